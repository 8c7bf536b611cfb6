"""Accuracy against speed: stacks of some members, with and without a cascade, chosen on one half of labelled rows.

Needs scikit-learn. What an image costs is handed in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import pandas as pd
from tqdm import tqdm

from ensemble.core import bootstrap
from ensemble.core.errors import ArtifactError, ManyeyesError
from ensemble.core.metrics import Interval, auroc, sigmoid
from ensemble.stacking.calibration import fit_calibration
from ensemble.stacking.cascade import Cascade
from ensemble.stacking.cascade_fit import MORE_ROWS, Rows, fit_cascade, halves, lacking_groups
from ensemble.stacking.diagnostics import explore, undominated
from ensemble.stacking.fit import fit, held_logits, out_of_fold, solve
from ensemble.stacking.grouped_cv import Fold, grouped_folds, one_thread
from ensemble.stacking.logit_table import Material, Part, same_rows
from ensemble.stacking.stacker import Stacker
from ensemble.stacking.threshold import asked_rule, choose_threshold

TOLERANCES = (0.0005, 0.001, 0.002, 0.005, 0.01)  # of the cascades tried
SAME_SPEED = 1.02
# a slower point is better in this share of draws of groups: by a single pair of images, members of noise would be too
SURE, RESAMPLES = 0.9, 500
LEAST_ROWS, LEAST_GROUPS = 100, 4  # in both halves together, and with rows of a class in each

T = TypeVar("T")


@dataclass(frozen=True)
class Costs:
    """What an image takes on one machine, in milliseconds.

    decode: reading and decoding it. views: preparing it for each image contract, beyond that;
    view_of: the place there of each member that runs. members: what each of them takes, by
    precision; lower: those that then run below fp32. Members that are not named are looked up,
    for nothing. overlap: pixels are prepared while members run, on another chip.
    """

    decode: float
    views: tuple[float, ...]
    view_of: Mapping[str, int]
    members: Mapping[str, Mapping[str, float]]
    lower: Mapping[str, frozenset[str]]
    overlap: bool = False

    def running(self, precision: str, names: Sequence[str]) -> dict[str, float]:
        """Milliseconds of each member."""
        return {name: self.members[precision].get(name, 0.0) for name in names}

    def milliseconds(self, precision: str, names: Sequence[str], shares: Sequence[float] | None = None) -> float:
        """All of it. shares: of the images that leave after each member, in the order of names; without, none do.

        An image is prepared for a member only once it gets there.
        """
        reached = np.ones(len(names)) if shares is None else 1 - np.cumsum([0.0, *shares[:-1]])
        seen: dict[int, float] = {}
        for name, share in zip(names, reached.tolist(), strict=True):
            if name in self.view_of:
                seen.setdefault(self.view_of[name], share)  # the first member that needs the view is reached most
        pixels = self.decode + sum(self.views[view] * share for view, share in seen.items())
        members = float(reached @ list(self.running(precision, names).values()))
        return max(pixels, members) if self.overlap else pixels + members


@dataclass(frozen=True)
class Study:
    """Labelled rows, the half of them that points are chosen on, bool [N], and how stacks are fitted there.

    folds: of that half. own: the stacker of all members, whose kind and threshold rule each stack has.
    """

    material: Material
    first: np.ndarray
    folds: Sequence[Fold]
    own: Stacker
    strength: float

    def logits(self, names: Sequence[str]) -> np.ndarray:
        """Of all rows, float64 [N, names]."""
        return self.material.fitting.logits[:, [self.material.names.index(name) for name in names]]


@dataclass(frozen=True)
class Point:
    """A stack of some members at a precision, perhaps with a cascade.

    auroc: on the half that is chosen on, out of fold, less what the cascade loses there; drawn:
    the same of RESAMPLES draws of its groups, alike for all points. other: on the other half.
    milliseconds: predicted for an image; for a cascade by the shares of images that leave the one
    fitted on the half, and once `settle` had it shipped, the one fitted on all rows.
    """

    members: tuple[str, ...]
    precision: str
    auroc: float
    drawn: np.ndarray = field(repr=False, compare=False)
    other: float
    milliseconds: float
    cascade: Cascade | None = None

    @property
    def images_per_second(self) -> float:
        """Predicted."""
        return 1000 / self.milliseconds


@dataclass(frozen=True)
class Measured:
    """On the half that nothing was fitted or chosen on, with 95 % intervals: AUROC, and the full stack's minus it."""

    auroc: Interval
    lost: Interval


