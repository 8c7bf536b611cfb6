"""Metadata of an image file: quantisation tables, chroma subsampling, EXIF, XMP, C2PA, the file's layout.

No detector reads it. The audit tests whether it alone tells the classes apart.
"""

import io
import struct
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin

from ensemble.images.decode import FORMATS

Header = dict[str, float | str]

# Annex K of ITU-T T.81, the luminance table that libjpeg scales by quality; in zigzag-free raster order.
_LUMINANCE = np.array(
    (
        "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
        "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"
    ).split(),
    dtype=np.float64,
)
_SCALES = np.array([5000 // q if q < 50 else 200 - 2 * q for q in range(1, 101)])  # libjpeg's jpeg_quality_scaling
_TABLES = np.clip((np.sort(_LUMINANCE) * _SCALES[:, None] + 50) // 100, 1, 255)
_CAMERA = {271: "make", 272: "model", 33434: "exposure", 37386: "focal", 34855: "iso", 34853: "gps"}
_GENERATORS = (
    *(b"stable diffusion", b"midjourney", b"dall-e", b"dall\xc2\xb7e", b"openai", b"firefly", b"comfyui", b"ksampler"),
    *(b"class_type", b"automatic1111", b"negative prompt", b"trainedalgorithmicmedia", b"invokeai", b"novelai"),
    *(b"imagen", b"flux.1"),
)


def read_header(data: bytes, width: int, height: int) -> Header:
    """Describe an encoded image, given its upright size in pixels; numbers and short texts.

    Damaged metadata counts as absent, though Pillow may warn of it. Keys are the same for
    every file.
    """
    found = _empty(data, width, height)
    chunks = list(_chunks(data))
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            found |= _of_pillow(image, _exif(image, data, chunks))
    except Exception:
        return found  # pixels were decoded elsewhere; this file keeps its header to itself
    texts = _payloads(data, chunks, ("tEXt", "iTXt", "zTXt"))
    keys = {text.partition(b"\0")[0].decode("latin-1")[:40] for text in texts}
    if _XMP_KEY in keys:  # Pillow sees it only before the pixels
        keys.remove(_XMP_KEY)
        found["xmp"] = 1.0
    found |= {"text": float(bool(keys)), "text_keys": ",".join(sorted(keys))[:80]}
    found["lossless"] = float(found["format"] in _LOSSLESS or any(name == "VP8L" for name, _, _ in chunks))
    found["segments"] = ">".join(dict.fromkeys(name for name, _, _ in chunks))[:80]
    found["trailing"] = float(_trailing(data, chunks))
    found["c2pa"] = float(any(b"jumb" in part or b"c2pa" in part for part in _payloads(data, chunks, _C2PA)))
    joined = b" ".join(_payloads(data, chunks, _TEXTS)).replace(b"\0", b"").lower()  # EXIF comments are UTF-16
    found["generator_text"] = float(any(word in joined for word in _GENERATORS))
    return found


def _empty(data: bytes, width: int, height: int) -> Header:
    return {
        "format": "unknown",
        "mode": "",
        "lossless": 0.0,
        "width": float(width),
        "height": float(height),
        "aspect": width / height,
        "bytes": float(len(data)),
        "bytes_per_pixel": len(data) / (width * height),
        "quality": -1.0,
        "tables": "none",
        "sampling": "none",
        "progressive": 0.0,
        "exif": 0.0,
        "camera": 0.0,
        "orientation": 1.0,
        "software": "",
        "xmp": 0.0,
        "icc": "none",
        "density": "",
        "text": 0.0,
        "text_keys": "",
        "generator_text": 0.0,
        "c2pa": 0.0,
        "comment": 0.0,
        "segments": "",
        "trailing": 0.0,
    }


def _exif(image: ImageFile.ImageFile, data: bytes, chunks: list[tuple[str, int, int]]) -> Image.Exif:
    if image.format != "PNG":
        return image.getexif()
    tags = Image.Exif()  # Pillow would decode the whole PNG first
    for raw in _payloads(data, chunks, ("eXIf",)):
        tags.load(raw)
    return tags


def _of_pillow(image: ImageFile.ImageFile, tags: Image.Exif) -> Header:
    info = image.info
    found: Header = {
        "format": image.format or "unknown",
        "mode": image.mode,
        "exif": float(bool(info.get("exif"))),
        "xmp": float(any(key in info for key in ("xmp", _XMP_KEY))),
        "icc": sha256(info["icc_profile"]).hexdigest()[:8] if info.get("icc_profile") else "none",
        "density": str(info.get("dpi") or info.get("jfif_density") or ""),
        "progressive": float(bool(info.get("progressive") or info.get("interlace"))),
        "comment": float(bool(info.get("comment"))),
    }
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        tables: Any = image.quantization
        found["tables"] = sha256(repr(sorted((k, list(v)) for k, v in tables.items())).encode()).hexdigest()[:8]
        found["quality"] = jpeg_quality(tables[min(tables)]) if tables else -1.0
        found["sampling"] = str(JpegImagePlugin.get_sampling(image))
    if len(tags):
        inner = dict(tags) | dict(tags.get_ifd(0x8769))
        camera = sum(tag in inner for tag in _CAMERA)
        found["camera"] = float(camera)
        # A TIFF's own fields are no EXIF.
        found["exif"] = float(image.format != "TIFF" or camera > 0 or 0x8769 in inner)
        found["orientation"] = float(tags.get(274, 1)) if isinstance(tags.get(274, 1), int) else 1.0
        found["software"] = str(tags.get(305, ""))[:40]
    return found


def jpeg_quality(table: list[int]) -> float:
    """The libjpeg quality, 1..100, whose luminance table lies nearest to this one (64 values, any order)."""
    return float(1 + np.abs(_TABLES - np.sort(np.asarray(table, dtype=np.float64))).sum(axis=1).argmin())


_XMP_KEY = "XML:com.adobe.xmp"
_LOSSLESS = ("PNG", "BMP", "TIFF", "PPM", "GIF")
_C2PA = ("APP11", "caBX", "C2PA", "jumb", "uuid")
_TEXTS = ("APP1", "APP11", "APP13", "COM", "tEXt", "iTXt", "zTXt", "eXIf", "caBX", "XMP ", "EXIF", "C2PA", "uuid")


def _payloads(data: bytes, chunks: list[tuple[str, int, int]], names: tuple[str, ...]) -> Iterator[bytes]:
    return (data[start:end][:65536] for name, start, end in chunks if name in names)


def _chunks(data: bytes) -> Iterator[tuple[str, int, int]]:
    """(name, start, end) of the payload of each segment, chunk or box, up to the pixels or 400 of them."""
    walk = _jpeg if data[:2] == b"\xff\xd8" else _png if data[:8] == b"\x89PNG\r\n\x1a\n" else None
    walk = walk or (_riff if data[:4] == b"RIFF" else _boxes if data[4:8] == b"ftyp" else None)
    if walk is not None:
        for count, chunk in enumerate(walk(data)):
            if count == 400:
                return
            yield chunk


def _jpeg(data: bytes) -> Iterator[tuple[str, int, int]]:
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        name = f"APP{marker - 0xE0}" if 0xE0 <= marker <= 0xEF else "COM" if marker == 0xFE else f"{marker:02X}"
        yield name, at + 4, at + 2 + length
        if marker == 0xDA:  # start of scan: the pixels
            return
        at += 2 + max(length, 2)


def _png(data: bytes) -> Iterator[tuple[str, int, int]]:
    at, last = 8, b""
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if name != b"IDAT" or last != name:  # pixels in thousands of parts count as one
            yield name.decode("latin-1"), at + 8, at + 8 + length
        at, last = at + 12 + length, name


def _riff(data: bytes) -> Iterator[tuple[str, int, int]]:
    at = 12
    while at + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        yield name.decode("latin-1"), at + 8, at + 8 + length
        at += 8 + length + length % 2


def _boxes(data: bytes) -> Iterator[tuple[str, int, int]]:
    at = 0
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        yield name.decode("latin-1"), at + 8, at + length
        at += length if length >= 8 else len(data)


def _trailing(data: bytes, chunks: list[tuple[str, int, int]]) -> bool:
    """Whether bytes follow the end of the image."""
    if data[:2] == b"\xff\xd8":
        return not data.rstrip(b"\0").endswith(b"\xff\xd9")
    if data[:4] == b"\x89PNG":
        return any(name == "IEND" and end + 4 < len(data) for name, _, end in chunks)
    return False
