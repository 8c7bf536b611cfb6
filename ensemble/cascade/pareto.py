"""Accuracy against speed: the Pareto front of stacks of some members, with and without a cascade.

Labelled rows are halved by groups. Stacks and cascades are fitted and points are selected on the first half, out of
fold; what is reported of them is their AUROC on the other half, which nothing was fitted or selected on. So the
selection among many points does not flatter the scores.

A point is a stack of a subset of members at a precision. It is on the front if no point reaches its AUROC in as little
time (`pareto_front`), and it stays there only if its AUROC is higher than the faster point's in 90 % of bootstrap
draws of groups (`drop_uncertain`): by the draw of images alone, members that are noise would win by a single pair.

Needs scikit-learn. What an image costs is measured by the caller.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from ensemble.cascade.cascade import Cascade
from ensemble.cascade.fit import MORE_ROWS_HINT, describe_missing_groups, fit_cascade, split_halves
from ensemble.core import bootstrap
from ensemble.core.errors import ArtifactError, ManyeyesError
from ensemble.core.metrics import Interval, auroc, sigmoid
from ensemble.stacking.fit import cross_val_logits, fit_on_folds, fit_with_strength, nested_cv_logits, solve
from ensemble.stacking.grouped_cv import Fold, NestedFold, grouped_folds, single_threaded_blas
from ensemble.stacking.logit_table import LabelledLogits, cross_validated
from ensemble.stacking.stacker import Stacker
from ensemble.stacking.threshold import choose_threshold, rule_of_threshold

EXHAUSTIVE_MEMBERS = 8  # members up to which every subset is tried
TOLERANCES = (0.0005, 0.001, 0.002, 0.005, 0.01)  # losses of AUROC that cascades are fitted to
SAME_SPEED_RATIO = 1.02  # no timing separates speeds that are closer
MIN_CONFIDENCE, RESAMPLES = 0.9, 500  # share of bootstrap draws in which a slower point is better; draws
MIN_ROWS, MIN_GROUPS = 100, 4  # rows in both halves together; groups with rows of a class in each half

T = TypeVar("T")


@dataclass(frozen=True)
class Costs:
    """What an image takes on one machine, in milliseconds.

    decode: reading and decoding it. views: preparing it for each preprocessing, beyond that.
    view_of: the index in `views` of each member that runs. members: milliseconds of each, by
    precision. lower: the members that run below fp32 at a precision. Members that are not named are looked
    up, at no cost. overlap: pixels are prepared while members run, on another device.
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
        """An image in all. shares: of the images that exit after each member, in the order of names; default: none.

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
    """Labelled rows, and how stacks are fitted on the half of them that points are selected on.

    nests: of all rows. first: that half, bool [N]. folds: of that half. own: the bundle's stacker of all
    members; each stack has its method and threshold rule. strength: of fit.py, chosen on that half.
    """

    rows: LabelledLogits
    nests: Sequence[NestedFold]
    first: np.ndarray
    folds: Sequence[Fold]
    own: Stacker
    strength: float


@dataclass(frozen=True)
class Point:
    """A stack of some members at a precision, perhaps with a cascade.

    auroc: on the first half, out of fold, minus what the cascade loses there. auroc_draws: the same in
    RESAMPLES bootstrap draws of its groups, the same draws for all points. other_auroc: on the other half.
    milliseconds: predicted for an image; for a cascade by the shares of images that exit it: of the cascade
    fitted on the first half, and after `select_frontier` of the one fitted on all rows.
    """

    members: tuple[str, ...]
    precision: str
    auroc: float
    auroc_draws: np.ndarray = field(repr=False, compare=False)
    other_auroc: float
    milliseconds: float
    cascade: Cascade | None = None

    @property
    def images_per_second(self) -> float:
        """Predicted."""
        return 1000 / self.milliseconds


@dataclass(frozen=True)
class PointScores:
    """AUROC on the other half, and the full stack's AUROC minus it, with 95 % intervals."""

    auroc: Interval
    loss: Interval


