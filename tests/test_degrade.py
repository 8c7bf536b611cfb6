import numpy as np
import pytest
from conftest import noise
from PIL import Image

from ensemble import degrade, images
from ensemble.contract import ImageContract
from ensemble.recipe import Augment


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def error_after(image: Image.Image, changed: Image.Image) -> float:
    return float(np.abs(np.asarray(image, dtype=float) - np.asarray(changed, dtype=float)).mean())


def test_lower_quality_loses_more(photos):
    errors = [error_after(photos[0], degrade.jpeg(photos[0], quality)) for quality in (95, 60, 20)]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_coarser_chroma_loses_more(photos):
    errors = [error_after(photos[0], degrade.jpeg(photos[0], 90, subsampling)) for subsampling in (0, 1, 2)]
    assert errors[0] < errors[1] < errors[2]


def test_degrade_draws_quality_and_subsampling_from_the_range():
    image, augment = noise(0), Augment(jpeg=(40, 42), chance=1.0)
    possible = {
        degrade.jpeg(image, quality, subsampling).tobytes() for quality in (40, 41, 42) for subsampling in (0, 2)
    }
    drawn = {degrade.degrade(image, augment, rng(seed)).tobytes() for seed in range(60)}
    assert len(possible) == 6
    assert drawn == possible


@pytest.mark.parametrize("augment", [Augment(), Augment(jpeg=(30, 90), chance=0.0)])
def test_no_compression_without_the_wish(augment):
    image = noise(0)
    assert degrade.degrade(image, augment, rng()).tobytes() == image.tobytes()


def test_compression_comes_by_its_chance():
    image, augment = noise(0, 8, 8), Augment(jpeg=(10, 20), chance=0.25)
    changed = sum(degrade.degrade(image, augment, rng(seed)).tobytes() != image.tobytes() for seed in range(400))
    assert 70 <= changed <= 130


def test_the_same_draw_gives_the_same_image():
    image, augment = noise(0), Augment(jpeg=(10, 90), chance=1.0)
    results = [degrade.degrade(image, augment, rng(5)).tobytes() for _ in range(2)]
    assert results[0] == results[1] != degrade.degrade(image, augment, rng(6)).tobytes()


def test_transparent_parts_still_show_the_background():
    hidden = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    degraded = degrade.degrade(hidden, Augment(jpeg=(50, 50), chance=1.0), rng())
    contract = ImageContract(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, background=(10, 20, 30))
    assert (images.to_pixels(degraded, contract) == (10, 20, 30)).all()


def turns(augment: Augment, pixels: np.ndarray) -> list[np.ndarray]:
    return [degrade.turn(pixels, augment, rng(seed)) for seed in range(80)]


@pytest.mark.parametrize(
    ("flip", "quarter_turns", "outcomes"), [(False, False, 1), (True, False, 2), (False, True, 4), (True, True, 8)]
)
def test_turn_reaches_every_position_and_no_other(flip, quarter_turns, outcomes):
    pixels = np.asarray(noise(0, 4, 4))[None]
    turned = turns(Augment(flip=flip, quarter_turns=quarter_turns), pixels)
    mirrored = [pixels[0], pixels[0, :, ::-1]] if flip else [pixels[0]]
    expected = {np.rot90(p, k).tobytes() for p in mirrored for k in range(4 if quarter_turns else 1)}
    assert {result.tobytes() for result in turned} == expected
    assert len(expected) == outcomes


def test_all_views_turn_alike():
    view = np.asarray(noise(0, 4, 4))
    for result in turns(Augment(quarter_turns=True), np.stack([view, view, view])):
        assert result.shape == (3, 4, 4, 3)
        assert (result == result[0]).all()
        assert result.flags.c_contiguous
