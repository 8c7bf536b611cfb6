"""One member: fine-tune on train rows, choose the epoch on tune rows, score the held-out ones."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
import transformers

from ensemble.core import artifacts
from ensemble.core.names import LABELS
from ensemble.core.recipe import Recipe
from ensemble.data import dataset, splits
from ensemble.data.splits import FITTED_SPLITS
from ensemble.images import canonical
from ensemble.images.canonical import Plan
from ensemble.models.backbone import Member, build_member, save_classifier
from ensemble.models.checkpoints import hub_name
from ensemble.models.lora import merge_lora
from ensemble.training import checkpoint as unfinished
from ensemble.training import tracking
from ensemble.training.data_loader import TrainDataset
from ensemble.training.distributed import ProcessGroup, run_on_main
from ensemble.training.linear_probe import fit_probe
from ensemble.training.loop import FitConfig, fit
from ensemble.training.optimizer import prepare_for_training
from ensemble.training.progress import TrainingCallback
from ensemble.training.tracking import open_trackers
from ensemble.training.validation import RowReader, predict_logits

TRAINING_VERSION = 2  # raised by hand when training the same recipe would give another member

ALONE = ProcessGroup()
SCORE_COLUMNS = ["id", "label", "split", "fold"]


@dataclass(frozen=True)
class TrainContext:
    """How members are trained, whatever their recipe.

    report_to: trackers by name. save_minutes: between states of an unfinished epoch. beside: how many
    members may be trained on this machine at once, which share its memory.
    """

    seed: int = 0
    processes: ProcessGroup = ALONE
    report_to: tuple[str, ...] = ()
    save_minutes: float = 10.0
    beside: int = 1


@dataclass(frozen=True)
class _Task:
    """One member's fits: the same recipe and checkpoint on other rows."""

    recipe: Recipe
    checkpoint: Path | None
    setup: TrainContext
    plan: Plan | None
    run: Path
    work: Path
    board: TrainingCallback

    @property
    def seed(self) -> int:
        return self.setup.seed if self.recipe.train.seed is None else self.recipe.train.seed

    @property
    def reading(self) -> RowReader:
        return RowReader(self.plan, self.setup.seed)


def train_member(
    recipe: Recipe,
    checkpoint: Path | None,
    frame: pd.DataFrame,
    run: Path,
    setup: TrainContext,
    board: TrainingCallback,
) -> dict[str, Any]:
    """Train one member and move it to its place in the run; returns its member.json.

    frame: the run's rows. checkpoint: see `build_member`. An interrupted training of the
    same recipe and rows is gone on from. An older member of the same name is replaced only
    once this one is complete.
    """
    started = time.monotonic()
    kind = unfinished.training_fingerprint(recipe, dataset.run_sha256(frame, run), setup.seed, TRAINING_VERSION)
    work = run_on_main(setup.processes, lambda: unfinished.open_workdir(run, recipe.name, kind))
    plan = canonical.read_plan(artifacts.canonical_path(run))
    task = _Task(recipe, checkpoint, setup, plan, run, work, board)
    member, parts, scored = (_folded if frame["fold"].notna().any() else _plain)(task, frame)

    def finish() -> dict[str, Any]:
        folder = work / "member"
        shutil.rmtree(folder, ignore_errors=True)
        artifacts.write_parquet(folder / "heldout.parquet", scored)
        artifacts.write_json(folder / "history.json", {"parts": parts})
        tracking.draw_curves({"parts": parts}, folder / "curves.png")
        save_classifier(member.cpu(), folder)
        info = {
            "name": recipe.name,
            "labels": list(LABELS),
            "contract": member.preprocess_config.to_dict(),
            "parameters": sum(p.numel() for p in member.parameters()),
            "best": _best(parts),
            "folds": int(frame["fold"].max()) + 1 if frame["fold"].notna().any() else None,
            "recipe_sha256": recipe.sha256,
            "hub_checkpoint": hub_name(recipe.backbone.checkpoint, checkpoint),
            **kind,
            "files": {path.name: artifacts.file_sha256(path) for path in sorted(folder.iterdir())},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "device": setup.processes.device,
            "seconds": round(time.monotonic() - started, 1),
        }
        artifacts.write_json(folder / "member.json", info)
        artifacts.replace_folder(folder, artifacts.member_path(run, recipe.name))
        shutil.rmtree(work, ignore_errors=True)
        return info

    return run_on_main(setup.processes, finish)


def _plain(task: _Task, frame: pd.DataFrame) -> tuple[Member, list[dict[str, Any]], pd.DataFrame]:
    """Train on train rows, choose on tune rows, score the others: (member, its history, scored rows)."""
    train, tune = (frame[frame["split"] == split] for split in FITTED_SPLITS)
    member, history = _fit(task, train, tune, "fit", "", task.recipe.train.epochs)
    return member, [history], _scored(task, member, frame[~frame["split"].isin(FITTED_SPLITS)])


