"""Evaluation of a model on labelled images, undamaged and under corruptions: the table of logits, and its scores.

An interrupted evaluation resumes: logits of unchanged images by unchanged members are read from finished parts.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from PIL.Image import Image

from ensemble.core import artifacts
from ensemble.core.bootstrap import percentile_interval, score_intervals
from ensemble.core.errors import ArtifactError, ImageError, join_limited
from ensemble.core.metrics import SCORES, Interval, sigmoid
from ensemble.core.parallel import ordered_map
from ensemble.data.sources import LabelledImage
from ensemble.images import decode
from ensemble.images.robustness import GRID_VERSION, Change
from ensemble.stacking.stacker import Stacker

LOGIT_PREFIX = "logit:"  # of the members' columns
CLEAN = "clean"
SAVE_SECONDS = 10.0
MAX_BATCH_PIXELS = 50_000_000  # of the images that wait to be scored together
TARGET_QUANTILES = (0.05, 0.5, 0.95, 0.99)
TITLES = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy_real": "accuracy on real",
    "accuracy_ai": "accuracy on ai",
}

ScoreImages = Callable[[Sequence[Image]], np.ndarray]  # decoded images -> the members' logits [N, members]


@dataclass(frozen=True)
class PartScores:
    """The scores of one part; NaN where it lacks a class.

    real and ai: how many images they are of. groups: that its own images form; an interval
    over a handful of groups says little.
    """

    name: str
    real: int
    ai: int
    groups: int
    scores: dict[str, Interval]

    def to_dict(self) -> dict[str, object]:
        """JSON-ready values: null for NaN."""
        return vars(self) | {"scores": {name: score.to_dict() for name, score in self.scores.items()}}


def score_parts(
    frame: pd.DataFrame, column: str, threshold: float = 0.5, resamples: int = 2000, seed: int = 0
) -> list[PartScores]:
    """The scores of each value of `column`, in the order in which they first come.

    frame: a row an image, with label, group, logit and `column`. A generator's ai images are
    scored against all reals, since reals have no generator; a source and a cell by their own
    rows. The threshold is on p.
    """
    labels, values = frame["label"].to_numpy(), np.where(frame[column].isna(), "", frame[column].astype(str))
    p, groups = sigmoid(frame["logit"].to_numpy()), frame["group"].to_numpy(dtype=str)
    shared = (labels == 0) & (column == "generator")
    parts = []
    for name in pd.unique(values[~shared]):
        own = (values == name) & ~shared
        rows = own | shared
        scores = score_intervals(labels[rows], p[rows], groups[rows], threshold, resamples, seed, tuple(TITLES))
        real, ai = np.bincount(labels[rows], minlength=2).tolist()
        parts.append(PartScores(name or "not named", real, ai, len(set(groups[own])), scores))
    return parts


@dataclass(frozen=True)
class EvaluatedModel:
    """What is scored. identity: a hash of all that decides the members' logits; the stacker does not enter."""

    score: ScoreImages
    stacker: Stacker
    identity: str
    batch: int = 16


