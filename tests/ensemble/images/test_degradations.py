import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, noise
from PIL import Image
from scipy.ndimage import gaussian_filter

from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.core.recipe import DEGRADATIONS, Augment
from ensemble.images import decode, degradations, preprocess

RANGES = {
    "jpeg": (30, 100), "webp": (30, 100), "blur": (0.1, 3.0), "resize": (0.5, 2.0), "noise": (0.01, 0.1),
    "crop": (0.5, 0.9),
}  # fmt: skip
ALL = Augment(chance=1.0, chain=(1, 6), **RANGES)
CHANGES = {
    "jpeg": lambda image: degradations.jpeg(image, 60),
    "webp": lambda image: degradations.webp(image, 60),
    "blur": lambda image: degradations.blur(image, 1.5),
    "resize": lambda image: degradations.resize(image, 0.5, "bicubic"),
    "noise": lambda image: degradations.noise(image, 0.1, 0),
    "crop": lambda image: degradations.crop(image, 0.5, 0.5, 0.5),
}


def degrade(image: Image.Image, augment: Augment, generator: np.random.Generator) -> Image.Image:
    for change in degradations.draw_degradations(augment, generator):
        image = change.apply(image)
    return image


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def error_after(image: Image.Image, changed: Image.Image) -> float:
    return float(np.abs(np.asarray(image, dtype=float) - np.asarray(changed, dtype=float)).mean())


def test_lower_quality_loses_more(photos):
    errors = [error_after(photos[0], degradations.jpeg(photos[0], quality)) for quality in (95, 60, 20)]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_coarser_chroma_loses_more(photos):
    errors = [error_after(photos[0], degradations.jpeg(photos[0], 90, subsampling)) for subsampling in (0, 1, 2)]
    assert errors[0] < errors[1] < errors[2]


def test_degrade_draws_quality_and_subsampling_from_the_range():
    image, augment = noise(0), Augment(jpeg=(40, 42), chance=1.0)
    possible = {
        degradations.jpeg(image, quality, subsampling).tobytes() for quality in (40, 41, 42) for subsampling in (0, 2)
    }
    drawn = {degrade(image, augment, rng(seed)).tobytes() for seed in range(60)}
    assert len(possible) == 6
    assert drawn == possible


@pytest.mark.parametrize("augment", [Augment(), Augment(jpeg=(30, 90), chance=0.0)])
def test_no_compression_without_the_wish(augment):
    image = noise(0)
    assert degrade(image, augment, rng()).tobytes() == image.tobytes()


def test_compression_comes_by_its_chance():
    image, augment = noise(0, 8, 8), Augment(jpeg=(10, 20), chance=0.25)
    changed = sum(degrade(image, augment, rng(seed)).tobytes() != image.tobytes() for seed in range(400))
    assert 70 <= changed <= 130


def test_the_same_draw_gives_the_same_image():
    image, augment = noise(0), Augment(jpeg=(10, 90), chance=1.0)
    results = [degrade(image, augment, rng(5)).tobytes() for _ in range(2)]
    assert results[0] == results[1] != degrade(image, augment, rng(6)).tobytes()


def test_transparent_parts_still_show_the_background():
    hidden = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    degraded = degrade(hidden, Augment(jpeg=(50, 50), chance=1.0), rng())
    preprocess_config = PreprocessConfig(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, background=(10, 20, 30))
    assert (preprocess.to_pixels(degraded, preprocess_config) == (10, 20, 30)).all()


# ---- each degradation


def test_webp_loses_more_at_lower_quality(photos):
    errors = [error_after(photos[0], degradations.webp(photos[0], quality)) for quality in (95, 60, 20)]
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        (degradations.jpeg(noise(0), 60, 0), {"file_format": "JPEG", "quality": 60, "subsampling": 0}),
        (degradations.webp(noise(0), 60), {"file_format": "WEBP", "quality": 60}),
    ],
)
def test_compression_is_what_a_stored_file_would_show(changed, options):
    assert changed.tobytes() == decode.decode(encoded(noise(0), **options)).tobytes()


