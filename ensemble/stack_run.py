"""Fit a run's stacker on its members' held-out logits, score it, and write stacker.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ensemble import calibrate, flips, stack_table, stackers, weights
from ensemble.core import artifacts, metrics
from ensemble.core.bootstrap import score_intervals
from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import Interval
from ensemble.grouped import grouped_folds, one_thread
from ensemble.models import external, members
from ensemble.models.external import External
from ensemble.shift import Shift
from ensemble.stack import KINDS, Stacker
from ensemble.stack_rows import Material, read_material, stack_scores
from ensemble.stack_table import Scored
from ensemble.stackers import Scores
from ensemble.threshold import BALANCED, choose_threshold


@dataclass(frozen=True)
class Choices:
    """How a stacker is made: its kind, calibration and threshold rule, members from elsewhere, and whether
    flips are measured.
    """

    kind: str = KINDS[0]
    calibration: str = "auto"
    threshold: str | float = BALANCED
    externals: tuple[External, ...] = ()
    flips: bool = False


@dataclass(frozen=True)
class Stacked:
    """A fitted stacker and what is known of it.

    scored: it beside its members. kinds: beside the other kinds. weights: with intervals, None
    for a kind that estimates none. strength: its inverse penalty. held: its logits of
    `rows`. ece: before and after calibration. balanced_accuracy: of the stack at its threshold.
    flipped: None if not measured.
    """

    stacker: Stacker
    material: Material
    scored: list[Scored]
    kinds: list[Scored]
    weights: list[Interval] | None
    strength: float
    held: Scores
    ece: tuple[float, float]
    balanced_accuracy: Interval
    flipped: list[Scored] | None

    @property
    def stack_targets(self) -> np.ndarray:
        """The stack's p of the rows, float64."""
        return metrics.sigmoid(self.held.calibrated)

    @property
    def rows(self) -> pd.DataFrame:
        """The rows that the scores are of."""
        return self.material.scored.rows

    @property
    def basis(self) -> str:
        """How those rows stand to the stacker, in words."""
        return self.material.basis


def stack_run(run: Path, names: tuple[str, ...] = (), choices: Choices | None = None) -> Stacked:
    """Fit, score and store.

    With folds the stacker is fitted on out-of-fold logits and scored on the held-out rows,
    which neither it nor its members have seen. Without them it is fitted on the held-out
    rows and scored on them out of fold.
    """
    choices = choices or Choices()
    chosen = artifacts.list_members(run, names)
    _check_externals(run, choices.externals)
    material = read_material(run, chosen, choices.externals)
    done = fit_and_score(material, choices)
    if choices.flips:
        flipped = flips.measure(run, chosen, material.scored.rows)
        done = replace(done, flipped=flipped, stacker=replace(done.stacker, flips=flips.helped(flipped)))
    for member in choices.externals:
        external.write_external(run, member)
    artifacts.write_json(artifacts.stacker_path(run), record(done, choices, fingerprint(run, done.stacker.members)))
    return done


def fit_and_score(material: Material, choices: Choices) -> Stacked:
    """Everything that needs no image."""
    part, truth = material.fitting, (material.scored.labels, material.scored.groups)
    with one_thread():
        folds = grouped_folds(part.labels, part.groups)
        fitted = stackers.fit(choices.kind, part.logits, part.labels, folds)
        calibration = calibrate.fit_calibration(choices.calibration, fitted.held, part.labels, part.groups, folds)
    kinds = tqdm(KINDS, desc="stack", unit="kind", leave=False, disable=None)
    scores = {kind: stack_scores(material, kind, choices.calibration) for kind in kinds}
    p = {kind: metrics.sigmoid(found.calibrated) for kind, found in scores.items()}
    ranking = {kind: metrics.sigmoid(found.raw) for kind, found in scores.items()}
    threshold, rule = choose_threshold(choices.threshold, truth[0], p[choices.kind])
    stacker = Stacker(
        material.names, tuple(fitted.coef.tolist()), fitted.intercept, threshold, choices.kind, calibration, rule
    )
    own = scores[choices.kind]
    return Stacked(
        stacker,
        material,
        stack_table.score_table(material.names, material.scored.logits, own.calibrated, *truth, own.raw),
        stack_table.score_models(p, choices.kind, *truth, ranking),
        weights.weight_intervals(choices.kind, part.logits, part.labels, part.groups, fitted.strength),
        fitted.strength,
        own,
        (metrics.ece(truth[0], ranking[choices.kind]), metrics.ece(truth[0], p[choices.kind])),
        score_intervals(truth[0], p[choices.kind], truth[1], threshold, names=("balanced_accuracy",))[
            "balanced_accuracy"
        ],
        None,
    )