def begin(rows: Rows, own: Stacker) -> Study:
    """Halve rows, each with logits of weights that saw no row of its group; ArtifactError where they, or the
    members, are too few.
    """
    if len(own.members) < 2:
        raise ArtifactError("the bundle has one member: there is nothing to choose from; train another, and stack")
    first = halves(rows.labels, rows.groups)
    _check(rows, first)
    part = Part(pd.DataFrame({"label": rows.labels, "group": rows.groups}), rows.logits)
    material = same_rows(own.members, part)
    labels = part.labels[first]
    with one_thread():
        folds = grouped_folds(labels, part.groups[first])
        strength = fit(own.kind, part.logits[first], labels, folds).strength
    return Study(material, first, folds, own, strength)


def stacks(study: Study, costs: Costs) -> list[Point]:
    """A point for every subset that `explore` tries and in which a member runs, at each precision."""
    labels, first = study.material.fitting.labels, study.first
    plain, *others = costs.members

    def measure(chosen: tuple[int, ...]) -> Point:
        names = tuple(study.material.names[column] for column in chosen)
        logits = study.logits(names)
        held = held_logits(study.own.kind, logits[first], labels[first], study.folds, study.strength)
        other = auroc(labels[~first], half_stacker(study, names).logit(logits[~first]))
        (drawn,) = _draws(study, held)
        return Point(names, plain, auroc(labels[first], held), drawn, other, costs.milliseconds(plain, names))

    with one_thread():
        every = [
            point for point in explore(len(study.material.names), measure) if set(point.members) & {*costs.view_of}
        ]
    return every + [
        replace(point, precision=precision, milliseconds=costs.milliseconds(precision, point.members))
        for precision in others
        for point in every
        if costs.lower[precision] & set(point.members)
    ]


def cascades(study: Study, points: Sequence[Point], costs: Costs) -> list[Point]:
    """The points of two members or more with a cascade, for each of TOLERANCES that holds."""
    jobs = [(point, tolerance) for point in points if len(point.members) > 1 for tolerance in TOLERANCES]
    found = []
    for point, tolerance in tqdm(jobs, desc="cascades", unit="cascade", leave=False, disable=None):
        try:
            found.append(_with_cascade(study, point, costs, tolerance))
        except ArtifactError:  # it loses more
            continue
    return found


def _with_cascade(study: Study, point: Point, costs: Costs, tolerance: float) -> Point:
    part, first = study.material.fitting, study.first
    stacker, logits = half_stacker(study, point.members), study.logits(point.members)
    half = Rows(logits[first], part.labels[first], part.groups[first])
    cascade = fit_cascade(stacker, half, costs.running(point.precision, point.members), tolerance)
    # less than nothing is lost but by chance
    full, found = stacker.logit(half.logits), cascade.apply(half.logits, stacker)[0]
    whole, less = _draws(study, full, found)
    return replace(
        point,
        auroc=point.auroc - max(cascade.report.loss.value, 0.0),
        drawn=point.drawn - np.maximum(whole - less, 0.0),
        other=auroc(part.labels[~first], cascade.apply(logits[~first], stacker)[0]),
        milliseconds=costs.milliseconds(point.precision, cascade.order, cascade.report.shares),
        cascade=cascade,
    )


def _draws(study: Study, *models: np.ndarray) -> np.ndarray:
    """AUROC [models, RESAMPLES] of logits on the half that is chosen on, over draws of its groups."""
    part, first = study.material.fitting, study.first
    labels, groups = part.labels[first], part.groups[first]
    return bootstrap.draws(labels, models, groups, ("auroc",), resamples=RESAMPLES)["auroc"]


