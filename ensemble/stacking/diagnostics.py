"""What each member adds to the stack and costs, and the best stacks for the time they take.

Subsets of members worth trying, and those that nothing beats for the time they take.

How sure the stack's weights are, and which members say the same. Needs scikit-learn.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import pandas as pd
from tqdm import tqdm

from ensemble.core import artifacts, metrics
from ensemble.core.errors import ArtifactError, DataError, ImageError
from ensemble.core.metrics import Interval
from ensemble.data import dataset
from ensemble.images import decode
from ensemble.models.runner import Runner
from ensemble.stacking.fit import PENALISED, Scores, solve
from ensemble.stacking.grouped_cv import one_thread
from ensemble.stacking.logit_table import Material, scores_at, stack_scores, subset
from ensemble.stacking.scores import Scored, score_models, signed

EXHAUSTIVE = 8  # members up to which every subset is tried


class Stack(Protocol):
    """A stack of some members: its AUROC on rows it was not fitted on, and what an image takes."""

    @property
    def members(self) -> tuple[str, ...]:
        """Their names."""

    @property
    def auroc(self) -> float:
        """0 to 1."""

    @property
    def milliseconds(self) -> float:
        """An image."""


S = TypeVar("S", bound=Stack)


def explore(count: int, measure: Callable[[tuple[int, ...]], S]) -> list[S]:
    """What `measure` says of subsets of so many members, each given by their places in order.

    Every subset of up to eight; of more, those found by adding, again and again, the member
    that raises the AUROC most.
    """
    if count <= EXHAUSTIVE:
        subsets = [chosen for size in range(1, count + 1) for chosen in combinations(range(count), size)]
        return [measure(chosen) for chosen in tqdm(subsets, desc="frontier", unit="stack", leave=False, disable=None)]
    kept: tuple[int, ...] = ()
    tried: list[S] = []
    for _ in tqdm(range(count), desc="frontier", unit="member", leave=False, disable=None):
        grown = [tuple(sorted((*kept, column))) for column in range(count) if column not in kept]
        found = [measure(chosen) for chosen in grown]
        kept = grown[int(np.argmax([stack.auroc for stack in found]))]
        tried += found
    return tried


def undominated(stacks: Sequence[S], better: Callable[[S, S | None], bool] = lambda slow, fast: True) -> list[S]:
    """Those that score above chance and above all that take as little time or less, from the fastest.

    `better` may refuse one of them: it is asked whether a slower stack is better than the best of
    the faster ones that it let pass, or, where there is none, than chance.
    """
    best: list[S] = []
    for stack in sorted(stacks, key=lambda stack: (stack.milliseconds, -stack.auroc, len(stack.members))):
        if stack.auroc > (best[-1].auroc if best else 0.5):
            best.append(stack)
    passed: list[S] = []
    for stack in best:  # one that is refused still beats what is slower and less accurate
        if better(stack, passed[-1] if passed else None):
            passed.append(stack)
    return passed


IMAGES = 8  # of one timed batch
REPEATS = 5


@dataclass(frozen=True)
class Point:
    """A stack of some members: its AUROC on rows it was not fitted on, and what its members take for an image."""

    members: tuple[str, ...]
    auroc: float
    milliseconds: float


def without_each(material: Material, kind: str, calibration: str, held: Scores) -> list[Scored]:
    """The stack of all members, then a line for each: the stack without it, compared with that of all.

    Everything is fitted and chosen again for each; `held` are the logits of all members' stack.
    """
    count = len(material.names)
    if count < 2:
        raise DataError("--drop-one needs two members or more; train another, or leave it out")
    found = {"all members": held}
    for column in tqdm(range(count), desc="drop-one", unit="member", leave=False, disable=None):
        rest = subset(material, [other for other in range(count) if other != column])
        found[material.names[column]] = stack_scores(rest, kind, calibration)
    p = {name: metrics.sigmoid(scores.calibrated) for name, scores in found.items()}
    ranking = {name: metrics.sigmoid(scores.raw) for name, scores in found.items()}
    return score_models(p, "all members", material.scored.labels, material.scored.groups, ranking)


def drop_table(lines: Sequence[Scored], cost: Mapping[str, float]) -> pd.DataFrame:
    """`without_each` and milliseconds an image, as text."""
    return pd.DataFrame(
        {
            "without": [line.name if line.auroc_difference else "(none)" for line in lines],
            "AUROC": [str(line.auroc) for line in lines],
            "change of AUROC": [signed(line.auroc_difference) for line in lines],
            "change of log-loss": [signed(line.log_loss_difference) for line in lines],
            "ms per image": [
                f"{cost[line.name] if line.auroc_difference else sum(cost.values()):.1f}" for line in lines
            ],
        }
    )


def measure_costs(run: Path, names: Sequence[str], rows: pd.DataFrame) -> tuple[dict[str, float], str]:
    """Milliseconds an image of each torch member's network on held-out images, and the device. Needs torch."""
    import torch

    from ensemble.models.members import load_member
    from ensemble.models.torch_runner import choose_device, torch_runner

    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first").set_index("id", drop=False)
    files = dataset.files(frame.loc[rows["id"].iloc[:IMAGES]])
    device = choose_device("auto")
    costs = {}
    for name in tqdm(names, desc="timing", unit="member", leave=False, disable=None):
        runner = torch_runner(name, load_member(run, name), torch.device(device))
        try:
            pixels = np.concatenate([decode.to_pixels(decode.decode(file), runner.contract) for file in files])
        except ImageError as error:
            raise ArtifactError(f"members are timed on held-out images, and one cannot be read: {error}") from None
        costs[name] = milliseconds(runner, pixels, len(files))
    return costs, device


