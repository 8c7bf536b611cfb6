from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, noise
from PIL import Image

from ensemble.core.errors import ImageError
from ensemble.core.preprocess_config import CROP_COUNTS, FILTERS, PreprocessConfig
from ensemble.images import decode, preprocess

GREEN = (0, 200, 0)


def config(size, **values) -> PreprocessConfig:
    return PreprocessConfig(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), **values)


# ---- to_pixels: transparency


def two_pixels(mode, hidden, shown) -> Image.Image:
    image = Image.new(mode, (2, 1), shown)
    image.putpixel((0, 0), hidden)
    return image


def palette_image() -> Image.Image:
    image = two_pixels("P", 0, 1)
    image.putpalette([9, 9, 9, 40, 50, 60])
    return image


@pytest.mark.parametrize(
    ("image", "file_format", "options", "colour"),
    [
        (two_pixels("RGBA", (9, 9, 9, 0), (40, 50, 60, 255)), "PNG", {}, (40, 50, 60)),
        (two_pixels("RGBA", (9, 9, 9, 0), (40, 50, 60, 255)), "WEBP", {"lossless": True}, (40, 50, 60)),
        (two_pixels("LA", (9, 0), (40, 255)), "PNG", {}, (40, 40, 40)),
        (palette_image(), "PNG", {"transparency": 0}, (40, 50, 60)),
        (palette_image(), "PNG", {"transparency": b"\0\xff"}, (40, 50, 60)),
        (palette_image(), "GIF", {"transparency": 0}, (40, 50, 60)),
        (two_pixels("RGB", (9, 8, 7), (40, 50, 60)), "PNG", {"transparency": (9, 8, 7)}, (40, 50, 60)),
        (two_pixels("L", 9, 40), "PNG", {"transparency": 9}, (40, 40, 40)),
    ],
)
@pytest.mark.parametrize("background", [(255, 255, 255), GREEN])
def test_transparency_shows_the_background(image, file_format, options, colour, background):
    decoded = decode.decode(encoded(image, file_format, **options))
    assert decoded.mode == "RGBA"
    view = config(2, geometry="native_crops", background=background)
    assert preprocess.to_pixels(decoded, view)[0, 0].tolist() == [list(background), list(colour)]


def test_half_transparency_mixes_with_the_background():
    decoded = decode.decode(encoded(Image.new("RGBA", (2, 2), (200, 100, 0, 51))))  # 51 / 255 = a fifth
    assert preprocess.to_pixels(decoded, config(2, background=(100, 200, 250)))[0, 0, 0].tolist() == [120, 180, 200]


def test_a_large_image_is_laid_on_its_background_in_parts(monkeypatch):
    image = noise(0, 30, 41)
    image.putalpha(noise(1, 30, 41).convert("L"))
    whole = preprocess.flatten(image, GREEN)
    monkeypatch.setattr(preprocess, "LARGE_IMAGE", 100)
    assert preprocess.flatten(image, GREEN).tobytes() == whole.tobytes()


# ---- to_pixels: geometry

CROPS = {  # (top, left) of 4-pixel crops in an image 14 wide and 10 high
    1: [(3, 5)],
    4: [(0, 0), (0, 10), (6, 0), (6, 10)],
    5: [(0, 0), (0, 10), (6, 0), (6, 10), (3, 5)],
    9: [(y, x) for y in (0, 3, 6) for x in (0, 5, 10)],
    16: [(y, x) for y in (0, 2, 4, 6) for x in (0, 3, 7, 10)],
}


def test_the_table_of_crops_is_complete():
    assert tuple(CROPS) == CROP_COUNTS


@pytest.mark.parametrize("count", CROPS)
def test_native_crops_are_exact_slices(count):
    image = noise(1, 14, 10)
    views = preprocess.to_pixels(image, config(4, geometry="native_crops", count=count))
    source = np.asarray(image)
    assert views.dtype == np.uint8
    assert views.tolist() == [source[y : y + 4, x : x + 4].tolist() for y, x in CROPS[count]]


