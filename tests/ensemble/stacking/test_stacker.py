import json
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import auroc, sigmoid
from ensemble.stacking.fit import fit_stacker
from ensemble.stacking.fit import nested_cv_logits as nested
from ensemble.stacking.stacker import METHODS, Calibration, Stacker, read_stacker_values

STACKER = Stacker(("a", "b", "c"), (0.7, -0.2, 0.3), -0.4)


def sample(signals, groups=40, rows=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(groups * rows) % 2
    logits = rng.normal(size=(len(labels), len(signals))) + np.outer(labels - 0.5, signals)
    return logits, labels, np.repeat([f"g{i}" for i in range(groups)], rows)


def out_of_fold(logits, labels, groups, kind="logit"):
    return nested(logits, labels, groups, kind).calibrated


def member_logits(limit):
    return arrays(np.float64, st.tuples(st.integers(1, 40), st.just(3)), elements=st.floats(-limit, limit))


def test_apply_is_scikit_learns():
    logits, labels, _ = sample([2, 1, 0])
    model = LogisticRegression().fit(logits, labels)
    stacker = Stacker(("a", "b", "c"), tuple(model.coef_[0]), float(model.intercept_[0]))
    np.testing.assert_allclose(stacker.logit(logits), model.decision_function(logits), rtol=1e-12)
    np.testing.assert_allclose(stacker.target(logits), model.predict_proba(logits)[:, 1], rtol=1e-12)


def test_fit_is_scikit_learns_at_one_of_the_strengths():
    logits, labels, groups = sample([2, 1])
    stacker = fit_stacker(["a", "b"], logits, labels, groups, "logit")
    fits = [LogisticRegression(C=10.0**k, max_iter=1000).fit(logits, labels) for k in range(-4, 5)]
    differences = [np.abs(stacker.target(logits) - fit.predict_proba(logits)[:, 1]).max() for fit in fits]
    assert min(differences) < 1e-9
    assert stacker.members == ("a", "b")
    assert stacker.threshold == 0.5


@settings(deadline=None)
@given(member_logits(20), st.floats(0.1, 5))
def test_target_is_a_probability_that_rises_with_a_member(logits, step):
    target = STACKER.target(logits)
    assert ((target > 0) & (target < 1)).all()
    assert (STACKER.target(logits + np.array([step, 0, 0])) > target).all()
    assert (STACKER.target(logits + np.array([0, step, 0])) < target).all()


@settings(deadline=None)
@given(member_logits(1e3), st.sampled_from([np.float32, np.float64]), st.sampled_from("CF"))
def test_a_row_alone_scores_as_in_a_batch(logits, kind, order):
    logits = np.asarray(logits, dtype=kind, order=order)
    alone = np.concatenate([STACKER.target(logits[row : row + 1]) for row in range(len(logits))])
    assert alone.tobytes() == STACKER.target(logits).tobytes()


def test_an_unread_image_has_no_target():
    target = STACKER.target(np.array([[1, 2, 3], [np.nan] * 3]))
    assert np.isfinite(target).tolist() == [True, False]


def test_the_informative_member_gets_the_weight():
    logits, labels, groups = sample([3, 0])
    informative, noise = fit_stacker(["signal", "noise"], logits, labels, groups, "logit").coef
    assert informative > 1
    assert abs(noise) < 0.2 * informative
    # of calibrated probabilities the weights are closer, but those of noise hardly move
    stacker = fit_stacker(["signal", "noise"], logits, labels, groups)
    moved = stacker.parts(logits).std(axis=0) * np.abs(stacker.coef)
    assert moved[1] < 0.2 * moved[0]


def test_a_reversed_member_gets_a_negative_weight():
    logits, labels, groups = sample([-3, 0])
    stacker = fit_stacker(["reversed", "noise"], logits, labels, groups, "logit")
    assert stacker.coef[0] < -1
    assert auroc(labels, stacker.target(logits)) > 0.9


def test_a_member_whose_logits_hardly_move_hardly_counts():
    logits, labels, groups = sample([1, 1])
    logits[:, 1] *= 0.001
    stacker = fit_stacker(["loud", "quiet"], logits, labels, groups)
    loud, quiet = np.abs(stacker.coef) * logits.std(axis=0)
    assert loud > 0.5
    assert quiet < 0.5 * loud


def test_out_of_fold_never_fits_on_a_rows_own_group():
    # A member for each group knows that group alone, so a label can be had only by fitting on its group.
    count, rows = 10, 6
    labels = np.repeat(np.arange(count) % 2, rows)
    groups = np.repeat([f"g{i}" for i in range(count)], rows)
    logits = np.repeat(np.eye(count), rows, axis=0)
    names = [f"m{i}" for i in range(count)]
    stacker = fit_stacker(names, logits, labels, groups)
    split = StratifiedKFold(5, shuffle=True, random_state=0)
    by_rows = cross_val_predict(LogisticRegression(), logits, labels, cv=split, method="decision_function")
    held = out_of_fold(logits, labels, groups)
    assert auroc(labels, stacker.target(logits)) == 1
    assert auroc(labels, by_rows) == 1
    assert auroc(labels, held) <= 0.5
    # Two groups a fold, about which their stacker knows nothing but its intercept.
    assert len(np.unique(held.round(9))) <= 5


def test_out_of_fold_differs_from_in_sample_and_scores_lower():
    logits, labels, groups = sample([1] + [0] * 15, groups=12)
    stacker = fit_stacker([f"m{i}" for i in range(16)], logits, labels, groups)
    held = out_of_fold(logits, labels, groups)
    assert not np.isclose(held, stacker.logit(logits)).any()
    assert auroc(labels, held) < auroc(labels, stacker.logit(logits))


def test_out_of_fold_repeats_exactly():
    logits, labels, groups = sample([1, 0], groups=12)
    assert out_of_fold(logits, labels, groups).tobytes() == out_of_fold(logits, labels, groups).tobytes()


# labels and groups, and whether the stacker can be fitted; none can be scored out of fold
TOO_FEW = {
    "one group": ([0, 1, 0, 1], "aaaa", False),
    "one ai group": ([0, 0, 0, 0, 1, 1], "abcdee", False),
    "one real row": ([1, 1, 1, 1, 1, 0], "abcdef", False),
    "two groups": ([0, 1, 0, 1], "aabb", True),
    "two groups of each class": ([0, 1, 0, 1], "abcd", True),
}


@pytest.mark.parametrize(("labels", "groups", "can_fit"), TOO_FEW.values(), ids=TOO_FEW)
def test_too_few_groups_are_refused_with_what_to_do(labels, groups, can_fit):
    logits, labels, groups = (
        np.array([[0.5, -1, 1, 2, 0, 1]]).T[: len(labels)],
        np.array(labels),
        np.array(list(groups)),
    )
    refusal = pytest.raises(ArtifactError, match=r"held-out rows .*; train with a larger --heldout or more groups")
    with refusal:
        out_of_fold(logits, labels, groups)
    with nullcontext() if can_fit else refusal:
        assert np.isfinite(fit_stacker(["a"], logits, labels, groups).coef).all()


@pytest.mark.parametrize("count", [3, 4, 5, 9])
def test_a_few_groups_of_each_class_are_enough(count):
    logits, labels, groups = sample([2], groups=2 * count, rows=1)
    held = out_of_fold(logits, labels, groups)
    assert np.isfinite(held).all()
    assert auroc(labels, held) > 0.5


def test_a_constant_member_changes_no_ranking():
    logits, labels, groups = sample([2, 0])
    logits[:, 1] = 3.0
    stacker = fit_stacker(["signal", "constant"], logits, labels, groups)
    assert np.isfinite([*stacker.coef, stacker.intercept]).all()
    assert auroc(labels, stacker.target(logits)) == auroc(labels, logits[:, 0])
    assert np.isfinite(out_of_fold(logits, labels, groups)).all()


@pytest.mark.parametrize("kind", ["logistic", "logit", "nonnegative", "best"])
def test_a_duplicated_member_leaves_the_stack_as_it_was(kind):
    logits, labels, groups = sample([2, 1, 0.3], groups=30)
    doubled = logits[:, [0, 1, 0, 2, 0]]
    single = fit_stacker("abc", logits, labels, groups, kind)
    double = fit_stacker("abxcy", doubled, labels, groups, kind)
    np.testing.assert_allclose(double.logit(doubled), single.logit(logits), rtol=1e-9)
    held = [nested(values, labels, groups, kind).calibrated for values in (logits, doubled)]
    np.testing.assert_allclose(held[1], held[0], rtol=1e-9)
    if kind != "best":
        assert double.coef[0] == double.coef[2] == double.coef[4] == pytest.approx(single.coef[0] / 3)


def test_a_member_that_is_nearly_a_duplicate_changes_the_stack_a_little():
    logits, labels, groups = sample([2, 1], groups=30)
    noise = np.random.default_rng(1).normal(scale=1e-3, size=len(labels))
    near = np.column_stack([logits, logits[:, 0] + noise])
    changed = fit_stacker("abc", near, labels, groups, "logit").logit(near)
    expected = fit_stacker("ab", logits, labels, groups, "logit").logit(logits)
    assert not np.allclose(changed, expected, rtol=1e-9)  # the check above can fail
    np.testing.assert_allclose(changed, expected, atol=0.3)


@pytest.mark.parametrize("kind", ["logistic", "logit", "best"])
def test_targets_of_certain_members_are_calibrated(kind):
    logits, labels, groups = sample([1.0], groups=200)
    target = fit_stacker(["a"], 50 * logits, labels, groups, kind).target(50 * logits)
    assert target.mean() == pytest.approx(labels.mean(), abs=0.01)
    # normal classes one apart: the true logit is the value itself
    np.testing.assert_allclose(target, sigmoid(logits[:, 0]), atol=0.06 if kind != "logistic" else 0.08)


@settings(deadline=None)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=4),
    st.floats(-9, 9),
    st.floats(0, 1),
    st.sampled_from(["logistic", "nonnegative", "mean", "best"]),
    st.sampled_from([Calibration(), Calibration("temperature", 0.3, reason="why"), Calibration("shift", 1.0, -2.0)]),
    st.booleans(),
)
def test_round_trip_through_json_is_exact(coef, intercept, threshold, kind, calibration, flips):
    names = tuple(f"member-{i}" for i in range(len(coef)))
    flipped = names[:1] if flips else None
    stacker = Stacker(names, tuple(coef), intercept, threshold, kind, calibration, "fpr=0.05", flipped)
    assert Stacker.from_dict(json.loads(json.dumps(stacker.to_dict()))) == stacker


