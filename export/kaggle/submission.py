"""A competition's submission: scores, checked against its sample and in the sample's order and columns. No torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import DataError, join_limited
from ensemble.core.names import LABELS, NEGATIVE, NEGATIVE_NAMES, POSITIVE, POSITIVE_NAMES
from ensemble.data.tables import read_table
from export.inference.outputs import write_csv

LABELS_ONLY, PROBABILITIES = "labels", "probabilities"  # what a sample's values suggest that it accepts


@dataclass(frozen=True)
class SampleSubmission:
    """sample_submission.csv: its columns in order, which one is the id and which the target, and its ids.

    suggests: LABELS_ONLY where its values are all 0 or 1, PROBABILITIES where one lies between, "" otherwise.
    """

    path: Path
    columns: tuple[str, ...]
    id: str
    target: str
    ids: list[str]
    suggests: str


@dataclass(frozen=True)
class SubmissionOptions:
    """threshold: write labels by it; None for probabilities. positive: the class that the target column means."""

    threshold: float | None = None
    positive: str | None = None


def read_sample(path: Path) -> SampleSubmission:
    """Read the sample. DataError unless it has one column of unique ids and one of numbers."""
    frame = read_table(path)
    columns = [str(column) for column in frame.columns]
    if len(columns) != 2:
        raise DataError(f"{path} needs two columns, an id and the target; it has: {', '.join(columns)}")
    key = next((column for column in columns if column.casefold() == "id"), columns[0])
    (target,) = (column for column in columns if column != key)
    if repeated := frame.loc[frame[key].duplicated(), key].tolist():
        raise DataError(f"{path} has ids more than once: {join_limited(repeated)}; ask for another sample")
    values = frame.loc[frame[target].str.strip() != "", target]
    numbers = pd.to_numeric(values, errors="coerce")
    if len(words := values[numbers.isna()]):
        raise DataError(
            f"{path}: {target} holds {join_limited(words.unique())} in place of numbers; submit writes "
            "probabilities, or 0 and "
            "1 with --hard, so write this competition's file by yourself"
        )
    suggests = LABELS_ONLY if len(numbers) and numbers.isin([0, 1]).all() else ""
    suggests = PROBABILITIES if ((numbers > 0) & (numbers < 1)).any() else suggests
    return SampleSubmission(path, tuple(columns), key, target, frame[key].tolist(), suggests)


def read_scores(path: Path, sample: SampleSubmission) -> pd.DataFrame:
    """`id` (text) and `target` (float64) of each row of a file that `infer` wrote or that has the sample's columns.

    DataError for a target that is empty, not a number, or outside [0, 1], and for repeated ids.
    """
    if not path.is_file():
        raise DataError(f"no scores at {path}; make them first: python cli.py infer --onnx --output {path}")
    frame = artifacts.read_parquet(path, "run infer again") if path.suffix.lower() == ".parquet" else read_table(path)
    pairs = [(sample.id, sample.target), ("id", "target")]
    columns = next((pair for pair in pairs if set(pair) <= set(frame.columns)), None)
    if columns is None:
        raise DataError(
            f"{path} has the columns {', '.join(map(str, frame.columns))}; it needs id and target, as infer "
            f"writes them, or the sample's {' and '.join(pairs[0])}"
        )
    if frame[columns[0]].isna().any():  # null in Parquet; a CSV has an empty text
        raise DataError(f"{path} has rows without an id; give each one, as the sample has them")
    ids = frame[columns[0]].astype(str)
    if repeated := ids[ids.duplicated()].tolist():
        raise DataError(f"{path} has ids more than once: {join_limited(repeated)}; keep one row each")
    target = pd.to_numeric(frame[columns[1]], errors="coerce").astype(np.float64)
    if len(bad := ids[~target.between(0, 1)]):
        raise DataError(
            f"{path}: {columns[1]} is empty or outside [0, 1] for {len(bad)} ids: {join_limited(bad)}; where "
            "images could not be "
            "read, infer --fill 0.5 gives them a score"
        )
    return pd.DataFrame({"id": ids, "target": target})


def align_to_sample(scores: pd.DataFrame, sample: SampleSubmission, path: Path) -> tuple[np.ndarray, bool]:
    """float64 targets in the order of the sample's rows, and whether rows moved; DataError unless the ids are equal."""
    ours = scores["id"].tolist()
    missing, unknown = sorted(set(sample.ids) - set(ours)), sorted(set(ours) - set(sample.ids))
    if missing or unknown:
        parts = [f"it lacks {len(missing)}: {join_limited(missing)}"] if missing else []
        parts += [f"it has {len(unknown)} more: {join_limited(unknown)}"] if unknown else []
        raise DataError(
            f"{path} does not have the ids of {sample.path}: {'; '.join(parts)}{_mismatch_hint(ours, sample.ids)}"
        )
    moved = ours != sample.ids
    return scores.set_index("id")["target"].loc[sample.ids].to_numpy(), moved


