"""Trains every recipe of a run that is not already trained, on an engine: in this process, or on a cluster."""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import pandas as pd
from rich.console import Console
from tqdm import tqdm

from ensemble.core import artifacts, metrics
from ensemble.core.errors import BackboneError, ManyeyesError, error_line
from ensemble.core.log import Log, no_log
from ensemble.core.recipe import Recipe
from ensemble.data import dataset
from ensemble.images import canonical
from ensemble.models import members
from ensemble.models.checkpoints import check_source, locate_checkpoint, weights_file
from ensemble.models.torch_runner import choose_device
from ensemble.training import checkpoint, precision
from ensemble.training.distributed import run_on_main
from ensemble.training.dry_run import Estimate, estimate_member
from ensemble.training.optimizer import check_network
from ensemble.training.progress import LiveProgress
from ensemble.training.tracking import check_trackers
from ensemble.training.train_member import TRAINING_VERSION, Outcome, TrainContext, member_fingerprint, train_member
from ensemble.training.validation import RowReader

T = TypeVar("T")


@dataclass(frozen=True)
class TrainPlan:
    """What is trained: `todo` are those of `recipes` whose member is missing or was made from other values.

    frame: the rows of `run`. checkpoints: folders, see `recipe_checkpoint`, and weight_bytes: the size of the weights,
    both by name for `todo`. resumed: names of members whose interrupted training is continued.
    """

    recipes: Sequence[Recipe]
    todo: Sequence[Recipe]
    frame: pd.DataFrame
    run: Path
    context: TrainContext
    checkpoints: Mapping[str, Path | None]
    weight_bytes: Mapping[str, int]
    resumed: Sequence[str] = ()

    def announcement(self, recipe: Recipe, where: str = "") -> str:
        """The line about a recipe before it is trained on `where`, or skipped."""
        lead = f"[{self.recipes.index(recipe) + 1}/{len(self.recipes)}] {recipe.name}: "
        if recipe not in self.todo:
            return f"{lead}unchanged, not trained again"
        return f"{lead}{'going on with its training' if recipe.name in self.resumed else 'training'} on {where}"


class Engine(Protocol):
    """Where members are trained."""

    def parallel_members(self, plan: TrainPlan) -> int:
        """How many members are trained at the same time, at most."""

    def train_members(self, plan: TrainPlan, log: Log) -> list[Outcome]:
        """Train `plan.todo`; returns the outcomes of all recipes, in order."""


class LocalEngine:
    """Trains one member after the other in this process, or in the processes that a launcher has started."""

    def parallel_members(self, plan: TrainPlan) -> int:
        """See `Engine`."""
        return 1

    def train_members(self, plan: TrainPlan, log: Log) -> list[Outcome]:
        """See `Engine`."""
        outcomes = []
        processes = plan.context.processes
        console = None if processes.is_main else Console(quiet=True)
        with LiveProgress([recipe.name for recipe in plan.recipes], log, console) as progress:
            for recipe in plan.recipes:
                progress.log(plan.announcement(recipe, processes.device))
                outcome = Outcome(recipe.name, "unchanged")
                if recipe in plan.todo:
                    progress.begin_member(recipe.name, processes.device)
                    checkpoint_folder = plan.checkpoints[recipe.name]
                    outcome = train_one(recipe, checkpoint_folder, plan.frame, plan.run, plan.context, progress)
                    if outcome.status == "failed":
                        progress.log(f"  failed: {outcome.error}")
                progress.end_member(recipe.name, outcome.status, outcome.score, outcome.seconds, outcome.error)
                outcomes.append(outcome)
        return outcomes


def check_ready(recipes: Sequence[Recipe], device: str, report_to: Sequence[str] = (), remote: bool = False) -> None:
    """Raise, all problems together, for what is known to fail before any image is read.

    remote: members are trained on other machines, which check their own precision.
    """
    device_type = device if remote else choose_device(device)
    check_trackers(report_to)
    for recipe in recipes:
        if not remote or (recipe.train.precision, device_type) == ("fp16", "cpu"):  # no CPU trains in fp16
            precision.check_precision(recipe.train.precision, device_type)
    _for_each(recipes, lambda recipe: check_source(recipe.backbone))