@pytest.mark.parametrize(
    ("change", "side"), [(degradations.jpeg, degradations.JPEG_SIDE), (degradations.webp, degradations.WEBP_SIDE)]
)
def test_what_a_format_cannot_hold_stays_as_it_is(change, side):
    longest, longer = noise(0, side, 1), noise(0, side + 1, 1)
    assert change(longest, 50).tobytes() != longest.tobytes()
    assert change(longer, 50).tobytes() == longer.tobytes()


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1, 3, 12])
def test_blur_is_gaussian(sigma):
    image = noise(0, 101, 75)  # blocks of rows do not fit evenly
    exact = gaussian_filter(np.asarray(image, dtype=float), (sigma, sigma, 0), mode="nearest", truncate=8)
    assert np.abs(np.asarray(degradations.blur(image, sigma)) - exact).max() < 1.5
    assert np.abs(np.asarray(image) - exact).max() > 1.5


def test_blurred_point_has_the_textbook_values():
    point = np.zeros((9, 9, 3), dtype=np.uint8)
    point[4, 4] = 255
    blurred = np.asarray(degradations.blur(Image.fromarray(point), 1.0))[..., 0]
    assert blurred[4, 2:7].tolist() == [5, 25, 41, 25, 5]  # 255 / (2 pi) exp(-d^2 / 2)
    assert (blurred == blurred.T).all()


def test_blur_of_zero_changes_nothing():
    assert degradations.blur(noise(0), 0.0).tobytes() == noise(0).tobytes()


def test_noise_has_its_sigma_and_no_offset():
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    difference = np.asarray(degradations.noise(grey, 0.05, 3), dtype=float) - 128
    assert difference.std() == pytest.approx(0.05 * 255, rel=0.01)
    assert difference.mean() == pytest.approx(0, abs=0.1)
    assert (np.abs(difference) > 2 * 0.05 * 255).mean() == pytest.approx(0.0455, abs=0.003)  # the normal's tails
    assert np.abs(np.corrcoef(difference[..., 0].ravel(), difference[..., 1].ravel())[0, 1]) < 0.02


def test_noise_is_clipped_and_seeded():
    black = Image.new("RGB", (64, 64))
    noisy = np.asarray(degradations.noise(black, 0.1, 0))
    assert (noisy == 0).mean() == pytest.approx(0.5, abs=0.03)
    assert noisy.max() < 150
    assert noisy[0, :2].tolist() == [[1, 26, 36], [9, 25, 1]]
    assert (noisy == np.asarray(degradations.noise(black, 0.1, 0))).all()
    assert (noisy != np.asarray(degradations.noise(black, 0.1, 1))).any()


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((100, 60), 0.6, (60, 36)),
        ((100, 60), 1.5, (150, 90)),
        ((100, 60), 0.1, (53, 32)),  # the shorter side keeps 32 pixels
        ((40, 8), 0.5, (40, 8)),
        ((1, 1), 0.05, (1, 1)),
    ],
)
def test_resize_multiplies_both_sides(size, scale, expected):
    assert degradations.resize(noise(0, *size), scale, "box").size == expected


def test_resize_stops_at_what_memory_holds(monkeypatch):
    monkeypatch.setattr(degradations, "MAX_RESIZED_PIXELS", 10_000)
    assert degradations.resize(noise(0, 50, 50), 8, "box").size == (100, 100)
    assert degradations.resize(noise(0, 200, 100), 8, "box").size == (200, 100)


def test_resize_uses_the_filter():
    results = {degradations.resize(noise(0, 64, 64), 0.7, name).tobytes() for name in degradations.SMOOTH_FILTERS}
    assert len(results) == len(degradations.SMOOTH_FILTERS) == 5


@pytest.mark.parametrize(
    ("size", "place", "box"),
    [
        ((100, 80), (0, 0), (0, 0, 50, 40)),
        ((100, 80), (1, 0), (0, 40, 50, 80)),
        ((100, 80), (0.5, 1), (50, 20, 100, 60)),
        ((40, 20), (0, 1), (8, 0, 40, 20)),  # neither side below 32 pixels, or what there is
    ],
)
def test_crop_keeps_its_share_of_each_side(size, place, box):
    image = noise(0, *size)
    assert degradations.crop(image, 0.5, *place).tobytes() == image.crop(box).tobytes()


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_transparency_is_kept_and_colours_change(name):
    image = noise(0, 64, 64)
    image.putalpha(noise(1, 64, 64).getchannel("R"))
    before = image.tobytes()
    changed = CHANGES[name](image)
    assert changed.mode == "RGBA"
    assert image.tobytes() == before
    if name == "crop":
        assert changed.tobytes() == image.crop((16, 16, 48, 48)).tobytes()
    elif name == "resize":
        alpha = image.getchannel("A").resize((32, 32), Image.Resampling.BICUBIC)
        assert changed.getchannel("A").tobytes() == alpha.tobytes()
    else:
        assert changed.getchannel("A").tobytes() == image.getchannel("A").tobytes()
        assert changed.convert("RGB").tobytes() == CHANGES[name](image.convert("RGB")).tobytes()


