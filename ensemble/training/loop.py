"""One fit: epochs of optimizer steps, the best epoch by its tune score, and a state from which a killed fit goes on."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ensemble.core import artifacts
from ensemble.core.errors import DataError, TrainingError
from ensemble.core.recipe import Recipe
from ensemble.models.backbone import Member, save_classifier
from ensemble.models.lora import merge_lora
from ensemble.training import checkpoint, data_loader
from ensemble.training import precision as machine
from ensemble.training.data_loader import TrainDataset
from ensemble.training.distributed import ProcessGroup, any_rank, run_on_main
from ensemble.training.optimizer import lr_factor, set_lr
from ensemble.training.progress import TrainingCallback
from ensemble.training.step import TrainState, build_train_state, optimizer_step
from ensemble.training.tracking import Trackers
from ensemble.training.validation import RowReader, best_epoch, tune_scores

STATE_FILE = "state.safetensors"
SEED_STREAM = 5  # of random draws: drop path and dropout
MAX_LOGGED_STEPS = 500  # at most about so many of a fit stand in its history
GPU_SYNC_STEPS = 10  # steps, on a GPU, which would wait at each look


@dataclass(frozen=True)
class FitConfig:
    """What is fitted, on what, and where its state is kept.

    tune: the rows that choose the epoch; None takes the last one. last_epoch: the fit ends
    there, on the schedule of all the recipe's epochs. share: of the member's whole work.
    """

    recipe: Recipe
    train: TrainDataset
    tune: pd.DataFrame | None
    reading: RowReader
    last_epoch: int
    folder: Path
    seed: int
    processes: ProcessGroup
    title: str = ""
    share: float = 1.0
    save_seconds: float = 600.0


@dataclass
class _Progress:
    """How far the fit is: finished epochs, finished steps of the running one and the sum of their losses."""

    epoch: int = 0
    step: int = 0
    losses: float = 0.0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)


def fit(member: Member, job: FitConfig, board: TrainingCallback, track: Callable[[int], Trackers]) -> dict[str, Any]:
    """Train in place and leave the best epoch's weights in `member`; returns its history.

    track: opens the trackers, told how many steps an interrupted run has done.

    The history holds `epochs`, `steps` and `best`, the number of the chosen epoch. A state
    in the job's folder is gone on from. Raises TrainingError where the loss is no number.
    """
    train, processes = job.recipe.train, job.processes
    effective = train.batch_size * train.accumulate
    in_epoch = data_loader.steps_per_epoch(len(job.train), effective)
    if len(job.train) // in_epoch < processes.world_size:
        raise DataError(
            f"{processes.world_size} processes share steps of {len(job.train) // in_epoch} images; "
            "start fewer processes"
        )
    total = in_epoch * train.epochs
    saved = checkpoint.read(job.folder / STATE_FILE) if (job.folder / STATE_FILE).exists() else None
    facts = saved[1] if saved is not None else None
    precision, channels_last = run_on_main(processes, lambda: _ways(member, job, facts))
    engine = build_train_state(member, train, total, precision, channels_last, processes)
    progress = _restore(engine, saved) if saved is not None else _Progress()
    del saved  # as large as the network and more
    done = in_epoch * progress.epoch + progress.step
    board.part(job.title, job.last_epoch, in_epoch * job.last_epoch, done, job.share)
    with closing(track(done)) as trackers:
        while progress.epoch < job.last_epoch and not _patience_ended(progress, job):
            _run_epoch(engine, job, progress, in_epoch, board, trackers)
            _end_epoch(engine, job, progress, board, trackers)
    best = best_epoch(progress.epochs, train.tune_score)
    assert best is not None  # noqa: S101 the recipe has at least one epoch
    _take_best(engine, job, int(best["epoch"]))
    return {"title": job.title, "epochs": progress.epochs, "steps": progress.steps, "best": int(best["epoch"])}


def _ways(member: Member, job: FitConfig, facts: Mapping[str, Any] | None) -> tuple[str, bool]:
    """(precision, channels last): those of the state that is gone on from, else by recipe and machine."""
    if facts is not None:
        return facts["precision"], facts["channels_last"]
    return machine.choose_precision_and_layout(member, job.recipe.train, job.processes.device_type)


def _run_epoch(
    engine: TrainState, job: FitConfig, progress: _Progress, in_epoch: int, board: TrainingCallback, trackers: Trackers
) -> None:
    train, processes = job.recipe.train, job.processes
    steps = data_loader.epoch_steps(len(job.train), train.batch_size * train.accumulate, job.seed, progress.epoch)
    todo = [rows[processes.rank :: processes.world_size] for rows in steps[progress.step :]]
    parts = [data_loader.micro_batches(rows, train.batch_size) for rows in todo]
    loaded = data_loader.load_batches(
        job.train, progress.epoch, [piece for part in parts for piece in part], processes.device_type
    )
    total, every = in_epoch * train.epochs, GPU_SYNC_STEPS if processes.device_type == "cuda" else 1
    logged = max(in_epoch * job.last_epoch // MAX_LOGGED_STEPS, 1)
    waiting: list[torch.Tensor] = []
    saved_at = time.monotonic()
    engine.network.train()
    for rows, part in zip(steps[progress.step :], parts, strict=True):
        number = progress.epoch * in_epoch + progress.step
        factor = lr_factor(number, total, train.warmup, train.schedule)
        set_lr(engine.optimizer, train.lr, factor)
        torch.manual_seed(_step_seed(job.seed, number, processes.rank))
        waiting.append(optimizer_step(engine, [next(loaded) for _ in part], len(rows), board.log))
        progress.step += 1
        if progress.step % every and progress.step < in_epoch:
            continue
        values = torch.stack(waiting).tolist()
        waiting.clear()
        if any_rank(processes, not _sound(values, engine.precision)):
            _stop_for_nan(engine, job, progress, train.lr * factor)
        progress.losses += sum(loss for loss, _ in values)
        board.step(number + 1, values[-1][0], train.lr * factor, len(values) * len(rows))
        if any((number + 1 - back) % logged == 0 for back in range(len(values))):
            record = {"loss": values[-1][0], "lr": train.lr * factor}
            progress.steps.append({"step": number + 1, **record})
            trackers.log({f"train/{name}": value for name, value in record.items()}, number + 1)
        if progress.step < in_epoch and time.monotonic() - saved_at > job.save_seconds:
            _save(engine, job, progress)
            saved_at = time.monotonic()


def _end_epoch(
    engine: TrainState, job: FitConfig, progress: _Progress, board: TrainingCallback, trackers: Trackers
) -> None:
    """Score the epoch, keep its weights if they are the best, and write the state."""
    before = best_epoch(progress.epochs, job.recipe.train.tune_score)
    record: dict[str, Any] = {"epoch": progress.epoch + 1, "train_loss": progress.losses / progress.step}
    steps = (progress.epoch + 1) * progress.step
    with _averaged(engine):
        if job.tune is not None:
            scores = (job.tune, job.reading, job.processes, engine.precision, board.scoring)
            record |= tune_scores(engine.member, job.recipe, *scores)
        progress.epochs.append(record)
        progress.epoch, progress.step, progress.losses = progress.epoch + 1, 0, 0.0
        best = best_epoch(progress.epochs, job.recipe.train.tune_score)
        if best is record and job.processes.is_main:
            checkpoint.write(_best_path(job, progress.epoch), engine.member.state_dict(), {"epoch": progress.epoch})
    _save(engine, job, progress)
    if best is record and before is not None and job.processes.is_main:
        _best_path(job, int(before["epoch"])).unlink(missing_ok=True)
    board.epoch(record, better=best is record and job.tune is not None)
    trackers.log({f"tune/{k.removeprefix('tune_')}": v for k, v in record.items() if k.startswith("tune_")}, steps)


def _averaged(engine: TrainState) -> AbstractContextManager[object]:
    """The moving average in the place of the member's weights, where there is one."""
    return engine.ema.applied(engine.member) if engine.ema is not None else nullcontext()