def test_explicit_offsets_take_the_place_of_the_grid():
    image = noise(2, 14, 10)
    views = preprocess.to_pixels(image, config(4, geometry="native_crops", count=9), [(0.5, 1.0), (1.0, 0.0)])
    source = np.asarray(image)
    assert views.tolist() == [source[3:7, 10:14].tolist(), source[6:10, 0:4].tolist()]


@pytest.mark.parametrize("count", [1, 5])
def test_smaller_images_are_reflected(count):
    source = np.asarray(noise(3, 3, 2))
    views = preprocess.to_pixels(Image.fromarray(source), config(5, geometry="native_crops", count=count))
    expected = source[[1, 0, 1, 0, 1]][:, [1, 0, 1, 2, 1]]
    assert views.tolist() == [expected.tolist()] * count


def test_an_image_small_in_one_direction_is_cropped_in_the_other():
    source = np.asarray(noise(4, 9, 2))
    [view] = preprocess.to_pixels(Image.fromarray(source), config(4, geometry="native_crops"))
    assert view.tolist() == source[[1, 0, 1, 0]][:, 2:6].tolist()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 6), (6, 1)])
def test_one_pixel_is_repeated(width, height):
    source = np.asarray(noise(5, width, height))
    [view] = preprocess.to_pixels(Image.fromarray(source), config(6, geometry="native_crops"))
    assert (view == source).all()  # the single row or column, broadcast
    assert view.shape == (6, 6, 3)


@pytest.mark.parametrize("geometry", ["squash", "center_crop", "native_crops"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 9), (40, 3), (300, 7), (16, 16)])
def test_every_geometry_gives_square_views(geometry, width, height):
    count = 4 if geometry == "native_crops" else 1
    view = config(16, geometry=geometry, count=count, crop_pct=0.875)
    assert preprocess.to_pixels(noise(0, width, height), view).shape == (count, 16, 16, 3)


def test_squash_keeps_the_whole_picture():
    image = Image.new("RGB", (40, 10), "red")
    image.paste((0, 0, 255), (20, 0, 40, 10))
    [view] = preprocess.to_pixels(image, config(4, filter="box"))
    assert view.tolist() == [[[255, 0, 0]] * 2 + [[0, 0, 255]] * 2] * 4


def test_squash_has_no_offsets_but_as_many_views():
    image = noise(6)
    views = preprocess.to_pixels(image, config(8), [(0, 0), (1, 1)])
    assert views.tolist() == preprocess.to_pixels(image, config(8)).tolist() * 2


@pytest.mark.parametrize(("width", "height"), [(32, 32), (64, 32), (32, 80)])
def test_center_crop_at_its_own_size_is_a_slice(width, height):
    image = noise(7, width, height)
    [view] = preprocess.to_pixels(image, config(28, geometry="center_crop", crop_pct=0.875))
    top, left = (height - 28) // 2, (width - 28) // 2
    assert view.tolist() == np.asarray(image)[top : top + 28, left : left + 28].tolist()


def test_center_crop_resizes_the_shorter_side():
    image = Image.new("RGB", (80, 20), "red")
    image.paste((0, 0, 255), (40, 0, 80, 20))
    [view] = preprocess.to_pixels(image, config(10, geometry="center_crop", filter="box"))
    assert view.tolist() == [[[255, 0, 0]] * 5 + [[0, 0, 255]] * 5] * 10


def test_filters_differ(photo):
    image = decode.decode(photo)
    views = {name: preprocess.to_pixels(image, config(32, filter=name)).tobytes() for name in ("bicubic", "bilinear")}
    assert views["bicubic"] != views["bilinear"]


def test_image_too_thin_to_resize_is_refused_and_not_tried():
    thin = Image.new("RGB", (1, 20_000))
    with pytest.raises(ImageError, match="1x20000 is too thin to be resized to 256x5120000"):
        preprocess.to_pixels(thin, config(224, geometry="center_crop", crop_pct=0.875))
    assert preprocess.to_pixels(thin, config(224)).shape == (1, 224, 224, 3)


@pytest.mark.parametrize(("crop", "short"), [(192, 225), (224, 256), (384, 438), (518, 545)])
def test_crop_pct_of_two_sides_gives_them_back(crop, short):
    assert config(crop, geometry="center_crop", crop_pct=crop / short).short_side == short


