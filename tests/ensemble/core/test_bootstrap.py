import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from ensemble.core import bootstrap, metrics
from ensemble.core.bootstrap import paired_difference, score_intervals
from ensemble.core.metrics import SCORES, sigmoid

APART = 1.5  # of the classes' normal scores, in standard deviations
SHARED = 0.8  # of the variance within a class: what images of one group have in common
SPREAD = ("auroc", "log_loss")


def sample(seed, groups=20, rows=5, signal=1.0):
    rng = np.random.default_rng(seed)
    labels = np.arange(groups * rows) % 2
    p = sigmoid(rng.normal(size=len(labels)) + signal * labels)
    return labels, p, np.repeat([f"g{i}" for i in range(groups)], rows)


def width(interval):
    return interval.high - interval.low


def one_group_after_another(name, labels, p, groups, resamples, seed):
    """The plain way: rows of the drawn groups, put one after another and scored anew."""
    labels, p = np.asarray(labels), np.asarray(p)
    names = np.unique(groups)
    drawn = []
    for chosen in np.random.default_rng(seed).integers(len(names), size=(resamples, len(names))):
        rows = np.concatenate([np.flatnonzero(groups == names[i]) for i in chosen])
        drawn.append(metrics.score(name, labels[rows], p[rows]))
    return np.nanquantile(drawn, [0.025, 0.975])


@pytest.mark.parametrize("seed", range(3))
def test_intervals_are_those_of_rows_drawn_and_scored_anew(seed):
    labels, p, groups = sample(seed, groups=7)
    groups = np.random.default_rng(seed).permutation(groups)  # of 5 rows, in no order
    p = np.round(p, 1)  # with ties
    found = score_intervals(labels, p, groups, resamples=150, seed=seed)
    assert list(found) == list(SCORES)
    for name, interval in found.items():
        expected = one_group_after_another(name, labels, p, groups, 150, seed)
        assert (interval.low, interval.high) == pytest.approx(tuple(expected), abs=1e-12), name
        assert interval.value == metrics.score(name, labels, p)


@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_the_chunk_changes_nothing(monkeypatch, chunk):
    labels, p, groups = sample(0)
    whole = score_intervals(labels, p, groups, resamples=50)
    monkeypatch.setattr(bootstrap, "CHUNK_WEIGHTS", chunk)
    for name, interval in score_intervals(labels, p, groups, resamples=50).items():
        assert (interval.low, interval.high) == pytest.approx((whole[name].low, whole[name].high), abs=1e-12), name


def test_interval_depends_on_the_seed_alone():
    labels, p, groups = sample(0)
    first, again, other = (score_intervals(labels, p, groups, resamples=200, seed=seed) for seed in (1, 1, 2))
    assert first == again
    for name in SCORES:
        assert (first[name].low, first[name].high) != (other[name].low, other[name].high)
        assert str(first[name]) == f"{first[name].value:.4f} [{first[name].low:.4f}, {first[name].high:.4f}]"


@pytest.mark.parametrize("seed", range(4))
def test_interval_contains_its_value(seed):
    found = score_intervals(*sample(seed), resamples=300)
    for name in set(SCORES) - {"ece"}:  # which chance raises in every draw
        assert found[name].low <= found[name].value <= found[name].high, name


def test_interval_ignores_the_order_of_rows():
    labels, p, groups = sample(0, groups=4)
    order = np.random.default_rng(1).permutation(len(labels))
    first = score_intervals(labels, p, groups, resamples=200, names=("auroc",))
    assert score_intervals(labels[order], p[order], groups[order], resamples=200, names=("auroc",)) == first


def test_copies_within_a_group_add_no_certainty():
    labels, p, _ = sample(3, groups=10, rows=4)
    labels, p, groups = (np.repeat(values, 9) for values in (labels, p, np.arange(40)))
    by_group = score_intervals(labels, p, groups, resamples=400, names=SPREAD)
    by_row = score_intervals(labels, p, np.arange(len(labels)), resamples=400, names=SPREAD)
    # nine copies of each row look like nine times the rows: an interval a third as wide
    assert all(width(by_group[name]) > 2 * width(by_row[name]) for name in SPREAD)


def test_one_group_has_no_interval():
    labels, p, _ = sample(0)
    for name, found in score_intervals(labels, p, ["same"] * len(labels), resamples=50).items():
        assert found.value == metrics.score(name, labels, p)
        assert found.to_dict() == {"value": found.value, "low": None, "high": None}
        assert str(found) == f"{found.value:.4f}"
    assert np.isnan(paired_difference(labels, p, p, ["same"] * len(labels), resamples=50).better)