def milliseconds(
    runner: Runner, pixels: np.ndarray, count: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Milliseconds an image for pixels uint8 of `count` images: the median of five runs after one to warm up."""
    runner.run(pixels)
    taken = []
    for _ in range(REPEATS):
        started = clock()
        runner.run(pixels)
        taken.append(clock() - started)
    return float(np.median(taken)) * 1000 / count


def frontier(material: Material, kind: str, strength: float, cost: Mapping[str, float]) -> list[Point]:
    """The stacks of some members that no other stack beats in AUROC for as little time, from the fastest.

    Subsets as `explore` tries them, all at one penalty, without calibration.
    """
    with one_thread():
        return undominated(explore(len(material.names), lambda chosen: _point(material, chosen, kind, strength, cost)))


def frontier_table(points: Sequence[Point]) -> pd.DataFrame:
    """The frontier as text."""
    return pd.DataFrame(
        {
            "members": [" + ".join(point.members) for point in points],
            "AUROC": [f"{point.auroc:.4f}" for point in points],
            "ms per image": [f"{point.milliseconds:.1f}" for point in points],
        }
    )


def _point(material: Material, chosen: Sequence[int], kind: str, strength: float, cost: Mapping[str, float]) -> Point:
    part = subset(material, chosen)
    logits = scores_at(part, kind, strength)
    taken = sum(cost[name] for name in part.names)
    return Point(part.names, metrics.auroc(material.scored.labels, logits), taken)


DRAWS = 200
COLLINEAR = 0.98


def weight_intervals(
    kind: str, logits: np.ndarray, labels: np.ndarray, groups: np.ndarray, strength: float, seed: int = 0
) -> list[Interval] | None:
    """Each member's weight with its 95 % interval: refitted at this penalty on 200 draws of whole groups.

    None for kinds whose weights are not estimated.
    """
    if kind not in PENALISED:
        return None
    names, codes = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = []
    with one_thread():
        for _ in range(DRAWS):
            counts = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[codes]
            if len(np.unique(labels[counts > 0])) == 2:
                rows = counts > 0
                drawn.append(solve(kind, logits[rows], labels[rows], strength, counts[rows].astype(np.float64))[0])
        coef, _ = solve(kind, logits, labels, strength)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0) if drawn else np.full((2, len(coef)), np.nan)
    return [Interval(*map(float, values)) for values in zip(coef, low, high, strict=True)]


def near_collinear(names: Sequence[str], logits: np.ndarray) -> list[tuple[str, str, float]]:
    """Pairs of members whose logits [N, members] are correlated above 0.98: their weights mean little apart."""
    table = np.atleast_2d(np.corrcoef(logits, rowvar=False))
    pairs = combinations(range(len(names)), 2)
    return [(names[a], names[b], float(table[a, b])) for a, b in pairs if table[a, b] > COLLINEAR]
