"""RGB image -> the pixels of a member: executes a `PreprocessConfig`. The only resize and crop code.

Training, validation, export and serving all come through here, so that a member always sees an image as it did in
training. NumPy and Pillow only.
"""

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from ensemble.core.errors import ImageError
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.images.decode import LARGE_IMAGE, MAX_PIXELS


def to_pixels(
    image: Image.Image, config: PreprocessConfig, offsets: Sequence[tuple[float, float]] | None = None
) -> np.ndarray:
    """A decoded image's views: uint8 [K, size, size, 3], RGB in 0..255.

    K is `config.count` (1 but for native_crops). `offsets`, for random crops in training,
    are (y, x) in [0, 1], the share of the free space above and left of each crop; K is then
    their number. The crop of the centre is (0.5, 0.5). `squash` has no free space and
    ignores the values.
    """
    rgb = _resize(flatten(image, config.background), _scaled_size(image.size, config), config.filter)
    return _crops(rgb, config.size, crop_offsets(config.count) if offsets is None else offsets)


def prepare(image: Image.Image, configs: Collection[PreprocessConfig]) -> dict[tuple[Any, ...], np.ndarray]:
    """The pixels of each config by its `view`, each as `to_pixels` gives them, with no step done twice.

    Configs that come to the same steps for this image share one array.
    """
    opaque = image.mode != "RGBA"

    @cache
    def flattened(background: tuple[int, int, int] | None) -> Image.Image:
        return image if background is None else flatten(image, background)

    @cache
    def scaled(background: tuple[int, int, int] | None, size: tuple[int, int], filter_name: str | None) -> Image.Image:
        return flattened(background) if filter_name is None else _resize(flattened(background), size, filter_name)

    @cache
    def views(step: tuple[Any, ...], size: int, count: int) -> np.ndarray:
        return _crops(scaled(*step), size, crop_offsets(count))

    prepared = {}
    for config in configs:
        size = _scaled_size(image.size, config)
        step = (None if opaque else config.background, size, None if size == image.size else config.filter)
        prepared[config.view] = views(step, config.size, config.count)
    return prepared


def view_boxes(size: tuple[int, int], config: PreprocessConfig) -> list[tuple[float, float, float, float]]:
    """The box of each view of `to_pixels` in an image of (width, height): left, top, right, bottom in its pixels.

    Where the image is smaller than its crop, the box is larger than the image, which is reflected there.
    """
    width, height = size
    if config.geometry == "squash":
        return [(0, 0, width, height)]
    scale = 1.0
    if config.geometry == "center_crop":
        scale = min(size) / config.short_side
    boxes = []
    for y, x in crop_offsets(config.count):
        left, top = (
            _crop_start(round(side / scale), config.size, at) * scale for side, at in ((width, x), (height, y))
        )
        boxes.append((left, top, left + config.size * scale, top + config.size * scale))
    return boxes


def crop_offsets(count: int) -> list[tuple[float, float]]:
    """The fixed offsets of `count` crops, as (y, x) shares of the free space.

    1: the centre; 4, 9, 16: an even grid from corner to corner; 5: the corners and the centre.
    """
    if count == 5:
        return [*crop_offsets(4), (0.5, 0.5)]
    side = round(count**0.5)
    steps = [0.5] if side == 1 else [i / (side - 1) for i in range(side)]
    return [(y, x) for y in steps for x in steps]


def flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A decoded image as RGB, composited over `background` (RGB in 0..255) where it is transparent."""
    if image.mode != "RGBA":
        return image
    canvas = Image.new("RGB", image.size)
    rows = max(1, LARGE_IMAGE // image.width)  # at a time: the steps hold three more copies of the pixels
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        composite = Image.alpha_composite(Image.new("RGBA", part.size, (*background, 255)), part)
        canvas.paste(composite.convert("RGB"), (0, top))
    return canvas


def _scaled_size(size: tuple[int, int], config: PreprocessConfig) -> tuple[int, int]:
    """Width and height after the resize, before the crop."""
    if config.geometry == "squash":
        return config.size, config.size
    if config.geometry == "native_crops":
        return size
    # torchvision's rounding (int of the longer side), which timm's evaluation transform uses
    (width, height), short = size, config.short_side
    scaled = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise ImageError(f"an image of {width}x{height} is too thin to be resized to {scaled[0]}x{scaled[1]}")
    return scaled


def _crop_start(side: int, size: int, share: float) -> int:
    """First pixel of a crop of `size` along a side; below 0 if the side is smaller."""
    return round((side - size) * share) if side >= size else -((size - side) // 2)


def _resize(image: Image.Image, size: tuple[int, int], filter_name: str) -> Image.Image:
    return image if size == image.size else image.resize(size, Image.Resampling[filter_name.upper()])


def _crops(image: Image.Image, size: int, offsets: Sequence[tuple[float, float]]) -> np.ndarray:
    """uint8 [K, size, size, 3], a crop at each offset."""
    return np.stack([_crop(image, size, y, x) for y, x in offsets])


def _crop(image: Image.Image, size: int, y: float, x: float) -> np.ndarray:
    """uint8 [size, size, 3] at a share (y, x) of the free space; a smaller image is padded by reflection."""
    # round() halves to even, as torchvision's CenterCrop does
    top, left = round(max(image.height - size, 0) * y), round(max(image.width - size, 0) * x)
    box = (left, top, min(left + size, image.width), min(top + size, image.height))
    pixels = np.asarray(image.crop(box))
    down, right = size - pixels.shape[0], size - pixels.shape[1]
    if down or right:
        pad = ((down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0))
        pixels = np.pad(pixels, pad, mode="reflect")
    return pixels
