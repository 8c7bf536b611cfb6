"""What happens to an image on its way through the web, for augmentation and robustness tests.

Every function takes a decoded image, RGB or RGBA, and gives one of the same mode. Colours
change alone; transparency is kept, as the background is chosen later, by the preprocessing.
NumPy and Pillow only.
"""

import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import numpy as np
from PIL import Image

from ensemble.core.preprocess_config import FILTERS

if TYPE_CHECKING:
    from ensemble.core.recipe import Augment  # what only looks at images needs no recipe

P = ParamSpec("P")

MIN_SIDE = 32  # pixels of the shorter side that no resize and no crop goes below
MAX_RESIZED_PIXELS = 50_000_000  # pixels of an image that a resize enlarged
JPEG_SIDE, WEBP_SIDE = 65_500, 16_383  # the longest that the formats hold; longer images stay as they are
SUBSAMPLINGS = (0, 2)  # 4:4:4 and 4:2:0
FAST_WEBP = 2  # half the time of libwebp's default 4, and within 3 % of its error
SMOOTH_FILTERS = FILTERS[1:]  # photographs are not resized by "nearest"
BLUR_ROWS = 32  # rows blurred at a time, so that they stay in the processor's cache


def _on_colours(
    change: Callable[Concatenate[Image.Image, P], Image.Image],
) -> Callable[Concatenate[Image.Image, P], Image.Image]:
    """A change of RGB images as one of RGBA too, whose alpha it keeps."""

    @functools.wraps(change)
    def changed(image: Image.Image, /, *args: P.args, **kwargs: P.kwargs) -> Image.Image:
        if image.mode != "RGBA":
            return change(image, *args, **kwargs)
        colours = change(image.convert("RGB"), *args, **kwargs)
        colours.putalpha(image.getchannel("A"))
        return colours

    return changed


def _stored(image: Image.Image, file_format: str, **options: Any) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    read = Image.open(buffer, formats=(file_format,))
    read.load()
    return read


@_on_colours
def jpeg(image: Image.Image, quality: int, subsampling: int = 2) -> Image.Image:
    """An image after one JPEG compression.

    quality: 1..100. subsampling: 0 for 4:4:4, 1 for 4:2:2, 2 for 4:2:0.
    """
    if max(image.size) > JPEG_SIDE:
        return image
    return _stored(image, "JPEG", quality=quality, subsampling=subsampling, comment=b"")


@_on_colours
def webp(image: Image.Image, quality: int, method: int = 4) -> Image.Image:
    """An image after one lossy WebP compression.

    quality: 1..100. method: 0..6, the encoder's effort; 4 is libwebp's default.
    """
    if max(image.size) > WEBP_SIDE:
        return image
    return _stored(image, "WEBP", quality=quality, method=method)