def train_all(
    recipes: Sequence[Recipe],
    frame: pd.DataFrame,
    run: Path,
    context: TrainContext,
    log: Log,
    fresh: bool = False,
    engine: Engine | None = None,
) -> list[Outcome]:
    """Train each recipe whose member is missing or was made from other values; by default in this process.

    A member that fails is reported and the others are still trained; its traceback is written to the run's work
    folder. Interrupted trainings are continued, or with `fresh` thrown away. Raises before any training if a
    checkpoint cannot be had, the disk is too small, or a network cannot be trained as its recipe says.
    """
    engine, processes = engine or LocalEngine(), context.processes
    log = log if processes.is_main else no_log
    plan = _plan(recipes, frame, run, run, context, lambda todo: checkpoint.find_resumable(run, todo, fresh, log))
    if processes.is_main:
        checkpoint.check_disk(run, list(plan.weight_bytes.values()), max(engine.parallel_members(plan), 1))
    run_on_main(processes, lambda: _check_networks(plan))
    return engine.train_members(plan, log)


def dry_run(
    recipes: Sequence[Recipe], frame: pd.DataFrame, run: Path, data_run: Path, context: TrainContext
) -> list[tuple[str, Estimate | None]]:
    """What each recipe would take, None for a member of `run` that would not be trained again.

    data_run: a run's folder with the rows of `frame`; nothing is written in `run`.
    """
    plan = _plan(recipes, frame, run, data_run, context)
    checkpoint.check_disk(run, list(plan.weight_bytes.values()))
    _check_networks(plan)
    reader = RowReader(canonical.read_plan(artifacts.canonical_path(data_run)), context.seed)

    def estimate(recipe: Recipe) -> Estimate | None:
        if recipe not in plan.todo:
            return None
        return estimate_member(recipe, plan.checkpoints[recipe.name], frame, reader, context.processes)

    bar = tqdm(recipes, "timing steps", unit="member", leave=False, disable=None)
    return [(recipe.name, estimate(recipe)) for recipe in bar]


def _plan(
    recipes: Sequence[Recipe],
    frame: pd.DataFrame,
    run: Path,
    data_run: Path,
    context: TrainContext,
    resumable: Callable[[Mapping[str, Mapping[str, object]]], Sequence[str]] = lambda todo: (),
) -> TrainPlan:
    """What `run` lacks. resumable: names of members to resume, from the fingerprints by name of what is to do."""
    precision.keep_freed_memory()
    data = dataset.run_sha256(frame, data_run)
    fingerprints = {r.name: checkpoint.training_fingerprint(r, data, context.seed, TRAINING_VERSION) for r in recipes}
    todo = [recipe for recipe in recipes if not members.is_current(run, recipe.name, fingerprints[recipe.name])]
    resumed = run_on_main(context.processes, lambda: resumable({r.name: fingerprints[r.name] for r in todo}))
    checkpoints = run_on_main(context.processes, lambda: _for_each(todo, recipe_checkpoint))
    weight_bytes = {recipe.name: _weight_bytes(recipe, checkpoints[recipe.name]) for recipe in todo}
    return TrainPlan(recipes, todo, frame, run, context, checkpoints, weight_bytes, resumed)


def _check_networks(plan: TrainPlan) -> None:
    _for_each(plan.todo, lambda recipe: check_network(recipe, plan.checkpoints[recipe.name]))


def _weight_bytes(recipe: Recipe, checkpoint_folder: Path | None) -> int:
    """About how many bytes the member's weights take; 0 for an architecture without weights, which is small."""
    if checkpoint_folder is not None:
        files = (file for suffix in ("*.safetensors", "*.bin") for file in checkpoint_folder.glob(suffix))
        return max((file.stat().st_size for file in files), default=0)
    return weights_file(recipe.backbone.weights).stat().st_size if recipe.backbone.weights is not None else 0


