"""The training loop of one fit: optimizer steps, the best epoch by its tune score, a state on disk to resume from."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
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
from ensemble.training.progress import LiveProgress
from ensemble.training.step import build_train_state, optimizer_step
from ensemble.training.tracking import Trackers
from ensemble.training.validation import RowReader, best_epoch, tune_scores

STATE_FILE = "state.safetensors"
SEED_STREAM = 5  # of the random numbers of drop path and dropout
MAX_LOGGED_STEPS = 500  # about so many steps of a fit are kept in its history
GPU_SYNC_STEPS = 10  # between two reads of the loss on a GPU, each of which waits for it


@dataclass(frozen=True)
class FitConfig:
    """One fit of a member: a fold, the refit, or its only fit. folder: where its state is saved.

    tune: the rows that choose the epoch; None takes the last one. last_epoch: the fit ends there, on the learning
    rate schedule of all the recipe's epochs. title, share: see `LiveProgress.on_fit_begin`. C: inverse regularisation
    strength of a linear probe without tune rows.
    """

    recipe: Recipe
    train: pd.DataFrame
    tune: pd.DataFrame | None
    reader: RowReader
    last_epoch: int
    folder: Path
    seed: int
    processes: ProcessGroup
    title: str = ""
    share: float = 1.0
    save_seconds: float = 600.0
    C: float = 1.0


@dataclass
class _Progress:
    """Finished epochs, finished steps of the current one, and the sum of their losses; saved in the state."""

    epoch: int = 0
    step: int = 0
    losses: float = 0.0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)


def fit(
    member: Member,
    config: FitConfig,
    data: TrainDataset,
    callback: LiveProgress,
    open_trackers: Callable[[int], Trackers],
) -> dict[str, Any]:
    """Train in place and leave the best epoch's weights in `member`; returns the history.

    data: the images of `config.train`. open_trackers: gets the number of steps that an interrupted run has done. The
    history holds `title`, `epochs`, `steps` and `best`, the number of the chosen epoch. A state in the folder is
    resumed. Raises TrainingError where the loss is not finite, DataError where steps have fewer images than there are
    processes.
    """
    loop = _Loop(member, config, data, callback)
    progress, steps = loop.progress, loop.epoch_steps * config.last_epoch
    done = loop.epoch_steps * progress.epoch + progress.step
    callback.on_fit_begin(config.title, config.last_epoch, steps, done, config.share)
    with closing(open_trackers(done)) as trackers:
        while progress.epoch < config.last_epoch and not loop.patience_ended():
            loop.run_epoch(trackers)
            loop.end_epoch(trackers)
    return {"title": config.title, "epochs": progress.epochs, "steps": progress.steps, "best": loop.load_best()}


class _Loop:
    """A fit: its state, new or of an interrupted run, and what is done with it."""

    def __init__(self, member: Member, config: FitConfig, data: TrainDataset, callback: LiveProgress) -> None:
        self.config, self.data, self.callback, self.processes = config, data, callback, config.processes
        self.train = train = config.recipe.train
        self.effective = train.batch_size * train.accumulate
        self.epoch_steps = data_loader.steps_per_epoch(len(data), self.effective)
        if (images := len(data) // self.epoch_steps) < self.processes.world_size:
            raise DataError(
                f"{self.processes.world_size} processes share steps of {images} images; start fewer processes"
            )
        self.total = self.epoch_steps * train.epochs
        self.state_path = config.folder / STATE_FILE
        tensors, facts = checkpoint.read(self.state_path) if self.state_path.exists() else ({}, {})

        def precision_and_layout() -> tuple[str, bool]:
            if facts:  # an interrupted fit is continued as it was begun
                return facts["precision"], facts["channels_last"]
            return choose_precision_and_layout(member, train, self.processes.device_type)

        precision, channels_last = run_on_main(self.processes, precision_and_layout)
        self.state = build_train_state(member, train, self.total, precision, channels_last, self.processes)
        self.progress = self._restore(tensors, facts) if facts else _Progress()

    def run_epoch(self, trackers: Trackers) -> None:
        """The rest of an epoch; losses are read, logged and checked every GPU_SYNC_STEPS on a GPU."""
        config, state, progress, processes = self.config, self.state, self.progress, self.processes
        steps = data_loader.epoch_steps(len(self.data), self.effective, config.seed, progress.epoch)[progress.step :]
        parts = [
            data_loader.micro_batches(rows[processes.rank :: processes.world_size], self.train.batch_size)
            for rows in steps
        ]
        batches = [batch for part in parts for batch in part]
        loaded = data_loader.load_batches(self.data, progress.epoch, batches, processes.device_type)
        every = GPU_SYNC_STEPS if processes.device_type == "cuda" else 1
        logged = max(self.epoch_steps * config.last_epoch // MAX_LOGGED_STEPS, 1)
        waiting: list[torch.Tensor] = []
        saved_at = time.monotonic()
        state.network.train()
        for rows, part in zip(steps, parts, strict=True):
            number = progress.epoch * self.epoch_steps + progress.step
            factor = lr_factor(number, self.total, self.train.warmup, self.train.schedule)
            lr = self.train.lr * factor
            set_lr(state.optimizer, self.train.lr, factor)
            # of drop path and dropout; the same when the step is repeated after a kill
            step_seed = np.random.SeedSequence([config.seed, number, processes.rank, SEED_STREAM]).generate_state(1)
            torch.manual_seed(int(step_seed[0]))
            waiting.append(optimizer_step(state, [next(loaded) for _ in part], len(rows), self.callback.log))
            progress.step += 1
            if progress.step % every and progress.step < self.epoch_steps:
                continue
            values = torch.stack(waiting).tolist()
            waiting.clear()
            if any_rank(processes, not _finite(values, state.precision)):
                self._stop_for_nan(lr)
            progress.losses += sum(loss for loss, _ in values)
            loss = values[-1][0]
            self.callback.on_step(number + 1, loss, lr, len(values) * len(rows))
            if any((number + 1 - back) % logged == 0 for back in range(len(values))):
                progress.steps.append({"step": number + 1, "loss": loss, "lr": lr})
                trackers.log({"train/loss": loss, "train/lr": lr}, number + 1)
            if progress.step < self.epoch_steps and time.monotonic() - saved_at > config.save_seconds:
                self._save()
                saved_at = time.monotonic()

    def end_epoch(self, trackers: Trackers) -> None:
        """Score the epoch, save its weights if they are the best, and save the state."""
        config, state, progress = self.config, self.state, self.progress
        before = self._best()
        record: dict[str, Any] = {"epoch": progress.epoch + 1, "train_loss": progress.losses / progress.step}
        steps = (progress.epoch + 1) * progress.step
        # scored and saved with the averaged weights, if the recipe asks for an average
        with state.ema.applied(state.member) if state.ema is not None else nullcontext():
            if config.tune is not None:
                scores = (config.tune, config.reader, self.processes, state.precision, self.callback.on_scoring)
                record |= tune_scores(state.member, config.recipe, *scores)
            progress.epochs.append(record)
            progress.epoch, progress.step, progress.losses = progress.epoch + 1, 0, 0.0
            better = self._best() is record
            if better and self.processes.is_main:
                checkpoint.write(self._best_path(record), state.member.state_dict(), {"epoch": progress.epoch})
        self._save()
        if better and before is not None and self.processes.is_main:
            self._best_path(before).unlink(missing_ok=True)
        self.callback.on_epoch_end(record, better=better and config.tune is not None)
        trackers.log({f"tune/{k.removeprefix('tune_')}": v for k, v in record.items() if k.startswith("tune_")}, steps)

    def patience_ended(self) -> bool:
        """Whether so many epochs as the recipe's patience were no better than the best one."""
        patience, best = self.train.patience, self._best()
        return patience is not None and best is not None and self.progress.epoch - int(best["epoch"]) >= patience

    def load_best(self) -> int:
        """Give the member the weights of the best epoch; returns its number."""
        best = self._best()
        assert best is not None  # noqa: S101 the recipe has at least one epoch
        run_on_main(self.processes, lambda: None)  # a barrier: until the main process has written
        self.state.member.load_state_dict(checkpoint.read(self._best_path(best))[0])
        return int(best["epoch"])

    def _best(self) -> Mapping[str, Any] | None:
        return best_epoch(self.progress.epochs, self.train.tune_score)

    def _best_path(self, record: Mapping[str, Any]) -> Path:
        return self.config.folder / f"best-{int(record['epoch']):04}.safetensors"

    def _save(self) -> None:
        if not self.processes.is_main:
            return
        state = self.state
        tensors, groups = checkpoint.optimizer_state(state.optimizer)
        parts = {"member": state.member.state_dict(), "optimizer": tensors}
        facts: dict[str, Any] = {"progress": vars(self.progress), "groups": groups, "scaler": state.scaler.state_dict()}
        facts |= {"most": state.micro_batch, "precision": state.precision, "channels_last": state.channels_last}
        if state.ema is not None:
            parts["ema"] = state.ema.average
            facts["ema_count"] = state.ema.count
        named = {f"{prefix}.{name}": tensor for prefix, part in parts.items() for name, tensor in part.items()}
        checkpoint.write(self.state_path, named, facts)

    def _restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> _Progress:
        state = self.state
        state.member.load_state_dict(checkpoint.strip_prefix("member", tensors))
        checkpoint.load_optimizer_state(state.optimizer, checkpoint.strip_prefix("optimizer", tensors), facts["groups"])
        state.scaler.load_state_dict(facts["scaler"])
        state.micro_batch = facts["most"]
        if state.ema is not None:
            state.ema.load(checkpoint.strip_prefix("ema", tensors), facts["ema_count"])
        return _Progress(**facts["progress"])

    def _stop_for_nan(self, lr: float) -> None:
        """Save the last good weights as a classifier, and raise TrainingError."""
        member, best, saved = self.state.member, self._best(), ""
        source = self._best_path(best) if best is not None else self.state_path
        if self.processes.is_main and source.exists():
            tensors, _ = checkpoint.read(source)
            member.load_state_dict(tensors if best is not None else checkpoint.strip_prefix("member", tensors))
            if self.config.recipe.adapt.mode == "lora":
                merge_lora(member)
            folder = self.config.folder / "last_good"
            artifacts.ensure_folder(folder)
            save_classifier(member.cpu(), folder)
            saved = f"; the last good weights are in {folder}"
        raise TrainingError(
            f"the loss is no longer a number in epoch {self.progress.epoch + 1}, step {self.progress.step}, at lr "
            f"{lr:.2g} in {self.state.precision}{saved}; lower train.lr or train.clip, or set train.precision=fp32, "
            "and add --fresh"
        )


def _finite(values: list[list[float]], precision: str) -> bool:
    """Whether losses and gradient norms are finite; fp16 skips steps whose scaled gradients overflow."""
    return all(math.isfinite(loss) and (precision == "fp16" or math.isfinite(norm)) for loss, norm in values)
