import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.core.metrics import auroc, log_loss, sigmoid
from ensemble.stacking import diagnostics
from ensemble.stacking.fit import fit_stacker, fit_with_strength, nested_cv_logits, solve
from ensemble.stacking.grouped_cv import grouped_folds
from ensemble.stacking.logistic import equal_weights_penalty, minimise_log_loss, smoothed_targets
from ensemble.stacking.stacker import METHODS, calibrated_probabilities


def planted(coef, intercept, groups=1000, rows=10, seed=0):
    """Labels drawn from a logistic model with these weights."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=1.5, size=(groups * rows, len(coef)))
    labels = (rng.random(len(logits)) < sigmoid(logits @ np.array(coef) + intercept)).astype(int)
    return logits, labels, np.repeat([f"g{i}" for i in range(groups)], rows)


def detectors(rows=400, seed=0, members=4, groups=None):
    """Detectors of one truth: their logits are in units and shifts of their own, and the last knows nothing."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % 2
    signal = np.linspace(2.0, 0.0, members)
    logits = rng.normal(size=(rows, members)) + np.outer(labels - 0.5, signal)
    logits = logits * 10.0 ** np.arange(members) + 3.0
    return logits, labels, np.arange(rows) % (groups or rows)


@pytest.mark.parametrize("kind", ["logit", "logit-nonnegative"])
def test_planted_weights_are_recovered(kind):
    logits, labels, groups = planted((1.0, 0.5, 0.0), -0.3)
    stacker = fit_stacker("abc", logits, labels, groups, kind)
    # the standard error of a weight is about 1 / sqrt(N p (1 - p)) / 1.5 = 0.02
    assert stacker.coef == pytest.approx((1.0, 0.5, 0.0), abs=0.08)
    assert stacker.intercept == pytest.approx(-0.3, abs=0.08)


def test_the_default_does_not_depend_on_the_members_units():
    logits, labels, groups = detectors()
    plain = fit_stacker("abcd", logits, labels, groups)
    other = fit_stacker("abcd", logits * [5.0, 0.1, 3.0, 7.0] - 2.0, labels, groups)
    np.testing.assert_allclose(other.target(logits * [5.0, 0.1, 3.0, 7.0] - 2.0), plain.target(logits), atol=1e-4)
    alone = [auroc(labels, column) for column in logits.T]
    assert auroc(labels, plain.target(logits)) > max(alone)
    raw = fit_stacker("abcd", logits, labels, groups, "logit-mean")
    assert auroc(labels, raw.target(logits)) < max(alone)  # a mean of logits is the loudest member


def test_weights_are_pulled_towards_each_other_and_not_towards_0():
    logits, labels, groups = detectors(rows=40)
    few = fit_stacker("abcd", logits, labels, groups)
    far = max(few.coef) - min(few.coef)
    assert np.mean(few.coef) > 1
    free, _ = minimise_log_loss(few.parts(logits), smoothed_targets(labels), 1e-3 * equal_weights_penalty(4))
    assert far < np.ptp(free)


def test_large_logits_count_only_where_they_are_right():
    """The size of a logit is a log-likelihood ratio, or noise around its sign."""
    rng = np.random.default_rng(0)
    labels, groups = np.arange(600) % 2, np.arange(600)
    truth = 2.5 * (labels - 0.5)[:, None] + rng.normal(size=(600, 2))
    temperature = {}
    for name, logits in (("true", 3 * truth), ("loud", truth * np.exp(1.5 * rng.normal(size=(600, 2))))):
        temperature[name] = fit_with_strength(
            "logistic", logits, labels, groups, grouped_folds(labels, groups)
        ).strength
    assert temperature["true"] > 1 == temperature["loud"]


def test_nonnegative_is_the_default_where_no_weight_would_be_below_0():
    logits, labels, _ = detectors()
    free = solve("logistic", logits, labels)
    assert min(free.coef) >= 0
    assert solve("nonnegative", logits, labels).coef == free.coef


