import numpy as np
import pytest
from helpers import PREPROCESS_CONFIG
from hypothesis import given
from hypothesis import strategies as st

from ensemble.core.errors import ArtifactError
from ensemble.models.runner import Runner
from ensemble.stacking.stacker import Stacker
from export.bundle.certificate import certify_fp32, compare_scores, judge

PIXELS = np.random.default_rng(0).integers(0, 256, (14, 8, 8, 3), dtype=np.uint8)


def logits(pixels):
    return (pixels.mean(axis=(1, 2, 3)) / 64).astype(np.float32)


def certified(twin, pixels=PIXELS):
    return certify_fp32(logits(pixels), Runner("twin", PREPROCESS_CONFIG, twin), pixels)


def off_by(difference, size=7, position=3):
    def twin(pixels):
        found = logits(pixels)
        if len(pixels) == size:
            found[position] += difference
        return found

    return twin


def test_agreement_passes_and_is_measured():
    assert certified(logits) == {
        "images": 14,
        "batch_sizes": [1, 2, 7],
        "max_abs_difference": 0.0,
        "mean_abs_difference": 0.0,
        "tolerance": 0.001,
    }


@pytest.mark.parametrize("difference", [9e-4, -9e-4])
def test_a_difference_within_the_tolerance_is_recorded(difference):
    found = certified(off_by(difference))
    assert found["max_abs_difference"] == pytest.approx(9e-4, rel=1e-2)
    assert found["mean_abs_difference"] == pytest.approx(9e-4 / 21, rel=1e-2)  # 2 of 42 logits are off


@pytest.mark.parametrize("difference", [2e-3, -2e-3])
def test_one_logit_off_at_one_batch_size_is_caught_and_named(difference):
    with pytest.raises(ArtifactError) as error:
        certified(off_by(difference))
    assert str(error.value) == (
        "twin: the exported file's logits differ from the member's by 0 at batch 1, 0 at batch 2, 0.002 at batch 7 "
        "(tolerance 0.001); it was not kept"
    )


@pytest.mark.parametrize("size", [1, 2])
def test_small_batches_are_looked_at_too(size):
    with pytest.raises(ArtifactError, match=rf"0\.002 at batch {size}"):
        certified(off_by(2e-3, size, 0))


def test_a_last_batch_that_is_not_full_is_compared():
    with pytest.raises(ArtifactError, match=r"0\.002 at batch 7"):
        certified(off_by(2e-3, 3, 0), PIXELS[:10])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_caught(value):
    with pytest.raises(ArtifactError, match=f"{abs(value)} at batch 7"):
        certified(off_by(value))


def test_two_members_that_both_answer_nan_do_not_agree():
    def silent(pixels):
        return np.full(len(pixels), np.nan, dtype=np.float32)

    with pytest.raises(ArtifactError, match="nan at batch 1"):
        certify_fp32(silent(PIXELS), Runner("twin", PREPROCESS_CONFIG, silent), PIXELS)


LABELS = np.arange(256) % 2
FAR = np.where(LABELS == 1, 2.0, -2.0) + np.linspace(-0.5, 0.5, 256)  # no logit near 0, classes apart


def moved(logits, **to):
    """Logits with some rows changed: row_3=1.5."""
    found = logits.copy()
    for row, value in to.items():
        found[int(row.removeprefix("row_"))] = value
    return found


def test_a_shift_of_all_logits_is_measured_by_the_formulas():
    change = compare_scores(FAR, FAR + 0.1, LABELS)
    p = [1 / (1 + np.exp(-z)) for z in (FAR, FAR + 0.1)]
    assert change.largest == pytest.approx(np.abs(p[1] - p[0]).max(), rel=1e-9)
    assert change.mean == pytest.approx(np.abs(p[1] - p[0]).mean(), rel=1e-9)
    assert change.spearman == pytest.approx(1, abs=1e-12)
    assert (change.auroc, change.decision_changes, change.failed) == (0.0, 0.0, ())


def test_ranks_that_turn_round_are_seen():
    assert compare_scores(FAR, -FAR, LABELS).spearman == pytest.approx(-1)
    assert compare_scores(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 3]), np.array([0, 1, 0, 1])).spearman == (
        pytest.approx(5 / 6)  # by hand: ranks 1, 2.5, 2.5, 4 and 1, 2, 3.5, 3.5
    )


def test_one_flip_of_256_passes_and_two_fail():
    one = compare_scores(FAR, moved(FAR, row_0=0.01), LABELS)  # the real nearest the ai side: ranks stay
    two = compare_scores(FAR, moved(FAR, row_0=0.01, row_2=0.01), LABELS)
    assert (one.decision_changes, one.failed) == (1 / 256, ())
    assert (two.decision_changes, two.failed) == (2 / 256, ("0.78% flipped",))


