"""The canonical form: both classes stored alike, so that only the pictures differ.

Metadata goes; every image becomes a crop of one size at a random place, so that no class
is rescaled and the 8x8 grids of earlier JPEG compression fall anywhere; images without a
JPEG history get one as the others have; all end with one more compression, drawn alike.
What an earlier, stronger compression did to one class alone cannot be undone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ensemble.core import artifacts
from ensemble.core.errors import DataError, ImageError
from ensemble.images.decode import decode, format_name
from ensemble.images.degradations import SUBSAMPLINGS, jpeg
from ensemble.images.preprocess import flatten

MAX_LEFT_OUT_SHARE = 0.05  # share of a class that may be too small for the common crop
JPEG_FORMATS = ("JPEG", "MPO")  # formats whose files have a JPEG history
GRID_JITTER = 7  # pixels every image can spare, for a random place on the 8x8 grid
MIN_SIZE = 32  # pixels of a canonical image
MAX_FIRST = 100  # of a plan's `first`, where each pair is about as common as in the data
WHITE = (255, 255, 255)
RNG_STREAM = 3  # of random draws, apart from those of augmentation


@dataclass(frozen=True)
class CanonicalPlan:
    """How every image is made canonical.

    size: side of the crop in pixels. first: (quality, subsampling) of JPEGs seen in the
    data, which images without a JPEG history draw from; empty if there were none. quality:
    lowest and highest of the last compression.
    """

    size: int
    first: tuple[tuple[int, int], ...]
    quality: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "CanonicalPlan":
        """From `to_dict`."""
        low, high = values["quality"]
        return CanonicalPlan(values["size"], tuple((q, sampling) for q, sampling in values["first"]), (low, high))


def read_plan(path: Path) -> CanonicalPlan | None:
    """The plan in a canonical.json, None where there is no such file."""
    if not path.exists():
        return None
    return CanonicalPlan.from_dict(artifacts.read_json(path, "remove it and run train-all again")["plan"])


def make_plan(
    headers: pd.DataFrame,
    labels: np.ndarray,
    size: int | None = None,
    quality: tuple[int, int] | None = None,
    left_out: float = MAX_LEFT_OUT_SHARE,
) -> CanonicalPlan:
    """A plan from the headers of both classes.

    The size is the largest multiple of 8 that all but `left_out` of either class can spare a
    random place for. The last quality lies within ten below the lower of the classes'
    median qualities, so that it covers what came before, but between 50 and 95.
    """
    short = headers[["width", "height"]].to_numpy().min(axis=1)
    if size is None:
        least = min(float(np.quantile(short[labels == label], left_out, method="lower")) for label in (0, 1))
        size = int(least - GRID_JITTER) // 8 * 8
    if size < MIN_SIZE:
        raise DataError(
            f"images are too small for a common crop of {MIN_SIZE} pixels; the smallest side is {short.min():g}; "
            f"remove what is below {MIN_SIZE + GRID_JITTER}"
        )
    stored = (headers["quality"] > 0).to_numpy()
    if quality is None:
        medians = [headers.loc[stored & (labels == label), "quality"].median() for label in (0, 1)]
        known = [float(value) for value in medians if value == value]
        high = int(np.clip(min(known, default=95.0), 60, 95))
        quality = (high - 10, high)
    jpegs = headers.loc[stored, ["quality", "sampling"]].itertuples(index=False, name=None)
    pairs = sorted((int(value), int(text) if text in ("0", "1", "2") else 2) for value, text in jpegs)
    step = max(len(pairs) / MAX_FIRST, 1)
    return CanonicalPlan(size, tuple(pairs[int(i * step)] for i in range(min(len(pairs), MAX_FIRST))), quality)


def canonical(image: Image.Image, was_jpeg: bool, plan: CanonicalPlan, rng: np.random.Generator) -> Image.Image:
    """An image in canonical form: RGB, plan.size square, before its last compression is stored.

    was_jpeg: whether the file was a JPEG. Raises ImageError for an image too small for the plan.
    """
    rgb = flatten(image, WHITE)
    if min(rgb.size) < plan.size:
        raise ImageError(f"{rgb.width}x{rgb.height} is smaller than the common crop of {plan.size}")
    if plan.first and not was_jpeg:
        rgb = jpeg(rgb, *plan.first[int(rng.integers(len(plan.first)))])
    left, top = (int(rng.integers(side - plan.size + 1)) for side in rgb.size)
    crop = rgb.crop((left, top, left + plan.size, top + plan.size))
    crop.info.clear()  # Pillow would write a comment again
    return crop


def last_compression(plan: CanonicalPlan, rng: np.random.Generator) -> tuple[int, int]:
    """(quality, subsampling) of the last JPEG compression, drawn alike for both classes."""
    return int(rng.integers(plan.quality[0], plan.quality[1] + 1)), int(rng.choice(SUBSAMPLINGS))


def read_canonical(file: Path, plan: CanonicalPlan, seed: Sequence[int]) -> Image.Image:
    """An image file as it would be read back from its canonical form; `seed` decides what is drawn."""
    rng = np.random.default_rng([*seed, RNG_STREAM])  # not the draws of what comes after
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ImageError(f"{file}: {error.strerror}") from None
    image = decode(data, name=str(file))
    return jpeg(canonical(image, format_name(data) in JPEG_FORMATS, plan, rng), *last_compression(plan, rng))
