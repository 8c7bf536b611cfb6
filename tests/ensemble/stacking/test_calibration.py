import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.core.errors import DataError
from ensemble.core.metrics import auroc, expected_calibration_error, log_loss, score, sigmoid
from ensemble.stacking.calibration import clustered_mean, fit_calibration
from ensemble.stacking.grouped_cv import grouped_folds
from ensemble.stacking.threshold import choose_threshold, parse_rule


def calibrated(choice, logits, labels, groups):
    return fit_calibration(choice, logits, labels, groups, grouped_folds(labels, groups))


def simulated(count=4000, scale=1.0, shift=0.0, seed=0):
    """Logits whose truth is scale * z + shift, labels drawn from it, four rows a group."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=count)
    labels = (rng.random(count) < sigmoid(scale * logits + shift)).astype(int)
    return logits, labels, np.arange(count) // 4


@pytest.mark.parametrize(
    ("choice", "scale", "shift", "kind"),
    [
        ("temperature", 0.25, 0.0, "temperature"),
        ("shift", 1.0, -1.5, "shift"),
        ("auto", 0.25, 0.0, "temperature"),
        ("auto", 1.0, -1.5, "shift"),
        ("auto", 1.0, 0.0, "none"),
        ("none", 0.25, 0.0, "none"),
    ],
)
def test_planted_miscalibration_is_found(choice, scale, shift, kind):
    logits, labels, groups = simulated(scale=scale, shift=shift)
    found = calibrated(choice, logits, labels, groups)
    assert found.kind == kind
    if kind != "none":
        assert (found.scale, found.shift) == (pytest.approx(scale, rel=0.1), pytest.approx(shift, abs=0.15))
        assert expected_calibration_error(labels, sigmoid(logits)) > 0.1
        assert expected_calibration_error(labels, sigmoid(found.apply(logits))) < 0.03
        assert auroc(labels, found.apply(logits)) == auroc(labels, logits)
        before, after = (log_loss(labels, sigmoid(values)) for values in (logits, found.apply(logits)))
        assert after < before
    else:
        assert found.apply(logits) == pytest.approx(logits)
        assert found.reason


def test_auto_seldom_calibrates_what_is_calibrated():
    chosen = [calibrated("auto", *simulated(200, seed=seed)).kind for seed in range(20)]
    assert chosen.count("none") >= 17


def test_the_standard_error_is_over_groups():
    values = np.random.default_rng(0).normal(size=1000)
    mean, error = clustered_mean(values, np.arange(1000))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(1000), rel=1e-6)
    assert clustered_mean(values.repeat(4), np.arange(4000) // 4)[1] == pytest.approx(error)
    assert clustered_mean(values.repeat(4), np.arange(4000))[1] == pytest.approx(error / 2, rel=0.01)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 60))
def test_no_threshold_has_a_higher_balanced_accuracy(seed, count):
    rng = np.random.default_rng(seed)
    labels, target = np.arange(count) % 2, rng.integers(0, 10, count) / 10 + rng.random() / 10
    if len(np.unique(target)) < 2:
        return
    threshold, rule = choose_threshold("balanced", labels, target)
    best = max(score("balanced_accuracy", labels, target, value) for value in np.linspace(0, 1.1, 111))
    assert score("balanced_accuracy", labels, target, threshold) >= best - 1e-9
    assert rule == "balanced_accuracy"


@pytest.mark.parametrize(("share", "called"), [(0.05, 1), (0.1, 2), (0.12, 2), (0.5, 10)])
def test_an_fpr_is_kept_and_used_up(share, called):
    target = np.concatenate([np.linspace(0, 0.9, 20), np.linspace(0.3, 1, 15)])
    labels = np.repeat([0, 1], [20, 15])
    threshold, rule = choose_threshold(f"fpr={share}", labels, target)
    assert (target[:20] >= threshold).sum() == called
    assert rule == f"fpr={share}"
    lower = target[target < threshold].max()
    assert (target[:20] >= lower).sum() > called or lower in target[20:]


def test_an_fpr_that_ties_do_not_allow_is_kept_below():
    labels, target = np.repeat([0, 1], [20, 2]), np.array([0.1] * 17 + [0.8] * 3 + [0.7, 0.9])
    threshold, _ = choose_threshold("fpr=0.1", labels, target)
    assert 0.8 < threshold <= 0.9


@pytest.mark.parametrize(
    ("rule", "target", "message"),
    [
        ("fpr=0.05", np.linspace(0, 1, 38), r"needs at least 20 real"),
        ("fpr=0.01", np.linspace(0, 1, 38), r"needs at least 100 real"),
        ("fpr=0.1", np.tile([1.0, 0.5], 19), "more real images than that have the highest target"),
        ("balanced", np.full(38, 0.5), "the same target; no threshold separates ai from real"),
    ],
)
def test_a_threshold_that_the_rows_cannot_give_is_refused(rule, target, message):
    with pytest.raises(DataError, match=message):
        choose_threshold(rule, np.arange(38) % 2, target)


def test_a_number_is_taken_as_it_is():
    assert choose_threshold(parse_rule("0.7"), np.array([0, 1]), np.array([0.1, 0.9])) == (0.7, "given")


@pytest.mark.parametrize(
    "text", ["", "much", "1.5", "-0.1", "nan", "fpr=", "fpr=0", "fpr=1", "fpr=nan", "fpr=x", "tpr=0.5"]
)
def test_a_rule_that_means_nothing_is_refused(text):
    with pytest.raises(ValueError, match=r".*"):
        parse_rule(text)