def score_corruptions(
    items: Sequence[LabelledImage],
    sha256s: Sequence[str],
    cells: Mapping[str, Change],
    model: EvaluatedModel,
    folder: Path,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """One row an image and cell, image by image, and why images could not be scored, by id.

    Each image is decoded once. An image that cannot be read, or not in one of the cells, is in none, so
    that all cells are of the same images. Finished parts are stored in `folder`; `progress` is called with
    the number of damaged images done.
    """
    key = evaluation_key(items, sha256s, model)
    names = model.stacker.members
    parts = [read_finished(folder, key, names)]
    todo = remaining_cells(items, cells, parts[0])
    progress(len(items) * len(cells) - sum(len(left) for _, left in todo))
    errors: dict[str, str] = {}
    rows: list[tuple[str, str, np.ndarray]] = []

    def save() -> None:
        if rows:
            parts.append(_frame([row[:2] for row in rows], np.stack([row[2] for row in rows]), names))
            finished = parts_path(folder)
            number = len(list(finished.glob("*.parquet")))
            artifacts.write_parquet(finished / f"{number:06d}.parquet", parts[-1])
            artifacts.write_json(finished / "key.json", {"key": key})
            rows.clear()

    saved = perf_counter()
    try:
        for row in _scored(todo, cells, model, errors, progress):
            rows.append(row)
            if perf_counter() - saved > SAVE_SECONDS:
                save()
                saved = perf_counter()
    finally:
        save()
    known = pd.concat(parts, ignore_index=True)
    return build_score_table(items, list(cells), known, model.stacker, set(errors)), errors


def remaining_cells(
    items: Sequence[LabelledImage], cells: Collection[str], known: pd.DataFrame
) -> list[tuple[LabelledImage, list[str]]]:
    """The images that are not in all of these cells yet, each with the cells it lacks. known: from `read_finished`."""
    done = set(known[["id", "cell"]].itertuples(index=False, name=None))
    todo = [(item, [cell for cell in cells if (item.id, cell) not in done]) for item in items]
    return [(item, left) for item, left in todo if left]


def seconds_per_image(items: Sequence[LabelledImage], model: EvaluatedModel, count: int = 4) -> float | None:
    """What scoring one image takes, from the first few scored twice; None where they cannot be."""
    pictures = []
    for item in items[:count]:
        with suppress(ImageError):
            pictures.append(decode.decode(item.file))
    if not pictures:
        return None
    try:
        model.score(pictures)  # warms up
        start = perf_counter()
        model.score(pictures)
    except ImageError:
        return None
    return (perf_counter() - start) / len(pictures)


def evaluation_key(items: Sequence[LabelledImage], sha256s: Sequence[str], model: EvaluatedModel) -> str:
    """Hash of what decides the members' logits of a row: the files by their ids, the members, the cells' code."""
    rows = sorted((item.id, digest) for item, digest in zip(items, sha256s, strict=True))
    return artifacts.json_sha256([rows, model.identity, list(model.stacker.members), GRID_VERSION])


def _scored(
    todo: Sequence[tuple[LabelledImage, list[str]]],
    cells: Mapping[str, Change],
    model: EvaluatedModel,
    errors: dict[str, str],
    progress: Callable[[int], object],
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(id, cell, member logits) of each image and cell; images that fail are named in `errors`."""

    def tasks() -> Iterator[tuple[str, str, Image]]:
        for item, left in todo:
            try:
                image = decode.decode(item.file)
            except ImageError as error:
                errors[item.id] = str(error)
                progress(len(left))
                continue
            yield from ((item.id, cell, image) for cell in left)

    batch: list[tuple[str, str, Image]] = []
    for key, cell, image in ordered_map(lambda task: (*task[:2], cells[task[1]](task[2])), tasks(), ahead=model.batch):
        batch.append((key, cell, image))
        if len(batch) == model.batch or sum(waiting.width * waiting.height for *_, waiting in batch) > MAX_BATCH_PIXELS:
            yield from _run(batch, model, errors)
            progress(len(batch))
            batch = []
    if batch:
        yield from _run(batch, model, errors)
        progress(len(batch))


def _run(
    batch: Sequence[tuple[str, str, Image]], model: EvaluatedModel, errors: dict[str, str]
) -> Iterator[tuple[str, str, np.ndarray]]:
    try:
        logits = model.score([image for *_, image in batch])
    except ImageError as error:
        if len(batch) > 1:  # it does not say which
            for one in batch:
                yield from _run([one], model, errors)
            return
        errors[batch[0][0]] = f"{batch[0][1]}: {error}"
        return
    if not np.isfinite(logits).all():
        lost = join_limited(
            sorted({key for (key, *_), row in zip(batch, logits, strict=True) if not np.isfinite(row).all()})
        )
        raise ArtifactError(f"a member gave no finite logit for images it could read ({lost}); train it again")
    for (key, cell, _), row in zip(batch, logits, strict=True):
        yield key, cell, row


def _frame(keys: Sequence[tuple[str, str]], logits: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    columns = {LOGIT_PREFIX + name: logits[:, column].astype(np.float32) for column, name in enumerate(names)}
    ids, cells = zip(*keys, strict=True) if keys else ((), ())
    return pd.DataFrame({"id": pd.Series(ids, dtype=object), "cell": pd.Series(cells, dtype=object), **columns})


def parts_path(folder: Path) -> Path:
    """The folder of the finished parts of an evaluation in progress."""
    return folder / "parts"


def read_finished(folder: Path, key: str, names: Sequence[str]) -> pd.DataFrame:
    """The rows scored already under this key, by a finished evaluation and by an interrupted one."""
    columns = ["id", "cell", *(LOGIT_PREFIX + name for name in names)]
    frames = [_frame([], np.empty((0, len(names))), names)]
    parts = parts_path(folder)
    if _key(folder / "evaluation.json") == key:
        frames.append(artifacts.read_parquet(folder / "scores.parquet", "remove it and run evaluate again")[columns])
    if _key(parts / "key.json") == key:
        frames += [artifacts.read_parquet(path, f"remove {parts}")[columns] for path in sorted(parts.glob("*.parquet"))]
    else:
        shutil.rmtree(parts, ignore_errors=True)
    return pd.concat(frames, ignore_index=True).drop_duplicates(["id", "cell"])


def _key(path: Path) -> str | None:
    try:
        return str(artifacts.read_json(path, "run evaluate")["key"])
    except (ArtifactError, KeyError):
        return None


def build_score_table(
    items: Sequence[LabelledImage], cells: Sequence[str], known: pd.DataFrame, stacker: Stacker, left_out: set[str]
) -> pd.DataFrame:
    """The rows of scores.parquet: each image that was scored in every cell, with the stack's logit of it.

    Cells that an earlier evaluation has finished stay, after those asked for now. An image without a
    group is a group of its own.
    """
    described = pd.DataFrame(
        {
            "id": pd.Series([item.id for item in items], dtype=object),
            "path": [item.path for item in items],
            "root": [item.root for item in items],
            "label": np.array([item.label for item in items], dtype=np.int8),
            "group": [item.group or item.id for item in items],
            "source": [item.source for item in items],
            "generator": [item.generator for item in items],
        }
    )
    described = described[~described["id"].isin(left_out)]
    known = known[known["id"].isin(set(described["id"]))]
    counts = known["cell"].value_counts()
    finished = [name for name in known["cell"].unique() if counts[name] == len(described)]
    pairs = described.merge(pd.DataFrame({"cell": list(dict.fromkeys([*cells, *finished]))}), "cross")
    frame = pairs.merge(known, on=["id", "cell"], how="left", validate="one_to_one")
    columns = [LOGIT_PREFIX + name for name in stacker.members]
    frame.insert(len(pairs.columns), "logit", stacker.logit(frame[columns].to_numpy()))
    return frame


def summarize(frame: pd.DataFrame, threshold: float, seed: int, stress: bool) -> dict[str, Any]:
    """The scores of evaluation.json from the rows of scores.parquet.

    cells: every score of the undamaged images, some of the damaged, by name, each with its 95 % interval.
    worst: the cell with the lowest AUROC, or, under `stress`, most often on the wrong side.
    by_generator, by_source: the parts of the undamaged images.
    """
    clean = frame[frame["cell"] == CLEAN]
    present = sorted(set(clean["label"]))
    one_sided = ("accuracy_real",) if present == [0] else ("accuracy_ai",)
    cells: dict[str, dict[str, Interval]] = {}
    for name, rows in frame.groupby("cell", sort=False):
        names = one_sided if stress else SCORES if name == CLEAN else tuple(TITLES)
        labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy(dtype=str)
        cells[str(name)] = score_intervals(
            labels, sigmoid(rows["logit"].to_numpy()), groups, threshold, seed=seed, names=names
        )
    deciding = one_sided[0] if stress else "auroc"
    worst = min(cells, key=lambda name: cells[name][deciding].value)
    return {
        "cells": {name: _dicts(scores) for name, scores in cells.items()},
        "worst": {"cell": worst, "score": deciding, **cells[worst][deciding].to_dict()},
        "by_generator": [part.to_dict() for part in _parts(clean, "generator", threshold, seed)],
        "by_source": [part.to_dict() for part in _parts(clean, "source", threshold, seed)],
        "target_quantiles": _dicts(target_quantiles(clean, seed)) if stress else None,
    }


def _dicts(scores: dict[str, Interval]) -> dict[str, dict[str, float | None]]:
    return {name: score.to_dict() for name, score in scores.items()}


def _parts(clean: pd.DataFrame, column: str, threshold: float, seed: int) -> list[PartScores]:
    """Scores part by part, where the images have such parts at all."""
    named = clean.loc[clean["label"] == 1, column] if column == "generator" else clean[column]
    return score_parts(clean, column, threshold, seed=seed) if named.notna().any() else []


def target_quantiles(clean: pd.DataFrame, seed: int, resamples: int = 1000) -> dict[str, Interval]:
    """Quantiles of the target, each with its 95 % interval by drawing whole groups."""
    target = sigmoid(clean["logit"].to_numpy())
    _, codes = np.unique(clean["group"].to_numpy(dtype=str), return_inverse=True)
    rows = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    rng = np.random.default_rng(seed)
    drawn = [
        np.quantile(
            target[np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])], TARGET_QUANTILES
        )
        for _ in range(resamples if len(rows) > 1 else 0)
    ]
    table = np.array(drawn).reshape(-1, len(TARGET_QUANTILES))
    values = np.quantile(target, TARGET_QUANTILES)
    return {f"{q:g}": percentile_interval(float(values[i]), table[:, i]) for i, q in enumerate(TARGET_QUANTILES)}


def write_evaluation(folder: Path, frame: pd.DataFrame, record: dict[str, Any]) -> None:
    """Write scores.parquet, then evaluation.json, and remove the finished parts."""
    (folder / "evaluation.json").unlink(missing_ok=True)
    artifacts.write_parquet(folder / "scores.parquet", frame)
    artifacts.write_json(folder / "evaluation.json", record)
    shutil.rmtree(parts_path(folder), ignore_errors=True)
