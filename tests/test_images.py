import io
import struct
import zlib

import numpy as np
import pytest
from conftest import encoded, noise
from PIL import Image

from ensemble import images
from ensemble.contract import CROP_COUNTS, ImageContract
from ensemble.errors import ImageError

GREEN = (0, 200, 0)


def contract(size, **values) -> ImageContract:
    return ImageContract(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), **values)


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(images.decode(data))


def refusal(source, name=None) -> str:
    with pytest.raises(ImageError) as caught:
        images.decode(source, name)
    return str(caught.value)


# ---- decode: formats and modes


@pytest.mark.parametrize("file_format", images.FORMATS)
def test_every_format_is_decoded(file_format):
    data = encoded(Image.new("RGB", (24, 16), (200, 100, 50)), file_format)
    image = images.decode(data)
    assert (image.mode, image.size) == ("RGB", (24, 16))
    np.testing.assert_allclose(np.asarray(image), np.full((16, 24, 3), (200, 100, 50)), atol=4)
    assert images.format_name(data) == file_format


def test_path_and_bytes_give_the_same_pixels(photo):
    from_path, from_bytes = images.decode(photo), images.decode(photo.read_bytes())
    assert from_path.mode == from_bytes.mode == "RGB"
    assert from_path.tobytes() == from_bytes.tobytes() == Image.open(photo).convert("RGB").tobytes()


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_taken(file_format):
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    data = encoded(red, file_format, save_all=True, append_images=[blue])
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    np.testing.assert_allclose(pixels_of(data)[..., :3], np.full((16, 16, 3), (255, 0, 0)), atol=4)


@pytest.mark.parametrize(
    ("mode", "colour", "file_format", "expected"),
    [
        ("CMYK", (0, 255, 255, 0), "JPEG", (255, 0, 0)),
        ("CMYK", (0, 0, 0, 255), "JPEG", (0, 0, 0)),
        ("CMYK", (0, 0, 0, 0), "JPEG", (255, 255, 255)),
        ("L", 70, "PNG", (70, 70, 70)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("1", 0, "PNG", (0, 0, 0)),
    ],
)
def test_other_colour_modes_become_rgb(mode, colour, file_format, expected):
    pixels = pixels_of(encoded(Image.new(mode, (8, 8), colour), file_format))
    assert pixels.shape == (8, 8, 3)
    assert (pixels == expected).all()


def test_a_palette_becomes_its_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert pixels_of(encoded(image)).tolist() == [[[1, 2, 3], [40, 50, 60]]]


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (386, 2), (65280, 254), (65535, 255)])
@pytest.mark.parametrize(("file_format", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2")])
def test_16_bit_grey_is_scaled_to_8_bits(file_format, dtype, value, expected):
    data = encoded(Image.fromarray(np.full((3, 4), value, dtype)), file_format)
    assert pixels_of(data).tolist() == np.full((3, 4, 3), expected).tolist()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((2, 2), 0.5, np.float32), "floating-point pixels have no fixed range"),
        (np.full((2, 2), 70_000, np.int32), "32-bit pixels beyond 16 bits"),
        (np.full((2, 2), -1, np.int32), "32-bit pixels beyond 16 bits"),
    ],
)
def test_pixels_without_a_range_are_refused(pixels, message):
    assert refusal(encoded(Image.fromarray(pixels), "TIFF"), "x.tif").startswith(f"x.tif: {message}")


# ---- decode: orientation

UPRIGHT = np.kron(np.arange(6).reshape(2, 3) * 40, np.ones((16, 16), int))[..., None].repeat(3, 2).astype(np.uint8)
# How a camera stores the upright picture under each value, from the EXIF standard's table of rows and columns.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.swapaxes(0, 1),
    6: UPRIGHT.swapaxes(0, 1)[::-1],
    7: UPRIGHT.swapaxes(0, 1)[::-1, ::-1],
    8: UPRIGHT.swapaxes(0, 1)[:, ::-1],
}


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_undone(file_format, orientation):
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(file_format, {})
    stored = Image.fromarray(STORED[orientation])
    pixels = pixels_of(encoded(stored, file_format, exif=exif(orientation), **options))
    assert pixels.shape == UPRIGHT.shape
    np.testing.assert_allclose(pixels.astype(int), UPRIGHT.astype(int), atol=2 if file_format == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 6000])
