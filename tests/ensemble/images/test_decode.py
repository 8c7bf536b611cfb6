import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, noise
from PIL import Image

from ensemble.core.errors import ImageError
from ensemble.images import decode


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(decode.decode(data))


def refusal(source, name=None) -> str:
    with pytest.raises(ImageError) as caught:
        decode.decode(source, name)
    return str(caught.value)


# ---- decode: formats and modes


@pytest.mark.parametrize("file_format", decode.FORMATS)
def test_every_format_is_decoded(file_format):
    data = encoded(Image.new("RGB", (24, 16), (200, 100, 50)), file_format)
    image = decode.decode(data)
    assert (image.mode, image.size) == ("RGB", (24, 16))
    np.testing.assert_allclose(np.asarray(image), np.full((16, 24, 3), (200, 100, 50)), atol=4)
    assert decode.format_name(data) == file_format


def test_path_and_bytes_give_the_same_pixels(photo):
    from_path, from_bytes = decode.decode(photo), decode.decode(photo.read_bytes())
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
        (b"this is text", f"not an image in a known format ({', '.join(decode.FORMATS)})"),
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
    assert refusal(tmp_path) == f"{tmp_path}: not a file"


def test_a_pipe_or_device_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for path in tmp_path.iterdir():
        assert refusal(path) == f"{path}: not a file"


def test_a_link_to_nothing_is_a_missing_file(tmp_path):
    (tmp_path / "x.jpg").symlink_to(tmp_path / "gone.jpg")
    assert refusal(tmp_path / "x.jpg") == f"{tmp_path / 'x.jpg'}: no such file"


def test_a_file_larger_than_any_image_is_not_read(tmp_path, monkeypatch):
    with (tmp_path / "x.jpg").open("wb") as file:
        file.truncate(decode.MAX_BYTES + 1)  # takes no room on the disk
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("the file was read"))
    assert "1431655761 bytes, more than 178956970 pixels need" in refusal(tmp_path / "x.jpg")


def test_bytes_are_refused_by_the_given_name():
    assert refusal(b"", "upload 3") == "upload 3: the file is empty"
    assert refusal(b"") == "image: the file is empty"


def test_format_name_refuses_what_is_no_image():
    with pytest.raises(ImageError, match="not an image"):
        decode.format_name(b"this is text")
