"""A competition's submission: scores, checked against its sample and in the sample's order and columns. No torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, DataError, join_limited
from ensemble.core.metrics import Interval
from ensemble.core.names import LABELS, NEGATIVE, NEGATIVE_NAMES, POSITIVE, POSITIVE_NAMES
from ensemble.data.tables import read_table
from ensemble.stacking.stacker import Stacker, read_stacker_values
from export.bundle import bundle, operating_point
from export.inference import provenance
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
class SubmittedStack:
    """The stack that made the scores: its file, its threshold, and its held-out AUROC, None where none is known."""

    path: Path
    threshold: float
    auroc: Interval | None


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
    targets: np.ndarray, sample: SampleSubmission, threshold: float | None, positive: str | None, path: Path
) -> np.ndarray:
    """The values to write: float64 probabilities, or int8 labels where a threshold is given.

    positive: the class that the target column means; None where its name says so. DataError where the scores or the
    sample suggest that the other is meant.
    """
    hard, single = threshold is not None, len(np.unique(targets)) == 1
    if single and len(targets) > 1:
        raise DataError(f"{path}: every target is {targets[0]:g}; such a submission ranks nothing, look at the scores")
    if hard and sample.suggests == PROBABILITIES:
        raise DataError(f"{sample.path} holds numbers between 0 and 1, so it takes probabilities: leave out --hard")
    if not hard and len(targets) > 1 and np.isin(targets, [0, 1]).all():
        raise DataError(
            f"{path}: every target is 0 or 1, as labels are; give infer's probabilities, or add --hard if the "
            "competition takes labels"
        )
    real = _positive_class(sample, positive) == NEGATIVE
    if threshold is None:
        return 1 - targets if real else targets
    labels = (targets >= threshold).astype(np.int8)
    if len(labels) > 1 and len(np.unique(labels)) == 1:
        raise DataError(
            f"the threshold {threshold:g} calls all {len(labels)} images {LABELS[labels[0]]}; give another "
            f"with --threshold (the targets go from {targets.min():.3g} to {targets.max():.3g})"
        )
    return 1 - labels if real else labels


def _positive_class(sample: SampleSubmission, positive: str | None) -> str:
    """The class whose probability is written. DataError where the column's name seems to mean the other class."""
    if positive:
        return positive
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


def submission_record(
    sample: SampleSubmission, threshold: float | None, positive: str | None, moved: bool
) -> dict[str, Any]:
    """What was done to the scores, for the provenance file, JSON-ready."""
    return {
        "sample": sample.path.name,
        "sample_sha256": artifacts.file_sha256(sample.path),
        "columns": list(sample.columns),
        "rows": len(sample.ids),
        "reordered": moved,
        "hard": threshold is not None,
        "threshold": threshold,
        "positive": _positive_class(sample, positive),
    }


def check_paths(scores: Path, sample: Path, output: Path, changes: bool) -> None:
    """ArtifactError for an output that is no CSV, would replace the sample, or the scores by something else."""
    if output.suffix.lower() != ".csv":
        raise ArtifactError(f"cannot write {output}; a submission's name ends in .csv")
    provenance_file = provenance.provenance_path(output)
    if provenance_file.is_dir():
        raise ArtifactError(f"{provenance_file} is a folder, and says what made {output}; choose another --output")
    for path, what in ((sample, "the sample"), (scores, "the scores")):
        if provenance_file.exists() and path.exists() and provenance_file.samefile(path):
            raise ArtifactError(f"{provenance_file} has {what} and would be overwritten; choose another --output")
    if output.exists() and sample.exists() and output.samefile(sample):
        raise ArtifactError(f"{output} is the sample and would be overwritten; choose another --output")
    if changes and output.exists() and scores.exists() and output.samefile(scores):
        raise ArtifactError(
            f"{output} has the scores, which would be lost; choose another --output, or let infer write scores.csv"
        )


