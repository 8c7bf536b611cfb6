"""A run: index the data once, then train every recipe that is not already done."""

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pandas as pd
from rich.console import Console
from tqdm import tqdm

from ensemble.core import artifacts, metrics
from ensemble.core.errors import BackboneError, ManyeyesError, error_line
from ensemble.core.log import Log
from ensemble.core.recipe import Recipe
from ensemble.data import dataset
from ensemble.images import canonical
from ensemble.models import members
from ensemble.models.checkpoints import check_source, locate_checkpoint, weights_file
from ensemble.models.torch_runner import choose_device
from ensemble.training import checkpoint as unfinished
from ensemble.training import precision
from ensemble.training.distributed import run_on_main
from ensemble.training.dry_run import Estimate, estimate_member
from ensemble.training.live_progress import LiveProgress
from ensemble.training.optimizer import check_network
from ensemble.training.progress import TrainingCallback
from ensemble.training.tracking import check_trackers
from ensemble.training.train_member import TRAINING_VERSION, TrainContext, train_member
from ensemble.training.validation import RowReader

if TYPE_CHECKING:
    from ensemble.cluster.train_driver import Cluster

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe: status is trained, unchanged or failed."""

    name: str
    status: str
    seconds: float = 0.0
    error: str = ""
    score: str = ""


def check_ready(recipes: Sequence[Recipe], device: str, report_to: Sequence[str] = (), elsewhere: bool = False) -> None:
    """Raise, all problems together, for what is known to fail before any image is read.

    elsewhere: members are trained on other machines, which say themselves in what precision they compute.
    """
    kind = device if elsewhere else choose_device(device)
    check_trackers(report_to)
    for recipe in recipes:
        if not elsewhere or (recipe.train.precision, kind) == ("fp16", "cpu"):  # which no CPU trains in
            precision.check_precision(recipe.train.precision, kind)
    _each(recipes, lambda recipe: check_source(recipe.backbone))


def train_all(
    recipes: Sequence[Recipe],
    frame: pd.DataFrame,
    run: Path,
    setup: TrainContext,
    log: Log,
    fresh: bool = False,
    cluster: "Cluster | None" = None,
) -> list[Outcome]:
    """Train each recipe whose member is missing or was made from other values.

    A member that fails is reported and the others go on; its traceback is kept in the
    run's work folder. Interrupted trainings are gone on from, or with `fresh` thrown away.
    Raises before any training if a checkpoint cannot be had, the disk is too small, or a network
    cannot be trained as its recipe says. cluster: where members are trained, in place of this process.
    """
    precision.keep_freed_memory()
    kinds = training_fingerprints(recipes, frame, run, setup)
    todo = [recipe for recipe in recipes if not members.is_current(run, recipe.name, kinds[recipe.name])]
    first, log = setup.processes.is_main, log if setup.processes.is_main else _nothing
    wanted = {recipe.name: kinds[recipe.name] for recipe in todo}
    goes_on = run_on_main(setup.processes, lambda: unfinished.find_resumable(run, wanted, fresh, log))
    checkpoints = run_on_main(setup.processes, lambda: _each(todo, recipe_checkpoint))
    weights = {recipe.name: _weight_bytes(recipe, checkpoints[recipe.name]) for recipe in todo}
    if first:
        at_once = 1
        if cluster is not None:
            from ensemble.cluster import train_driver

            at_once = max(train_driver.at_once(cluster, todo, weights), 1)
        unfinished.check_disk(run, list(weights.values()), at_once)
    run_on_main(setup.processes, lambda: _each(todo, lambda recipe: check_network(recipe, checkpoints[recipe.name])))
    leads = {
        recipe.name: f"[{number}/{len(recipes)}] {recipe.name}: "
        + (
            "unchanged, not trained again"
            if recipe not in todo
            else f"{'going on with its training' if recipe.name in goes_on else 'training'} on "
        )
        for number, recipe in enumerate(recipes, start=1)
    }
    if cluster is not None:
        from ensemble.cluster import train_driver

        return train_driver.train_members(cluster, recipes, todo, weights, run, setup, log, leads)
    outcomes = []
    with LiveProgress(
        [recipe.name for recipe in recipes], log, console=None if first else Console(quiet=True)
    ) as board:
        for recipe in recipes:
            if recipe not in todo:
                board.log(leads[recipe.name])
                outcome = Outcome(recipe.name, "unchanged")
            else:
                board.log(f"{leads[recipe.name]}{setup.processes.device}")
                board.member(recipe.name, setup.processes.device)
                outcome = train_one(recipe, checkpoints[recipe.name], frame, run, setup, board)
                if outcome.status == "failed":
                    board.log(f"  failed: {outcome.error}")
            board.finished(recipe.name, outcome.status, outcome.score, outcome.seconds, outcome.error)
            outcomes.append(outcome)
    return outcomes


def dry_run(
    recipes: Sequence[Recipe], frame: pd.DataFrame, run: Path, drawn: Path, setup: TrainContext
) -> list[tuple[str, Estimate | None]]:
    """What each recipe would take, None for a member of `run` that would not be trained again.

    drawn: a run's folder with the rows of `frame`; nothing is written in `run`.
    """
    precision.keep_freed_memory()
    kinds = training_fingerprints(recipes, frame, drawn, setup)
    todo = [recipe for recipe in recipes if not members.is_current(run, recipe.name, kinds[recipe.name])]
    checkpoints = _each(todo, recipe_checkpoint)
    unfinished.check_disk(run, [_weight_bytes(recipe, checkpoints[recipe.name]) for recipe in todo])
    _each(todo, lambda recipe: check_network(recipe, checkpoints[recipe.name]))
    reading = RowReader(canonical.read_plan(artifacts.canonical_path(drawn)), setup.seed)
    bar = tqdm(recipes, "timing steps", unit="member", leave=False, disable=None)
    return [
        (r.name, estimate_member(r, checkpoints[r.name], frame, reading, setup.processes) if r in todo else None)
        for r in bar
    ]


def training_fingerprints(
    recipes: Sequence[Recipe], frame: pd.DataFrame, run: Path, setup: TrainContext
) -> dict[str, dict[str, object]]:
    """What decides each recipe's training, by member name."""
    data = dataset.run_sha256(frame, run)
    return {r.name: unfinished.training_fingerprint(r, data, setup.seed, TRAINING_VERSION) for r in recipes}