def settle(points: Sequence[Point], ship: Callable[[Point], tuple[Point, T]]) -> tuple[dict[Point, T], list[str]]:
    """The points that nothing beats, from the fastest, with what `ship` makes of each, and why others were left out.

    A slower point has to be `better` than the faster ones. `ship` also says at what speed a point
    runs as it ships, which then counts. One for which it raises is left out, and what it had beaten
    may take its place.
    """
    waiting = list(points)
    made: dict[Point, T] = {}
    refused: list[str] = []
    while True:
        best = undominated([*made, *waiting], better)
        wanted = [point for point in best if point not in made]
        if not wanted:
            return {point: made[point] for point in best}, refused
        for point in tqdm(wanted, desc="refit", unit="stack", leave=False, disable=None):
            waiting.remove(point)
            try:
                shipped, what = ship(point)
            except ManyeyesError as error:
                refused.append(str(error))
            else:
                made[shipped] = what


def better(slow: Point, fast: Point | None) -> bool:
    """Whether a point is better than another, or than chance, beyond what the choice of images explains."""
    apart = slow.drawn - (fast.drawn if fast else 0.5)
    apart = apart[~np.isnan(apart)]  # a draw may lack a class
    return bool(np.mean((apart > 0) + (apart == 0) / 2) >= SURE)


def apart(points: Sequence[Point]) -> list[Point]:
    """Of points from the fastest, ever more accurate: the most accurate of those that no timing tells apart."""
    kept: list[Point] = []
    for point in reversed(points):
        if not kept or point.milliseconds * SAME_SPEED < kept[-1].milliseconds:
            kept.append(point)
    return kept[::-1]


def half_stacker(study: Study, names: Sequence[str]) -> Stacker:
    """A stack of some members, fitted on the half that is chosen on."""
    part, first = study.material.fitting, study.first
    coef, intercept = solve(study.own.kind, study.logits(names)[first], part.labels[first], study.strength)
    return Stacker(tuple(names), tuple(coef.tolist()), intercept, kind=study.own.kind)


def measure(study: Study, point: Point) -> Measured:
    """How a point does on the other half, beside the stack of all members fitted on the same rows."""
    part, other = study.material.fitting, ~study.first
    stacker = half_stacker(study, point.members)
    logits = study.logits(point.members)[other]
    found = point.cascade.apply(logits, stacker)[0] if point.cascade else stacker.logit(logits)
    full = half_stacker(study, study.material.names).logit(part.logits[other])
    labels, groups = part.labels[other], part.groups[other]
    interval = bootstrap.score_intervals(labels, sigmoid(found), groups, names=("auroc",))["auroc"]
    return Measured(interval, bootstrap.paired(labels, full, found, groups).difference)


def refit(study: Study, names: Sequence[str], calibration: str) -> Stacker:
    """The stack of some members fitted on all rows, its threshold set out of fold; of all members, the bundle's own.

    So `stack` does without folds. With them it fits on the training rows alone and keeps the
    held-out ones for the threshold and the scores; here both are fitted on.
    """
    own, part, nests = study.own, study.material.fitting, study.material.nests
    if tuple(names) == own.members:
        return own
    logits, labels, groups = study.logits(names), part.labels, part.groups
    folds = [(nest.rows, nest.held) for nest in nests]
    with one_thread():
        fitted = fit(own.kind, logits, labels, folds)
        found = fit_calibration(calibration, fitted.held, labels, groups, folds)
        held = out_of_fold(logits, labels, groups, own.kind, calibration, nests)
    threshold, rule = choose_threshold(asked_rule(own.threshold, own.threshold_rule), labels, sigmoid(held.calibrated))
    flips = None if own.flips is None else tuple(name for name in own.flips if name in names)
    return Stacker(tuple(names), tuple(fitted.coef.tolist()), fitted.intercept, threshold, own.kind, found, rule, flips)


def _check(rows: Rows, first: np.ndarray) -> None:
    if len(rows.labels) < LEAST_ROWS:
        raise ArtifactError(
            f"frontier chooses on {LEAST_ROWS} held-out images or more, and here are {len(rows.labels)}: {MORE_ROWS}"
        )
    if lack := lacking_groups(rows, (first, ~first), LEAST_GROUPS):
        raise ArtifactError(
            "frontier chooses on half of the held-out images and reports on the other half; one half has "
            f"{lack}, and {LEAST_GROUPS} are needed: {MORE_ROWS}"
        )
