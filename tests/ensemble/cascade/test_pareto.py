"""Stacks chosen for what they cost, on planted members and costs."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble.cascade import pareto
from ensemble.cascade.cascade import Cascade, CascadeReport, CascadeStep
from ensemble.cascade.pareto import (
    Costs,
    Point,
    drop_equal_speeds,
    drop_uncertain,
    pareto_front,
    prepare_study,
    refit_on_all_rows,
    score_point,
    select_frontier,
    subset_points,
)
from ensemble.core import bootstrap
from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import Interval, sigmoid
from ensemble.stacking.fit import fit_stacker
from ensemble.stacking.logit_table import LabelledLogits
from ensemble.stacking.stacker import Stacker
from ensemble.stacking.threshold import choose_threshold, rule_of_threshold

ROWS, GROUPS = 1200, 60
NAMES = ("noise", "hiss", "cheap", "dear")
COSTS = Costs(
    2.0,
    (0.5, 1.5),
    {"noise": 0, "hiss": 0, "cheap": 0, "dear": 1},
    {"fp32": {"noise": 1.0, "hiss": 1.0, "cheap": 1.0, "dear": 10.0}},
    {"fp32": frozenset()},
)


def planted(cheap=1.0, dear=2.0, seed=0, rows=ROWS):
    """Two members that know nothing, and two that know so much."""
    rng = np.random.default_rng(seed)
    labels, groups = rng.integers(0, 2, rows), rng.integers(0, GROUPS, rows)
    signal = np.array([0.0, 0.0, cheap, dear])
    return LabelledLogits(NAMES, rng.normal(size=(rows, 4)) + signal * (2 * labels - 1)[:, None], labels, groups)


def mean_of(names=NAMES, **values):
    """Noise that the mean takes in makes it worse, whatever the draw: just the right stacks are best."""
    return Stacker(names, (1 / len(names),) * len(names), 0.0, method="mean", **values)


def best_of(rows, own=None):
    """The study, all points that were tried, and those on the frontier."""
    study = prepare_study(rows, own or mean_of())
    points = subset_points(study, COSTS)
    found, _ = select_frontier(points, lambda point: (point, refit_on_all_rows(study, point.members, "none")))
    return study, points, found


@pytest.mark.parametrize(
    ("cheap", "dear", "best"),
    [
        (0.3, 2.0, [("cheap",), ("dear",)]),
        (1.0, 1.2, [("cheap",), ("dear",), ("cheap", "dear")]),
        (1.0, 0.0, [("cheap",)]),
        (0.0, 1.0, [("dear",)]),
    ],
)
def test_the_frontier_holds_just_the_members_that_pay(cheap, dear, best):
    _, _, found = best_of(planted(cheap, dear))
    # by chance a member that knows nothing is a little better than a coin, and fast
    assert [point.members for point in found if point.auroc > 0.55] == best
    speeds = {("cheap",): 3.5, ("dear",): 13.5, ("cheap", "dear"): 15.0}
    assert [point.milliseconds for point in found if point.auroc > 0.55] == [speeds[members] for members in best]


def test_what_is_chosen_by_chance_is_not_believed():
    study, points, _ = best_of(planted(0.0, 0.0, rows=200))
    lucky = max(points, key=lambda point: point.auroc)
    told = score_point(study, lucky)
    assert lucky.auroc > 0.53
    assert told.auroc.low < 0.5 < told.auroc.high
    study, _, found = best_of(planted())
    good = list(found)[-1]
    assert abs(good.auroc - score_point(study, good).auroc.value) < 0.02


def test_a_slower_point_is_better_by_more_than_chance():
    def point(auroc, spread):
        return Point(("a",), "fp32", auroc, auroc + spread * np.linspace(-1, 1, 100), 0.5, 1.0)

    assert pareto.is_better(point(0.8, 0.01), point(0.7, 0.0))
    assert pareto.is_better(point(0.8, 0.1), point(0.75, 0.1))  # both fall and rise together
    assert not pareto.is_better(point(0.8, 0.1), point(0.75, 0.0))
    assert not pareto.is_better(point(0.8, 0.1), point(0.8, 0.1))
    assert pareto.is_better(point(0.6, 0.1), None)
    assert not pareto.is_better(point(0.55, 0.1), None)


def drawn_point(name, milliseconds, auroc, spread):
    return Point((name,), "fp32", auroc, auroc + spread * np.linspace(-1, 1, 100), auroc, milliseconds)


POINT = st.tuples(
    st.integers(1, 8), st.sampled_from(np.arange(0.85, 0.95, 0.005).tolist()), st.sampled_from([0.0, 0.05])
)


def beaten(points, listed):
    return [
        (one, other)
        for one in listed
        for other in points
        if (other.milliseconds < one.milliseconds and other.auroc >= one.auroc)
        or (other.milliseconds <= one.milliseconds and other.auroc > one.auroc)
    ]


@given(st.lists(POINT, max_size=12))
def test_no_point_that_was_tried_beats_one_that_is_listed(drawn):
    points = [drawn_point(str(number), *values) for number, values in enumerate(drawn)]
    listed = drop_uncertain(pareto_front(points))
    assert not beaten(points, listed)
    assert all(pareto.is_better(slow, fast) for fast, slow in pairwise([None, *listed]))


def test_what_a_lucky_point_beats_is_not_listed_though_the_lucky_one_is_not():
    fast, lucky, slow = points = [
        drawn_point("fast", 1.0, 0.88, 0.0),
        drawn_point("lucky", 2.0, 0.90, 0.05),
        drawn_point("slow", 3.0, 0.885, 0.001),
    ]
    assert drop_uncertain(pareto_front(points)) == [fast]
    assert drop_uncertain(pareto_front([fast, slow])) == [fast, slow]
    assert beaten(points, [slow]) == [(slow, lucky)]


def test_members_of_noise_do_not_join_by_luck():
    own = Stacker(NAMES, (1.0,) * 4, 0.0)  # logistic regression hardly suffers from them
    _, points, found = best_of(planted(), own)
    lucky = [point for point in points if point.auroc > 0.55]
    assert any({"noise", "hiss"} & {*point.members} for point in pareto_front(lucky))
    assert [point.members for point in found] == [("cheap",), ("dear",), ("cheap", "dear")]


@pytest.mark.parametrize("own", [mean_of(), Stacker(NAMES, (1.0,) * 4, 0.0)])
def test_nothing_of_the_half_that_is_reported_on_is_used(own):
    rows = planted()
    study = prepare_study(rows, own)
    turned = np.where(study.first[:, None], rows.logits, -rows.logits)
    twin = prepare_study(replace(rows, logits=turned), own)
    for point, other in zip(subset_points(study, COSTS), subset_points(twin, COSTS), strict=True):
        assert (point.members, point.auroc) == (other.members, other.auroc)
        assert point.other_auroc == pytest.approx(1 - other.other_auroc)


def test_the_loss_is_against_all_members_on_the_same_rows():
    study, points, found = best_of(planted())
    full = next(point for point in points if point.members == NAMES)
    assert score_point(study, full).loss.value == 0
    best = list(found)[-1]
    told = score_point(study, best)
    assert told.loss.value == pytest.approx(full.other_auroc - best.other_auroc)
    assert told.auroc.value == pytest.approx(best.other_auroc)
    assert told.loss.low < told.loss.value < told.loss.high


def test_a_cascade_of_the_best_is_tried_and_costs_what_its_images_need():
    rng = np.random.default_rng(0)
    one = rng.uniform(-2, 2, ROWS)
    two = -one / 2 + 4 * (np.abs(one) < 0.4) * rng.normal(size=ROWS)
    own = Stacker(("cheap", "dear"), (0.5, 0.25), 0.1)
    logits = np.column_stack([one, two])
    labels = (rng.random(ROWS) < sigmoid(8 * own.logit(logits))).astype(int)
    study = prepare_study(LabelledLogits(own.members, logits, labels, rng.integers(0, GROUPS, ROWS)), own)
    *alone, both = subset_points(study, COSTS)
    found = pareto.cascade_points(study, [both], COSTS)
    point = found[-1]
    assert point.cascade.tolerance == 0.01
    assert point.auroc <= both.auroc
    left = point.cascade.report.shares[0]
    assert left > 0.5
    # decoding, the cheap member with its view, and for those that stay the dear one with its own
    assert point.milliseconds == pytest.approx(2 + 0.5 + 1 + (1 - left) * (1.5 + 10))
    assert score_point(study, point).loss.value < 0.01
    assert pareto.cascade_points(study, alone, COSTS) == []


@pytest.mark.parametrize(("alone", "last", "loss"), [("cheap", "dear", 0.05), ("dear", "cheap", -0.05)])
def test_what_a_cascade_loses_counts_against_it_and_what_it_wins_by_chance_does_not(monkeypatch, alone, last, loss):
    study = prepare_study(planted(0.3, 1.0), mean_of())  # `dear` alone is better than the mean of both
    both = next(point for point in subset_points(study, COSTS) if point.members == ("cheap", "dear"))
    report = CascadeReport(600, 30, (0.9, 0.9 - loss), Interval(loss, loss, loss), (0.9, 0.1), (11.0, 2.0), 0.0)
    early = Cascade((CascadeStep(alone, (1.0,), 0.0, -0.2, 0.2),), last, (1.0, 10.0), 0.01, report)
    monkeypatch.setattr(pareto, "fit_cascade", lambda *given: early)
    found = pareto.cascade_points(study, [both], COSTS)[0]
    assert found.auroc == pytest.approx(both.auroc - max(loss, 0))
    rows, first = study.rows, study.first
    stacker, logits = pareto.fit_half(study, both.members), rows.select(both.members).logits[first]
    whole, less = bootstrap.bootstrap_scores(
        rows.labels[first],
        [stacker.logit(logits), early.apply(logits, stacker)[0]],
        rows.groups[first],
        ("auroc",),
        resamples=pareto.RESAMPLES,
    )["auroc"]
    assert np.sign(loss) * np.mean(whole - less) > 0.01
    np.testing.assert_allclose(found.auroc_draws, both.auroc_draws - np.maximum(whole - less, 0))
    # and on the other half it is the cascade that is scored
    assert found.other_auroc == pytest.approx(score_point(study, found).auroc.value)
    assert np.sign(loss) * (both.other_auroc - found.other_auroc) > 0.01


def test_costs_add_up():
    assert COSTS.milliseconds("fp32", ("noise", "hiss")) == 2 + 0.5 + 2
    assert COSTS.milliseconds("fp32", ("cheap", "dear")) == 2 + 2 + 11
    assert COSTS.milliseconds("fp32", ("cheap", "elsewhere")) == 2 + 0.5 + 1
    assert COSTS.milliseconds("fp32", ("elsewhere", "dear"), (0.75, 0.25)) == pytest.approx(2 + 0.25 * 11.5)
    on_gpu = Costs(COSTS.decode, COSTS.views, COSTS.view_of, COSTS.members, COSTS.lower, overlap=True)
    assert on_gpu.milliseconds("fp32", ("cheap", "dear")) == 11
    assert on_gpu.milliseconds("fp32", ("cheap",)) == 2.5


def test_members_that_are_looked_up_are_no_point_by_themselves():
    costs = Costs(2.0, (0.5,), {"cheap": 0}, {"fp32": {"cheap": 1.0}}, {"fp32": frozenset()})
    points = subset_points(prepare_study(planted(), mean_of()), costs)
    assert all("cheap" in point.members for point in points)
    assert len(points) == 8


def test_a_lower_precision_is_as_accurate_and_faster_where_it_is_used():
    members = {**COSTS.members, "bf16": {**COSTS.members["fp32"], "dear": 4.0}}
    costs = Costs(COSTS.decode, COSTS.views, COSTS.view_of, members, {"fp32": frozenset(), "bf16": frozenset({"dear"})})
    points = subset_points(prepare_study(planted(), mean_of()), costs)
    by = {(point.members, point.precision): point for point in points}
    assert (("cheap",), "bf16") not in by
    plain, lower = by[("dear",), "fp32"], by[("dear",), "bf16"]
    assert (plain.auroc, plain.milliseconds - lower.milliseconds) == (lower.auroc, 6)


def test_what_cannot_be_shipped_gives_way_to_what_it_had_beaten():
    def ship(point):
        if "dear" in point.members:
            raise ArtifactError("not this one")
        return point, point.precision

    study = prepare_study(planted(0.3, 2.0), mean_of())
    found, left_out = select_frontier(subset_points(study, COSTS), ship)
    assert [point.members for point in found if point.auroc > 0.55] == [("cheap",)]
    assert set(found.values()) == {"fp32"}
    assert set(left_out) == {"not this one"}


def test_the_speed_at_which_a_point_ships_is_what_counts():
    fast, cascade, slow = points = [
        drawn_point("fast", 1.0, 0.8, 0.0),
        drawn_point("cascade", 2.0, 0.85, 0.0),
        drawn_point("slow", 3.0, 0.9, 0.0),
    ]
    found, _ = select_frontier(points, lambda point: (point, None))
    assert list(found) == [fast, cascade, slow]
    shipped = replace(cascade, milliseconds=4.0)  # as it ships it is slower than what is better
    found, left_out = select_frontier(points, lambda point: (shipped if point == cascade else point, None))
    assert (list(found), left_out) == ([fast, slow], [])
    shipped = replace(cascade, milliseconds=0.5)
    found, _ = select_frontier(points, lambda point: (shipped if point == cascade else point, None))
    assert list(found) == [shipped, slow]


def test_a_refitted_stack_is_as_stack_would_make_it():
    rows = planted()
    study = prepare_study(
        rows, Stacker(NAMES, (1.0,) * 4, 0.0, 0.3, threshold_rule="balanced_accuracy", tta_members=("dear",))
    )
    found = refit_on_all_rows(study, ("cheap", "dear"), "none")
    alone = fit_stacker(("cheap", "dear"), rows.logits[:, 2:], rows.labels, rows.groups.astype(str), "logit")
    assert (found.members, found.coef, found.intercept) == (alone.members, alone.coef, alone.intercept)
    assert (found.threshold_rule, found.tta_members) == ("balanced_accuracy", ("dear",))
    assert found.threshold != 0.3
    assert refit_on_all_rows(study, ("cheap", "noise"), "none").tta_members == ()
    assert refit_on_all_rows(study, NAMES, "none") is study.own


@pytest.mark.parametrize("rule", ["balanced", "fpr=0.05", 0.25])
def test_the_rule_of_a_threshold_is_known_from_its_answer(rule):
    rows = planted()
    target = sigmoid(rows.logits[:, 3])
    threshold, said = choose_threshold(rule, rows.labels, target)
    assert choose_threshold(rule_of_threshold(threshold, said), rows.labels, target)[0] == threshold
    assert rule_of_threshold(0.5, "default 0.5") == 0.5


def test_too_little_to_choose_on_is_said():
    with pytest.raises(ArtifactError, match="the bundle has one member: there is nothing to choose from"):
        prepare_study(planted().select(["cheap"]), mean_of(("cheap",)))
    with pytest.raises(
        ArtifactError, match=r"frontier chooses on 100 held-out images or more, and here are 60: export"
    ):
        prepare_study(planted(rows=60), mean_of())
    rows = planted()
    with pytest.raises(
        ArtifactError, match=r"reports on the other half; one half has \d groups with real images, and 4"
    ):
        prepare_study(replace(rows, groups=rows.groups % 5), mean_of())


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=30, unique=True))
def test_of_points_that_no_timing_tells_apart_the_most_accurate_stays(times):
    points = [Point((str(n),), "fp32", 0.5 + n / 100, np.empty(0), 0.5, ms) for n, ms in enumerate(sorted(times))]
    kept = drop_equal_speeds(points)
    assert kept == sorted(kept, key=lambda point: point.milliseconds)
    for point in points:
        assert any(
            other.auroc >= point.auroc and point.milliseconds <= other.milliseconds <= point.milliseconds * 1.02
            for other in kept
        )
    assert all(b.milliseconds > a.milliseconds * 1.02 for a, b in pairwise(kept))


def test_many_members_are_added_one_by_one(monkeypatch):
    worth = dict(zip("abcde", (0.1, 0.5, 0.2, 0.3, 0.4), strict=True))

    def value(names):
        return Point(names, "fp32", sum(map(worth.get, names)), np.empty(0), 0.5, 1.0)

    assert len(pareto.search_subsets(tuple(worth), value)) == 31
    monkeypatch.setattr(pareto, "EXHAUSTIVE_MEMBERS", 3)
    tried = [point.members for point in pareto.search_subsets(tuple(worth), value)]
    assert len(tried) == 5 + 4 + 3 + 2 + 1
    assert tried[5:9] == [("a", "b"), ("b", "c"), ("b", "d"), ("b", "e")]
    assert tried[9:12] == [("a", "b", "e"), ("b", "c", "e"), ("b", "d", "e")]
    assert tried[-1] == tuple(worth)


def test_a_point_as_slow_and_no_better_is_not_on_the_front():
    good, slow, bad, fast, useless = (
        drawn_point("good", 5.0, 0.9, 0.0),
        drawn_point("slow", 6.0, 0.9, 0.0),
        drawn_point("bad", 5.0, 0.8, 0.0),
        drawn_point("fast", 1.0, 0.7, 0.0),
        drawn_point("useless", 0.1, 0.5, 0.0),
    )
    assert pareto_front([slow, good, bad, useless, fast]) == [fast, good]