def test_an_unknown_orientation_is_passed_over(orientation):
    assert pixels_of(encoded(Image.fromarray(UPRIGHT), exif=exif(orientation))).tolist() == UPRIGHT.tolist()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "damaged",
    [b"garbage", b"Exif\0\0II*\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff"],
)
def test_damaged_exif_leaves_the_picture_as_stored(damaged):
    data = encoded(Image.fromarray(UPRIGHT), "JPEG", quality=100, subsampling=0, exif=damaged)
    np.testing.assert_allclose(pixels_of(data).astype(int), UPRIGHT.astype(int), atol=2)


def test_an_orientation_beside_a_damaged_tag_is_undone():
    make = struct.pack(">HHII", 0x010F, 5, 1, 38)  # the camera's maker, which is text, as a fraction
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    tags = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + make + turned + struct.pack(">III", 0, 3, 2)
    assert pixels_of(encoded(Image.fromarray(STORED[6]), exif=tags)).tolist() == UPRIGHT.tolist()


# ---- decode: what is refused


def png_claiming(width, height) -> bytes:
    data = bytearray(encoded(Image.new("L", (2, 2))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def patched(file_format, old, new) -> bytes:
    data = encoded(Image.new("L", (2, 2)), file_format)
    assert data.count(old) == 1
    return data.replace(old, new)


BOMBS = {
    "PNG": png_claiming(60_000, 60_000),
    "PPM": b"P6 60000 60000 255\n",
    "BMP": patched("BMP", struct.pack("<IiiH", 40, 2, 2, 1), struct.pack("<IiiH", 40, 60_000, 60_000, 1)),
    "GIF": patched("GIF", b"a" + struct.pack("<HH", 2, 2), b"a" + struct.pack("<HH", 60_000, 60_000)),
    "JPEG": patched("JPEG", b"\x08" + struct.pack(">HH", 2, 2), b"\x08" + struct.pack(">HH", 60_000, 60_000)),
    "TIFF": patched(
        "TIFF",
        struct.pack("<HHIIHHII", 256, 4, 1, 2, 257, 4, 1, 2),
        struct.pack("<HHIIHHII", 256, 4, 1, 60_000, 257, 4, 1, 60_000),
    ),
}


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None], ids=["pillow's limit", "no limit of pillow's"])
@pytest.mark.parametrize("file_format", BOMBS)
def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch, file_format, limit):
    def load(image):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # other packages switch the limit off
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert len(BOMBS[file_format]) < 2000
    message = refusal(BOMBS[file_format], "bomb")
    assert message.startswith("bomb: ")
    assert "over 178956970 pixels" in message


def test_eps_is_refused_and_ghostscript_never_runs(monkeypatch, tmp_path):
    def ghostscript(*arguments, **options):
        raise AssertionError("Ghostscript was run")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", ghostscript)
    monkeypatch.setattr("subprocess.Popen", ghostscript)
    (tmp_path / "x.jpg").write_bytes(encoded(noise(0), "EPS"))
    with Image.open(tmp_path / "x.jpg") as image, pytest.raises(AssertionError, match="Ghostscript was run"):
        image.load()
    assert "x.jpg: not an image in a known format" in refusal(tmp_path / "x.jpg")