def _nothing(line: str) -> None:
    """What processes other than the first say."""


def _weight_bytes(recipe: Recipe, checkpoint: Path | None) -> int:
    """About how many bytes the member's weights take; 0 for an architecture without weights, which is small."""
    if checkpoint is not None:
        return max((f.stat().st_size for s in ("*.safetensors", "*.bin") for f in checkpoint.glob(s)), default=0)
    return weights_file(recipe.backbone.weights).stat().st_size if recipe.backbone.weights is not None else 0


def recipe_checkpoint(recipe: Recipe) -> Path | None:
    """The folder of the recipe's checkpoint, which may be downloaded for it; None for an architecture."""
    name = recipe.backbone.checkpoint
    return locate_checkpoint(name) if name is not None else None


def _each(recipes: Sequence[Recipe], function: Callable[[Recipe], T]) -> dict[str, T]:
    """The function's value for every recipe, or all its BackboneErrors in one."""
    found: dict[str, T] = {}
    problems = []
    for recipe in recipes:
        try:
            found[recipe.name] = function(recipe)
        except BackboneError as error:
            problems.append(f"{recipe.name}: {error}")
    if problems:
        raise BackboneError("\n".join(problems))
    return found


def train_one(
    recipe: Recipe,
    checkpoint: Path | None,
    frame: pd.DataFrame,
    run: Path,
    setup: TrainContext,
    board: TrainingCallback,
) -> Outcome:
    """Train a member of a prepared run, unless another process is found to have just done so.

    An error is the outcome's, except where several processes train together.
    """
    started = time.monotonic()
    kind = training_fingerprints([recipe], frame, run, setup)[recipe.name]
    try:
        with ExitStack() as stack:

            def current() -> bool:
                stack.enter_context(unfinished.member_lock(run, recipe.name, board.log))
                return members.is_current(run, recipe.name, kind)

            if not run_on_main(setup.processes, current):
                train_member(recipe, checkpoint, frame, run, setup, board)
    except Exception as error:
        # Whatever broke this member, the others are worth their hours.
        line = error_line(error, first=True)
        if not isinstance(error, ManyeyesError):
            log = artifacts.work_path(run, recipe.name) / "error.txt"
            artifacts.ensure_folder(log.parent)
            log.write_text(traceback.format_exc(), encoding="utf-8")
            line = f"{line} (details in {log})"
        if setup.processes.world_size > 1:
            raise  # the other processes wait for this one: the launcher ends them all
        return Outcome(recipe.name, "failed", time.monotonic() - started, line)
    rows, logits = members.heldout_logits(run, [recipe.name])
    score = metrics.auroc(rows["label"].to_numpy(), logits[:, 0])
    return Outcome(recipe.name, "trained", time.monotonic() - started, score=f"{score:.4f}")


def summary(run: Path, outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """One row a recipe: status, best epoch, tune and held-out scores, minutes."""
    finished = [outcome.name for outcome in outcomes if outcome.status != "failed"]
    scores: dict[str, np.ndarray] = {}
    labels, unseen = np.empty(0), np.empty(0, dtype=bool)
    if finished:
        held, columns = members.heldout_logits(run, finished, ("heldout", "unseen"))
        labels, unseen = held["label"].to_numpy(), (held["split"] == "unseen").to_numpy()
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
                **_unseen_score(labels, logits, unseen),
                "parameters": f"{info['parameters'] / 1e6:.2f} M",
                "minutes": f"{info['seconds'] / 60:.1f}",
            }
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _unseen_score(labels: np.ndarray, logits: np.ndarray, unseen: np.ndarray) -> dict[str, str]:
    """AUROC of what --hold-out kept out; a class it lacks is taken from the held-out rows."""
    if not unseen.any():
        return {}
    rows = unseen | ~np.isin(labels, labels[unseen])
    return {"unseen AUROC": f"{metrics.auroc(labels[rows], logits[rows]):.4f}"}
