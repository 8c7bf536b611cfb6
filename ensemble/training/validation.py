"""Validation of a member: its logits on rows, and the tune scores by which the best epoch is chosen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL.Image import Image

from ensemble.core import metrics
from ensemble.core.errors import DataError
from ensemble.core.recipe import Recipe
from ensemble.data import dataset
from ensemble.images import canonical, decode, robustness
from ensemble.images.canonical import CanonicalPlan
from ensemble.models.backbone import Member
from ensemble.models.runner import score_images
from ensemble.models.torch_runner import torch_runner
from ensemble.training.distributed import ProcessGroup, all_gather, shard_indices

Progress = Callable[[int], object]


@dataclass(frozen=True)
class RowReader:
    """Reads images for scoring. plan: brings them to their canonical form, with random numbers from `seed`."""

    plan: CanonicalPlan | None
    seed: int

    def image(self, row: int, file: Path) -> Image:
        """The decoded image of a row."""
        return (
            decode.decode(file) if self.plan is None else canonical.read_canonical(file, self.plan, [self.seed, 0, row])
        )


def predict_logits(
    member: Member,
    recipe: Recipe,
    frame: pd.DataFrame,
    reader: RowReader,
    processes: ProcessGroup,
    precision: str = "fp32",
    progress: Progress = lambda count: None,
    change: Callable[[Image], Image] = lambda image: image,
) -> np.ndarray:
    """Logits float32 [N] of the rows, in order; with several processes each scores a share of them.

    progress: gets the number of images of each batch. change: applied to each decoded image. Raises DataError for an
    image that cannot be read.
    """
    rows = shard_indices(processes, len(frame))
    files = dataset.files(frame)
    runner = torch_runner(recipe.name, member, torch.device(processes.device), precision)
    logits, errors = score_images(
        [files[row] for row in rows],
        [runner],
        recipe.train.batch_size,
        progress=lambda count: progress(count * processes.world_size),
        read=lambda row, file: change(reader.image(int(rows[row]), file)),
    )
    if errors:
        raise DataError(f"{next(iter(errors.values()))}; restore it, and run the same command again")
    return all_gather(processes, logits[:, 0], len(frame))


def tune_scores(
    member: Member,
    recipe: Recipe,
    frame: pd.DataFrame,
    reader: RowReader,
    processes: ProcessGroup,
    precision: str,
    scoring: Callable[[str, int], Progress],
) -> dict[str, Any]:
    """Scores on the tune rows: tune_auroc, tune_log_loss, tune_balanced_accuracy, and tune_score: the recipe's choice.

    For `worst_cell` the rows are scored under every corruption of the small robustness grid.
    """
    robust = recipe.train.tune_score == "worst_cell"
    cells = robustness.SMALL_GRID if robust else robustness.choose_corruptions("none")
    progress = scoring("tune", len(frame) * len(cells))
    labels = frame["label"].to_numpy()
    by_cell = {
        cell: predict_logits(member, recipe, frame, reader, processes, precision, progress, change)
        for cell, change in cells.items()
    }
    logits = by_cell["clean"]
    scores: dict[str, Any] = {**named_scores(labels, logits)}
    if robust:
        scores["worst_cell"], scores["tune_worst_cell"] = robustness.worst_corruption(labels, by_cell)
    return scores | {"tune_score": scores[f"tune_{recipe.train.tune_score}"]}


def named_scores(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """tune_auroc, tune_log_loss and tune_balanced_accuracy of logits [N]."""
    p = metrics.sigmoid(logits)
    return {
        "tune_auroc": metrics.auroc(labels, logits),
        "tune_log_loss": metrics.log_loss(labels, p),
        "tune_balanced_accuracy": metrics.score("balanced_accuracy", labels, p),
    }


def best_epoch(epochs: Sequence[Mapping[str, Any]], tune_score: str) -> Mapping[str, Any] | None:
    """The epoch with the best tune score, the earlier of equals; the last one where none was scored."""
    scored = [epoch for epoch in epochs if "tune_score" in epoch]
    if not scored:
        return epochs[-1] if epochs else None
    sign = -1 if tune_score == "log_loss" else 1
    return max(scored, key=lambda epoch: (sign * epoch["tune_score"], -epoch["epoch"]))