def test_version_2_goes_through_json_exactly_and_version_1_is_as_it_was():
    logits, labels, groups = sample([2, 1])
    for kind in METHODS:
        stacker = fit_stacker(["a", "b"], logits, labels, groups, kind)
        values = json.loads(json.dumps(stacker.to_dict()))
        assert values["format_version"] == 2
        assert Stacker.from_dict(values) == stacker
    assert "format_version" not in STACKER.to_dict()  # hashes of it are compared with those in old files
    assert set(STACKER.to_dict()) == {
        "members", "kind", "coef", "intercept", "calibration", "threshold", "threshold_rule", "flips",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["logistic", "nonnegative", "mean", "best"])
def test_version_1_means_logits_whatever_its_kind_says(kind):
    values = {**STACKER.to_dict(), "kind": kind, "format_version": 1}
    logits = np.array([[1.0, 2.0, 3.0]])
    stacker = Stacker.from_dict(values)
    assert stacker.logit(logits).tolist() == [-0.4 + 0.7 * 1.0 + -0.2 * 2.0 + 0.3 * 3.0]
    assert stacker.refit_method.startswith("logit")
    with pytest.raises(ArtifactError, match="another version of manyeyes; run stack again"):
        Stacker.from_dict({**values, "format_version": 3})


def test_the_reader_of_version_1_refuses_version_2_in_one_line(tmp_path):
    logits, labels, groups = sample([2, 1])
    path = tmp_path / "stacker.json"
    artifacts.write_json(path, fit_stacker(["a", "b"], logits, labels, groups).to_dict())
    with pytest.raises(
        ArtifactError, match=r"stacker\.json was written by another version of manyeyes; run stack"
    ) as old:
        artifacts.read_json(path, "run stack again")  # what all code did before version 2
    assert "\n" not in str(old.value)
    assert read_stacker_values(path, "")["format_version"] == 2


