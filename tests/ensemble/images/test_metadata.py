import io
import struct
import warnings
import zlib

import numpy as np
import planted_metadata
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, noise
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from ensemble.images import metadata
from ensemble.images.metadata import jpeg_quality, read_header

PICTURE = noise(0, 48, 32)
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF")
PARAMETERS = "a cat\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7"
TEXTS = ("text", "text_keys", "generator_text", "xmp", "c2pa")


def header(data):
    return read_header(data, *PICTURE.size)


def of(file_format="JPEG", **options):
    return header(encoded(PICTURE, file_format, **options))


def exif(**tags):
    return {"exif": Image.Exif()} if not tags else {"exif": _exif(tags)}


def _exif(tags):
    made, names = Image.Exif(), {"make": 271, "model": 272, "orientation": 274, "software": 305}
    inner = {"exposure": 33434, "iso": 34855, "comment": 37510}
    for name, value in tags.items():
        if name in names:
            made[names[name]] = value
        else:
            made.get_ifd(0x8769)[inner[name]] = value
    return made


def chunk(name, payload):
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def after_header(png, *chunks):
    return png[:33] + b"".join(chunks) + png[33:]


def before_end(png, *chunks):
    return png[:-12] + b"".join(chunks) + png[-12:]


def segment(marker, payload):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(payload) + 2) + payload


def after_start(jpeg, *segments):
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


# ---- JPEG


@pytest.mark.parametrize("subsampling", [0, 2])
def test_the_quality_is_the_one_it_was_saved_with(subsampling):
    found = [of(quality=quality, subsampling=subsampling)["quality"] for quality in range(1, 101)]
    assert found[10:] == list(range(11, 101))
    assert max(abs(a - b) for a, b in zip(found, range(1, 101), strict=True)) <= 1


def test_the_quality_of_other_tables_is_that_of_the_nearest():
    table = metadata._LUMINANCE.copy()  # quality 50
    table[0] += 1
    assert jpeg_quality(list(table)) == 50
    assert jpeg_quality([255] * 64) <= 2
    assert jpeg_quality([1] * 64) == 100


def test_quantisation_tables_are_told_apart_by_quality_alone():
    tables = [of(quality=quality, optimize=optimize)["tables"] for quality in (80, 81) for optimize in (False, True)]
    assert tables[0] == tables[1] != tables[2] == tables[3]


@pytest.mark.parametrize(("subsampling", "expected"), [(0, "0"), (1, "1"), (2, "2")])
def test_subsampling(subsampling, expected):
    assert of(subsampling=subsampling)["sampling"] == expected


def test_a_grey_jpeg_has_no_subsampling():
    found = header(encoded(PICTURE.convert("L"), "JPEG", quality=70))
    assert (found["mode"], found["sampling"], found["quality"]) == ("L", "-1", 70)


def test_progressive_and_interlaced():
    assert [of(progressive=value)["progressive"] for value in (False, True)] == [0, 1]


def test_density():
    assert of()["density"] == "(1, 1)"
    assert of(dpi=(300, 300))["density"] == "(300, 300)"


def test_what_is_no_jpeg_has_no_tables():
    for file_format in set(FORMATS) - {"JPEG"}:
        found = of(file_format)
        assert (found["quality"], found["tables"], found["sampling"]) == (-1, "none", "none")


# ---- the file


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_has_the_same_keys(file_format):
    data = encoded(PICTURE, file_format)
    found = header(data)
    assert found["format"] == file_format
    assert found.keys() == header(b"no image").keys()
    assert (found["width"], found["height"], found["aspect"]) == (48, 32, 1.5)
    assert (found["bytes"], found["bytes_per_pixel"]) == (len(data), len(data) / (48 * 32))


def test_a_plain_file_shows_nothing():
    for file_format in FORMATS:
        found = of(file_format)
        for key in ("exif", "camera", "xmp", "text", "generator_text", "c2pa", "comment", "trailing"):
            assert found[key] == 0, (file_format, key)
        assert (found["icc"], found["software"], found["orientation"]) == ("none", "", 1)