def prepare_study(rows: LabelledLogits, own: Stacker) -> Study:
    """Halve rows, whose logits are of weights that saw no row of their group.

    ArtifactError where rows or members are too few.
    """
    if len(own.members) < 2:
        raise ArtifactError("the bundle has one member: there is nothing to choose from; train another, and stack")
    first = split_halves(rows.labels, rows.groups)
    if len(rows.labels) < MIN_ROWS:
        raise ArtifactError(
            f"frontier chooses on {MIN_ROWS} held-out images or more, and here are {len(rows.labels)}: {MORE_ROWS_HINT}"
        )
    if missing := describe_missing_groups(rows, (first, ~first), MIN_GROUPS):
        raise ArtifactError(
            "frontier chooses on half of the held-out images and reports on the other half; one half has "
            f"{missing}, and {MIN_GROUPS} are needed: {MORE_ROWS_HINT}"
        )
    rows = replace(rows, groups=rows.groups.astype(str))
    data = cross_validated(rows)
    half = rows.subset(first)
    with single_threaded_blas():
        folds = grouped_folds(half.labels, half.groups)
        strength = fit_with_strength(own.refit_method, half.logits, half.labels, half.groups, folds).strength
    return Study(rows, data.nests, first, folds, own, strength)


def subset_points(study: Study, costs: Costs) -> list[Point]:
    """A point for every subset that `search_subsets` tries and in which a member runs, at each precision."""
    labels, first = study.rows.labels, study.first
    plain, *others = costs.members

    def measure(names: tuple[str, ...]) -> Point:
        logits = study.rows.select(names).logits
        oof_logits = cross_val_logits(study.own.refit_method, logits[first], labels[first], study.folds, study.strength)
        other = auroc(labels[~first], fit_half(study, names).logit(logits[~first]))
        (draws,) = _auroc_draws(study, oof_logits)
        milliseconds = costs.milliseconds(plain, names)
        return Point(names, plain, auroc(labels[first], oof_logits), draws, other, milliseconds)

    with single_threaded_blas():
        every = [point for point in search_subsets(study.rows.members, measure) if {*point.members} & {*costs.view_of}]
    return every + [
        replace(point, precision=precision, milliseconds=costs.milliseconds(precision, point.members))
        for precision in others
        for point in every
        if costs.lower[precision] & set(point.members)
    ]


def cascade_points(study: Study, points: Sequence[Point], costs: Costs) -> list[Point]:
    """The points of two members or more with a cascade, for each of TOLERANCES that holds."""
    jobs = [(point, tolerance) for point in points if len(point.members) > 1 for tolerance in TOLERANCES]
    cascades = []
    for point, tolerance in tqdm(jobs, desc="cascades", unit="cascade", leave=False, disable=None):
        with suppress(ArtifactError):  # it loses more
            cascades.append(_with_cascade(study, point, costs, tolerance))
    return cascades


def _with_cascade(study: Study, point: Point, costs: Costs, tolerance: float) -> Point:
    stacker, rows, first = fit_half(study, point.members), study.rows.select(point.members), study.first
    half = rows.subset(first)
    cascade = fit_cascade(stacker, half, costs.running(point.precision, point.members), tolerance)
    # less than nothing is lost but by chance
    full, early = _auroc_draws(study, stacker.logit(half.logits), cascade.apply(half.logits, stacker)[0])
    return replace(
        point,
        auroc=point.auroc - max(cascade.report.loss.value, 0.0),
        auroc_draws=point.auroc_draws - np.maximum(full - early, 0.0),
        other_auroc=auroc(rows.labels[~first], cascade.apply(rows.logits[~first], stacker)[0]),
        milliseconds=costs.milliseconds(point.precision, cascade.order, cascade.report.shares),
        cascade=cascade,
    )


def _auroc_draws(study: Study, *models: np.ndarray) -> np.ndarray:
    """AUROC [models, RESAMPLES] of logits on the first half, in bootstrap draws of its groups."""
    half = study.rows.subset(study.first)
    return bootstrap.bootstrap_scores(half.labels, models, half.groups, ("auroc",), resamples=RESAMPLES)["auroc"]


def select_frontier(
    points: Sequence[Point], ship: Callable[[Point], tuple[Point, T]]
) -> tuple[dict[Point, T], list[str]]:
    """The frontier, from the fastest point, with what `ship` makes of each, and why others were left out.

    `ship` refits a point on all rows, as it will be used, and returns it with its final speed. That can move a point
    off the frontier, and a point for which `ship` raises is dropped: in both cases points that it had dominated
    may return. So this repeats until every point of the front has shipped. It ends, since each round ships or drops
    at least one point.
    """
    waiting = list(points)
    made: dict[Point, T] = {}
    refused: list[str] = []
    while True:
        best = drop_uncertain(pareto_front([*made, *waiting]))
        unshipped = [point for point in best if point not in made]
        if not unshipped:
            return {point: made[point] for point in best}, refused
        for point in tqdm(unshipped, desc="refit", unit="stack", leave=False, disable=None):
            waiting.remove(point)
            try:
                shipped, what = ship(point)
            except ManyeyesError as error:
                refused.append(str(error))
            else:
                made[shipped] = what