def test_one_class_has_the_intervals_that_need_no_other():
    found = score_intervals(np.zeros(60), np.linspace(0, 1, 60), np.arange(60), resamples=200)
    assert np.isnan([found["auroc"].value, found["auroc"].low, found["auroc"].high]).all()
    assert found["accuracy_real"].low < found["accuracy_real"].value < found["accuracy_real"].high


def test_draws_without_a_class_are_left_out():
    labels, groups = np.array([0, 0, 1, 1]), ["a", "a", "b", "b"]
    found = score_intervals(labels, np.array([0.1, 0.2, 0.3, 0.4]), groups, resamples=100)["auroc"]
    assert (found.value, found.low, found.high) == (1, 1, 1)


# Clustered binormal scores: a group is of one class, so every pair that AUROC counts is
# independent and the truth is that of two normal distributions.


def clustered(rng, groups, rows, models=1):
    """labels [N], logits [models, N] whose noise is each model's own, groups [N]."""
    labels = np.repeat(rng.integers(2, size=groups), rows)
    names = np.repeat(np.arange(groups), rows)
    own, shared = rng.normal(size=(models, len(labels))), rng.normal(size=(models, groups))[:, names]
    x = np.sqrt(1 - SHARED) * own + np.sqrt(SHARED) * shared + APART * labels
    return labels, APART * (x - APART / 2), names  # the log of the densities' ratio: calibrated


def truth():
    def mean(loss):
        def sides(x, y):
            return 0.5 * norm.pdf(x - APART * y) * loss(sigmoid(APART * (x - APART / 2)), y)

        return sum(quad(sides, -8, 10, args=(y,))[0] for y in (0, 1))

    return {
        "auroc": norm.cdf(APART / np.sqrt(2)),
        "balanced_accuracy": norm.cdf(APART / 2),
        "log_loss": mean(lambda p, y: -np.log(p if y else 1 - p)),
        "brier": mean(lambda p, y: (p - y) ** 2),
    }


def coverage(sets, groups, rows, resamples, by_group=True):
    rng, known = np.random.default_rng(0), truth()
    inside = dict.fromkeys(known, 0)
    for _ in range(sets):
        labels, (logits,), names = clustered(rng, groups, rows)
        names = names if by_group else np.arange(len(names))
        found = score_intervals(labels, sigmoid(logits), names, resamples=resamples, names=tuple(known))
        for name, value in known.items():
            inside[name] += found[name].low <= value <= found[name].high
    return {name: count / sets for name, count in inside.items()}


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    found = coverage(sets=100, groups=120, rows=4, resamples=200)
    assert all(0.89 <= share <= 0.99 for share in found.values()), found
    # the twin: images drawn one by one, as if those of a group were independent
    one_by_one = coverage(sets=100, groups=120, rows=4, resamples=200, by_group=False)
    assert all(share < 0.85 for share in one_by_one.values()), one_by_one


@pytest.mark.slow
def test_intervals_hold_the_truth_in_95_of_100_sets():
    found = coverage(sets=1000, groups=300, rows=2, resamples=1000)
    assert all(0.93 <= share <= 0.97 for share in found.values()), found


def test_paired_intervals_of_equally_good_models_hold_zero():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        labels, logits, names = clustered(rng, groups=100, rows=3, models=2)
        found = paired_difference(labels, *sigmoid(logits), names, resamples=300)
        inside += found.difference.low <= 0 <= found.difference.high
    assert 90 <= inside <= 99


def test_a_model_is_as_good_as_itself():
    labels, p, groups = sample(0)
    found = paired_difference(labels, p, p, groups, resamples=50)
    assert found.to_dict() == {"difference": {"value": 0, "low": 0, "high": 0}, "better": 0.5}


def test_the_better_model_wins_its_draws():
    labels, p, groups = sample(0, groups=60, signal=4.0)
    p = sigmoid(np.log(p / (1 - p)) - 2)
    worse = sigmoid(0.5 * np.log(p / (1 - p)) + np.random.default_rng(1).normal(size=len(p)))
    ahead, behind = (paired_difference(labels, *pair, groups, resamples=200) for pair in ((p, worse), (worse, p)))
    assert ahead.better > 0.99
    assert ahead.better + behind.better == pytest.approx(1)
    assert ahead.difference.value == metrics.auroc(labels, p) - metrics.auroc(labels, worse)
    assert behind.difference.low == pytest.approx(-ahead.difference.high)
    assert ahead.difference.low > 0


def test_drawing_both_together_is_surer_than_either_alone():
    labels, p, groups = sample(1, groups=50)
    like = sigmoid(np.log(p / (1 - p)) + 0.1 * np.random.default_rng(2).normal(size=len(p)))
    alone = score_intervals(labels, p, groups, resamples=300, names=("auroc",))["auroc"]
    assert width(paired_difference(labels, p, like, groups, resamples=300).difference) < 0.5 * width(alone)
