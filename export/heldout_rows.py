"""What a bundle's cascade and frontier rest on: labels, groups, and logits by weights that never saw the group.

They travel in the bundle as heldout.parquet: no ids, no paths.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ensemble import artifacts
from ensemble.cascade_fit import Rows
from ensemble.errors import ArtifactError

FILE = "heldout.parquet"
REMEDY = "export again (python cli.py export; a bundle of classifiers from elsewhere with --member ... --stack-on DATA)"


def write_rows(folder: Path, names: Sequence[str], rows: Rows) -> None:
    """Write `label` 0 or 1, `group` as a code from 0, and `logit NAME` of each member of the stacker, float64."""
    columns = {f"logit {name}": column.astype(np.float64) for name, column in zip(names, rows.logits.T, strict=True)}
    codes = np.unique(rows.groups, return_inverse=True)[1].astype(np.int32)
    frame = pd.DataFrame({"label": rows.labels.astype(np.int8), "group": codes, **columns})
    artifacts.write_parquet(folder / FILE, frame)


def read_rows(folder: Path, names: Sequence[str], asking: str = "--cascade") -> Rows:
    """A bundle's rows, logits in the order of `names`; ArtifactError where there are none.

    It says how to get them, to what the user calls `asking`.
    """
    if not (folder / FILE).is_file():
        raise ArtifactError(f"{asking}: the bundle {folder} has no held-out logits to fit and report on; {REMEDY}")
    frame = artifacts.read_parquet(folder / FILE, REMEDY)
    logits = np.column_stack([frame[f"logit {name}"].to_numpy() for name in names])
    return Rows(logits, frame["label"].to_numpy(), frame["group"].to_numpy())
