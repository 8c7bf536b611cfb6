"""Data sets with a known trap, and clean ones, made from real photographs: what an audit must find, and must not.

In a trapped set both classes come from the same photographs by the same draws, but for the trap. A class is
about 120 images of 96 to 192 pixels; a set takes about a second.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import planted_steps as steps
from PIL import Image
from planted_files import FORMAT, JPEG_QUALITY, METADATA, MIXED, NAMES, PNG, POLARITY, SIZE, WEBP
from planted_photos import photos
from planted_pixels import CONTENT, HIDDEN_JPEG, RESAMPLING
from planted_rows import DUPLICATES, SOURCE, UNREADABLE
from planted_set import Kind, Planted, Rng, Style, any_of, between, hex_name, write

__all__ = ["CLEAN", "KINDS", "make", "photos"]

KINDS: dict[str, Kind] = {
    "format": FORMAT,
    "size": SIZE,
    "jpeg_quality": JPEG_QUALITY,
    "metadata": METADATA,
    "names": NAMES,
    "hidden_jpeg": HIDDEN_JPEG,
    "resampling": RESAMPLING,
    "duplicates": DUPLICATES,
    "content": CONTENT,
    "source": SOURCE,
    "polarity": POLARITY,
    "unreadable": UNREADABLE,
}


def _any_name(serial: int, rng: Rng) -> str:
    return (f"IMG_{serial:04}", f"{serial:06}", hex_name(serial, rng))[int(rng.integers(3))]


def _alike(what: str, style: Style, ai: Style | None = None, table: bool = False) -> Planted:
    return Planted(what, ai or style, style, table=table)


ANY_QUALITY = Style(quality=(60, 98), subsampling=("4:2:0", "4:4:4"))

CLEAN = Kind(
    "nothing blocks; in the last two the pixels of ai differ, as they should",
    [
        _alike("JPEG 90, one size", Style(quality=(90, 90))),
        _alike("JPEG 60 to 98, both subsamplings", ANY_QUALITY),
        _alike("JPEG, PNG and WebP", Style(MIXED)),
        _alike("sizes and aspects", Style(sizes=between(96, 176))),
        _alike("EXIF and ICC on half", Style(metadata=("camera", "icc"), carry=0.5)),
        _alike("PNG, half of them were JPEG", Style(PNG, steps=[steps.sometimes(0.5, steps.jpeg_before(60, 90))])),
        _alike("WebP, names of three patterns", Style(WEBP, name=_any_name)),
        _alike(
            "a CSV with groups and sources, two sizes, names of a camera",
            Style(sizes=any_of((128, 128), (144, 108)), name=lambda serial, rng: f"DSC{serial:05}"),
            table=True,
        ),
        _alike(
            "ai super-resolved, JPEG 60 to 98",
            ANY_QUALITY,
            Style(quality=(60, 98), subsampling=("4:2:0", "4:4:4"), steps=[steps.super_resolved]),
            table=True,
        ),
        _alike(
            "ai denoised and sharpened, JPEG and PNG, sizes",
            Style(("jpeg", "png"), sizes=between(96, 160)),
            Style(("jpeg", "png"), sizes=between(96, 160), steps=[steps.denoised, steps.sharpened]),
        ),
    ],
)


def make(kind: str, variant: int, folder: Path, photos: Sequence[Image.Image], seed: int) -> Path:
    """Write variant 0 to 9 of a kind, or of "clean", below `folder`; the same seed writes the same bytes.

    photos: RGB images, at least 200 pixels a side. Returns what to give to an audit: a folder with ai/ and
    real/, or a CSV of id, path, label (ai or real), group, source, generator.
    """
    planted = (CLEAN if kind == "clean" else KINDS[kind]).variants[variant]
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), variant])
    return write(planted, folder / f"{kind}-{variant}", photos, rng)
