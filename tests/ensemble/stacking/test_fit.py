import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from ensemble.core.metrics import auroc, log_loss, sigmoid
from ensemble.stacking import diagnostics
from ensemble.stacking.fit import fit_stacker, fit_weights, nested_cv_logits, solve_weights
from ensemble.stacking.grouped_cv import grouped_folds
from ensemble.stacking.stacker import METHODS


def planted(coef, intercept, groups=1000, rows=10, seed=0):
    """Labels drawn from a logistic model with these weights."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=1.5, size=(groups * rows, len(coef)))
    labels = (rng.random(len(logits)) < sigmoid(logits @ np.array(coef) + intercept)).astype(int)
    return logits, labels, np.repeat([f"g{i}" for i in range(groups)], rows)


@pytest.mark.parametrize("kind", ["logistic", "nonnegative"])
def test_planted_weights_are_recovered(kind):
    logits, labels, groups = planted((1.0, 0.5, 0.0), -0.3)
    stacker = fit_stacker("abc", logits, labels, groups, kind)
    # the standard error of a weight is about 1 / sqrt(N p (1 - p)) / 1.5 = 0.02
    assert stacker.coef == pytest.approx((1.0, 0.5, 0.0), abs=0.08)
    assert stacker.intercept == pytest.approx(-0.3, abs=0.08)


def test_a_planted_negative_weight_is_recovered_or_held_at_zero():
    logits, labels, groups = planted((1.0, -0.5), 0.2, groups=300)
    assert fit_stacker("ab", logits, labels, groups).coef == pytest.approx((1.0, -0.5), abs=0.15)
    held = fit_stacker("ab", logits, labels, groups, "nonnegative")
    assert held.coef[1] == 0
    assert held.coef[0] == pytest.approx(fit_stacker("a", logits[:, :1], labels, groups).coef[0], abs=0.01)


def test_without_a_bound_that_binds_nonnegative_is_logistic_regression():
    logits, labels, _ = planted((1.0, 0.5), -0.3, groups=30)
    for strength in (0.01, 1.0, 100.0):
        coef, intercept = solve_weights("nonnegative", logits, labels, strength)
        model = LogisticRegression(C=strength, tol=1e-8, max_iter=1000).fit(logits, labels)
        np.testing.assert_allclose([*coef, intercept], [*model.coef_[0], model.intercept_[0]], atol=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_nonnegative_weights_are_never_below_zero(seed, members):
    rng = np.random.default_rng(seed)
    coef, _ = solve_weights("nonnegative", rng.normal(size=(40, members)), np.arange(40) % 2, 10.0)
    assert (coef >= 0).all()


def test_rows_that_count_twice_are_rows_that_stand_twice():
    logits, labels, _ = planted((1.0, -0.5), 0.2, groups=20)
    counts = np.random.default_rng(0).integers(0, 3, len(labels))
    for kind in ("logistic", "nonnegative"):
        weighted = solve_weights(kind, logits, labels, 1.0, counts.astype(float))
        repeated = solve_weights(kind, logits.repeat(counts, axis=0), labels.repeat(counts), 1.0)
        np.testing.assert_allclose(weighted[0], repeated[0], atol=1e-3)


def test_the_mean_is_of_logits_and_the_best_is_a_member():
    logits, labels, groups = planted((0.2, 2.0), 0.0, groups=60)
    mean, best = (fit_stacker("ab", logits, labels, groups, kind) for kind in ("mean", "best"))
    np.testing.assert_allclose(mean.logit(logits), logits.mean(axis=1))
    assert (best.coef, best.intercept, best.method) == ((0.0, 1.0), 0.0, "best")
    np.testing.assert_array_equal(best.logit(logits), logits[:, 1])


def test_the_best_member_is_chosen_inside_each_fold():
    # each member is right on all groups but those of one block, so which is best depends on the rows
    labels, groups = np.arange(120) % 2, np.repeat([f"g{i}" for i in range(20)], 6)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(120, 8)) + 0.3 * (labels - 0.5)[:, None]
    apparent = max(auroc(labels, column) for column in logits.T)
    held = nested_cv_logits(logits, labels, groups, "best").raw
    assert auroc(labels, held) < apparent
    assert all(row in values for row, values in zip(held, logits, strict=True))


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
    scores = nested_cv_logits(5 * logits, labels, groups, "best", "auto")
    losses = [log_loss(labels, sigmoid(values)) for values in (scores.raw, scores.calibrated, logits[:, 0])]
    assert losses[1] == pytest.approx(losses[2], abs=0.005)
    assert losses[0] > losses[2] + 0.5
    found = fit_stacker("a", 5 * logits, labels, groups, "best", "auto").calibration
    assert found.kind == "temperature"
    assert found.scale == pytest.approx(0.2, rel=0.1)


def test_weight_intervals_hold_the_planted_weights_and_narrow_with_groups():
    spans = []
    for groups in (30, 270):
        logits, labels, names = planted((1.0, 0.0), 0.0, groups=groups, seed=6)
        strength = fit_weights("logistic", logits, labels, grouped_folds(labels, names)).inverse_penalty
        one, other = diagnostics.weight_intervals("logistic", logits, labels, names, strength)
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
