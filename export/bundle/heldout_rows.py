"""Held-out logits in a bundle (heldout.parquet), by which cascade and frontier are fitted and scored.

Labels, groups, and each member's logits by weights that never saw the group. No ids, no paths.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, join_limited
from ensemble.stacking.logit_table import LabelledLogits

HELDOUT_FILE = "heldout.parquet"
REMEDY = "export again (python cli.py export; a bundle of classifiers from elsewhere with --member ... --stack-on DATA)"


def write_rows(folder: Path, rows: LabelledLogits) -> None:
    """Write `label` 0 or 1, `group` as a code from 0, and `logit NAME` of each member, float64."""
    columns = {
        f"logit {name}": column.astype(np.float64) for name, column in zip(rows.members, rows.logits.T, strict=True)
    }
    codes = np.unique(rows.groups, return_inverse=True)[1].astype(np.int32)
    frame = pd.DataFrame({"label": rows.labels.astype(np.int8), "group": codes, **columns})
    artifacts.write_parquet(folder / HELDOUT_FILE, frame)


def read_rows(folder: Path, names: Sequence[str], asking: str = "--cascade") -> LabelledLogits:
    """A bundle's rows, logits in the order of `names`; ArtifactError where there are none, or none of sense.

    asking: the option or command that needs them, named in the error.
    """
    if not (folder / HELDOUT_FILE).is_file():
        raise ArtifactError(f"{asking}: the bundle {folder} has no held-out logits to fit and report on; {REMEDY}")
    frame = artifacts.read_parquet(folder / HELDOUT_FILE, REMEDY)
    columns = [f"logit {name}" for name in names]
    if error := _format_error(frame, columns):
        raise ArtifactError(f"{asking}: {folder / HELDOUT_FILE} {error}; {REMEDY}")
    labels, groups = (frame[name].to_numpy(np.int64) for name in ("label", "group"))
    return LabelledLogits(tuple(names), frame[columns].to_numpy(np.float64), labels, groups)


def _format_error(frame: pd.DataFrame, columns: Sequence[str]) -> str:
    """What is wrong with a file that `write_rows` did not write, as text; "" if nothing is."""
    kinds = {"label": "iu", "group": "iu", **dict.fromkeys(columns, "iuf")}
    if missing := [name for name in kinds if list(frame.columns).count(name) != 1]:
        return f"has no column {join_limited(missing)}, or more than one"
    if not_numeric := [name for name, kind in kinds.items() if frame[name].dtype.kind not in kind]:
        return f"has values that are no numbers in {join_limited(not_numeric)}"
    if not_finite := [
        name for name in kinds if not np.isfinite(frame[name].to_numpy(np.float64, na_value=np.nan)).all()
    ]:
        return f"has values that are not finite in {join_limited(not_finite)}"
    return "" if frame["label"].isin([0, 1]).all() else "has labels other than 0 and 1"
