"""Diagnostics of a fitted stack: what each member adds and costs, intervals of its weights, collinear members.

Needs scikit-learn.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ensemble.core import artifacts, metrics
from ensemble.core.errors import ArtifactError, DataError, ImageError
from ensemble.core.metrics import Interval
from ensemble.data import dataset
from ensemble.images import decode, preprocess
from ensemble.models.runner import Runner
from ensemble.stacking.fit import WEIGHTED_METHODS, StackLogits, solve
from ensemble.stacking.grouped_cv import single_threaded_blas
from ensemble.stacking.logit_table import StackingData, stack_scores
from ensemble.stacking.scores import ModelScores, format_signed, score_models

TIMED_IMAGES = 8  # of one timed batch
TIMED_RUNS = 5
WEIGHT_DRAWS = 200
COLLINEAR_CORRELATION = 0.98


def drop_each_member(data: StackingData, method: str, calibration: str, held: StackLogits) -> list[ModelScores]:
    """The stack of all members, then a line for each: the stack without it, compared with that of all.

    Everything is fitted and chosen again for each; `held` are the logits of all members' stack.
    """
    if len(data.members) < 2:
        raise DataError("--drop-one needs two members or more; train another, or leave it out")
    stacks = {"all members": held}
    for name in tqdm(data.members, desc="drop-one", unit="member", leave=False, disable=None):
        rest = data.select([other for other in data.members if other != name])
        stacks[name] = stack_scores(rest, method, calibration)
    p = {name: metrics.sigmoid(scores.calibrated) for name, scores in stacks.items()}
    ranking = {name: metrics.sigmoid(scores.raw) for name, scores in stacks.items()}
    return score_models(p, "all members", data.scored.labels, data.scored.groups, ranking)


def drop_one_table(lines: Sequence[ModelScores], cost: Mapping[str, float]) -> pd.DataFrame:
    """The lines of `drop_each_member` and milliseconds an image, as text."""
    return pd.DataFrame(
        {
            "without": [line.name if line.auroc_difference else "(none)" for line in lines],
            "AUROC": [str(line.auroc) for line in lines],
            "change of AUROC": [format_signed(line.auroc_difference) for line in lines],
            "change of log-loss": [format_signed(line.log_loss_difference) for line in lines],
            "ms per image": [
                f"{cost[line.name] if line.auroc_difference else sum(cost.values()):.1f}" for line in lines
            ],
        }
    )


def measure_costs(run: Path, names: Sequence[str], ids: Sequence[str]) -> tuple[dict[str, float], str]:
    """Milliseconds an image of each torch member's network on held-out images, and the device. Needs torch."""
    from ensemble.models.torch_runner import choose_device, member_runners

    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first").set_index("id", drop=False)
    files = dataset.files(frame.loc[list(ids[:TIMED_IMAGES])])
    device = choose_device("auto")
    costs = {}
    runners = member_runners(run, names, device)
    for runner in tqdm(runners, "timing", len(names), unit="member", leave=False, disable=None):
        try:
            pixels = np.concatenate(
                [preprocess.to_pixels(decode.decode(file), runner.preprocess_config) for file in files]
            )
        except ImageError as error:
            raise ArtifactError(f"members are timed on held-out images, and one cannot be read: {error}") from None
        costs[runner.name] = milliseconds_per_image(runner, pixels, len(files))
    return costs, device


def milliseconds_per_image(runner: Runner, pixels: np.ndarray, count: int) -> float:
    """Milliseconds an image for pixels uint8 of `count` images: the median of five runs after one to warm up."""
    runner.run(pixels)
    taken = []
    for _ in range(TIMED_RUNS):
        started = time.perf_counter()
        runner.run(pixels)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken)) * 1000 / count


def weight_intervals(
    method: str, logits: np.ndarray, labels: np.ndarray, groups: np.ndarray, strength: float, seed: int = 0
) -> list[Interval] | None:
    """Each member's weight with its 95 % interval: refitted at this penalty on 200 draws of whole groups.

    None for kinds whose weights are not estimated.
    """
    if method not in WEIGHTED_METHODS:
        return None
    names, codes = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = []
    with single_threaded_blas():
        for _ in range(WEIGHT_DRAWS):
            counts = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[codes]
            rows = counts > 0
            if len(np.unique(labels[rows])) == 2:
                weights = counts[rows].astype(np.float64)
                drawn.append(solve(method, logits[rows], labels[rows], strength, weights).coef)
        coef = solve(method, logits, labels, strength).coef
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0) if drawn else np.full((2, len(coef)), np.nan)
    return [Interval(*map(float, values)) for values in zip(coef, low, high, strict=True)]


def collinear_pairs(names: Sequence[str], logits: np.ndarray) -> list[tuple[str, str, float]]:
    """Pairs of members whose logits [N, members] are correlated above 0.98: their weights mean little apart."""
    table = pd.DataFrame(logits).corr().to_numpy()  # of the rows where both gave an answer; NaN for a constant member
    pairs = combinations(range(len(names)), 2)
    return [(names[a], names[b], float(table[a, b])) for a, b in pairs if table[a, b] > COLLINEAR_CORRELATION]