# ---- prepare: the same pixels for several contracts

sides = st.one_of(st.sampled_from([1, 8, 16]), st.integers(1, 40))


@st.composite
def configs(draw):
    geometry = draw(st.sampled_from(["squash", "center_crop", "native_crops"]))
    return config(
        draw(st.sampled_from([4, 8, 14, 16])),
        geometry=geometry,
        filter=draw(st.sampled_from(FILTERS)),
        crop_pct=draw(st.sampled_from([1.0, 0.875, 0.5])),
        count=draw(st.sampled_from(CROP_COUNTS)) if geometry == "native_crops" else 1,
        background=draw(st.sampled_from([(255, 255, 255), GREEN])),
    )


@st.composite
def decoded(draw):
    image = noise(draw(st.integers(0, 9)), draw(sides), draw(sides))
    mode = draw(st.sampled_from(["RGB", "RGBA", "L", "P", "CMYK"]))
    if mode == "RGBA":
        image.putalpha(noise(draw(st.integers(0, 9)), *image.size).convert("L"))
        return decode.decode(encoded(image))
    return decode.decode(encoded(image.convert(mode), "TIFF"))


def assert_prepared(prepare, image, asked):
    found = prepare(image, asked)
    assert set(found) == {each.view for each in asked}
    for each in asked:
        pixels = found[each.view]
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, preprocess.to_pixels(image, each))


@settings(deadline=None, max_examples=300)
@given(image=decoded(), asked=st.lists(configs(), max_size=6))
def test_prepared_pixels_are_those_of_each_contract_alone(image, asked):
    assert_prepared(preprocess.prepare, image, asked)


OTHERS = {"filter": "box", "background": GREEN, "geometry": "squash", "crop_pct": 0.5, "count": 4}


@pytest.mark.parametrize("forgotten", OTHERS)
def test_the_comparison_sees_one_contract_taken_for_another(forgotten):
    image = noise(0, 40, 24)
    image.putalpha(100)
    one = config(8, geometry="native_crops" if forgotten == "count" else "center_crop")
    other = replace(one, **{forgotten: OTHERS[forgotten]})

    def careless(image, asked):
        return dict.fromkeys((each.view for each in asked), preprocess.to_pixels(image, one))

    assert_prepared(preprocess.prepare, image, [one, other])
    with pytest.raises(AssertionError):
        assert_prepared(careless, image, [one, other])


SHORT_16 = [config(size, geometry="center_crop", crop_pct=size / 16) for size in (8, 14, 16)]


@pytest.mark.parametrize(
    ("size", "asked", "resizes"),
    [
        ((32, 32), [config(16), *SHORT_16], 1),  # a square image: the whole of it is its centre crop
        ((48, 32), [config(16), *SHORT_16], 2),
        ((32, 32), [config(16), config(16, filter="box"), config(8)], 3),
        ((16, 16), [config(16), config(16, filter="box"), *SHORT_16], 0),  # of that size already
        ((32, 32), [config(8, geometry="native_crops", count=count) for count in CROP_COUNTS], 0),
        ((32, 32), [config(16), config(16, background=GREEN)], 1),  # nothing is transparent
    ],
)
def test_no_step_is_done_twice(monkeypatch, size, asked, resizes):
    done, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *given: done.append(given[1:]) or resize(*given))
    prepared = preprocess.prepare(noise(0, *size), asked)
    assert len(prepared) == len(asked)
    assert len(done) == resizes


def test_a_background_is_laid_once(monkeypatch):
    laid, flatten = [], preprocess.flatten
    monkeypatch.setattr(
        preprocess, "flatten", lambda image, background: laid.append(background) or flatten(image, background)
    )
    image = noise(0)
    image.putalpha(100)
    preprocess.prepare(image, [*SHORT_16, config(8), config(8, background=GREEN), config(4, background=GREEN)])
    assert laid == [(255, 255, 255), GREEN]


def test_what_no_contract_can_take_is_refused():
    with pytest.raises(ImageError, match="too thin"):
        preprocess.prepare(Image.new("RGB", (1, 20_000)), [config(8), config(224, geometry="center_crop")])
