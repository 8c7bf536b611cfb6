"""The training loop of one fit: optimizer steps, the best epoch by its tune score, a state on disk to resume from."""

import math
import time
from collections.abc import Callable
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
from ensemble.training.data_loader import TrainDataset
from ensemble.training.distributed import ProcessGroup, any_rank, run_on_main
from ensemble.training.optimizer import lr_factor, set_lr
from ensemble.training.precision import choose_precision_and_layout
from ensemble.training.progress import TrainingCallback
from ensemble.training.step import TrainState, build_train_state, optimizer_step
from ensemble.training.tracking import Trackers
from ensemble.training.validation import RowReader, best_epoch, tune_scores

STATE_FILE = "state.safetensors"
SEED_STREAM = 5  # of the random numbers of drop path and dropout
MAX_LOGGED_STEPS = 500  # about so many steps of a fit are kept in its history
GPU_SYNC_STEPS = 10  # between two reads of the loss on a GPU, each of which waits for it


@dataclass(frozen=True)
class FitConfig:
    """One fit. folder: where its state is saved.

    tune: the rows that choose the epoch; None takes the last one. last_epoch: the fit ends there, on the learning
    rate schedule of all the recipe's epochs. title, share: see `TrainingCallback.on_fit_begin`.
    """

    recipe: Recipe
    train: TrainDataset
    tune: pd.DataFrame | None
    reader: RowReader
    last_epoch: int
    folder: Path
    seed: int
    processes: ProcessGroup
    title: str = ""
    share: float = 1.0
    save_seconds: float = 600.0


@dataclass
class _Progress:
    """Finished epochs, finished steps of the current one, and the sum of their losses; saved in the state."""

    epoch: int = 0
    step: int = 0
    losses: float = 0.0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)


def fit(
    member: Member, config: FitConfig, callback: TrainingCallback, open_trackers: Callable[[int], Trackers]
) -> dict[str, Any]:
    """Train in place and leave the best epoch's weights in `member`; returns the history.

    open_trackers: gets the number of steps that an interrupted run has done. The history holds `title`, `epochs`,
    `steps` and `best`, the number of the chosen epoch. A state in the folder is resumed. Raises TrainingError where
    the loss is not finite, DataError where steps have fewer images than there are processes.
    """
    train, processes = config.recipe.train, config.processes
    effective = train.batch_size * train.accumulate
    in_epoch = data_loader.steps_per_epoch(len(config.train), effective)
    if len(config.train) // in_epoch < processes.world_size:
        raise DataError(
            f"{processes.world_size} processes share steps of {len(config.train) // in_epoch} images; "
            "start fewer processes"
        )
    total = in_epoch * train.epochs
    saved = checkpoint.read(config.folder / STATE_FILE) if (config.folder / STATE_FILE).exists() else None
    facts = saved[1] if saved is not None else None

    def precision_and_layout() -> tuple[str, bool]:
        if facts is not None:  # an interrupted fit is continued as it was begun
            return facts["precision"], facts["channels_last"]
        return choose_precision_and_layout(member, train, processes.device_type)

    precision, channels_last = run_on_main(processes, precision_and_layout)
    state = build_train_state(member, train, total, precision, channels_last, processes)
    progress = _restore(state, saved) if saved is not None else _Progress()
    del saved  # as large as the network and more
    done = in_epoch * progress.epoch + progress.step
    callback.on_fit_begin(config.title, config.last_epoch, in_epoch * config.last_epoch, done, config.share)
    with closing(open_trackers(done)) as trackers:
        while progress.epoch < config.last_epoch and not _patience_ended(progress, config):
            _run_epoch(state, config, progress, in_epoch, callback, trackers)
            _end_epoch(state, config, progress, callback, trackers)
    best = best_epoch(progress.epochs, train.tune_score)
    assert best is not None  # noqa: S101 the recipe has at least one epoch
    _load_best(state, config, int(best["epoch"]))
    return {"title": config.title, "epochs": progress.epochs, "steps": progress.steps, "best": int(best["epoch"])}


