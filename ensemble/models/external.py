"""Members that were trained elsewhere: their scores of the held-out and of the test images, by id. No torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, DataError, join_limited
from ensemble.core.names import is_member_name
from ensemble.data.tables import read_table, require_unique

CLIP = 1e-6  # probabilities are clipped to [1e-6, 1 - 1e-6] before they become logits
COLUMNS = ("logit", "p", "target", "score")  # the first that a CSV has is read; all but logit are probabilities


@dataclass(frozen=True)
class External:
    """A name, and its logits float64 by id: of the held-out rows, and of the images that `infer` will be given."""

    name: str
    heldout: pd.Series
    test: pd.Series


def parse_external(text: str) -> tuple[str, Path, Path]:
    """(name, held-out CSV, test CSV) of NAME=heldout.csv,test.csv, or ValueError; paths may hold commas."""
    name, _, files = text.partition("=")
    if not is_member_name(name):
        raise ValueError(f"{name!r} cannot be a member's name; use letters, digits, - and _")
    pairs = [(Path(files[: comma.start()]), Path(files[comma.end() :])) for comma in re.finditer(",", files)]
    existing = [pair for pair in pairs if all(path.is_file() for path in pair)]
    if len(existing) != 1:
        raise ValueError(f"{files!r} are not two CSV files that exist; write NAME=heldout.csv,test.csv")
    return name, *existing[0]


def read_external_csv(name: str, heldout: Path, test: Path) -> External:
    """Read both CSVs; DataError for ids given twice and for scores that are no numbers."""
    return External(name, _read_scores(heldout), _read_scores(test))


def _read_scores(path: Path) -> pd.Series:
    table = read_table(path)
    column = next((name for name in COLUMNS if name in table), None)
    if "id" not in table or column is None:
        raise DataError(
            f"{path} needs the columns id and {' or '.join(COLUMNS)}; it has: {join_limited(table.columns)}"
        )
    require_unique(table["id"], path)
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=np.float64)
    sound = np.isfinite(values) if column == "logit" else (values >= 0) & (values <= 1)
    if not sound.all():
        valid = "a finite number" if column == "logit" else "a probability in 0..1"
        raise DataError(f"{path}: {column} is not {valid} for {join_limited(map(repr, table.loc[~sound, 'id']))}")
    if column != "logit":
        p = np.clip(values, CLIP, 1 - CLIP)
        values = np.log(p / (1 - p))
    return pd.Series(values, index=pd.Index(table["id"]))


def heldout_column(external: External, ids: Iterable[str]) -> np.ndarray:
    """Its held-out logits float64 [N] in the order of `ids`; ArtifactError unless the ids are just those."""
    keys, scored = list(ids), set(external.heldout.index)
    missing, extra = set(keys) - scored, scored - set(keys)
    if missing or extra:
        sides = ((missing, "missing"), (extra, "not held out"))
        texts = [f"{len(side)} {what} ({join_limited(map(repr, sorted(side)))})" for side, what in sides if side]
        raise ArtifactError(
            f"{external.name}: the ids of its held-out scores do not match the run's held-out rows: "
            f"{' and '.join(texts)}; score just the rows with split heldout of dataset.parquet"
        )
    return external.heldout.loc[keys].to_numpy(dtype=np.float64)


def is_external(folder: Path, name: str) -> bool:
    """Whether a run knows this member by its scores alone."""
    return artifacts.external_path(folder, name).is_file() and not artifacts.member_path(folder, name).is_dir()


def read_externals(folder: Path, names: Iterable[str]) -> tuple[External, ...]:
    """Those of a stacker's members that a run or a bundle knows by their scores alone."""
    return tuple(read_external(folder, name) for name in names if is_external(folder, name))


def write_external(run: Path, external: External) -> None:
    """Store the scores in the run."""
    parts = (("heldout", external.heldout), ("test", external.test))
    rows = [pd.DataFrame({"id": series.index, "part": part, "logit": series.to_numpy()}) for part, series in parts]
    artifacts.write_parquet(artifacts.external_path(run, external.name), pd.concat(rows))


def read_external(folder: Path, name: str) -> External:
    """The stored scores of a run or a bundle."""
    table = artifacts.read_parquet(artifacts.external_path(folder, name), "run stack again with --external")
    if lacking := sorted({"id", "part", "logit"} - set(table.columns)):
        raise ArtifactError(
            f"{artifacts.external_path(folder, name)} has no column {join_limited(lacking)}; run stack again "
            "with --external"
        )
    parts = (table[table["part"] == part].set_index("id")["logit"] for part in ("heldout", "test"))
    return External(name, *parts)


def test_column(external: External, ids: Iterable[str]) -> np.ndarray:
    """Its logits float64 [N] of images to score, by id; ArtifactError naming those without a score."""
    keys = list(ids)
    if missing := [key for key in keys if key not in external.test.index]:
        raise ArtifactError(
            f"{external.name} was trained elsewhere and has no score for {len(missing)} of {len(keys)} ids "
            f"({join_limited(map(repr, missing))}); give its scores of these images to stack --external"
        )
    return external.test.loc[keys].to_numpy(dtype=np.float64)