def test_a_weight_below_0_is_held_at_0():
    rng = np.random.default_rng(0)
    labels = np.arange(2000) % 2
    shared = rng.normal(size=2000)
    signal = (labels - 0.5) * 1.5
    logits = np.column_stack([signal + shared, 0.3 * signal + shared])  # the second shows what misleads the first
    assert solve("logistic", logits, labels).coef[1] < -0.5
    held = solve("nonnegative", logits, labels)
    assert held.coef[1] == 0
    assert held.coef[0] > 0


@pytest.mark.parametrize("kind", ["logistic", "nonnegative", "mean", "logit", "logit-nonnegative"])
def test_rows_that_count_twice_are_rows_that_stand_twice(kind):
    logits, labels, _ = planted((1.0, 0.5), 0.2, groups=20)
    counts = np.random.default_rng(0).integers(0, 3, len(labels))
    weighted = solve(kind, logits, labels, 1.0, counts.astype(float))
    repeated = solve(kind, logits.repeat(counts, axis=0), labels.repeat(counts), 1.0)
    np.testing.assert_allclose(weighted.raw_logit(logits), repeated.raw_logit(logits), atol=1e-3)


def test_the_mean_ranks_as_the_mean_of_calibrated_probabilities_and_the_best_is_a_calibrated_member():
    logits, labels, groups = planted((0.2, 2.0), 0.0, groups=60)
    mean, best = (fit_stacker("ab", logits, labels, groups, kind) for kind in ("mean", "best"))
    p = calibrated_probabilities(logits, mean.member_calibrations)
    assert mean.coef[0] == mean.coef[1] > 0
    np.testing.assert_array_equal(np.argsort(mean.logit(logits)), np.argsort(p.mean(axis=1)))
    assert best.coef[0] == 0
    np.testing.assert_allclose(best.target(logits), p[:, 1])


def test_methods_of_old_files_are_on_logits():
    logits, labels, _ = planted((0.2, 2.0), 0.0, groups=60)
    np.testing.assert_allclose(solve("logit-mean", logits, labels).logit(logits), logits.mean(axis=1))
    best = solve("logit-best", logits, labels)
    assert (best.coef, best.intercept, best.method, best.format_version) == ((0.0, 1.0), 0.0, "best", 1)


def test_a_member_without_an_answer_counts_as_its_mean():
    logits, labels, groups = detectors()
    holes = np.where(np.random.default_rng(1).random(logits.shape) < 0.2, np.nan, logits)
    for kind in METHODS:
        stacker = fit_stacker("abcd", holes, labels, groups, kind)
        assert np.isfinite(stacker.target(stacker.fill_missing(holes))).all(), kind
        assert np.isnan(stacker.target(holes)).any()  # nothing is filled in silence
    p = calibrated_probabilities(holes, stacker.member_calibrations)
    filled = calibrated_probabilities(stacker.fill_missing(holes), stacker.member_calibrations)
    np.testing.assert_allclose(filled[np.isnan(p[:, 0]), 0], np.nanmean(p[:, 0]))
    unseen = stacker.fill_missing(np.full((1, 4), np.nan))
    assert np.isnan(unseen).all()


def test_constant_and_reversed_members_do_no_harm():
    logits, labels, groups = detectors(members=3)
    wrong = np.column_stack([logits, np.full(len(labels), 2.0), -logits[:, 0]])
    stacker = fit_stacker("abcde", wrong, labels, groups)
    assert stacker.coef[3:] == (0, 0)
    moved = wrong.copy()
    moved[:, 3:] = 99.0
    np.testing.assert_array_equal(stacker.target(moved), stacker.target(wrong))
    assert auroc(labels, stacker.target(wrong)) >= auroc(labels, solve("mean", logits, labels).raw_logit(logits)) - 0.01