# ---- chains


def drawn(augment: Augment, seeds: int = 300) -> list[list[degradations.Degradation]]:
    return [degradations.draw_degradations(augment, rng(seed)) for seed in range(seeds)]


def test_every_enabled_degradation_occurs_and_no_other():
    enabled = {"webp", "blur", "crop"}
    augment = Augment(chance=1.0, chain=(1, 2), **{name: RANGES[name] for name in enabled})
    chains = [[change.name for change in changes] for changes in drawn(augment)]
    assert {name for chain in chains for name in chain} == enabled
    assert {len(chain) for chain in chains} == {1, 2}
    assert all(len(set(chain)) == len(chain) for chain in chains)


def test_chains_come_in_every_order_and_length_alike_often():
    augment = Augment(chance=1.0, chain=(2, 6), blur=(1, 2), noise=(0.1, 0.2), crop=(0.5, 0.9))
    chains = [tuple(change.name for change in changes) for changes in drawn(augment, 1200)]
    lengths = np.bincount([len(chain) for chain in chains])
    assert lengths[2:].tolist() == pytest.approx([600, 600], abs=80)  # at most the three enabled
    for length in (2, 3):
        orders = {chain: chains.count(chain) for chain in chains if len(chain) == length}
        assert len(orders) == 6
        assert list(orders.values()) == pytest.approx([100] * 6, abs=45)


def test_one_draw_does_not_look_at_the_picture():
    generators = rng(0), rng(0)
    for size, generator in zip((32, 50), generators, strict=True):
        degrade(noise(size, size, size), ALL, generator)
    assert generators[0].random() == generators[1].random()


def test_a_seed_repeats_and_another_differs(photos):
    image = photos[0].crop((0, 0, 96, 96))
    first = [degrade(image, ALL, rng(seed)).tobytes() for seed in range(12)]
    assert first == [degrade(image, ALL, rng(seed)).tobytes() for seed in range(12)]
    assert len(set(first)) == 12


@given(
    st.sets(st.sampled_from(DEGRADATIONS)), st.integers(1, 6), st.integers(0, 5), st.floats(0, 1), st.integers(0, 2**32)
)
def test_draws_stay_within_their_ranges(enabled, fewest, more, chance, seed):
    chain = (fewest, min(fewest + more, 6))
    augment = Augment(chance=chance, chain=chain, **{name: RANGES[name] for name in enabled})
    changes = degradations.draw_degradations(augment, rng(seed))
    names = [change.name for change in changes]
    assert len(set(names)) == len(names)
    assert set(names) <= enabled
    assert not names or min(fewest, len(enabled)) <= len(names) <= chain[1]
    for change in changes:
        low, high = RANGES[change.name]
        values = change.apply.keywords
        value = values.get("quality", values.get("sigma", values.get("scale")))
        assert low <= value <= high
        assert change.scale == (value if change.name in ("resize", "crop") else 1)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 80), st.integers(1, 80), st.booleans(), st.integers(0, 2**32))
def test_any_image_survives_any_chain(width, height, transparent, seed):
    image = noise(0, width, height)
    if transparent:
        image.putalpha(128)
    changed = degrade(image, ALL, rng(seed))
    assert changed.mode == image.mode
    assert min(changed.size) >= min(width, height, degradations.MIN_SIDE)


def test_jpeg_alone_takes_the_same_draws_as_before_there_were_others():
    image, augment = noise(0), Augment(jpeg=(30, 100))
    for seed in range(40):
        expected, generator, plain = image, rng(seed), rng(seed)
        if plain.random() < 0.5:
            expected = degradations.jpeg(image, int(plain.integers(30, 101)), int(plain.choice([0, 2])))
        assert degrade(image, augment, generator).tobytes() == expected.tobytes()
        assert generator.random() == plain.random()


# ---- turns


def turns(augment: Augment, pixels: np.ndarray) -> list[np.ndarray]:
    return [degradations.random_flip(pixels, augment, rng(seed)) for seed in range(80)]


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
