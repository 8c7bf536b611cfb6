import time

import pytest
from mutations import png_of_zeros, scanned_jpeg, tag_bomb, tiled_tiff
from pictures import encoded, noise
from PIL import Image

from ensemble.core.errors import ImageError
from ensemble.images import decode


def refusal(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode.decode(data, "x")
    return str(caught.value)


@pytest.fixture
def no_pixels(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("pixels were decoded"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_progressive_jpeg_of_scans_without_end_is_refused(no_pixels):
    bomb = scanned_jpeg(12_000, 12_000, 200)
    assert len(bomb) < 400_000
    assert refusal(bomb) == "x: a progressive JPEG of too many scans, refused as a decompression bomb"


def test_a_small_jpeg_of_many_scans_is_decoded():
    assert decode.decode(scanned_jpeg(64, 64, 500)).size == (64, 64)


def test_a_tiff_of_small_size_and_huge_tiles_is_refused(no_pixels):
    assert len(tiled_tiff(16, 30_000)) < 200
    assert "x: 16x16 in tiles of 30000x30000 is over 178956970 pixels" in refusal(tiled_tiff(16, 30_000))


def test_an_ordinary_tiled_tiff_is_decoded():
    assert decode.decode(tiled_tiff(16, 16)).size == (16, 16)


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.filterwarnings("ignore:Possibly corrupt EXIF data")
@pytest.mark.parametrize(("file_format", "count", "size"), [("PNG", 3000, 1_000_000), ("JPEG", 2500, 30_000)])
def test_exif_whose_tags_share_their_bytes_takes_no_more_than_a_moment(file_format, count, size):
    exif = b"Exif\0\0" * (file_format == "JPEG") + tag_bomb(count, size)
    started = time.monotonic()
    assert decode.decode(encoded(noise(0), file_format, exif=exif)).size == (32, 32)
    assert time.monotonic() - started < 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_png_just_below_the_limit_is_decoded_and_one_beyond_it_refused():
    told = []
    assert decode.decode(png_of_zeros(16_000, 11_000), large=lambda: told.append(1)).size == (16_000, 11_000)
    assert told == [1]
    assert "over 178956970 pixels" in refusal(png_of_zeros(60_000, 60_000))


@pytest.mark.parametrize(("side", "tail", "expected"), [(40, 0, 1), (20, 1000, 1), (40, 1000, 1), (20, 0, 0)])
def test_large_images_are_told_once_and_before_their_memory_is_taken(monkeypatch, tmp_path, side, tail, expected):
    (tmp_path / "x.png").write_bytes(encoded(Image.new("L", (side, side))) + bytes(tail))
    told, load = [], Image.Image.load
    monkeypatch.setattr(decode, "LARGE_IMAGE", 1000)
    monkeypatch.setattr(Image.Image, "load", lambda image: told.append("pixels") or load(image))
    decode.decode(tmp_path / "x.png", large=lambda: told.append("large"))
    assert told.count("large") == expected
    assert told[0] == ("large" if expected else "pixels")