def _patience_ended(progress: _Progress, job: FitConfig) -> bool:
    patience, best = job.recipe.train.patience, best_epoch(progress.epochs, job.recipe.train.tune_score)
    return patience is not None and best is not None and progress.epoch - int(best["epoch"]) >= patience


def _step_seed(seed: int, number: int, rank: int) -> int:
    """Of drop path and dropout in one step: the same when the step is repeated after a kill."""
    return int(np.random.SeedSequence([seed, number, rank, SEED_STREAM]).generate_state(1)[0])


def _sound(values: list[list[float]], precision: str) -> bool:
    """Whether losses and gradients are numbers; fp16 skips steps whose scaled gradients overflow."""
    return all(math.isfinite(loss) and (precision == "fp16" or math.isfinite(norm)) for loss, norm in values)


def _best_path(job: FitConfig, epoch: int) -> Path:
    return job.folder / f"best-{epoch:04}.safetensors"


def _save(engine: TrainState, job: FitConfig, progress: _Progress) -> None:
    if not job.processes.is_main:
        return
    tensors, groups = checkpoint.optimizer_state(engine.optimizer)
    parts = {"member": engine.member.state_dict(), "optimizer": tensors}
    facts: dict[str, Any] = {"progress": vars(progress), "groups": groups, "scaler": engine.scaler.state_dict()}
    facts |= {"most": engine.most, "precision": engine.precision, "channels_last": engine.channels_last}
    if engine.ema is not None:
        parts["ema"] = engine.ema.state()
        facts["ema_count"] = engine.ema.count
    named = {name: t for prefix, part in parts.items() for name, t in checkpoint.add_prefix(prefix, part).items()}
    checkpoint.write(job.folder / STATE_FILE, named, facts)