def recipe_checkpoint(recipe: Recipe) -> Path | None:
    """The folder of the recipe's checkpoint, which may be downloaded for it; None for an architecture."""
    name = recipe.backbone.checkpoint
    return locate_checkpoint(name) if name is not None else None


def _for_each(recipes: Sequence[Recipe], function: Callable[[Recipe], T]) -> dict[str, T]:
    """The function's value for every recipe by name, or one BackboneError with the errors of all."""
    values: dict[str, T] = {}
    problems = []
    for recipe in recipes:
        try:
            values[recipe.name] = function(recipe)
        except BackboneError as error:
            problems.append(f"{recipe.name}: {error}")
    if problems:
        raise BackboneError("\n".join(problems))
    return values


def train_one(
    recipe: Recipe,
    checkpoint_folder: Path | None,
    frame: pd.DataFrame,
    run: Path,
    context: TrainContext,
    callback: LiveProgress,
) -> Outcome:
    """Train a member of a prepared run, unless another process has just done so.

    An error becomes a failed outcome; where several processes train together it is raised.
    """
    started = time.monotonic()
    fingerprint = member_fingerprint(recipe, frame, run, context)
    try:
        with ExitStack() as stack:

            def is_current() -> bool:
                stack.enter_context(checkpoint.member_lock(run, recipe.name, callback.log))
                return members.is_current(run, recipe.name, fingerprint)

            if not run_on_main(context.processes, is_current):
                train_member(recipe, checkpoint_folder, frame, run, context, callback)
    except Exception as error:
        # Whatever broke this member, the others are worth their hours.
        line = error_line(error, first=True)
        if not isinstance(error, ManyeyesError):
            log = artifacts.work_path(run, recipe.name) / "error.txt"
            artifacts.ensure_folder(log.parent)
            log.write_text(traceback.format_exc(), encoding="utf-8")
            line = f"{line} (details in {log})"
        if context.processes.world_size > 1:
            raise  # the other processes wait for this one: the launcher ends them all
        return Outcome(recipe.name, "failed", time.monotonic() - started, line)
    rows, logits = members.heldout_logits(run, [recipe.name])
    score = metrics.auroc(rows["label"].to_numpy(), logits[:, 0])
    return Outcome(recipe.name, "trained", time.monotonic() - started, score=f"{score:.4f}")


def summary(run: Path, outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row a recipe: status, best epoch, tune and held-out scores, minutes."""
    finished = [outcome.name for outcome in outcomes if outcome.status != "failed"]
    scores: dict[str, np.ndarray] = {}
    labels, unseen, unseen_rows = np.empty(0), np.empty(0, dtype=bool), np.empty(0, dtype=bool)
    if finished:
        held, columns = members.heldout_logits(run, finished, ("heldout", "unseen"))
        labels, unseen = held["label"].to_numpy(), (held["split"] == "unseen").to_numpy()
        # a class that --hold-out did not keep out is taken from the held-out rows
        unseen_rows = unseen | ~np.isin(labels, labels[unseen])
        scores = dict(zip(finished, columns.T, strict=True))
    rows = []
    for outcome in outcomes:
        row: dict[str, object] = {"member": outcome.name, "status": outcome.status}
        if outcome.name in scores:
            info, logits = members.read_info(run, outcome.name), scores[outcome.name]
            row |= {
                "epoch": f"{info['best']['epoch']}/{info['recipe']['train']['epochs']}",
                "tune AUROC": f"{info['best']['tune_auroc']:.4f}",
                "held-out AUROC": f"{metrics.auroc(labels[~unseen], logits[~unseen]):.4f}",
                "held-out log-loss": f"{metrics.log_loss(labels[~unseen], metrics.sigmoid(logits[~unseen])):.4f}",
            }
            if unseen.any():
                row["unseen AUROC"] = f"{metrics.auroc(labels[unseen_rows], logits[unseen_rows]):.4f}"
            row |= {
                "parameters": f"{info['parameters'] / 1e6:.2f} M",
                "minutes": f"{info['seconds'] / 60:.1f}",
            }
        rows.append(row)
    return pd.DataFrame(rows).fillna("")
