"""Does selection help? Compare training on selected images with training on random images.

Images are selected for half A of the test; members trained on either choice are scored on half B.
"""

import tempfile
from collections.abc import Sequence
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
from ensemble.data.splits import Fractions
from ensemble.images import near_duplicates
from ensemble.models.members import load_member
from ensemble.models.runner import score_images
from ensemble.models.torch_runner import choose_device, torch_runner
from ensemble.selection import select
from ensemble.selection.data import SelectionData, SelectOptions
from ensemble.training.distributed import ProcessGroup
from ensemble.training.progress import LiveProgress
from ensemble.training.train_all import recipe_checkpoint
from ensemble.training.train_member import TrainContext, train_member

ARMS = ("selected", "random")
# the tune part chooses the epoch; the held-out part is given back to training, since half B is held out
FRACTIONS = Fractions(tune=0.15, heldout=0.15)


def split_halves(groups: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """bool [T], half A of the test: whole groups, and about half of the images.

    Raises DataError where half B would lack a class.
    """
    _, codes = np.unique(groups, return_inverse=True)
    sizes = np.bincount(codes)
    order = np.random.default_rng(seed).permutation(len(sizes))
    group_in_a = np.zeros(len(sizes), dtype=bool)
    images = [0, 0]  # in halves A and B
    for group in order:
        group_in_a[group] = images[0] <= images[1]
        images[0 if group_in_a[group] else 1] += int(sizes[group])
    in_a = group_in_a[codes]
    if set(labels[~in_a].tolist()) != {0, 1}:
        raise DataError(
            f"--ablate: the half of the test that is kept for scoring lacks a class ({len(sizes)} groups in all); "
            "give a larger labelled test, or another --seed"
        )
    return in_a


def ablate(data: SelectionData, counts: dict[int, int], options: SelectOptions, log: Log) -> dict[str, Any]:
    """Train both arms for each seed and compare them on half B of the test; returns a JSON-ready report.

    Each seed makes a new selection for half A and a new random choice. Both have `counts` images
    of each class, none of them a near-duplicate of a test image of either half.
    """
    recipe, device = options.load_recipe(), choose_device(options.device)
    labels = np.array([item.label for item in data.test_items], dtype=np.int64)
    # the user's groups, merged where they share near-duplicates
    pairs = near_duplicates.near_duplicates(data.test.hashes.tolist(), data.test.thumbs)
    pairs += dataset.equal_pairs(digest.tobytes() for digest in data.test.pixels)
    pairs += dataset.equal_pairs(item.group for item in data.test_items)
    groups = np.array(near_duplicates.connected_components(len(data.test_items), pairs))
    in_a = split_halves(groups, labels, options.seed)
    half_b = [item.file for item, in_half_a in zip(data.test_items, in_a, strict=True) if not in_half_a]
    checkpoint = recipe_checkpoint(recipe)
    logits: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
    for seed in range(options.seed, options.seed + options.seeds):
        selected = select.select(data.pool, data.test.vectors[in_a], counts, seed, options.clusters).rows
        random = select.random_rows(data.pool, counts, seed)
        for arm, rows in zip(ARMS, (selected, random), strict=True):
            log(f"seed {seed}, trained on {len(rows)} {arm} images")
            logits[arm].append(
                _train_and_score(
                    recipe, checkpoint, data, rows, half_b, TrainContext(seed, ProcessGroup(device=device)), log
                )
            )
    report = compare(labels[~in_a], groups[~in_a], *(np.stack(logits[arm]) for arm in ARMS))
    return {
        "recipe": recipe.name,
        "recipe_sha256": recipe.sha256,
        "seeds": options.seeds,
        "seed": options.seed,
        "device": device,
        "half_a": int(in_a.sum()),
        "half_b": len(half_b),
        "half_b_groups": len(np.unique(groups[~in_a])),
        "images": sum(counts.values()),
        "ai": counts[1],
        "real": counts[0],
        **report,
    }


def _train_and_score(
    recipe: Recipe,
    checkpoint: Path | None,
    data: SelectionData,
    rows: np.ndarray,
    files: Sequence[Path],
    context: TrainContext,
    log: Log,
) -> np.ndarray:
    """float64 [B]: logits of `files` by a member trained on pool rows, in a temporary run."""
    device = context.processes.device
    items = [data.items[row] for row in rows]
    try:
        items, indexed = dataset.index_items(items)
        frame = dataset.assemble(items, indexed, dataset.near_pairs(indexed), FRACTIONS, context.seed)
    except DataError as error:
        raise DataError(f"--ablate cannot train on {len(items)} images: {error}; or raise --count") from None
    frame = frame.assign(split=frame["split"].replace("heldout", "train"))
    with tempfile.TemporaryDirectory(prefix="manyeyes-") as folder:
        run = Path(folder)
        with LiveProgress([recipe.name], log) as progress:
            progress.begin_member(recipe.name, device)
            train_member(recipe, checkpoint, frame, run, context, progress)
        runner = torch_runner(recipe.name, load_member(run, recipe.name), torch.device(device))
        with tqdm(total=len(files), desc="  half B", unit="image", leave=False, disable=None) as bar:
            logits, errors = score_images(files, [runner], recipe.train.batch_size, progress=bar.update)
    if errors:
        raise FileNotFoundError(next(iter(errors.values())))
    return logits[:, 0].astype(np.float64)


def compare(labels: np.ndarray, groups: np.ndarray, selected: np.ndarray, random: np.ndarray) -> dict[str, Any]:
    """Scores of both arms and their difference, JSON-ready, with 95 % intervals over groups.

    labels int [B], groups [B], selected and random: logits float64 [S, B] over seeds. A score is
    the mean over the seeds. The difference resamples both arms together; its interval covers the
    choice of test images only, the differences of the single seeds are given beside it.
    """
    report: dict[str, Any] = {}
    for name in ("auroc", "log_loss"):
        interval = partial(paired_interval, name, labels, groups=groups)
        arms = {arm: interval(values, None).to_dict() for arm, values in zip(ARMS, (selected, random), strict=True)}
        by_seed = [
            metrics.score(name, labels, a) - metrics.score(name, labels, b)
            for a, b in zip(metrics.sigmoid(selected), metrics.sigmoid(random), strict=True)
        ]
        report[name] = {**arms, "difference": interval(selected, random).to_dict(), "difference_by_seed": by_seed}
    return report


def paired_interval(name: str, labels: np.ndarray, a: np.ndarray, b: np.ndarray | None, groups: np.ndarray) -> Interval:
    """Mean over seeds of the score `name` of a, minus that of b if given, with its interval over groups.

    a and b: logits float [S, N]; each resample takes the same groups of both.
    """
    p = metrics.sigmoid(a if b is None else np.concatenate([a, b]))
    weights = np.repeat([1 / len(a), -1 / len(a)], len(a))[: len(p)]
    value = weights @ [metrics.score(name, labels, row) for row in p]
    resampled = bootstrap.bootstrap_scores(labels, p, groups, (name,), resamples=1000)[name]
    return bootstrap.percentile_interval(float(value), weights @ resampled)


def as_table(report: dict[str, Any]) -> pd.DataFrame:
    """The report's intervals: one row per arm and one for the difference."""
    rows = []
    for arm in (*ARMS, "difference"):
        row = {"": arm}
        for name, title in (("auroc", "AUROC"), ("log_loss", "log-loss")):
            row[title] = str(Interval.from_dict(report[name][arm]))
        rows.append(row)
    return pd.DataFrame(rows)


def verdict(report: dict[str, Any]) -> str:
    """One line: does the interval of the difference in AUROC exclude zero?"""
    ends = report["auroc"]["difference"]
    if ends["low"] is None or ends["low"] <= 0 <= ends["high"]:
        return "No difference in AUROC is shown: its interval holds zero."
    better, worse = ARMS if ends["low"] > 0 else ARMS[::-1]
    return f"Training on the {better} images is better than on the {worse} ones, by AUROC."
