import numpy as np
import pytest
from pictures import noise
from PIL import Image

from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.core.recipe import Augment
from ensemble.images import degradations, preprocess
from ensemble.training import data_loader
from ensemble.training.data_loader import TrainDataset, crop_region

PREPROCESS_CONFIG = PreprocessConfig(size=32, mean=(0.5,) * 3, std=(0.5,) * 3, geometry="native_crops")
PLACES = [(0.0, 0.0), (0.5, 0.5), (1.0, 0.3), (0.21, 0.87)]


@pytest.fixture(scope="module")
def ramp() -> Image.Image:
    """Red says the column, green the row."""
    y, x = np.mgrid[:250, :250].astype(np.uint8)
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2))


def blurred(sigma):
    return degradations.Degradation("blur", lambda image: degradations.blur(image, sigma))


@pytest.mark.parametrize("place", PLACES)
def test_what_is_cut_for_a_crop_holds_it_where_the_whole_image_has_it(ramp, place):
    part = crop_region(ramp, 32, place, [blurred(0)])
    assert part.size == (64, 64)
    whole, cropped = (preprocess.to_pixels(image, PREPROCESS_CONFIG, [place]).astype(int) for image in (ramp, part))
    assert np.abs(whole - cropped).max() <= 1  # two roundings in place of one
    elsewhere = preprocess.to_pixels(part, PREPROCESS_CONFIG, [(1 - place[0], 0.9)]).astype(int)
    assert np.abs(whole - elsewhere).max() > 1


@pytest.mark.parametrize("place", PLACES)
def test_a_resize_is_given_as_many_more_pixels(ramp, place):
    change = degradations.Degradation("resize", lambda image: degradations.resize(image, 0.5, "box"), 0.5)
    part = crop_region(ramp, 32, place, [blurred(0), change])
    assert part.size == (128, 128)
    whole, cropped = (
        preprocess.to_pixels(change.apply(image), PREPROCESS_CONFIG, [place]).astype(int) for image in (ramp, part)
    )
    assert np.abs(whole - cropped).max() <= 3


def test_small_images_are_taken_whole():
    image = noise(0, 50, 300)
    assert crop_region(image, 32, (0.5, 0.0), [blurred(1)]).size == (50, 64)
    assert crop_region(noise(0), 32, (0.5, 0.5), [blurred(1)]).tobytes() == noise(0).tobytes()


def seen_sizes(tmp_path, monkeypatch, geometry):
    """Sizes of what is degraded in 20 rows of a large image."""
    noise(0, 400, 300).save(tmp_path / "a.png")
    seen = []
    draw = degradations.draw_degradations

    def watched(augment, rng):
        changes = draw(augment, rng)
        return [
            degradations.Degradation(c.name, lambda i, c=c: (seen.append(i.size), c.apply(i))[1], c.scale)
            for c in changes
        ]

    monkeypatch.setattr(data_loader.degradations, "draw_degradations", watched)
    preprocess_config = PreprocessConfig(size=32, mean=(0.5,) * 3, std=(0.5,) * 3, geometry=geometry)
    rows = TrainDataset([tmp_path / "a.png"] * 20, np.zeros(20), preprocess_config, Augment(chance=1.0, jpeg=(50, 90)))
    assert all(rows[0, row]["pixels"].shape == (1, 32, 32, 3) for row in range(20))
    return set(seen)


def test_native_crops_degrade_only_what_they_need(tmp_path, monkeypatch):
    assert seen_sizes(tmp_path, monkeypatch, "native_crops") == {(64, 64)}


@pytest.mark.parametrize("geometry", ["squash", "center_crop"])
def test_other_geometries_degrade_all_they_show(tmp_path, monkeypatch, geometry):
    assert seen_sizes(tmp_path, monkeypatch, geometry) == {(400, 300)}


def test_places_on_the_grid_of_a_compression_are_all_reached():
    """A crop starts anywhere on the 8x8 grid, though it lies in a part cut for it."""
    rng = np.random.default_rng(0)
    starts = []
    for _ in range(2000):
        y, x = rng.random(2)
        part = crop_region(Image.new("RGB", (1000, 600)), 64, (y, x), [blurred(1)])
        starts.append(round((part.height - 64) * y) % 8)
    assert np.bincount(starts, minlength=8) / 2000 == pytest.approx(np.full(8, 1 / 8), abs=0.03)
