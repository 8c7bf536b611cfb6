"""Estimates what training would take on this machine, from a few timed steps of each member; nothing is kept."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch

from ensemble.core.log import format_duration
from ensemble.core.recipe import Recipe
from ensemble.data import dataset
from ensemble.images import robustness
from ensemble.models.backbone import Member, build_member
from ensemble.training import data_loader
from ensemble.training.data_loader import TrainDataset
from ensemble.training.distributed import ProcessGroup
from ensemble.training.optimizer import prepare_for_training
from ensemble.training.precision import choose_precision_and_layout
from ensemble.training.step import build_train_state, optimizer_step
from ensemble.training.validation import RowReader, predict_logits

TIMED_SECONDS, TIMED_BATCHES = 5.0, 4  # the first limit that is reached ends a member's timing; batch 1 warms up
SCORED_IMAGES = 8  # that are timed without training


@dataclass(frozen=True)
class Estimate:
    """steps and seconds of the whole member with its folds; memory: the peak of its steps, in bytes."""

    rows: int
    steps: int
    seconds: float
    memory: int


def estimate_member(
    recipe: Recipe, checkpoint: Path | None, frame: pd.DataFrame, reader: RowReader, processes: ProcessGroup
) -> Estimate:
    """Time a few training batches and a few scored images, and extrapolate to all rows and epochs."""
    train = frame[frame["split"] == "train"]
    member = build_member(recipe, checkpoint)
    if processes.device_type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux alone; the peak begins anew
        Path("/proc/self/clear_refs").write_text("5")
    few = train.head(SCORED_IMAGES)
    predict_logits(member, recipe, few.head(1), reader, processes)  # warms up
    started = time.monotonic()
    predict_logits(member, recipe, few, reader, processes)
    scoring = (time.monotonic() - started) / len(few)  # seconds an image with all its views
    # with K folds each row is trained on K - 1 times by the folds, and once more by the refit
    times = int(frame["fold"].max()) + 1 if frame["fold"].notna().any() else 1
    in_epoch = data_loader.steps_per_epoch(len(train), recipe.train.batch_size * recipe.train.accumulate)
    if recipe.adapt.mode == "probe":
        views = member.preprocess_config.count + recipe.adapt.views
        seconds = scoring * (len(train) * views / member.preprocess_config.count + (frame["split"] != "train").sum())
        return Estimate(len(train), 0, float(seconds) * times, _peak(processes))
    training = _training_rate(member, recipe, train, reader, processes)
    cells = len(robustness.SMALL_GRID) if recipe.train.tune_score == "worst_cell" else 1
    epochs, count = recipe.train.epochs, frame["split"].value_counts()
    epoch = training * count["train"] + scoring * count["tune"] * cells
    held = scoring * (len(frame) - count["train"] - count["tune"])
    return Estimate(len(train), in_epoch * epochs * times, epoch * epochs * times + held, _peak(processes))


def _training_rate(
    member: Member, recipe: Recipe, train: pd.DataFrame, reader: RowReader, processes: ProcessGroup
) -> float:
    """Seconds an image of training, with loading and augmentation."""
    prepare_for_training(member, recipe)
    precision, channels_last = choose_precision_and_layout(member, recipe.train, processes.device_type)
    state = build_train_state(member, recipe.train, TIMED_BATCHES, precision, channels_last, processes)
    rows = TrainDataset(
        dataset.files(train),
        train["label"].to_numpy(),
        member.preprocess_config,
        recipe.augment,
        reader.seed,
        reader.plan,
    )
    size = min(recipe.train.batch_size, len(rows))
    order = list(np.resize(np.arange(len(rows)), (TIMED_BATCHES, size)))
    state.network.train()
    started, done = time.monotonic(), 0
    for number, batch in enumerate(data_loader.load_batches(rows, 0, order, processes.device_type)):
        # reading the values waits for the GPU
        optimizer_step(state, [batch], len(batch["labels"]), lambda line: None).tolist()
        if number == 0:
            started = time.monotonic()
            continue
        done += len(batch["labels"])
        if time.monotonic() - started > TIMED_SECONDS:
            break
    return (time.monotonic() - started) / max(done, 1)


def _peak(processes: ProcessGroup) -> int:
    """The peak memory in bytes, of the GPU or of this process."""
    if processes.device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def estimate_table(estimates: Sequence[tuple[str, Estimate | None]]) -> pd.DataFrame:
    """One line a member, None for one that is not trained again, and the total time."""
    rows = [
        {"member": name, "": "unchanged"}
        if estimate is None
        else {
            "member": name,
            "rows": str(estimate.rows),
            "steps": str(estimate.steps),
            "time": format_duration(estimate.seconds),
            "memory": f"{estimate.memory / 2**30:.1f} GiB",
        }
        for name, estimate in estimates
    ]
    total = sum(estimate.seconds for _, estimate in estimates if estimate is not None)
    return pd.DataFrame([*rows, {"member": "all", "time": format_duration(total)}]).fillna("")