PNG, JPEG = encoded(noise(0)), encoded(noise(0), "JPEG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"this is text", f"not an image in a known format ({', '.join(images.FORMATS)})"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image in a known format"),
        (PNG[:30], "not an image in a known format"),
        (PNG[: len(PNG) // 2], "cannot be decoded (OSError: image file is truncated)"),
        (JPEG[: len(JPEG) // 2], "cannot be decoded (OSError: image file is truncated"),
        (JPEG[:-20], "cannot be decoded (OSError: image file is truncated"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, data, message):
    path = tmp_path / "holiday.jpg"
    if data is not None:
        path.write_bytes(data)
    assert refusal(path).startswith(f"{path}: {message}")


def test_a_folder_is_refused_by_name(tmp_path):
    assert refusal(tmp_path).startswith(f"{tmp_path}: cannot be decoded (IsADirectoryError")


def test_bytes_are_refused_by_the_given_name():
    assert refusal(b"", "upload 3") == "upload 3: the file is empty"
    assert refusal(b"") == "image: the file is empty"


def test_format_name_refuses_what_is_no_image():
    with pytest.raises(ImageError, match="not an image"):
        images.format_name(b"this is text")


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
    decoded = images.decode(encoded(image, file_format, **options))
    assert decoded.mode == "RGBA"
    view = contract(2, geometry="native_crops", background=background)
    assert images.to_pixels(decoded, view)[0, 0].tolist() == [list(background), list(colour)]


def test_half_transparency_mixes_with_the_background():
    decoded = images.decode(encoded(Image.new("RGBA", (2, 2), (200, 100, 0, 51))))  # 51 / 255 = a fifth
    assert images.to_pixels(decoded, contract(2, background=(100, 200, 250)))[0, 0, 0].tolist() == [120, 180, 200]


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
    views = images.to_pixels(image, contract(4, geometry="native_crops", count=count))
    source = np.asarray(image)
    assert views.dtype == np.uint8
    assert views.tolist() == [source[y : y + 4, x : x + 4].tolist() for y, x in CROPS[count]]


def test_explicit_offsets_take_the_place_of_the_grid():
    image = noise(2, 14, 10)
    views = images.to_pixels(image, contract(4, geometry="native_crops", count=9), [(0.5, 1.0), (1.0, 0.0)])
    source = np.asarray(image)
    assert views.tolist() == [source[3:7, 10:14].tolist(), source[6:10, 0:4].tolist()]


@pytest.mark.parametrize("count", [1, 5])
def test_smaller_images_are_reflected(count):
    source = np.asarray(noise(3, 3, 2))
    views = images.to_pixels(Image.fromarray(source), contract(5, geometry="native_crops", count=count))
    expected = source[[1, 0, 1, 0, 1]][:, [1, 0, 1, 2, 1]]
    assert views.tolist() == [expected.tolist()] * count


def test_an_image_small_in_one_direction_is_cropped_in_the_other():
    source = np.asarray(noise(4, 9, 2))
    [view] = images.to_pixels(Image.fromarray(source), contract(4, geometry="native_crops"))
    assert view.tolist() == source[[1, 0, 1, 0]][:, 2:6].tolist()


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 6), (6, 1)])
def test_one_pixel_is_repeated(width, height):
    source = np.asarray(noise(5, width, height))
    [view] = images.to_pixels(Image.fromarray(source), contract(6, geometry="native_crops"))
    assert (view == source).all()  # the single row or column, broadcast
    assert view.shape == (6, 6, 3)


@pytest.mark.parametrize("geometry", ["squash", "center_crop", "native_crops"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 9), (40, 3), (300, 7), (16, 16)])
def test_every_geometry_gives_square_views(geometry, width, height):
    count = 4 if geometry == "native_crops" else 1
    view = contract(16, geometry=geometry, count=count, crop_pct=0.875)
    assert images.to_pixels(noise(0, width, height), view).shape == (count, 16, 16, 3)


def test_squash_keeps_the_whole_picture():
    image = Image.new("RGB", (40, 10), "red")
    image.paste((0, 0, 255), (20, 0, 40, 10))
    [view] = images.to_pixels(image, contract(4, filter="box"))
    assert view.tolist() == [[[255, 0, 0]] * 2 + [[0, 0, 255]] * 2] * 4


def test_squash_has_no_offsets_but_as_many_views():
    image = noise(6)
    views = images.to_pixels(image, contract(8), [(0, 0), (1, 1)])
    assert views.tolist() == images.to_pixels(image, contract(8)).tolist() * 2


@pytest.mark.parametrize(("width", "height"), [(32, 32), (64, 32), (32, 80)])
def test_center_crop_at_its_own_size_is_a_slice(width, height):
    image = noise(7, width, height)
    [view] = images.to_pixels(image, contract(28, geometry="center_crop", crop_pct=0.875))
    top, left = (height - 28) // 2, (width - 28) // 2
    assert view.tolist() == np.asarray(image)[top : top + 28, left : left + 28].tolist()


def test_center_crop_resizes_the_shorter_side():
    image = Image.new("RGB", (80, 20), "red")
    image.paste((0, 0, 255), (40, 0, 80, 20))
    [view] = images.to_pixels(image, contract(10, geometry="center_crop", filter="box"))
    assert view.tolist() == [[[255, 0, 0]] * 5 + [[0, 0, 255]] * 5] * 10


def test_filters_differ(photo):
    image = images.decode(photo)
    views = {name: images.to_pixels(image, contract(32, filter=name)).tobytes() for name in ("bicubic", "bilinear")}
    assert views["bicubic"] != views["bilinear"]


def test_image_too_thin_to_resize_is_refused_and_not_tried():
    thin = Image.new("RGB", (1, 20_000))
    with pytest.raises(ImageError, match="1x20000 is too thin to be resized to 256x5120000"):
        images.to_pixels(thin, contract(224, geometry="center_crop", crop_pct=0.875))
    assert images.to_pixels(thin, contract(224)).shape == (1, 224, 224, 3)


@pytest.mark.parametrize(("crop", "short"), [(192, 225), (224, 256), (384, 438), (518, 545)])
def test_crop_pct_of_two_sides_gives_them_back(crop, short):
    assert contract(crop, geometry="center_crop", crop_pct=crop / short).short_side == short