def _folded(task: _Task, frame: pd.DataFrame) -> tuple[Member, list[dict[str, Any]], pd.DataFrame]:
    """Out-of-fold logits of train and tune rows, then one refit on all of them for as long as the folds chose.

    A fold that is done stands on disk, and is not fitted again after a kill.
    """
    count = int(frame["fold"].max()) + 1
    histories, scored = [], []
    for fold in range(count):
        folder = task.work / f"fold-{fold + 1}"
        title, share = f"fold {fold + 1}/{count}", 1 / (count + 1)
        if (folder / "done.json").is_file():
            task.board.part(title, 1, 1, 1, share)
        else:
            train, tune, rows = splits.fold_parts(frame, fold, task.setup.seed)
            member, history = _fit(task, train, tune, folder.name, title, task.recipe.train.epochs, share)
            logits = _scored(task, member, rows)
            run_on_main(task.setup.processes, partial(_finish_fold, folder, history, logits))
        histories.append(artifacts.read_json(folder / "done.json", unfinished.REMEDY)["history"])
        scored.append(artifacts.read_parquet(folder / "scored.parquet", unfinished.REMEDY))
    epochs = splits.chosen_epochs(history["best"] for history in histories)
    fitted = frame[frame["split"].isin(FITTED_SPLITS)]
    strength = float(np.median([history["epochs"][-1].get("strength", 1.0) for history in histories]))
    member, history = _fit(task, fitted, None, "refit", "refit", epochs, 1 / (count + 1), strength)
    scored.append(_scored(task, member, frame[~frame["split"].isin(FITTED_SPLITS)]))
    return member, [*histories, history], pd.concat(scored, ignore_index=True)


def _finish_fold(folder: Path, history: dict[str, Any], scored: pd.DataFrame) -> None:
    artifacts.write_parquet(folder / "scored.parquet", scored)
    artifacts.write_json(folder / "done.json", {"history": history})
    for path in folder.glob("*.safetensors"):
        path.unlink()


def _fit(
    task: _Task,
    train: pd.DataFrame,
    tune: pd.DataFrame | None,
    folder: str,
    title: str,
    last_epoch: int,
    share: float = 1.0,
    strength: float = 1.0,
) -> tuple[Member, dict[str, Any]]:
    """A member from the recipe's start, trained on these rows as its `adapt.mode` says, and the fit's history.

    strength: of a probe without tune rows.
    """
    recipe, setup, board = task.recipe, task.setup, task.board
    transformers.set_seed(task.seed)
    member = build_member(recipe, task.checkpoint)
    if recipe.adapt.mode == "probe":
        arguments = (train, tune, task.plan, task.seed, setup.processes.device_type, board.scoring, strength)
        probe = partial(fit_probe, member, recipe, *arguments)
        board.part(title, 1, 1, share=share)
        record = run_on_main(setup.processes, probe)
        if not setup.processes.is_main:
            probe()  # from the features that the first process has kept
        board.epoch(record, better=tune is not None)
        return member, {"title": title, "epochs": [record], "steps": [], "best": 1}
    prepare_for_training(member, recipe)
    device = setup.processes.device_type
    keep = psutil.virtual_memory().available // (4 * setup.beside) if device == "cpu" else 0
    labels = train["label"].to_numpy()
    augment, files = recipe.augment, dataset.files(train)
    rows = TrainDataset(files, labels, member.preprocess_config, augment, task.seed, task.plan, keep)
    job = FitConfig(
        recipe, rows, tune, task.reading, last_epoch, task.work / folder, task.seed, setup.processes, title, share,
        60 * setup.save_minutes,
    )  # fmt: skip
    report_to = setup.report_to if setup.processes.is_main else ()
    logs, name = artifacts.logs_path(task.run), f"{recipe.name}/{folder}"
    config = recipe.model_dump(mode="json")
    history = fit(member, job, board, partial(open_trackers, report_to, logs, name, config))
    if recipe.adapt.mode == "lora":
        merge_lora(member)
    return member, history


def _scored(task: _Task, member: Member, rows: pd.DataFrame) -> pd.DataFrame:
    """id, label, split, fold, logit of rows that no weight and no choice has seen, in float32 arithmetic."""
    progress = task.board.scoring("held-out", len(rows))
    logits = predict_logits(member, task.recipe, rows, task.reading, task.setup.processes, progress=progress)
    return rows[SCORE_COLUMNS].assign(logit=logits).reset_index(drop=True)


def _best(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The chosen epoch and its tune scores; with folds the refit's last epoch and the folds' mean scores."""
    chosen = [next(e for e in part["epochs"] if e["epoch"] == part["best"]) for part in parts]
    scored = [epoch for epoch in chosen if "tune_score" in epoch]
    names = [name for name, value in scored[0].items() if isinstance(value, float)]
    means = {name: float(np.mean([epoch[name] for epoch in scored])) for name in names}
    return {**chosen[-1], **means}