@pytest.mark.parametrize(
    ("file_format", "options", "lossless"),
    [
        ("WEBP", {"quality": 80}, 0),
        ("WEBP", {"lossless": True}, 1),
        ("WEBP", {"lossless": True, "exif": _exif({"make": "x"})}, 1),
        ("PNG", {}, 1),
        ("BMP", {}, 1),
        ("JPEG", {"quality": 100}, 0),
        ("AVIF", {}, 0),
    ],
)
def test_lossless(file_format, options, lossless):
    assert of(file_format, **options)["lossless"] == lossless


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_trailing_bytes(file_format):
    data = encoded(PICTURE, file_format)
    assert header(data)["trailing"] == 0
    assert header(data + b"secret")["trailing"] == 1


def test_trailing_zeros_of_a_jpeg_are_padding():
    assert header(encoded(PICTURE, "JPEG") + bytes(40))["trailing"] == 0


# ---- metadata


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_of_a_camera(file_format):
    found = of(file_format, **exif(make="Canon", model="EOS 80D", exposure=0.01, iso=200, orientation=6))
    tags = 2 if file_format == "TIFF" else 4  # Pillow writes no inner EXIF into a TIFF
    assert (found["exif"], found["camera"], found["orientation"]) == (1, tags, 6)


def test_exif_of_an_editor_is_no_camera():
    found = of(**exif(software="Adobe Photoshop 26.0 (Macintosh)"))
    assert (found["exif"], found["camera"], found["software"]) == (1, 0, "Adobe Photoshop 26.0 (Macintosh)")


def test_icc_profiles_are_told_apart():
    profile = planted_metadata._icc()
    other = profile[:-1] + bytes([profile[-1] ^ 1])
    found = [of(icc_profile=value)["icc"] for value in (profile, profile, other)]
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 8


def test_a_comment():
    assert of(comment=b"made with love")["comment"] == 1


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_xmp(file_format):
    found = of(file_format, xmp=b"<x:xmpmeta/>")
    assert (found["xmp"], found["text"], found["generator_text"]) == (1, 0, 0)


@pytest.mark.parametrize("place", [after_header, before_end], ids=["before the pixels", "after the pixels"])
def test_text_of_a_png(place):
    texts = (
        chunk(b"tEXt", b"Title\0a"),
        chunk(b"iTXt", b"prompt\0\0\0\0\0{}"),
        chunk(b"zTXt", b"Author\0\0" + zlib.compress(b"x")),
    )
    found = header(place(encoded(PICTURE, "PNG"), *texts))
    assert (found["text"], found["text_keys"], found["xmp"]) == (1, "Author,Title,prompt", 0)


@pytest.mark.parametrize("place", [after_header, before_end], ids=["before the pixels", "after the pixels"])
def test_xmp_of_a_png_is_no_text(place):
    packet = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta/>")
    found = header(place(encoded(PICTURE, "PNG"), packet))
    assert [found[key] for key in TEXTS] == [0, "", 0, 1, 0]


def test_exif_of_a_png_after_the_pixels():
    raw = Image.Exif()
    raw[271] = "Canon"
    found = header(before_end(encoded(PICTURE, "PNG"), chunk(b"eXIf", raw.tobytes()[6:])))
    assert (found["exif"], found["camera"]) == (1, 1)


def test_text_after_the_pixels_of_a_large_png():
    png = encoded(PICTURE, "PNG")
    start = png.index(b"IDAT") - 4
    pixels = png[start + 8 : -16]
    split = b"".join(chunk(b"IDAT", pixels[at : at + 4]) for at in range(0, len(pixels), 4))
    data = before_end(png[:start] + split + png[-12:], chunk(b"tEXt", b"Title\0a"))
    assert data.count(b"IDAT") > 400
    found = header(data + b"more")
    assert (found["text_keys"], found["segments"], found["trailing"]) == ("Title", "IHDR>IDAT>tEXt>IEND", 1)


