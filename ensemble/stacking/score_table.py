"""Read a table of members' scores, such as those of detectors that a team pays for: CSV or Parquet, a row an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ensemble.core.errors import DataError, join_limited
from ensemble.core.names import is_member_name
from ensemble.data.sources import ReadOptions, read_labels
from ensemble.data.tables import read_table
from ensemble.models.external import CLIP
from ensemble.stacking.logit_table import LabelledLogits
from ensemble.stacking.stacker import INPUTS

DESCRIBING = ("id", "label", "group", "generator", "source")  # columns that are never members
NO_ANSWER = ("", "na", "nan", "null", "none")  # cells, in any case, that are no score
MIN_ROWS = 20  # to fit a stacker on
PROBABILITY = INPUTS[1]


@dataclass(frozen=True)
class ScoreTable:
    """Members' scores of images.

    ids: str [N]. members: column names. logits: float64 [N, members], NaN where a member gave no answer. described: the
    columns of DESCRIBING that the table has, as text. notes: lines on how it was read.
    """

    ids: np.ndarray
    members: tuple[str, ...]
    logits: np.ndarray
    described: pd.DataFrame
    notes: tuple[str, ...]


def read_score_table(path: Path, members: Sequence[str] = (), inputs: str = PROBABILITY) -> ScoreTable:
    """The columns of these members, by default every column of numbers but those of DESCRIBING.

    inputs: whether they are probabilities, clipped to [1e-6, 1 - 1e-6] and taken to logits, or logits. Without a
    column id, ids are the numbers of the rows from 0. DataError for ids given twice, infinities and probabilities
    outside 0..1.
    """
    table = _read(path)
    ids = table["id"] if "id" in table else pd.Series(np.arange(len(table)).astype(str))
    if repeated := sorted(set(ids[ids.duplicated()])):
        raise DataError(f"{path}: ids given more than once: {join_limited(map(repr, repeated))}")
    if absent := [name for name in members if name not in table or name in DESCRIBING]:
        raise DataError(f"{path} has no scores of {join_limited(absent)}; its columns: {join_limited(table.columns)}")
    candidates = members or [str(name) for name in table if name not in DESCRIBING]
    columns = {str(name): _numbers(table[name]) for name in candidates}
    texts = [name for name, values in columns.items() if values is None]
    if members and texts:
        raise DataError(f"{path}: {join_limited(texts)} holds text or nothing, not numbers")
    scores = {name: values for name, values in columns.items() if values is not None}
    if not scores:
        raise DataError(f"{path} has no column of scores; its columns: {join_limited(table.columns)}")
    if odd := [name for name in scores if not is_member_name(name)]:
        raise DataError(f"{path}: columns that cannot be members' names: {join_limited(map(repr, odd))}; rename them")
    values = np.column_stack(list(scores.values()))
    _check(path, values, list(scores), ids.to_numpy(), inputs)
    if inputs == PROBABILITY:
        p = np.clip(values, CLIP, 1 - CLIP)
        values = np.log(p) - np.log1p(-p)
    notes = [f"Not members, since they are not numbers: {join_limited(texts, 5)}."] if texts else []
    described = table[[name for name in DESCRIBING if name in table]]
    return ScoreTable(ids.to_numpy(dtype=str), tuple(scores), values, described, tuple(notes))


def labelled_scores(table: ScoreTable, path: Path) -> tuple[LabelledLogits, pd.DataFrame, list[str]]:
    """Rows to fit a stacker on, their DESCRIBING columns with `id`, and lines on what was left out.

    Rows without any score are left out. DataError without labels, for one class, and for fewer than MIN_ROWS rows.
    """
    if "label" not in table.described:
        raise DataError(
            f"{path} has no column label (1 = ai, 0 = real, or class names); to score it, give --apply stacker.json"
        )
    labels, notes = read_labels(table.described["label"], path, ReadOptions())
    answered = ~np.isnan(table.logits).all(axis=1)
    if lost := int((~answered).sum()):
        notes = [*notes, f"{lost} rows have no score by any member and are left out."]
    if answered.sum() < MIN_ROWS:
        raise DataError(f"{path} has {answered.sum()} rows with scores; a stacker needs {MIN_ROWS} or more")
    groups = table.described["group"].to_numpy(dtype=str) if "group" in table.described else table.ids
    rows = LabelledLogits(table.members, table.logits, np.array(labels), groups)
    described = table.described.assign(id=table.ids)[answered]
    rows = rows.subset(answered)
    return rows, described, [*notes, *describe_answers(rows.members, rows.logits)]


def describe_answers(members: Sequence[str], logits: np.ndarray, constant: bool = True) -> list[str]:
    """Lines on members that gave no answer on some rows, and on those whose score is the same for all (`constant`)."""
    lines = []
    for name, column in zip(members, logits.T, strict=True):
        known = column[~np.isnan(column)]
        if missing := len(column) - len(known):
            lines.append(
                f"{name}: no answer on {missing} of {len(column)} rows; its mean calibrated probability is used there."
            )
        if constant and len(known) and known.min() == known.max():
            lines.append(f"{name}: the same score for all rows, so it does not count.")
    return lines


def _read(path: Path) -> pd.DataFrame:
    """Columns of DESCRIBING as text; those of a Parquet file that hold numbers as they are, all others as text."""
    if path.suffix.lower() != ".parquet":
        return read_table(path)
    table = read_table(path, DESCRIBING)
    rest = [name for name in pq.read_schema(path).names if name not in DESCRIBING]
    return pd.concat([table, pd.read_parquet(path, columns=rest)], axis=1)


def _numbers(column: pd.Series) -> np.ndarray | None:
    """A column as float64 [N], NaN where there is no answer; None if some other cell is no number, or every cell."""
    if pd.api.types.is_numeric_dtype(column):
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return None if np.isnan(values).all() else values
    column = column.astype(str)
    known = ~column.str.strip().str.lower().isin(NO_ANSWER)
    values = pd.to_numeric(column.where(known), errors="coerce").to_numpy(dtype=np.float64)
    return values if known.any() and not np.isnan(values[known]).any() else None


def _check(path: Path, values: np.ndarray, names: Sequence[str], ids: np.ndarray, inputs: str) -> None:
    """DataError for infinities, and for probabilities outside 0..1."""
    checks = [(np.isinf(values), "is infinite; leave such a cell empty")]
    if inputs == PROBABILITY:
        outside = "is no probability in 0..1; add --logits for logits, or name the members with --members"
        checks.append(((values < 0) | (values > 1), outside))
    for wrong, problem in checks:
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            count = int(wrong.any(axis=1).sum())
            raise DataError(
                f"{path}: {names[column]} of id {str(ids[row])!r} is {values[row, column]:g}"
                f"{f', and so on in {count} rows' if count > 1 else ''}; it {problem}"
            )