def _restore(engine: TrainState, saved: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> _Progress:
    tensors, facts = saved
    engine.member.load_state_dict(checkpoint.strip_prefix("member", tensors))
    checkpoint.load_optimizer_state(engine.optimizer, checkpoint.strip_prefix("optimizer", tensors), facts["groups"])
    engine.scaler.load_state_dict(facts["scaler"])
    engine.most = facts["most"]
    if engine.ema is not None:
        engine.ema.load(checkpoint.strip_prefix("ema", tensors), facts["ema_count"])
    return _Progress(**facts["progress"])


def _take_best(engine: TrainState, job: FitConfig, epoch: int) -> None:
    run_on_main(job.processes, lambda: None)  # others wait until the first has written
    tensors, _ = checkpoint.read(_best_path(job, epoch))
    engine.member.load_state_dict(tensors)


def _stop_for_nan(engine: TrainState, job: FitConfig, progress: _Progress, lr: float) -> None:
    """Keep the last good weights as a classifier, and raise TrainingError."""
    kept = ""
    if job.processes.is_main:
        best = best_epoch(progress.epochs, job.recipe.train.tune_score)
        source = _best_path(job, int(best["epoch"])) if best is not None else job.folder / STATE_FILE
        if source.exists():
            tensors, _ = checkpoint.read(source)
            engine.member.load_state_dict(tensors if best is not None else checkpoint.strip_prefix("member", tensors))
            if job.recipe.adapt.mode == "lora":
                merge_lora(engine.member)
            folder = job.folder / "last_good"
            artifacts.ensure_folder(folder)
            save_classifier(engine.member.cpu(), folder)
            kept = f"; the last good weights are in {folder}"
    raise TrainingError(
        f"the loss is no longer a number in epoch {progress.epoch + 1}, step {progress.step}, at lr {lr:.2g} in "
        f"{engine.precision}{kept}; lower train.lr or train.clip, or set train.precision=fp32, and add --fresh"
    )
