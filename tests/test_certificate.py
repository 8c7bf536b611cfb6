import numpy as np
import pytest
from helpers import CONTRACT

from ensemble.errors import ArtifactError
from ensemble.score import Runner
from export.certificate import certify

PIXELS = np.random.default_rng(0).integers(0, 256, (14, 8, 8, 3), dtype=np.uint8)


def logits(pixels):
    return (pixels.mean(axis=(1, 2, 3)) / 64).astype(np.float32)


def certified(twin, pixels=PIXELS, **options):
    return certify(Runner("one", CONTRACT, logits), Runner("twin", CONTRACT, twin), pixels, **options)


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
        certify(Runner("one", CONTRACT, silent), Runner("twin", CONTRACT, silent), PIXELS)


def test_the_tolerance_can_be_another():
    assert certified(off_by(2e-3), tolerance=5e-3)["tolerance"] == 5e-3
