import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from ensemble.metrics import auroc, cluster_interval, log_loss, sigmoid


def labels_with(values):
    return st.lists(st.tuples(st.integers(0, 1), values), min_size=2, max_size=60)


def sample(seed, groups=20, rows=5, signal=1.0):
    rng = np.random.default_rng(seed)
    labels = np.arange(groups * rows) % 2
    scores = sigmoid(rng.normal(size=len(labels)) + signal * labels)
    return labels, scores, np.repeat([f"g{i}" for i in range(groups)], rows)


@settings(deadline=None)
@given(labels_with(st.integers(-2, 2) | st.floats(-1e6, 1e6)))
def test_auroc_is_scikit_learns_with_ties(pairs):
    labels, scores = np.array([label for label, _ in pairs]), np.array([score for _, score in pairs], dtype=float)
    assume(0 < labels.sum() < len(labels))
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@settings(deadline=None)
@given(labels_with(st.floats(1e-12, 1 - 1e-12)))
def test_log_loss_is_scikit_learns(pairs):
    labels, p = np.array([label for label, _ in pairs]), np.array([score for _, score in pairs])
    assert log_loss(labels, p) == pytest.approx(sklearn_log_loss(labels, p, labels=[0, 1]), rel=1e-12)


@pytest.mark.parametrize(
    ("labels", "scores", "expected"),
    [
        ([0, 1], [0.1, 0.9], 1.0),
        ([0, 1], [0.9, 0.1], 0.0),
        ([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5], 0.5),
        ([0, 1, 1], [0.5, 0.5, 0.7], 0.75),
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


@pytest.mark.parametrize("score", [auroc, log_loss])
@pytest.mark.parametrize("seed", range(4))
def test_interval_contains_its_value(score, seed):
    labels, scores, groups = sample(seed)
    found = cluster_interval(score, labels, scores, groups, resamples=300)
    assert found.value == score(labels, scores)
    assert found.low < found.value < found.high


def test_interval_depends_on_the_seed_alone():
    labels, scores, groups = sample(0)
    first, again, other = (cluster_interval(auroc, labels, scores, groups, 200, seed) for seed in (1, 1, 2))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    assert str(first) == f"{first.value:.4f} [{first.low:.4f}, {first.high:.4f}]"


def test_interval_ignores_the_order_of_rows():
    labels, scores, groups = sample(0, groups=4)
    order = np.random.default_rng(1).permutation(len(labels))
    first = cluster_interval(auroc, labels, scores, groups, 200)
    assert cluster_interval(auroc, labels[order], scores[order], groups[order], 200) == first


@pytest.mark.parametrize("score", [auroc, log_loss])
def test_copies_within_a_group_add_no_certainty(score):
    labels, scores, _ = sample(3, groups=10, rows=4)
    copies, groups = 9, np.arange(40)
    labels, scores, groups = (np.repeat(values, copies) for values in (labels, scores, groups))
    by_group = cluster_interval(score, labels, scores, groups, 400)
    by_row = cluster_interval(score, labels, scores, np.arange(len(labels)), 400)
    # nine copies of each row look like nine times the rows: an interval a third as wide
    assert by_group.high - by_group.low > 2 * (by_row.high - by_row.low)


def test_one_group_has_no_interval():
    labels, scores, _ = sample(0)
    found = cluster_interval(auroc, labels, scores, ["same"] * len(labels), 50)
    assert found.value == auroc(labels, scores)
    assert np.isnan([found.low, found.high]).all()


def test_one_class_has_no_interval():
    found = cluster_interval(auroc, np.ones(6, int), np.linspace(0, 1, 6), list("aabbcc"), 50)
    assert np.isnan([found.value, found.low, found.high]).all()


def test_draws_without_a_class_are_left_out():
    labels, groups = np.array([0, 0, 1, 1]), ["a", "a", "b", "b"]
    found = cluster_interval(auroc, labels, np.array([0.1, 0.2, 0.3, 0.4]), groups, 100)
    assert (found.value, found.low, found.high) == (1, 1, 1)
