"""Trains one member: fit on train rows, choose the epoch on tune rows, score the held-out ones."""

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
from ensemble.images.canonical import CanonicalPlan
from ensemble.models.backbone import Member, build_member, save_classifier
from ensemble.models.checkpoints import hub_id
from ensemble.models.lora import merge_lora
from ensemble.training import checkpoint, tracking
from ensemble.training.data_loader import TrainDataset
from ensemble.training.distributed import ProcessGroup, run_on_main
from ensemble.training.linear_probe import ProbeConfig, fit_probe
from ensemble.training.loop import FitConfig, fit
from ensemble.training.optimizer import prepare_for_training
from ensemble.training.progress import LiveProgress
from ensemble.training.tracking import open_trackers
from ensemble.training.validation import RowReader, predict_logits

TRAINING_VERSION = 2  # raised by hand when training the same recipe would give another member

SINGLE_PROCESS = ProcessGroup()
SCORE_COLUMNS = ["id", "label", "split", "fold"]


@dataclass(frozen=True)
class Outcome:
    """The result for one recipe; status: trained, unchanged or failed. score: the held-out AUROC as text."""

    name: str
    status: str
    seconds: float = 0.0
    error: str = ""
    score: str = ""


@dataclass(frozen=True)
class TrainContext:
    """How members are trained, whatever their recipe.

    report_to: trackers by name. save_minutes: between two saved states of an unfinished epoch. parallel_members: how
    many members may be trained on this machine at once; they share its memory.
    """

    seed: int = 0
    processes: ProcessGroup = SINGLE_PROCESS
    report_to: tuple[str, ...] = ()
    save_minutes: float = 10.0
    parallel_members: int = 1


@dataclass(frozen=True)
class MemberRun:
    """One member's training. checkpoint: see `build_member`. workdir: where unfinished work is kept."""

    recipe: Recipe
    checkpoint: Path | None
    context: TrainContext
    plan: CanonicalPlan | None
    run: Path
    workdir: Path
    callback: LiveProgress

    @property
    def seed(self) -> int:
        """The recipe's own seed, or else the run's."""
        return self.context.seed if self.recipe.train.seed is None else self.recipe.train.seed

    @property
    def reader(self) -> RowReader:
        """Reads images for scoring; canonical forms depend on the run's seed, as for every member."""
        return RowReader(self.plan, self.context.seed)


@dataclass(frozen=True)
class _Part:
    """One fit of a member: a fold, the refit, or its only fit.

    tune: the rows that choose the epoch; None takes `last_epoch`. share: of the member's work. C: inverse
    regularisation strength of a linear probe without tune rows.
    """

    train: pd.DataFrame
    tune: pd.DataFrame | None
    folder: str
    last_epoch: int
    title: str = ""
    share: float = 1.0
    C: float = 1.0


def member_fingerprint(recipe: Recipe, frame: pd.DataFrame, run: Path, context: TrainContext) -> dict[str, Any]:
    """What decides the result of the member's training on the rows of the run."""
    data_sha256 = dataset.run_sha256(frame, run)
    return checkpoint.training_fingerprint(recipe, data_sha256, context.seed, TRAINING_VERSION)


def train_member(
    recipe: Recipe,
    checkpoint_folder: Path | None,
    frame: pd.DataFrame,
    run: Path,
    context: TrainContext,
    callback: LiveProgress,
) -> dict[str, Any]:
    """Train one member and move it to its folder in the run; returns its member.json.

    frame: the run's rows. checkpoint_folder: see `build_member`. An interrupted training of the same recipe and rows
    is continued. An older member of the same name is replaced only once this one is complete.
    """
    started = time.monotonic()
    fingerprint = member_fingerprint(recipe, frame, run, context)
    workdir = run_on_main(context.processes, lambda: checkpoint.open_workdir(run, recipe.name, fingerprint))
    plan = canonical.read_plan(artifacts.canonical_path(run))
    member_run = MemberRun(recipe, checkpoint_folder, context, plan, run, workdir, callback)
    folds = int(frame["fold"].max()) + 1 if frame["fold"].notna().any() else None
    member, histories, scored = _fit_once(member_run, frame) if folds is None else _fit_folds(member_run, frame, folds)
    save = partial(_save_member, member_run, member, histories, scored, fingerprint, started)
    return run_on_main(context.processes, save)