def _check_externals(run: Path, externals: Sequence[External]) -> None:
    names = [member.name for member in externals]
    for name in names:
        if artifacts.member_path(run, name).is_dir() or names.count(name) > 1:
            raise ArtifactError(f"--external {name}: a member of that name is there already; give it another name")


def record(done: Stacked, choices: Choices, fitted_on: Mapping[str, Any]) -> dict[str, Any]:
    """What stacker.json holds. fitted_on: hashes of the members and of what they scored."""
    stacker, fitting, scored = done.stacker, done.material.fitting.rows, done.rows
    return {
        **stacker.to_dict(),
        "scores": {line.name: line.to_dict() for line in done.scored},
        "kinds": {line.name: line.to_dict() for line in done.kinds},
        "weights": None if done.weights is None else [weight.to_dict() for weight in done.weights],
        "strength": done.strength,
        "calibration_asked": choices.calibration,
        "ece": {"before_calibration": done.ece[0], "after": done.ece[1]},
        "balanced_accuracy": done.balanced_accuracy.to_dict(),
        "flip_scores": None if done.flipped is None else {line.name: line.to_dict() for line in done.flipped},
        "rows": {"split": "heldout", "images": len(scored), "groups": scored["group"].nunique(), "stack": done.basis},
        "fitted_rows": {"images": len(fitting), "groups": fitting["group"].nunique()},
        "fitted_on": dict(fitted_on),
    }


def read_stacker(run: Path) -> Stacker:
    """The run's stacker; ArtifactError if there is none, or if members changed since it was fitted."""
    remedy = f"run: python cli.py stack --run {run}"
    values = artifacts.read_json(artifacts.stacker_path(run), remedy)
    stacker = Stacker.from_dict(values)
    artifacts.list_members(run, tuple(name for name in stacker.members if not external.is_external(run, name)))
    if values.get("fitted_on") != fingerprint(run, stacker.members):
        raise ArtifactError(f"members of {run} changed since the stack was fitted; {remedy}")
    return stacker


def fitted_prior(run: Path, stacker: Stacker) -> float:
    """The share of ai among the rows that the run's stacker was fitted on."""
    trained = [name for name in stacker.members if not external.is_external(run, name)]
    rows, _ = members.fitting_logits(run, trained)
    return float(rows["label"].mean())


def store_shift(run: Path, shift: Shift) -> None:
    """Put a shift for target images beside the stacker; all else in stacker.json stays."""
    path = artifacts.stacker_path(run)
    values = artifacts.read_json(path, "run stack again")
    artifacts.write_json(path, {**values, "adapted": shift.to_dict()})


def has_shift(run: Path) -> bool:
    """Whether the run's stacker.json, current or not, holds a shift."""
    try:
        return "adapted" in artifacts.read_json(artifacts.stacker_path(run), "")
    except ArtifactError:
        return False


def fingerprint(run: Path, names: Sequence[str]) -> dict[str, Any]:
    """What a stacker was fitted on: the data, each member's weights and held-out logits, and scores from elsewhere."""
    elsewhere = [name for name in names if external.is_external(run, name)]
    infos = {name: members.read_info(run, name) for name in names if name not in elsewhere}
    found = {
        "data_sha256": {info["data_sha256"] for info in infos.values()}.pop(),
        "members": {name: artifacts.json_sha256(info["files"]) for name, info in infos.items()},
    }
    if elsewhere:
        found["externals"] = {name: artifacts.file_sha256(artifacts.external_path(run, name)) for name in elsewhere}
    return found
