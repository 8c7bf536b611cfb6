"""What each member adds to the stack and costs, and the best stacks for the time they take."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ensemble.core import artifacts, metrics
from ensemble.core.errors import ArtifactError, DataError, ImageError
from ensemble.data import dataset
from ensemble.grouped import one_thread
from ensemble.images import decode
from ensemble.models.runner import Runner
from ensemble.stack_rows import Material, scores_at, stack_scores, subset
from ensemble.stack_table import Scored, score_models, signed
from ensemble.stackers import Scores
from ensemble.subsets import explore, undominated

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