def _mismatch_hint(ours: Iterable[str], theirs: Iterable[str]) -> str:
    normalisers = {
        "only the files' suffixes differ: run infer with a CSV of the sample's ids": lambda key: str(
            PurePosixPath(key).with_suffix("") if PurePosixPath(key).name else key
        ),
        "only leading zeros differ: keep ids as text": lambda key: key.lstrip("0"),
        "only spaces around them differ": str.strip,
        "only the folder differs: run infer with a CSV of the sample's ids": lambda key: PurePosixPath(key).name,
    }
    ours, theirs = set(ours), set(theirs)
    hints = (hint for hint, key in normalisers.items() if set(map(key, ours)) == set(map(key, theirs)))
    return next((f" ({hint})" for hint in hints), "")


def submission_values(
    targets: np.ndarray, sample: SampleSubmission, options: SubmissionOptions, path: Path
) -> np.ndarray:
    """The values to write: float64 probabilities, or int8 labels where a threshold is given.

    DataError where the scores or the sample suggest that the other is meant.
    """
    hard, single = options.threshold is not None, len(np.unique(targets)) == 1
    if single and len(targets) > 1:
        raise DataError(f"{path}: every target is {targets[0]:g}; such a submission ranks nothing, look at the scores")
    if hard and sample.suggests == PROBABILITIES:
        raise DataError(f"{sample.path} holds numbers between 0 and 1, so it takes probabilities: leave out --hard")
    if not hard and len(targets) > 1 and np.isin(targets, [0, 1]).all():
        raise DataError(
            f"{path}: every target is 0 or 1, as labels are; give infer's probabilities, or add --hard if the "
            "competition takes labels"
        )
    real = _positive_class(sample, options) == NEGATIVE
    if options.threshold is None:
        return 1 - targets if real else targets
    labels = (targets >= options.threshold).astype(np.int8)
    if len(labels) > 1 and len(np.unique(labels)) == 1:
        raise DataError(
            f"the threshold {options.threshold:g} calls all {len(labels)} images {LABELS[labels[0]]}; give another "
            f"with --threshold (the targets go from {targets.min():.3g} to {targets.max():.3g})"
        )
    return 1 - labels if real else labels


def _positive_class(sample: SampleSubmission, options: SubmissionOptions) -> str:
    """The class whose probability is written. DataError where the column's name seems to mean the other class."""
    if options.positive:
        return options.positive
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", sample.target)  # isReal
    words = set(re.split(r"[^a-z]+", spaced.casefold()))
    if words & NEGATIVE_NAMES and not words & POSITIVE_NAMES:
        raise DataError(
            f"{sample.path}: the column {sample.target} seems to mean that an image is real, while targets are of "
            f"AI-made; say which with --positive {NEGATIVE} or --positive {POSITIVE}"
        )
    return POSITIVE


def write_submission(output: Path, sample: SampleSubmission, values: np.ndarray) -> None:
    """The sample's columns and ids with `values`, atomically; numbers with nine digits, as infer writes them."""
    frame = pd.DataFrame({sample.id: pd.Series(sample.ids, dtype=object), sample.target: values})
    columns = list(sample.columns)
    returns = any("\r" in key for key in (*sample.ids, *columns))
    with artifacts.replacing(output) as temporary:
        write_csv(temporary, columns, [frame[columns]], returns)


def submission_record(sample: SampleSubmission, options: SubmissionOptions, moved: bool) -> dict[str, Any]:
    """What was done to the scores, for the provenance file, JSON-ready."""
    return {
        "sample": sample.path.name,
        "sample_sha256": artifacts.file_sha256(sample.path),
        "columns": list(sample.columns),
        "rows": len(sample.ids),
        "reordered": moved,
        "hard": options.threshold is not None,
        "threshold": options.threshold,
        "positive": _positive_class(sample, options),
    }