def search_subsets(members: Sequence[str], measure: Callable[[tuple[str, ...]], Point]) -> list[Point]:
    """What `measure` says of subsets of the members.

    Every subset of up to eight members. Of more, greedy forward selection: the subsets that are
    reached by adding, again and again, the member that raises the AUROC most.
    """
    if len(members) <= EXHAUSTIVE_MEMBERS:
        subsets = [chosen for size in range(1, len(members) + 1) for chosen in combinations(members, size)]
        return [measure(chosen) for chosen in tqdm(subsets, desc="frontier", unit="stack", leave=False, disable=None)]
    best: tuple[str, ...] = ()
    tried: list[Point] = []
    for _ in tqdm(members, desc="frontier", unit="member", leave=False, disable=None):
        grown = [tuple(one for one in members if one in (*best, name)) for name in members if name not in best]
        points = [measure(chosen) for chosen in grown]
        best = grown[int(np.argmax([point.auroc for point in points]))]
        tried += points
    return tried


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points above chance whose AUROC no point reaches in as little time, from the fastest."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.milliseconds, -point.auroc, len(point.members))):
        if point.auroc > (front[-1].auroc if front else 0.5):
            front.append(point)
    return front


def drop_uncertain(front: Sequence[Point]) -> list[Point]:
    """Of a Pareto front, the points that are `is_better` than the last one retained, or than chance.

    A point that is dropped here has all the same taken what is slower and less accurate off the front.
    """
    retained: list[Point] = []
    for point in front:
        if is_better(point, retained[-1] if retained else None):
            retained.append(point)
    return retained


def is_better(slow: Point, fast: Point | None) -> bool:
    """Whether a point has the higher AUROC, than another or than chance, in MIN_CONFIDENCE of the paired draws.

    Equal draws count half.
    """
    gain = slow.auroc_draws - (fast.auroc_draws if fast else 0.5)
    gain = gain[~np.isnan(gain)]  # a draw may lack a class
    return bool(np.mean((gain > 0) + (gain == 0) / 2) >= MIN_CONFIDENCE)


def drop_equal_speeds(points: Sequence[Point]) -> list[Point]:
    """Of points from the fastest, each more accurate: the most accurate of those whose speeds are as good as equal."""
    retained: list[Point] = []
    for point in reversed(points):
        if not retained or point.milliseconds * SAME_SPEED_RATIO < retained[-1].milliseconds:
            retained.append(point)
    return retained[::-1]


def fit_half(study: Study, names: Sequence[str]) -> Stacker:
    """A stack of some members, fitted on the first half."""
    half = study.rows.select(names).subset(study.first)
    stacker = solve(study.own.refit_method, half.logits, half.labels, study.strength)
    return replace(stacker, members=tuple(names))


def score_point(study: Study, point: Point) -> PointScores:
    """A point's scores on the other half, beside those of the stack of all members fitted on the same rows."""
    other, stacker = study.rows.subset(~study.first), fit_half(study, point.members)
    logits = other.select(point.members).logits
    own = point.cascade.apply(logits, stacker)[0] if point.cascade else stacker.logit(logits)
    full = fit_half(study, study.rows.members).logit(other.logits)
    interval = bootstrap.score_intervals(other.labels, sigmoid(own), other.groups, names=("auroc",))["auroc"]
    return PointScores(interval, bootstrap.paired_difference(other.labels, full, own, other.groups).difference)


def refit_on_all_rows(study: Study, names: Sequence[str], calibration: str) -> Stacker:
    """The stack of some members fitted on all rows, its threshold set out of fold; of all members, the bundle's own.

    This is what `stack` does without folds. With folds it fits on the training rows alone and keeps the
    held-out rows for the threshold and the scores; here all rows are fitted on.
    """
    own = study.own
    if tuple(names) == own.members:
        return own
    logits, labels, groups = study.rows.select(names).logits, study.rows.labels, study.rows.groups
    folds = [(nest.fit, nest.held_out) for nest in study.nests]
    stacker, _ = fit_on_folds(names, logits, labels, groups, folds, own.refit_method, calibration)
    scores = nested_cv_logits(logits, labels, groups, own.refit_method, calibration, study.nests)
    threshold, rule = choose_threshold(
        rule_of_threshold(own.threshold, own.threshold_rule), labels, sigmoid(scores.calibrated)
    )
    tta_members = None if own.tta_members is None else tuple(name for name in own.tta_members if name in names)
    return replace(stacker, threshold=threshold, threshold_rule=rule, tta_members=tta_members)
