"""A run: index the data once, then train every recipe that is not already done."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd

from ensemble import artifacts, dataset, members, metrics
from ensemble.checkpoints import check_source, locate_checkpoint
from ensemble.errors import BackboneError, ManyeyesError
from ensemble.recipe import Recipe
from ensemble.train import TRAINING_VERSION, Say, choose_device, train_member

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe: status is trained, unchanged or failed."""

    name: str
    status: str
    seconds: float = 0.0
    error: str = ""


def check_ready(recipes: Sequence[Recipe], device: str) -> None:
    """Raise, all problems together, for what is known to fail before any image is read."""
    choose_device(device)
    _each(recipes, lambda recipe: check_source(recipe.backbone))


def train_all(
    recipes: Sequence[Recipe], frame: pd.DataFrame, run: Path, seed: int, device: str, say: Say
) -> list[Outcome]:
    """Train each recipe whose member is missing or was made from other values.

    A member that fails is reported and the others go on; its traceback is kept in the
    run's work folder. Raises before any training if a checkpoint cannot be had.
    """
    device = choose_device(device)
    data_sha256 = dataset.run_sha256(frame, run)
    todo = []
    for recipe in recipes:
        wanted = {
            "recipe_sha256": recipe.sha256,
            "data_sha256": data_sha256,
            "training_version": TRAINING_VERSION,
            "seed": seed,
        }
        if not members.is_current(run, recipe.name, wanted):
            todo.append(recipe)
    checkpoints = _each(todo, _locate)
    outcomes = []
    for number, recipe in enumerate(recipes, start=1):
        if recipe not in todo:
            say(f"[{number}/{len(recipes)}] {recipe.name}: unchanged, not trained again")
            outcomes.append(Outcome(recipe.name, "unchanged"))
            continue
        say(f"[{number}/{len(recipes)}] {recipe.name}: training on {device}")
        outcomes.append(_train_one(recipe, checkpoints[recipe.name], frame, run, seed, device, say))
    return outcomes


def _locate(recipe: Recipe) -> Path | None:
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


def _train_one(
    recipe: Recipe, checkpoint: Path | None, frame: pd.DataFrame, run: Path, seed: int, device: str, say: Say
) -> Outcome:
    started = time.monotonic()
    try:
        train_member(recipe, checkpoint, frame, run, seed, device, say)
    except Exception as error:
        # Whatever broke this member, the others are worth their hours.
        brief = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not isinstance(error, ManyeyesError):
            log = artifacts.work_path(run, recipe.name) / "error.txt"
            artifacts.ensure_folder(log.parent)
            log.write_text(traceback.format_exc(), encoding="utf-8")
            brief = f"{brief} (details in {log})"
        say(f"  failed: {brief}")
        return Outcome(recipe.name, "failed", time.monotonic() - started, brief)
    return Outcome(recipe.name, "trained", time.monotonic() - started)


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