VERSION_2_DAMAGES = {
    "no calibrations": {"member_calibrations": []},
    "a negative scale": {"member_calibrations": [{"scale": -1.0, "shift": 0.0, "missing": 0.0}] * 2},
    "no shift": {"member_calibrations": [{"scale": 1.0, "missing": 0.0}] * 2},
    "text for a scale": {"member_calibrations": [{"scale": "x", "shift": 0.0, "missing": 0.0}] * 2},
    "an infinite shift": {"member_calibrations": [{"scale": 1.0, "shift": float("inf"), "missing": 0.0}] * 2},
    "unknown inputs": {"inputs": "ranks"},
}


@pytest.mark.parametrize("damage", VERSION_2_DAMAGES.values(), ids=VERSION_2_DAMAGES)
def test_a_damaged_stacker_of_version_2_is_refused(damage):
    logits, labels, groups = sample([2, 1])
    values = fit_stacker(["a", "b"], logits, labels, groups).to_dict() | damage
    with pytest.raises(ArtifactError, match=r"stacker\.json is damaged .*; run stack again"):
        Stacker.from_dict(values)


def test_a_stacker_of_an_older_file_is_read():
    values = {
        "members": ["a", "b"],
        "coef": [0.5, 0.25],
        "intercept": 0.1,
        "calibration": {"kind": "none", "reason": "logistic regression is fitted on the log-loss itself"},
        "threshold": 0.5,
    }
    stacker = Stacker.from_dict(values)
    assert (stacker.method, stacker.threshold_rule, stacker.tta_members) == ("logistic", "default 0.5", None)
    assert stacker.logit(np.array([[2.0, 4.0]])) == pytest.approx([2.1])


