"""Does selection pay? A recipe trained on what half of the test drew and on a random draw, scored on the other half."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ensemble.core import bootstrap, metrics
from ensemble.core.errors import DataError
from ensemble.core.log import Log
from ensemble.core.metrics import Interval
from ensemble.core.recipe import Recipe
from ensemble.data import dataset
from ensemble.data.sources import LabelledImage
from ensemble.data.splits import Fractions
from ensemble.images import near_duplicates
from ensemble.models.checkpoints import locate_checkpoint
from ensemble.models.features import Features
from ensemble.models.members import load_member
from ensemble.models.runner import score_images
from ensemble.models.torch_runner import torch_runner
from ensemble.selection import select
from ensemble.training.distributed import ProcessGroup
from ensemble.training.live_progress import LiveProgress
from ensemble.training.train_member import TrainContext, train_member

ARMS = ("selected", "random")
# the epoch is chosen on the tune part; the held-out part goes back to training, as half B is held out
FRACTIONS = Fractions(tune=0.15, heldout=0.15)


@dataclass(frozen=True)
class Material:
    """The pool, whose rows `allowed` bool [M] may be trained on, and the labelled test.

    items and test_items: the images of the rows of `pool` and `test`.
    """

    items: Sequence[LabelledImage]
    pool: Features
    allowed: np.ndarray
    test_items: Sequence[LabelledImage]
    test: Features

    @property
    def labels(self) -> np.ndarray:
        """int64 [M] of the pool."""
        return np.array([item.label for item in self.items], dtype=np.int64)


def test_groups(items: Sequence[LabelledImage], test: Features) -> list[int]:
    """For each test image a number of its group: the user's groups, joined by copies and near-duplicates."""
    pairs = near_duplicates.near_duplicates(test.hashes.tolist(), test.thumbs)
    first: dict[object, int] = {}
    for row, (item, pixels) in enumerate(zip(items, test.pixels, strict=True)):
        keys = [pixels.tobytes()] + ([item.group] if item.group is not None else [])
        pairs += [(first.setdefault(key, row), row) for key in keys]
    return near_duplicates.connected(len(items), pairs)


def halves(names: Sequence[int], labels: np.ndarray, seed: int) -> np.ndarray:
    """bool [T], half A of the test: whole groups, of about as many images as half B.

    Raises DataError where half B would lack a class.
    """
    _, codes = np.unique(np.asarray(names), return_inverse=True)
    sizes = np.bincount(codes)
    order = np.random.default_rng(seed).permutation(len(sizes))
    in_a = np.zeros(len(sizes), dtype=bool)
    held = [0, 0]
    for group in order:
        in_a[group] = held[0] <= held[1]
        held[0 if in_a[group] else 1] += int(sizes[group])
    first = in_a[codes]
    if set(labels[~first].tolist()) != {0, 1}:
        raise DataError(
            f"--ablate: the half of the test that is kept for scoring lacks a class ({len(sizes)} groups in all); "
            "give a larger labelled test, or another --seed"
        )
    return first


def ablate(
    recipe: Recipe,
    material: Material,
    counts: dict[int, int],
    seeds: int,
    seed: int,
    device: str,
    log: Log,
    clusters: int | None = None,
) -> dict[str, Any]:
    """Train both arms over `seeds` seeds and compare them on half B; a JSON-ready report.

    Each seed selects for half A, and draws at random, anew. Both draws have `counts` images
    of each class, none of them a near-duplicate of a test image of either half.
    """
    labels = np.array([item.label for item in material.test_items], dtype=np.int64)
    names = test_groups(material.test_items, material.test)
    in_a = halves(names, labels, seed)
    scored = [item.file for item, first in zip(material.test_items, in_a, strict=True) if not first]
    checkpoint = locate_checkpoint(recipe.backbone.checkpoint) if recipe.backbone.checkpoint is not None else None
    logits: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
    for number in range(seed, seed + seeds):
        vectors = material.test.vectors[in_a]
        chosen = select.select(material.pool, material.labels, material.allowed, vectors, counts, number, clusters).rows
        drawn = select.random_rows(material.pool, material.labels, material.allowed, counts, number)
        for arm, rows in zip(ARMS, (chosen, drawn), strict=True):
            log(f"seed {number}, trained on {len(rows)} {arm} images")
            logits[arm].append(_train_and_score(recipe, checkpoint, material, rows, scored, number, device, log))
    report = compare(labels[~in_a], np.asarray(names)[~in_a], *(np.stack(logits[arm]) for arm in ARMS))
    sizes = {"half_a": int(in_a.sum()), "half_b": len(scored), "half_b_groups": len(set(np.asarray(names)[~in_a]))}
    sizes |= {"images": sum(counts.values()), "ai": counts[1], "real": counts[0]}
    settings = {"recipe": recipe.name, "recipe_sha256": recipe.sha256, "seeds": seeds, "seed": seed, "device": device}
    return settings | sizes | report