def test_scores_that_are_exactly_right_stay_finite():
    labels = np.arange(40) % 2
    logits = np.where(labels == 1, 13.8, -13.8)[:, None] * [1.0, 1.0]
    for kind in METHODS:
        target = fit_stacker("ab", logits, labels, np.arange(40), kind).target(logits)
        assert ((target > 0) & (target < 1)).all(), kind


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(20, 60), st.integers(1, 5), st.sampled_from(METHODS))
def test_any_table_gives_finite_weights_and_targets_between_0_and_1(seed, rows, members, kind):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, members)) * 10.0 ** rng.integers(-3, 4, members)
    logits[rng.random(logits.shape) < rng.choice([0, 0.3])] = np.nan
    logits[np.isnan(logits).all(axis=1)] = 0.0  # rows without any answer are left out before
    labels = rng.permutation(np.arange(rows) % 2)
    stacker = solve(kind, logits, labels)
    target = stacker.target(stacker.fill_missing(logits))
    assert np.isfinite([*stacker.coef, stacker.intercept]).all()
    assert ((target >= 0) & (target <= 1)).all()


def test_the_best_member_is_chosen_inside_each_fold():
    # each member is right on all groups but those of one block, so which is best depends on the rows
    labels, groups = np.arange(120) % 2, np.repeat([f"g{i}" for i in range(20)], 6)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(120, 8)) + 0.3 * (labels - 0.5)[:, None]
    apparent = max(auroc(labels, column) for column in logits.T)
    held = nested_cv_logits(logits, labels, groups, "logit-best").raw
    assert auroc(labels, held) < apparent
    assert all(row in values for row, values in zip(held, logits, strict=True))
    assert auroc(labels, nested_cv_logits(logits, labels, groups, "best").raw) < apparent


@pytest.mark.parametrize("kind", METHODS)
def test_out_of_fold_no_kind_ranks_noise(kind):
    rng = np.random.default_rng(3)
    labels, groups = np.arange(400) % 2, np.repeat([f"g{i}" for i in range(100)], 4)
    logits = rng.normal(size=(400, 6))
    assert auroc(labels, nested_cv_logits(logits, labels, groups, kind, "auto").calibrated) == pytest.approx(
        0.5, abs=0.1
    )


def test_calibration_inside_folds_recovers_what_is_overconfident():
    logits, labels, groups = planted((1.0,), 0.0, groups=300)
    scores = nested_cv_logits(5 * logits, labels, groups, "logit-best", "auto")
    losses = [log_loss(labels, sigmoid(values)) for values in (scores.raw, scores.calibrated, logits[:, 0])]
    assert losses[1] == pytest.approx(losses[2], abs=0.005)
    assert losses[0] > losses[2] + 0.5
    found = fit_stacker("a", 5 * logits, labels, groups, "logit-best", "auto").calibration
    assert found.kind == "temperature"
    assert found.scale == pytest.approx(0.2, rel=0.1)


def test_weight_intervals_hold_the_planted_weights_and_narrow_with_groups():
    spans = []
    for groups in (30, 270):
        logits, labels, names = planted((1.0, 0.0), 0.0, groups=groups, seed=6)
        strength = fit_with_strength("logit", logits, labels, names, grouped_folds(labels, names)).strength
        one, other = diagnostics.weight_intervals("logit", logits, labels, names, strength)
        assert one.low < 1.0 < one.high
        assert other.low < 0.0 < other.high
        spans.append(one.high - one.low)
    assert spans[1] == pytest.approx(spans[0] / 3, rel=0.4)


def test_fixed_weights_have_no_intervals():
    assert (
        diagnostics.weight_intervals("mean", np.ones((4, 2)), np.array([0, 1, 0, 1]), np.array(list("abcd")), 1.0)
        is None
    )


def test_members_that_say_the_same_are_named():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(500, 2))
    logits = np.column_stack([base, 3 * base[:, 0] + 0.1 * rng.normal(size=500), -base[:, 1]])
    ((one, other, correlation),) = diagnostics.collinear_pairs("abcd", logits)
    assert (one, other) == ("a", "c")
    assert correlation > 0.98
    assert diagnostics.collinear_pairs("a", logits[:, :1]) == []