def test_calibration_is_applied_to_the_stacks_logit():
    stacker = Stacker(("a",), (2.0,), 1.0, calibration=Calibration("temperature", 0.5, 0.25))
    assert stacker.logit(np.array([[3.0], [-1.0]])).tolist() == [3.75, -0.25]
    assert stacker.target(np.array([[3.0]])) == pytest.approx(sigmoid(3.75))


DAMAGES = {
    **{f"no {key}": {key: None} for key in ("members", "coef", "intercept", "threshold")},
    "fewer weights than members": {"coef": [0.7, -0.2]},
    "text for a weight": {"coef": [0.7, "much", 0.3]},
    "NaN for a weight": {"coef": [0.7, float("nan"), 0.3]},
    "infinite intercept": {"intercept": float("inf")},
    "no members": {"members": [], "coef": []},
    "unknown kind": {"kind": "boosted"},
    "unknown calibration": {"calibration": {"kind": "isotonic"}},
    "calibration that is no object": {"calibration": "none"},
    "negative scale": {"calibration": {"kind": "temperature", "scale": -1}},
    "threshold above 1": {"threshold": 1.5},
    "flips of a stranger": {"flips": ["z"]},
    "flips that are lists": {"flips": [["a"]]},
    "a weight beyond all floats": {"intercept": 10**400},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_stacker_is_refused(damage):
    values = {key: value for key, value in (STACKER.to_dict() | damage).items() if value is not None}
    with pytest.raises(ArtifactError, match=r"stacker\.json is damaged .*; run stack again"):
        Stacker.from_dict(values)