def _run_epoch(
    state: TrainState,
    config: FitConfig,
    progress: _Progress,
    in_epoch: int,
    callback: TrainingCallback,
    trackers: Trackers,
) -> None:
    """The rest of an epoch of `in_epoch` steps; losses are read, logged and checked every GPU_SYNC_STEPS on a GPU."""
    train, processes = config.recipe.train, config.processes
    steps = data_loader.epoch_steps(len(config.train), train.batch_size * train.accumulate, config.seed, progress.epoch)
    todo = [rows[processes.rank :: processes.world_size] for rows in steps[progress.step :]]
    parts = [data_loader.micro_batches(rows, train.batch_size) for rows in todo]
    loaded = data_loader.load_batches(
        config.train, progress.epoch, [piece for part in parts for piece in part], processes.device_type
    )
    total, every = in_epoch * train.epochs, GPU_SYNC_STEPS if processes.device_type == "cuda" else 1
    logged = max(in_epoch * config.last_epoch // MAX_LOGGED_STEPS, 1)
    waiting: list[torch.Tensor] = []
    saved_at = time.monotonic()
    state.network.train()
    for rows, part in zip(steps[progress.step :], parts, strict=True):
        number = progress.epoch * in_epoch + progress.step
        factor = lr_factor(number, total, train.warmup, train.schedule)
        set_lr(state.optimizer, train.lr, factor)
        torch.manual_seed(_step_seed(config.seed, number, processes.rank))
        waiting.append(optimizer_step(state, [next(loaded) for _ in part], len(rows), callback.log))
        progress.step += 1
        if progress.step % every and progress.step < in_epoch:
            continue
        values = torch.stack(waiting).tolist()
        waiting.clear()
        if any_rank(processes, not _finite(values, state.precision)):
            _stop_for_nan(state, config, progress, train.lr * factor)
        progress.losses += sum(loss for loss, _ in values)
        callback.on_step(number + 1, values[-1][0], train.lr * factor, len(values) * len(rows))
        if any((number + 1 - back) % logged == 0 for back in range(len(values))):
            record = {"loss": values[-1][0], "lr": train.lr * factor}
            progress.steps.append({"step": number + 1, **record})
            trackers.log({f"train/{name}": value for name, value in record.items()}, number + 1)
        if progress.step < in_epoch and time.monotonic() - saved_at > config.save_seconds:
            _save(state, config, progress)
            saved_at = time.monotonic()


def _end_epoch(
    state: TrainState, config: FitConfig, progress: _Progress, callback: TrainingCallback, trackers: Trackers
) -> None:
    """Score the epoch, save its weights if they are the best, and save the state."""
    before = best_epoch(progress.epochs, config.recipe.train.tune_score)
    record: dict[str, Any] = {"epoch": progress.epoch + 1, "train_loss": progress.losses / progress.step}
    steps = (progress.epoch + 1) * progress.step
    with _averaged(state):
        if config.tune is not None:
            scores = (config.tune, config.reader, config.processes, state.precision, callback.on_scoring)
            record |= tune_scores(state.member, config.recipe, *scores)
        progress.epochs.append(record)
        progress.epoch, progress.step, progress.losses = progress.epoch + 1, 0, 0.0
        best = best_epoch(progress.epochs, config.recipe.train.tune_score)
        if best is record and config.processes.is_main:
            checkpoint.write(_best_path(config, progress.epoch), state.member.state_dict(), {"epoch": progress.epoch})
    _save(state, config, progress)
    if best is record and before is not None and config.processes.is_main:
        _best_path(config, int(before["epoch"])).unlink(missing_ok=True)
    callback.on_epoch_end(record, better=best is record and config.tune is not None)
    trackers.log({f"tune/{k.removeprefix('tune_')}": v for k, v in record.items() if k.startswith("tune_")}, steps)


def _averaged(state: TrainState) -> AbstractContextManager[object]:
    """In the block, the member has the averaged weights, if the recipe asks for an average."""
    return state.ema.applied(state.member) if state.ema is not None else nullcontext()


def _patience_ended(progress: _Progress, config: FitConfig) -> bool:
    patience, best = config.recipe.train.patience, best_epoch(progress.epochs, config.recipe.train.tune_score)
    return patience is not None and best is not None and progress.epoch - int(best["epoch"]) >= patience


def _step_seed(seed: int, number: int, rank: int) -> int:
    """The seed of drop path and dropout in one step; the same when the step is repeated after a kill."""
    return int(np.random.SeedSequence([seed, number, rank, SEED_STREAM]).generate_state(1)[0])


def _finite(values: list[list[float]], precision: str) -> bool:
    """Whether losses and gradient norms are finite; fp16 skips steps whose scaled gradients overflow."""
    return all(math.isfinite(loss) and (precision == "fp16" or math.isfinite(norm)) for loss, norm in values)


def _best_path(config: FitConfig, epoch: int) -> Path:
    return config.folder / f"best-{epoch:04}.safetensors"


def _save(state: TrainState, config: FitConfig, progress: _Progress) -> None:
    if not config.processes.is_main:
        return
    tensors, groups = checkpoint.optimizer_state(state.optimizer)
    parts = {"member": state.member.state_dict(), "optimizer": tensors}
    facts: dict[str, Any] = {"progress": vars(progress), "groups": groups, "scaler": state.scaler.state_dict()}
    facts |= {"most": state.micro_batch, "precision": state.precision, "channels_last": state.channels_last}
    if state.ema is not None:
        parts["ema"] = state.ema.state()
        facts["ema_count"] = state.ema.count
    named = {name: t for prefix, part in parts.items() for name, t in checkpoint.add_prefix(prefix, part).items()}
    checkpoint.write(config.folder / STATE_FILE, named, facts)


def _restore(state: TrainState, saved: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> _Progress:
    tensors, facts = saved
    state.member.load_state_dict(checkpoint.strip_prefix("member", tensors))
    checkpoint.load_optimizer_state(state.optimizer, checkpoint.strip_prefix("optimizer", tensors), facts["groups"])
    state.scaler.load_state_dict(facts["scaler"])
    state.micro_batch = facts["most"]
    if state.ema is not None:
        state.ema.load(checkpoint.strip_prefix("ema", tensors), facts["ema_count"])
    return _Progress(**facts["progress"])


def _load_best(state: TrainState, config: FitConfig, epoch: int) -> None:
    run_on_main(config.processes, lambda: None)  # a barrier: until the main process has written
    tensors, _ = checkpoint.read(_best_path(config, epoch))
    state.member.load_state_dict(tensors)


def _stop_for_nan(state: TrainState, config: FitConfig, progress: _Progress, lr: float) -> None:
    """Save the last good weights as a classifier, and raise TrainingError."""
    saved = ""
    if config.processes.is_main:
        best = best_epoch(progress.epochs, config.recipe.train.tune_score)
        source = _best_path(config, int(best["epoch"])) if best is not None else config.folder / STATE_FILE
        if source.exists():
            tensors, _ = checkpoint.read(source)
            state.member.load_state_dict(tensors if best is not None else checkpoint.strip_prefix("member", tensors))
            if config.recipe.adapt.mode == "lora":
                merge_lora(state.member)
            folder = config.folder / "last_good"
            artifacts.ensure_folder(folder)
            save_classifier(state.member.cpu(), folder)
            saved = f"; the last good weights are in {folder}"
    raise TrainingError(
        f"the loss is no longer a number in epoch {progress.epoch + 1}, step {progress.step}, at lr {lr:.2g} in "
        f"{state.precision}{saved}; lower train.lr or train.clip, or set train.precision=fp32, and add --fresh"
    )
