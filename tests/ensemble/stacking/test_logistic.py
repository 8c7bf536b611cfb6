"""The penalised log-loss: its minimum against scikit-learn's, its penalty, its bound."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from ensemble.core.metrics import sigmoid
from ensemble.stacking.logistic import equal_weights_penalty, minimise_log_loss, smoothed_targets


def planted(coef, rows=400, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, len(coef)))
    return features, (rng.random(rows) < sigmoid(features @ np.array(coef) - 0.3)).astype(int)


@pytest.mark.parametrize("inverse_penalty", [0.01, 1.0, 100.0])
def test_a_penalty_on_squares_is_scikit_learns(inverse_penalty):
    features, labels = planted((1.0, -0.5))
    coef, intercept = minimise_log_loss(features, labels.astype(float), np.eye(2) / inverse_penalty)
    model = LogisticRegression(C=inverse_penalty, tol=1e-10, max_iter=1000).fit(features, labels)
    np.testing.assert_allclose([*coef, intercept], [*model.coef_[0], model.intercept_[0]], atol=1e-5)


def test_the_penalty_is_on_differences_between_weights_alone():
    penalty = equal_weights_penalty(3)
    assert np.ones(3) @ penalty @ np.ones(3) == pytest.approx(0)
    weights = np.array([1.0, 2.0, 6.0])
    assert weights @ penalty @ weights == pytest.approx(((weights - 3) ** 2).sum())


def test_a_large_penalty_makes_weights_equal_and_keeps_their_mean_free():
    features, labels = planted((3.0, 1.0))
    coef, _ = minimise_log_loss(features, labels.astype(float), 1e9 * equal_weights_penalty(2))
    one, _ = minimise_log_loss(features.mean(axis=1)[:, None], labels.astype(float), np.zeros((1, 1)))
    np.testing.assert_allclose(coef, np.repeat(one / 2, 2), rtol=1e-4)
    free, _ = minimise_log_loss(features, labels.astype(float), 0 * equal_weights_penalty(2))
    assert free[0] > free[1] + 1  # the penalty did it


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_weights_are_never_below_the_bound(seed, members):
    features = np.random.default_rng(seed).normal(size=(40, members))
    coef, _ = minimise_log_loss(features, np.arange(40) % 2.0, np.eye(members) / 10, lowest=0.0)
    assert (coef >= 0).all()


def test_rows_that_count_twice_are_rows_that_stand_twice():
    features, labels = planted((1.0, -0.5), rows=60)
    counts = np.random.default_rng(0).integers(0, 3, len(labels))
    weighted = minimise_log_loss(features, labels.astype(float), np.eye(2), counts.astype(float))
    repeated = minimise_log_loss(features.repeat(counts, axis=0), labels.repeat(counts).astype(float), np.eye(2))
    np.testing.assert_allclose(weighted[0], repeated[0], atol=1e-6)
    np.testing.assert_allclose(
        np.unique(smoothed_targets(labels, counts)), np.unique(smoothed_targets(labels.repeat(counts)))
    )


def test_smoothed_targets_are_platts_and_keep_separable_rows_finite():
    labels = np.array([1, 1, 1, 0])
    assert smoothed_targets(labels).tolist() == [4 / 5, 4 / 5, 4 / 5, 1 / 3]
    features = np.array([[2.0], [3.0], [4.0], [-5.0]])
    coef, intercept = minimise_log_loss(features, smoothed_targets(labels), np.zeros((1, 1)))
    assert 0 < coef[0] < 10
    assert np.isfinite(intercept)