def _train_and_score(
    recipe: Recipe,
    checkpoint: Path | None,
    material: Material,
    rows: np.ndarray,
    files: Sequence[Path],
    seed: int,
    device: str,
    log: Log,
) -> np.ndarray:
    """float64 [B]: logits of `files` by a member trained on pool rows, in a run that is thrown away."""
    items = [material.items[row] for row in rows]
    try:
        frame, _ = dataset.build_dataset(items, FRACTIONS, seed)
    except DataError as error:
        raise DataError(f"--ablate cannot train on {len(items)} images: {error}; or raise --count") from None
    frame = frame.assign(split=frame["split"].replace("heldout", "train"))
    with tempfile.TemporaryDirectory(prefix="manyeyes-") as folder:
        run = Path(folder)
        with LiveProgress([recipe.name], log) as board:
            board.member(recipe.name, device)
            train_member(recipe, checkpoint, frame, run, TrainContext(seed, ProcessGroup(device=device)), board)
        runner = torch_runner(recipe.name, load_member(run, recipe.name), torch.device(device))
        with tqdm(total=len(files), desc="  half B", unit="image", leave=False, disable=None) as bar:
            logits, errors = score_images(files, [runner], recipe.train.batch_size, progress=bar.update)
    if errors:
        raise FileNotFoundError(next(iter(errors.values())))
    return logits[:, 0].astype(np.float64)


def compare(labels: np.ndarray, names: np.ndarray, selected: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """Scores of both arms and their difference, JSON-ready, with 95 % intervals over groups.

    labels int [B], names [B] of groups, selected and drawn: logits float64 [S, B] over seeds.
    A score is the mean over the seeds. In the difference both arms are resampled together;
    its interval is of the test images drawn, the spread over seeds stands beside it.
    """
    report: dict[str, Any] = {}
    for name in ("auroc", "log_loss"):
        interval = partial(paired_interval, name, labels, groups=names)
        arms = {arm: interval(values, None).to_dict() for arm, values in zip(ARMS, (selected, drawn), strict=True)}
        each = [
            metrics.score(name, labels, a) - metrics.score(name, labels, b)
            for a, b in zip(metrics.sigmoid(selected), metrics.sigmoid(drawn), strict=True)
        ]
        report[name] = {**arms, "difference": interval(selected, drawn).to_dict(), "difference_by_seed": each}
    return report


def paired_interval(
    name: str, labels: np.ndarray, a: np.ndarray, b: np.ndarray | None, groups: np.ndarray, resamples: int = 1000
) -> Interval:
    """Mean over seeds of the named score of a minus that of b, of a's alone without b; with its interval over groups.

    a and b: logits float [S, N]; b has as many seeds; each draw resamples both alike.
    """
    p = metrics.sigmoid(a if b is None else np.concatenate([a, b]))
    share = np.repeat([1 / len(a), -1 / len(a)], len(a))[: len(p)]
    value = share @ [metrics.score(name, labels, column) for column in p]
    drawn = bootstrap.draws(labels, p, groups, (name,), resamples=resamples)[name]
    return bootstrap.interval(float(value), share @ drawn)


def as_table(report: dict[str, Any]) -> pd.DataFrame:
    """The report's intervals, a row an arm and one for the difference."""
    rows = []
    for arm in (*ARMS, "difference"):
        row = {"": arm}
        for name, title in (("auroc", "AUROC"), ("log_loss", "log-loss")):
            ends = {key: float("nan") if end is None else end for key, end in report[name][arm].items()}
            row[title] = str(Interval(**ends))
        rows.append(row)
    return pd.DataFrame(rows)


def verdict(report: dict[str, Any]) -> str:
    """One line: does the interval of the AUROC's difference leave zero out?"""
    ends = report["auroc"]["difference"]
    if ends["low"] is None or ends["low"] <= 0 <= ends["high"]:
        return "No difference in AUROC is shown: its interval holds zero."
    better, worse = ARMS if ends["low"] > 0 else ARMS[::-1]
    return f"Training on the {better} images is better than on the {worse} ones, by AUROC."
