import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    f1_score,
    recall_score,
    roc_auc_score,
)
from sklearn.metrics import log_loss as sklearn_log_loss

from ensemble.core import metrics
from ensemble.core.errors import DataError
from ensemble.core.metrics import SCORES, auroc, expected_calibration_error, log_loss, sigmoid

# few distinct values among many, so that ties are common
PROBABILITIES = st.integers(0, 6).map(lambda i: i / 6) | st.floats(0, 1)
SKLEARN = {
    "average_precision": average_precision_score,
    "balanced_accuracy": lambda labels, p: balanced_accuracy_score(labels, p >= 0.5),
    "f1": lambda labels, p: f1_score(labels, p >= 0.5),
    "accuracy_real": lambda labels, p: recall_score(labels, p >= 0.5, pos_label=0),
    "accuracy_ai": lambda labels, p: recall_score(labels, p >= 0.5),
    "brier": brier_score_loss,
}


def labels_with(values):
    return st.lists(st.tuples(st.integers(0, 1), values), min_size=2, max_size=60)


def both_classes(pairs):
    labels, values = np.array([label for label, _ in pairs]), np.array([value for _, value in pairs], dtype=float)
    assume(0 < labels.sum() < len(labels))
    return labels, values


@settings(deadline=None)
@given(labels_with(st.integers(-2, 2) | st.floats(-1e6, 1e6)))
def test_auroc_is_scikit_learns_with_ties(pairs):
    labels, scores = both_classes(pairs)
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@settings(deadline=None)
@given(labels_with(st.floats(1e-12, 1 - 1e-12)))
def test_log_loss_is_scikit_learns(pairs):
    labels, p = np.array([label for label, _ in pairs]), np.array([score for _, score in pairs])
    assert log_loss(labels, p) == pytest.approx(sklearn_log_loss(labels, p, labels=[0, 1]), rel=1e-12)


@settings(deadline=None)
@given(labels_with(PROBABILITIES))
def test_scores_are_scikit_learns_with_ties(pairs):
    labels, p = both_classes(pairs)
    for name, reference in SKLEARN.items():
        assert metrics.score(name, labels, p) == pytest.approx(reference(labels, p), abs=1e-12), name


@settings(deadline=None)
@given(labels_with(PROBABILITIES))
def test_ece_is_scikit_learns_calibration_curve(pairs):
    labels, p = both_classes(pairs)
    bins = metrics.ECE_BINS
    rows = np.histogram(np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], p), np.arange(bins + 1))[0]
    share, mean = calibration_curve(labels, p, n_bins=bins)
    assert expected_calibration_error(labels, p) == pytest.approx(
        rows[rows > 0] @ np.abs(share - mean) / len(p), abs=1e-12
    )


def tpr_at_fpr(labels, scores, fpr):
    return float(metrics._tpr_at_fpr(*metrics.roc_counts(labels, scores), fpr=fpr)[0])


@settings(deadline=None)
@given(labels_with(PROBABILITIES), st.floats(0.001, 0.999))
def test_tpr_at_fpr_is_the_best_threshold_that_keeps_to_it(pairs, fpr):
    labels, p = both_classes(pairs)
    thresholds = [*p, np.inf]
    kept = [np.mean(p[labels == 1] >= t) for t in thresholds if np.mean(p[labels == 0] >= t) <= fpr]
    assert tpr_at_fpr(labels, p, fpr) == pytest.approx(max(kept))