def parameters_of(file_format):
    """As Stable Diffusion's web interface writes them: PNG text, else EXIF's UserComment in UTF-16."""
    if file_format == "PNG":
        text = PngInfo()
        text.add_text("parameters", PARAMETERS)
        return {"pnginfo": text}
    return exif(comment=b"UNICODE\0" + PARAMETERS.encode("utf-16-be"))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_parameters_of_a_generator(file_format):
    found = of(file_format, **parameters_of(file_format))
    assert found["generator_text"] == 1
    assert found["text_keys"] == ("parameters" if file_format == "PNG" else "")


@pytest.mark.parametrize("name", ["trained_xmp", "firefly_xmp"])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_xmp_that_names_a_generator(name, file_format):
    options = planted_metadata.save_options((name,), file_format, np.random.default_rng(0))
    found = of(file_format, **options)
    assert (found["xmp"], found["generator_text"], found["text"]) == (1, 1, 0)


@pytest.mark.parametrize("text", ["a midsummer's journey", "real diffusion of light"])
def test_other_text_names_no_generator(text):
    note = PngInfo()
    note.add_text("Comment", text)
    assert of("PNG", pnginfo=note)["generator_text"] == 0
    assert of(comment=text.encode())["generator_text"] == 0


def test_c2pa():
    store = planted_metadata._c2pa(np.random.default_rng(0))
    files = {
        "APP11": after_start(encoded(PICTURE, "JPEG"), segment(0xEB, b"JP\0\1\0\0\0\1" + store)),
        "caBX": before_end(encoded(PICTURE, "PNG"), chunk(b"caBX", store)),
    }
    for name, data in files.items():
        found = header(data)
        assert found["c2pa"] == 1
        assert name in found["segments"]
    other = after_start(encoded(PICTURE, "JPEG"), segment(0xEB, b"HDR gain map"))
    assert header(other)["c2pa"] == 0


# ---- PNGs are not decoded, damage is no error


def test_a_png_is_not_decoded(monkeypatch):
    data = before_end(encoded(PICTURE, "PNG", dpi=(72, 72)), chunk(b"tEXt", b"Title\0a"))

    def decoded(*arguments):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    assert header(data)["text_keys"] == "Title"
    with pytest.raises(AssertionError, match="decoded"), Image.open(io.BytesIO(data)) as image:
        image.getexif()  # what would have decoded it


RICH = [
    encoded(PICTURE, "JPEG", comment=b"c", xmp=b"<x/>", **exif(make="Canon", iso=100)),
    encoded(PICTURE, "PNG", **parameters_of("PNG"), **exif(make="Canon", iso=100)),
    encoded(PICTURE, "WEBP", xmp=b"<x/>", **exif(make="Canon")),
    encoded(PICTURE, "TIFF", **exif(make="Canon")),
    encoded(PICTURE, "AVIF", **exif(make="Canon")),
    encoded(PICTURE, "GIF"),
]


def described(data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = header(data)
    assert found.keys() == metadata._empty(b"", 1, 1).keys()
    assert all(isinstance(value, (float, str)) for value in found.values())
    assert np.isfinite([value for value in found.values() if isinstance(value, float)]).all()
    return found


@settings(deadline=None)
@given(st.sampled_from(RICH), st.data())
def test_damage_never_raises(data, draw):
    for _ in range(draw.draw(st.integers(0, 6))):
        at = draw.draw(st.integers(0, min(len(data), 600) - 1))
        data = data[:at] + draw.draw(st.binary(min_size=1, max_size=4)) + data[at + 1 :]
    described(data[: draw.draw(st.integers(0, len(data)))])


@settings(deadline=None)
@given(
    st.sampled_from([b"", b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBP", b"\0\0\0\x18ftypavif", b"II*\0"])
)
def test_random_bytes_never_raise(start):
    rng = np.random.default_rng(len(start))
    for length in (0, 1, 7, 40, 300):
        described(start + rng.bytes(length))


def test_a_damaged_exif_leaves_the_rest():
    data = encoded(PICTURE, "JPEG", quality=77, comment=b"c", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    found = described(data)
    assert (found["quality"], found["comment"], found["camera"], found["orientation"]) == (77, 1, 0, 1)