def read_stack(location: Path, required: bool, made_by: dict[str, Any] | None) -> SubmittedStack | None:
    """Threshold and held-out AUROC of the stack in a run or bundle; None where there is none, unless it is required.

    None too where a single classifier made the scores. ArtifactError where another stack did.
    """
    path = artifacts.stacker_path(location)
    single = made_by is not None and made_by["source"] == provenance.MODEL
    if not required and (single or not path.is_file()):
        return None
    if single:
        raise ArtifactError(f"these scores were made by infer --model, not by {path}; leave out --run and --bundle")
    values = read_stacker_values(path, "name the run or bundle that made the scores with --run or --bundle")
    stacker = Stacker.from_dict(values)
    if made_by and made_by["stack"] != provenance.stacker_sha256(stacker, bool(made_by["options"]["adapted"])):
        chosen = _operating_point_stacker(location, path)
        if chosen is None or made_by["stack"] != provenance.stacker_sha256(chosen, False):
            raise ArtifactError(
                f"these scores were made by another stack than {path}; run infer again, or name theirs with --run or "
                "--bundle"
            )
        return SubmittedStack(path, chosen.threshold, None)
    return SubmittedStack(path, stacker.threshold, _heldout_auroc(values, path))


def _heldout_auroc(values: dict[str, Any], path: Path) -> Interval | None:
    """What stacker.json says of its stack's held-out images; None where it says nothing."""
    try:
        auroc = ((values.get("scores") or {}).get("stack") or {}).get("auroc")
        if auroc is None:
            return None
        ends = [auroc[key] for key in ("value", "low", "high")]
        if all(end is None or 0 <= end <= 1 for end in ends):
            return Interval(*(float("nan") if end is None else end for end in ends))
    except (AttributeError, KeyError, TypeError):
        pass
    raise ArtifactError(f"{path} is damaged (its scores); run stack again")


def _operating_point_stacker(location: Path, path: Path) -> Stacker | None:
    """The stack of the members that frontier chose in a bundle of this stack; None where it chose none."""
    folder = location if (location / "bundle.json").is_file() else artifacts.bundle_path(location)
    if not (folder / bundle.POINT_FILE).is_file():
        return None
    values = bundle.read_contents(folder)
    if values["files"]["stacker.json"] != artifacts.file_sha256(path):
        return None
    point = operating_point.read(folder, values)
    return point.stacker if point else None


def notes(
    stack: SubmittedStack | None,
    made_by: dict[str, Any] | None,
    moved: bool,
    sample: SampleSubmission,
    hard: bool,
    scores: Path,
) -> list[str]:
    """What a competitor should know; ArtifactError where the held-out scores say that the stack is reversed."""
    lines = []
    if made_by and made_by["source"] == provenance.MODEL:
        lines.append("No held-out scores of a single classifier: a reversed one would not be noticed.")
    elif stack is None or stack.auroc is None:
        lines.append("No held-out scores of the stack here (--run or --bundle): a reversed one would not be noticed.")
    else:
        auroc = stack.auroc
        if auroc.high < 0.5:
            raise ArtifactError(
                f"the stack ranks its held-out images backwards (AUROC {auroc}, {stack.path}): ai and real are "
                "probably swapped in the training labels; set --classes, train and stack again"
            )
        doubt = ": perhaps no better than chance" if auroc.low <= 0.5 else ""
        lines.append(f"AUROC of the stack on held-out images: {auroc}{doubt}.")
    if made_by is None:
        lines.append(f"Nothing beside {scores} says what made it; its fingerprint will not either.")
    elif made_by["images"]["failed"]:
        lines.append(f"{made_by['images']['failed']} images could not be read and have the score of --fill.")
    if moved:
        lines.append("Rows were put into the sample's order.")
    if sample.suggests == LABELS_ONLY and not hard:
        lines.append("The sample holds only 0 and 1: if labels are scored (accuracy, F1), add --hard.")
    return lines