@_on_colours
def blur(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur, cut off at three sigma; beyond the edge its pixels go on.

    sigma: in pixels, 0 or more. Within one level of the exact values; Pillow's GaussianBlur, made of
    boxes, is up to 20 off where sigma is small and near edges, and slower up to a sigma of about 3.
    """
    sigma = max(sigma, 0.1)  # the neighbours' weight is 0 in float32
    reach = math.ceil(3 * sigma)
    taps = np.exp(-0.5 * (np.arange(reach + 1) / sigma) ** 2)
    taps = (taps / (2 * taps.sum() - taps[0])).astype(np.float32)
    pixels = np.asarray(image)
    height, width, bands = pixels.shape
    padded = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge").reshape(height + 2 * reach, -1)
    blurred = np.empty((height, width * bands), dtype=np.uint8)
    for top in range(0, height, BLUR_ROWS):
        block = padded[top : top + BLUR_ROWS + 2 * reach].astype(np.float32)
        down = _weighted(block, taps, 1)
        blurred[top : top + BLUR_ROWS] = _weighted(down.T, taps, bands).T + np.float32(0.5)
    return Image.fromarray(blurred.reshape(pixels.shape))


def _weighted(values: np.ndarray, taps: np.ndarray, step: int) -> np.ndarray:
    """float32 [N + 2 R step, M] -> [N, M]: along the first axis, the symmetric filter taps [R + 1] every `step`."""
    reach = len(taps) - 1
    length = len(values) - 2 * reach * step
    middle = values[reach * step : reach * step + length]
    total, pair = middle * taps[0], np.empty_like(middle)
    for distance in range(1, reach + 1):
        before, after = (reach - distance) * step, (reach + distance) * step
        np.add(values[before : before + length], values[after : after + length], out=pair)
        pair *= taps[distance]
        total += pair
    return total


@_on_colours
def noise(image: Image.Image, sigma: float, seed: int) -> Image.Image:
    """Gaussian noise added to every value, which then is rounded and clipped.

    sigma: as a share of the range 0..1. The noise is drawn from 65,536 quantiles, which
    takes a fifth of the time of drawing normal numbers.
    """
    pixels = np.asarray(image)
    steps = np.rint(_normal_quantiles() * (255 * sigma)).astype(np.int16)
    values = steps.take(np.random.default_rng(seed).integers(0, len(steps), pixels.shape, dtype=np.uint16))
    values += pixels
    return Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8))


@functools.cache
def _normal_quantiles() -> np.ndarray:
    """float32 [65536]: the standard normal distribution at evenly spaced probabilities."""
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)
    quantiles.flags.writeable = False
    return quantiles


def resize(image: Image.Image, scale: float, filter_name: str) -> Image.Image:
    """An image with both sides multiplied by `scale`; it stays at its new size.

    The shorter side is not reduced below MIN_SIDE, nor the image enlarged beyond MAX_RESIZED_PIXELS.
    """
    scale = max(scale, min(1.0, MIN_SIDE / min(image.size)))
    scale = min(scale, max(1.0, math.sqrt(MAX_RESIZED_PIXELS / (image.width * image.height))))
    return image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling[filter_name.upper()]
    )


def crop(image: Image.Image, scale: float, y: float, x: float) -> Image.Image:
    """The share `scale` of each side, at (y, x) in [0, 1] of the free space; no side is cut below MIN_SIDE."""
    width, height = (max(round(side * scale), min(side, MIN_SIDE)) for side in image.size)
    return crop_at(image, width, height, y, x)


def crop_at(image: Image.Image, width: int, height: int, y: float, x: float) -> Image.Image:
    """`width` by `height` pixels, or what there is of them, at (y, x) in [0, 1] of the free space."""
    width, height = min(width, image.width), min(height, image.height)
    left, top = round((image.width - width) * x), round((image.height - height) * y)
    return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class Degradation:
    """A degradation with all it needs already drawn. scale: what becomes of the length of a side."""

    name: str
    apply: Callable[[Image.Image], Image.Image]
    scale: float = 1.0


def draw_degradations(augment: "Augment", rng: np.random.Generator) -> list[Degradation]:
    """The random degradations of one image, in order; none but to a share `augment.chance` of images.

    Without replacement, any number within `augment.chain` (as far as so many are enabled) and
    any value within a range being equally likely. No label and no pixel enters.
    """
    names = augment.degradations
    if not names or rng.random() >= augment.chance:
        return []
    fewest, most = (min(bound, len(names)) for bound in augment.chain)
    count = int(rng.integers(fewest, most + 1))
    return [_drawn(str(name), getattr(augment, name), rng) for name in rng.permutation(names)[:count]]


def _drawn(name: str, limits: tuple[float, float], rng: np.random.Generator) -> Degradation:
    low, high = limits
    value = int(rng.integers(int(low), int(high) + 1)) if name in ("jpeg", "webp") else float(rng.uniform(low, high))
    bound: Callable[[Image.Image], Image.Image]
    match name:
        case "jpeg":
            bound = functools.partial(jpeg, quality=int(value), subsampling=int(rng.choice(SUBSAMPLINGS)))
        case "webp":
            bound = functools.partial(webp, quality=int(value), method=FAST_WEBP)
        case "blur":
            bound = functools.partial(blur, sigma=value)
        case "noise":
            bound = functools.partial(noise, sigma=value, seed=int(rng.integers(2**32)))
        case "resize":
            bound = functools.partial(resize, scale=value, filter_name=str(rng.choice(SMOOTH_FILTERS)))
        case _:
            bound = functools.partial(crop, scale=value, y=float(rng.random()), x=float(rng.random()))
    return Degradation(name, bound, value if name in ("resize", "crop") else 1.0)


def random_flip(pixels: np.ndarray, augment: "Augment", rng: np.random.Generator) -> np.ndarray:
    """uint8 [K, S, S, 3] after a random flip and quarter turns; every view turns alike."""
    if augment.flip and rng.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    if augment.quarter_turns:
        pixels = np.rot90(pixels, int(rng.integers(4)), axes=(1, 2))
    return np.ascontiguousarray(pixels)