def _save_member(
    member_run: MemberRun,
    member: Member,
    histories: list[dict[str, Any]],
    scored: pd.DataFrame,
    fingerprint: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """Write the member's folder and put it into the run as a whole; member.json, which is returned, comes last."""
    recipe, folder = member_run.recipe, member_run.workdir / "member"
    shutil.rmtree(folder, ignore_errors=True)
    artifacts.write_parquet(folder / "heldout.parquet", scored)
    artifacts.write_json(folder / "history.json", {"parts": histories})
    tracking.draw_curves({"parts": histories}, folder / "curves.png")
    save_classifier(member.cpu(), folder)
    info = {
        "name": recipe.name,
        "labels": list(LABELS),
        "contract": member.preprocess_config.to_dict(),
        "parameters": sum(p.numel() for p in member.parameters()),
        "best": _best(histories),
        "folds": len(histories) - 1 or None,
        "recipe_sha256": recipe.sha256,
        "hub_checkpoint": hub_id(recipe.backbone.checkpoint, member_run.checkpoint),
        **fingerprint,
        "files": {path.name: artifacts.file_sha256(path) for path in sorted(folder.iterdir())},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": member_run.context.processes.device,
        "seconds": round(time.monotonic() - started, 1),
    }
    artifacts.write_json(folder / "member.json", info)
    artifacts.replace_folder(folder, artifacts.member_path(member_run.run, recipe.name))
    shutil.rmtree(member_run.workdir, ignore_errors=True)
    return info


def _fit_once(member_run: MemberRun, frame: pd.DataFrame) -> tuple[Member, list[dict[str, Any]], pd.DataFrame]:
    """Train on train rows, choose on tune rows, score the others: (member, its history, scored rows)."""
    train, tune = (frame[frame["split"] == split] for split in FITTED_SPLITS)
    member, history = _fit(member_run, _Part(train, tune, "fit", member_run.recipe.train.epochs))
    return member, [history], _scored(member_run, member, frame[~frame["split"].isin(FITTED_SPLITS)])


def _fit_folds(
    member_run: MemberRun, frame: pd.DataFrame, folds: int
) -> tuple[Member, list[dict[str, Any]], pd.DataFrame]:
    """Out-of-fold logits of train and tune rows, then one refit on all of them for as long as the folds chose.

    A finished fold is kept on disk, and is not fitted again after a kill.
    """
    processes, share = member_run.context.processes, 1 / (folds + 1)
    histories, scored = [], []
    for fold in range(folds):
        folder, title = member_run.workdir / f"fold-{fold + 1}", f"fold {fold + 1}/{folds}"
        if (folder / "done.json").is_file():
            member_run.callback.on_fit_begin(title, 1, 1, 1, share)
        else:
            train, tune, rows = splits.fold_parts(frame, fold, member_run.context.seed)
            part = _Part(train, tune, folder.name, member_run.recipe.train.epochs, title, share)
            member, history = _fit(member_run, part)
            run_on_main(processes, partial(_finish_fold, folder, history, _scored(member_run, member, rows)))
        histories.append(artifacts.read_json(folder / "done.json", checkpoint.REMEDY)["history"])
        scored.append(artifacts.read_parquet(folder / "scored.parquet", checkpoint.REMEDY))
    epochs = splits.chosen_epochs(history["best"] for history in histories)
    fitted = frame[frame["split"].isin(FITTED_SPLITS)]
    median_c = float(np.median([history["epochs"][-1].get("strength", 1.0) for history in histories]))
    member, history = _fit(member_run, _Part(fitted, None, "refit", epochs, "refit", share, median_c))
    scored.append(_scored(member_run, member, frame[~frame["split"].isin(FITTED_SPLITS)]))
    return member, [*histories, history], pd.concat(scored, ignore_index=True)


def _finish_fold(folder: Path, history: dict[str, Any], scored: pd.DataFrame) -> None:
    artifacts.write_parquet(folder / "scored.parquet", scored)
    artifacts.write_json(folder / "done.json", {"history": history})
    for path in folder.glob("*.safetensors"):
        path.unlink()


def _fit(member_run: MemberRun, part: _Part) -> tuple[Member, dict[str, Any]]:
    """A newly built member, trained on the part's rows as the recipe's `adapt.mode` says, and the fit's history."""
    transformers.set_seed(member_run.seed)
    member = build_member(member_run.recipe, member_run.checkpoint)
    if member_run.recipe.adapt.mode == "probe":
        return member, _fit_probe(member_run, part, member)
    return member, _fit_gradients(member_run, part, member)


def _fit_probe(member_run: MemberRun, part: _Part, member: Member) -> dict[str, Any]:
    processes, callback = member_run.context.processes, member_run.callback
    config = ProbeConfig(
        member_run.recipe, part.train, part.tune, member_run.plan, member_run.seed, processes.device_type, part.C
    )
    callback.on_fit_begin(part.title, 1, 1, share=part.share)
    record = run_on_main(processes, lambda: fit_probe(member, config, callback.on_scoring))
    if not processes.is_main:
        fit_probe(member, config, callback.on_scoring)  # from the features that the main process has cached
    callback.on_epoch_end(record, better=part.tune is not None)
    return {"title": part.title, "epochs": [record], "steps": [], "best": 1}


def _fit_gradients(member_run: MemberRun, part: _Part, member: Member) -> dict[str, Any]:
    recipe, context = member_run.recipe, member_run.context
    prepare_for_training(member, recipe)
    on_cpu = context.processes.device_type == "cpu"
    cache_bytes = psutil.virtual_memory().available // (4 * context.parallel_members) if on_cpu else 0
    files, labels = dataset.files(part.train), part.train["label"].to_numpy()
    config = FitConfig(
        recipe=recipe,
        train=TrainDataset(
            files, labels, member.preprocess_config, recipe.augment, member_run.seed, member_run.plan, cache_bytes
        ),
        tune=part.tune,
        reader=member_run.reader,
        last_epoch=part.last_epoch,
        folder=member_run.workdir / part.folder,
        seed=member_run.seed,
        processes=context.processes,
        title=part.title,
        share=part.share,
        save_seconds=60 * context.save_minutes,
    )
    report_to = context.report_to if context.processes.is_main else ()
    logs, name = artifacts.logs_path(member_run.run), f"{recipe.name}/{part.folder}"
    trackers = partial(open_trackers, report_to, logs, name, recipe.model_dump(mode="json"))
    history = fit(member, config, member_run.callback, trackers)
    if recipe.adapt.mode == "lora":
        merge_lora(member)
    return history


def _scored(member_run: MemberRun, member: Member, rows: pd.DataFrame) -> pd.DataFrame:
    """id, label, split, fold, logit of rows that no weight and no choice has seen, in float32 arithmetic."""
    progress = member_run.callback.on_scoring("held-out", len(rows))
    logits = predict_logits(
        member, member_run.recipe, rows, member_run.reader, member_run.context.processes, progress=progress
    )
    return rows[SCORE_COLUMNS].assign(logit=logits).reset_index(drop=True)


def _best(histories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The chosen epoch and its tune scores; with folds the refit's last epoch and the folds' mean scores."""
    chosen = [next(e for e in history["epochs"] if e["epoch"] == history["best"]) for history in histories]
    scored = [epoch for epoch in chosen if "tune_score" in epoch]
    names = [name for name, value in scored[0].items() if isinstance(value, float)]
    means = {name: float(np.mean([epoch[name] for epoch in scored])) for name in names}
    return {**chosen[-1], **means}
