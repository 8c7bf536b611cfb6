"""Trains one member: fit on train rows, choose the epoch on tune rows, score the held-out ones."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from ensemble.models.backbone import Member, build_member, save_classifier
from ensemble.models.checkpoints import hub_id
from ensemble.models.lora import merge_lora
from ensemble.training import checkpoint, tracking
from ensemble.training.data_loader import TrainDataset
from ensemble.training.distributed import ProcessGroup, run_on_main
from ensemble.training.linear_probe import fit_probe
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
    """One member's training. config: what its fits share, and the work folder. checkpoint: see `build_member`."""

    config: FitConfig
    checkpoint: Path | None
    context: TrainContext
    run: Path
    callback: LiveProgress


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
    # canonical forms depend on the run's seed, as for every member
    reader = RowReader(canonical.read_plan(artifacts.canonical_path(run)), context.seed)
    seed = context.seed if recipe.train.seed is None else recipe.train.seed
    common = (reader, recipe.train.epochs, workdir, seed, context.processes)
    config = FitConfig(recipe, frame, None, *common, save_seconds=60 * context.save_minutes)
    member_run = MemberRun(config, checkpoint_folder, context, run, callback)
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
    recipe, workdir = member_run.config.recipe, member_run.config.folder
    folder = workdir / "member"
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
    shutil.rmtree(workdir, ignore_errors=True)
    return info


def _fit_once(member_run: MemberRun, frame: pd.DataFrame) -> tuple[Member, list[dict[str, Any]], pd.DataFrame]:
    """Train on train rows, choose on tune rows, score the others: (member, its history, scored rows)."""
    train, tune = (frame[frame["split"] == split] for split in FITTED_SPLITS)
    config = replace(member_run.config, train=train, tune=tune, folder=member_run.config.folder / "fit")
    member, history = _fit(member_run, config)
    return member, [history], _scored(member_run, member, frame[~frame["split"].isin(FITTED_SPLITS)])


def _fit_folds(
    member_run: MemberRun, frame: pd.DataFrame, folds: int
) -> tuple[Member, list[dict[str, Any]], pd.DataFrame]:
    """Out-of-fold logits of train and tune rows, then one refit on all of them for as long as the folds chose.

    A finished fold is kept on disk, and is not fitted again after a kill.
    """
    common = replace(member_run.config, share=1 / (folds + 1))
    histories, scored = [], []
    for fold in range(folds):
        folder, title = common.folder / f"fold-{fold + 1}", f"fold {fold + 1}/{folds}"
        if (folder / "done.json").is_file():
            member_run.callback.on_fit_begin(title, 1, 1, 1, common.share)
        else:
            train, tune, rows = splits.fold_parts(frame, fold, member_run.context.seed)
            member, history = _fit(member_run, replace(common, train=train, tune=tune, folder=folder, title=title))
            run_on_main(common.processes, partial(_finish_fold, folder, history, _scored(member_run, member, rows)))
        histories.append(artifacts.read_json(folder / "done.json", checkpoint.REMEDY)["history"])
        scored.append(artifacts.read_parquet(folder / "scored.parquet", checkpoint.REMEDY))
    epochs = splits.chosen_epochs(history["best"] for history in histories)
    fitted = frame[frame["split"].isin(FITTED_SPLITS)]
    median_c = float(np.median([history["epochs"][-1].get("strength", 1.0) for history in histories]))
    refit = replace(common, train=fitted, last_epoch=epochs, folder=common.folder / "refit", title="refit", C=median_c)
    member, history = _fit(member_run, refit)
    scored.append(_scored(member_run, member, frame[~frame["split"].isin(FITTED_SPLITS)]))
    return member, [*histories, history], pd.concat(scored, ignore_index=True)


def _finish_fold(folder: Path, history: dict[str, Any], scored: pd.DataFrame) -> None:
    artifacts.write_parquet(folder / "scored.parquet", scored)
    artifacts.write_json(folder / "done.json", {"history": history})
    for path in folder.glob("*.safetensors"):
        path.unlink()


def _fit(member_run: MemberRun, config: FitConfig) -> tuple[Member, dict[str, Any]]:
    """A newly built member, trained as the recipe's `adapt.mode` says, and the fit's history."""
    recipe, context, processes = config.recipe, member_run.context, config.processes
    transformers.set_seed(config.seed)
    member = build_member(recipe, member_run.checkpoint)
    if recipe.adapt.mode == "probe":
        return member, _fit_probe(member, config, member_run.callback)
    prepare_for_training(member, recipe)
    on_cpu = processes.device_type == "cpu"
    cache_bytes = psutil.virtual_memory().available // (4 * context.parallel_members) if on_cpu else 0
    files, labels = dataset.files(config.train), config.train["label"].to_numpy()
    contract, plan = member.preprocess_config, config.reader.plan
    data = TrainDataset(files, labels, contract, recipe.augment, config.seed, plan, cache_bytes)
    report_to = context.report_to if processes.is_main else ()
    logs, name = artifacts.logs_path(member_run.run), f"{recipe.name}/{config.folder.name}"
    trackers = partial(open_trackers, report_to, logs, name, recipe.model_dump(mode="json"))
    history = fit(member, config, data, member_run.callback, trackers)
    if recipe.adapt.mode == "lora":
        merge_lora(member)
    return member, history


def _fit_probe(member: Member, config: FitConfig, callback: LiveProgress) -> dict[str, Any]:
    callback.on_fit_begin(config.title, 1, 1, share=config.share)
    record = run_on_main(config.processes, lambda: fit_probe(member, config, callback.on_scoring))
    if not config.processes.is_main:
        fit_probe(member, config, callback.on_scoring)  # from the features that the main process has cached
    callback.on_epoch_end(record, better=config.tune is not None)
    return {"title": config.title, "epochs": [record], "steps": [], "best": 1}


def _scored(member_run: MemberRun, member: Member, rows: pd.DataFrame) -> pd.DataFrame:
    """id, label, split, fold, logit of rows that no weight and no choice has seen, in float32 arithmetic."""
    progress = member_run.callback.on_scoring("held-out", len(rows))
    config = member_run.config
    logits = predict_logits(member, config.recipe, rows, config.reader, config.processes, progress=progress)
    return rows[SCORE_COLUMNS].assign(logit=logits).reset_index(drop=True)


def _best(histories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The chosen epoch and its tune scores; with folds the refit's last epoch and the folds' mean scores."""
    chosen = [next(e for e in history["epochs"] if e["epoch"] == history["best"]) for history in histories]
    scored = [epoch for epoch in chosen if "tune_score" in epoch]
    names = [name for name, value in scored[0].items() if isinstance(value, float)]
    means = {name: float(np.mean([epoch[name] for epoch in scored])) for name in names}
    return {**chosen[-1], **means}