def test_a_p_at_the_threshold_counts_as_ai_before_and_after():
    at = np.zeros(256)
    assert compare_scores(at, at + 1e-3, LABELS).decision_changes == 0
    assert compare_scores(at, at - 1e-3, LABELS).decision_changes == 1


def test_the_threshold_decides_what_is_a_flip():
    lower = moved(FAR, row_1=FAR[1] - 0.02, row_3=FAR[3] - 0.02)
    above = 1 / (1 + np.exp(-(FAR[3] - 0.005)))  # above row 1, below row 3
    assert compare_scores(FAR, lower, LABELS).decision_changes == 0
    assert compare_scores(FAR, lower, LABELS, above).decision_changes == 1 / 256


@pytest.mark.parametrize(("passed_reals", "failed"), [(16, ()), (17, ("AUROC by -0.0010",))])
def test_an_auroc_that_moves_by_a_thousandth_is_the_limit(passed_reals, failed):
    high = np.where(LABELS == 1, 30.0, 10.0) + np.linspace(0, 1, 256)  # no p is near 0.5
    reals = np.sort(high[LABELS == 0])
    change = compare_scores(high, moved(high, row_1=reals[-passed_reals] - 1e-6), LABELS)
    assert change.auroc == pytest.approx(-passed_reals / 128**2, rel=1e-9)
    assert (change.decision_changes, change.failed) == (0, failed)


def test_an_auroc_that_moves_by_just_the_limit_passes():
    labels, logits = np.repeat([0, 1], [40, 25]), np.arange(5.0, 70.0)  # 1000 pairs
    swapped = [compare_scores(logits, moved(logits, row_40=44.0 - places + 0.5), labels) for places in (1, 2)]
    assert [change.auroc for change in swapped] == pytest.approx([-0.001, -0.002])
    assert [len(change.failed) for change in swapped] == [0, 1]


def test_an_auroc_that_rises_too_much_fails_too():
    labels, logits = np.repeat([0, 1], [40, 25]), np.arange(5.0, 70.0)
    worse = moved(logits, row_40=42.5)
    assert compare_scores(worse, logits, labels).failed == ("AUROC by +0.0020",)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("lower", [True, False])
def test_logits_that_are_not_finite_fail(value, lower):
    pair = (FAR, moved(FAR, row_7=value))
    change = compare_scores(*(pair if lower else pair[::-1]), LABELS)
    assert change.failed == ("logits that are not finite",)
    assert change.to_dict() == {
        **dict.fromkeys(("largest", "mean", "spearman", "auroc", "flips")),
        "failed": ["logits that are not finite"],
    }


@given(st.lists(st.tuples(st.floats(-1e4, 1e4), st.booleans()), min_size=2), st.floats(0, 1))
def test_the_same_logits_change_nothing(rows, threshold):
    logits, labels = np.array([z for z, _ in rows]), np.array([int(ai) for _, ai in rows])
    change = compare_scores(logits, logits, labels, threshold)
    assert (change.largest, change.mean, change.decision_changes) == (0, 0, 0)
    assert change.failed == (() if 0 < labels.sum() < len(labels) else ("AUROC by +nan",))


TWO = Stacker(("one", "two"), (0.9, 0.1), 0.0)


def test_every_member_that_passes_may_run_lower():
    fp32 = np.stack([FAR, FAR], axis=1)
    members, stack, usable = judge(TWO, fp32, fp32 + 0.01, LABELS)
    assert usable == ("one", "two")
    assert stack.largest == pytest.approx(members["one"].largest)


def test_a_member_that_fails_stays_fp32_and_the_stack_is_judged_so():
    fp32 = np.stack([FAR, FAR], axis=1)
    lower = np.stack([-FAR, FAR + 0.01], axis=1)
    members, stack, usable = judge(TWO, fp32, lower, LABELS)
    assert members["one"].failed == ("AUROC by -1.0000", "100.00% flipped")
    assert usable == ("two",)
    assert stack == compare_scores(TWO.logit(fp32), TWO.logit(np.stack([FAR, FAR + 0.01], axis=1)), LABELS)
    assert judge(TWO, fp32, np.stack([FAR + 0.01, -FAR], axis=1), LABELS)[2] == ("one",)


def test_a_stack_that_fails_lets_no_member_run_lower():
    fp32 = np.stack([np.where(LABELS == 1, 1.0, -1.0)] * 2, axis=1)
    at = 1 / (1 + np.exp(0.97))  # between -1 and -0.95: where every real lies
    near = Stacker(("one", "two"), (0.5, 0.5), 0.0, threshold=at)
    members, stack, usable = judge(near, fp32, fp32 + 0.05, LABELS)
    assert [change.failed for change in members.values()] == [(), ()]
    assert stack.failed == ("50.00% flipped",)
    assert usable == ()
    assert judge(near, fp32, fp32 + 0.02, LABELS)[2] == ("one", "two")