@settings(deadline=None)
@given(labels_with(PROBABILITIES), st.data())
def test_a_weighted_score_is_the_score_of_repeated_rows(pairs, data):
    labels, p = both_classes(pairs)
    drawn = st.lists(st.integers(0, 3), min_size=len(p), max_size=len(p)).filter(any)
    counts = np.array(data.draw(st.lists(drawn, min_size=1, max_size=3)))
    found = metrics.weighted_scores(labels, p, counts.astype(float), SCORES)
    for line, count in enumerate(counts):
        for name in SCORES:
            expected = metrics.score(name, np.repeat(labels, count), np.repeat(p, count))
            assert found[name][line] == pytest.approx(expected, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize(
    ("fpr", "expected"), [(0.01, 0.25), (0.249, 0.25), (0.25, 0.75), (0.5, 0.75), (0.74, 0.75), (0.75, 1.0), (0.9, 1.0)]
)
def test_tpr_at_fpr_by_hand(fpr, expected):
    scores = np.array([0.9, 0.8, 0.7, 0.7, 0.5, 0.4, 0.4, 0.1])
    labels = np.array([1, 0, 1, 1, 0, 0, 1, 0])
    assert tpr_at_fpr(labels, scores, fpr) == expected


def test_a_rate_of_whole_images_is_met():
    assert 0.29 * 100 < 29  # in floating point
    labels = np.repeat([0, 1, 0], [29, 1, 71])
    assert tpr_at_fpr(labels, -np.arange(101.0), 0.29) == 1
    assert tpr_at_fpr(labels, -np.arange(101.0), 0.28) == 0


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_the_scores_that_need_no_other(label):
    labels, p = np.full(4, label), np.array([0.2, 0.4, 0.6, 0.9])
    found = {name: metrics.score(name, labels, p) for name in SCORES}
    known = {"log_loss", "brier", "ece", ("accuracy_real", "accuracy_ai")[label]} | ({"f1"} if label else set())
    assert {name for name, value in found.items() if not np.isnan(value)} == known
    accuracies = (found["accuracy_real"], found["accuracy_ai"])
    assert accuracies == pytest.approx((np.nan, 0.5) if label else (0.5, np.nan), nan_ok=True)


def test_no_rows_have_no_score():
    assert all(np.isnan(metrics.score(name, np.empty(0), np.empty(0))) for name in SCORES)


def calibrated(rows, seed, labels=1):
    rng = np.random.default_rng(seed)
    p = rng.beta(0.5, 0.5, rows)
    return p, [(rng.random(rows) < p).astype(int) for _ in range(labels)]


def test_ece_of_calibrated_scores_is_what_chance_makes_it():
    p, truths = calibrated(2000, 0, labels=300)
    found = [expected_calibration_error(labels, p) for labels in truths]
    in_bin = np.minimum((p * 15).astype(int), 14)
    chance = sum(np.sqrt(2 / np.pi * (p * (1 - p))[in_bin == i].sum()) for i in range(15)) / len(p)
    assert np.mean(found) == pytest.approx(chance, rel=0.03)
    # the twin: logits that are half as large again lie beyond all that chance gives
    off = sigmoid(1.5 * np.log(p / (1 - p)))
    assert expected_calibration_error(truths[0], off) > max(found)


def test_ece_of_many_calibrated_scores_is_near_zero():
    p, (labels,) = calibrated(200_000, 1)
    assert expected_calibration_error(labels, p) < 0.004
    assert expected_calibration_error(labels, np.full(len(p), labels.mean())) < 1e-12
    assert expected_calibration_error(labels, p**2) > 0.1


def test_a_rate_needs_enough_reals():
    metrics.check_fpr_resolvable(np.repeat([0, 1], [100, 5]), 0.01)
    metrics.check_fpr_resolvable(np.zeros(10), 0.1)
    with pytest.raises(DataError, match=r"rate of 0.01 needs at least 100 reals, and here are 99: add real images, or"):
        metrics.check_fpr_resolvable(np.repeat([0, 1], [99, 500]), 0.01)
    with pytest.raises(DataError, match="lies between 0 and 1, not at 5"):
        metrics.check_fpr_resolvable(np.zeros(100), 5)


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0, 1], [0.1, 0.9], 1.0),
        ([0, 1], [0.9, 0.1], 0.0),
        ([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5], 0.5),
        ([0, 1, 1], [0.5, 0.5, 0.7], 0.75),
        ([0, 1, 0, 1], [np.inf, np.inf, -np.inf, -np.inf], 0.5),
        ([1, 1], [0.1, 0.9], np.nan),
        ([0, 0], [0.1, 0.9], np.nan),
    ],
)
def test_auroc_by_hand(labels, scores, expected):
    assert auroc(labels, scores) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("label", "p", "expected"), [(1, 1.0, 0.0), (0, 0.0, 0.0), (1, 0.0, 34.5388), (0, 1.0, 34.5388), (1, 0.5, 0.6931)]
)
def test_log_loss_of_certain_answers_is_finite(label, p, expected):
    assert log_loss([label], [p]) == pytest.approx(expected, abs=1e-3)


@settings(deadline=None)
@given(st.lists(st.floats(-700, 700), min_size=1, max_size=20))
def test_sigmoid_is_the_logistic_function(values):
    z = np.array(values)
    np.testing.assert_allclose(sigmoid(z), expit(z), rtol=1e-13)
    np.testing.assert_allclose(sigmoid(z) + sigmoid(-z), 1, rtol=1e-14)


def test_sigmoid_does_not_overflow():
    z = np.array([-np.inf, -1e308, -1000, 0, 1000, 1e308, np.inf])
    assert sigmoid(z).tolist() == [0, 0, 0, 0.5, 1, 1, 1]
    assert sigmoid(np.float32([3.5])).dtype == np.float64
    assert 0 < sigmoid(np.array([-700.0]))[0] < 1e-300
    assert np.isnan(sigmoid(np.array([np.nan]))).all()
