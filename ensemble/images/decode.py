"""File or bytes -> RGB -> the contract's pixels. The only resize, crop and orientation code.

Training, validation, export and serving all come through here, so that a member always
sees an image the way it was trained on it. NumPy and Pillow only.
"""

import io
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from ensemble.core.errors import DataError, ImageError
from ensemble.core.preprocess_config import PreprocessConfig

# Decoders that read pixels and nothing else (Pillow's EPS runs Ghostscript, for one).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
MAX_PIXELS = 178_956_970  # Pillow's own hard limit: 512 MiB of RGB
MAX_BYTES = 8 * MAX_PIXELS  # of a file: 16-bit RGBA as it is
LARGE = 40_000_000  # pixels, or bytes of a file: beyond it, threads wait for each other's memory
MAX_SCANNED = 100 * MAX_PIXELS  # pixels times scans of a progressive JPEG, whose empty scans cost time and few bytes

# How to turn an image whose EXIF orientation is not 1.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Stored(Protocol):
    """Encoded bytes that lie elsewhere, such as in an archive or an object store."""

    @property
    def size(self) -> int:
        """How many."""
        ...

    def read(self) -> bytes:
        """All of them."""
        ...


Source = Path | bytes | Stored  # of one encoded image


def decode(source: Source, name: str | None = None, large: Callable[[], object] = lambda: None) -> Image.Image:
    """Decode an image to mode RGB, or RGBA if it has transparency, upright by its EXIF.

    The first frame of an animation is taken. 16-bit grey is scaled to 8 bits. Raises
    ImageError, naming `name` or the path, for a file that is missing, empty, truncated, not
    an image, larger than MAX_PIXELS, or of floating-point pixels.

    `large` is called once, before memory is taken, where the image or its file is LARGE;
    threads can wait in it for each other:

        with ExitStack() as held:
            image = decode(file, large=lambda: held.enter_context(lock))
            ...  # the lock is held until nobody needs the image
    """
    name = name or (str(source) if isinstance(source, Path) else "image")
    try:
        size = _size(source, name)
        if size > LARGE:
            large()
        data = _data(source)
        if not data:
            raise ImageError(f"{name}: the file is empty")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if _checked_pixels(image, data, name) > LARGE >= size:
                large()
            image.load()
            return _to_rgb(_upright(image), name)
    except (DataError, MemoryError):  # an ImageError, or where it is stored cannot be read at all
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: over {MAX_PIXELS} pixels, refused as a decompression bomb") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image in a known format ({', '.join(FORMATS)})") from None
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise ImageError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from None


def _size(source: Source, name: str) -> int:
    """Bytes of what can be read as a whole."""
    if isinstance(source, bytes):
        return len(source)
    if isinstance(source, Path):
        found = source.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a device read without end
            raise ImageError(f"{name}: not a file")
        size = found.st_size
    else:
        size = source.size
    if size > MAX_BYTES:
        raise ImageError(f"{name}: {size} bytes, more than {MAX_PIXELS} pixels need")
    return size


def _data(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    return source.read_bytes() if isinstance(source, Path) else source.read()


def _checked_pixels(image: Image.Image, data: bytes, name: str) -> int:
    """Pixels that decoding will take memory for, known from the header; ImageError for too many of them."""
    claim, pixels = f"{image.width}x{image.height}", image.width * image.height
    if isinstance(image, TiffImagePlugin.TiffImageFile) and TiffImagePlugin.TILEWIDTH in image.tag_v2:
        # tiles are decoded whole, and may be larger than their image
        width, height = (image.tag_v2[tag] for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
        claim, pixels = f"{claim} in tiles of {width}x{height}", max(pixels, width * height)
    if pixels > MAX_PIXELS:
        raise ImageError(f"{name}: {claim} is over {MAX_PIXELS} pixels")
    if image.info.get("progressive") and pixels * data.count(b"\xff\xda") > MAX_SCANNED:
        raise ImageError(f"{name}: a progressive JPEG of too many scans, refused as a decompression bomb")
    return pixels


def format_name(data: bytes) -> str:
    """The format of an encoded image by its header, such as "JPEG"; ImageError if unknown."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.format or "unknown"
    except Exception as error:
        raise ImageError(f"not an image: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        # Not ImageOps.exif_transpose: it also writes the EXIF anew, which other damaged tags prevent.
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Damaged EXIF beside intact pixels: shown unrotated, as viewers do.
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no fixed range; convert it to 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.array(image, dtype=np.int32)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: 32-bit pixels beyond 16 bits; convert it to 8 or 16 bits")
        values += 128
        values //= 257
        image = Image.fromarray(values.astype(np.uint8))
    mode = "RGBA" if image.has_transparency_data else "RGB"
    # what is in the mode already is detached from its file, where convert would hold the pixels twice
    return image._new(image.im) if image.mode == mode else image.convert(mode)


@contextmanager
def named(name: object) -> Iterator[None]:
    """An ImageError of the block begins with the image's name, as those of `decode` do."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None


def to_pixels(
    image: Image.Image,
    contract: PreprocessConfig,
    offsets: Sequence[tuple[float, float]] | None = None,
) -> np.ndarray:
    """Turn a decoded image into its views: uint8 [K, size, size, 3], RGB in 0..255.

    K is `contract.count` (1 but for native_crops). `offsets`, for random crops in training,
    are (y, x) in [0, 1], the share of the free space above and left of each crop; K is then
    their number. The crop of the centre is (0.5, 0.5). `squash` has no free space and
    ignores the values.
    """
    rgb = _resized(flatten(image, contract.background), _scaled_size(image.size, contract), contract.filter)
    return _views(rgb, contract.size, crop_offsets(contract.count) if offsets is None else offsets)


def prepare(image: Image.Image, contracts: Collection[PreprocessConfig]) -> dict[tuple[Any, ...], np.ndarray]:
    """Every contract's pixels by its `view`, each as `to_pixels` gives them, with no step done twice.

    Contracts that come to the same steps for this image share one array.
    """
    opaque = image.mode != "RGBA"

    @cache
    def laid_on(background: tuple[int, int, int] | None) -> Image.Image:
        return image if background is None else flatten(image, background)

    @cache
    def scaled(background: tuple[int, int, int] | None, size: tuple[int, int], filter_name: str | None) -> Image.Image:
        return laid_on(background) if filter_name is None else _resized(laid_on(background), size, filter_name)

    @cache
    def views(step: tuple[Any, ...], size: int, count: int) -> np.ndarray:
        return _views(scaled(*step), size, crop_offsets(count))

    prepared = {}
    for contract in contracts:
        size = _scaled_size(image.size, contract)
        step = (None if opaque else contract.background, size, None if size == image.size else contract.filter)
        prepared[contract.view] = views(step, contract.size, contract.count)
    return prepared


def view_boxes(size: tuple[int, int], contract: PreprocessConfig) -> list[tuple[float, float, float, float]]:
    """Where in an image of (width, height) each of `to_pixels`' views lies: left, top, right, bottom in its pixels.

    A view of a smaller image reaches beyond it, where it is reflected.
    """
    width, height = size
    if contract.geometry == "squash":
        return [(0, 0, width, height)]
    scale = 1.0
    if contract.geometry == "center_crop":
        scale = min(size) / contract.short_side
    boxes = []
    for y, x in crop_offsets(contract.count):
        left, top = (_start(round(side / scale), contract.size, at) * scale for side, at in ((width, x), (height, y)))
        boxes.append((left, top, left + contract.size * scale, top + contract.size * scale))
    return boxes


def _start(side: int, size: int, share: float) -> int:
    """Where a crop of `size` begins along a side, below 0 where the side is smaller."""
    return round((side - size) * share) if side >= size else -((size - side) // 2)


def crop_offsets(count: int) -> list[tuple[float, float]]:
    """The fixed places of `count` crops, as (y, x) shares of the free space.

    1: the centre; 4, 9, 16: an even grid from corner to corner; 5: the corners and the centre.
    """
    if count == 5:
        return [*crop_offsets(4), (0.5, 0.5)]
    side = round(count**0.5)
    steps = [0.5] if side == 1 else [i / (side - 1) for i in range(side)]
    return [(y, x) for y in steps for x in steps]


def flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A decoded image as RGB, what is transparent laid on `background`."""
    if image.mode != "RGBA":
        return image
    canvas = Image.new("RGB", image.size)
    rows = max(1, LARGE // image.width)  # at a time, as the steps hold the pixels three times more
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height)))
        laid = Image.alpha_composite(Image.new("RGBA", part.size, (*background, 255)), part)
        canvas.paste(laid.convert("RGB"), (0, top))
    return canvas


def _scaled_size(size: tuple[int, int], contract: PreprocessConfig) -> tuple[int, int]:
    """Width and height after the contract's resize, before its crop."""
    if contract.geometry == "squash":
        return contract.size, contract.size
    if contract.geometry == "native_crops":
        return size
    # torchvision's rounding (int of the longer side), which timm's evaluation transform uses
    (width, height), short = size, contract.short_side
    scaled = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise ImageError(f"an image of {width}x{height} is too thin to be resized to {scaled[0]}x{scaled[1]}")
    return scaled


def _resized(image: Image.Image, size: tuple[int, int], filter_name: str) -> Image.Image:
    return image if size == image.size else image.resize(size, Image.Resampling[filter_name.upper()])


def _views(image: Image.Image, size: int, places: Sequence[tuple[float, float]]) -> np.ndarray:
    """uint8 [K, size, size, 3], a crop at each place."""
    return np.stack([_crop(image, size, y, x) for y, x in places])


def _crop(image: Image.Image, size: int, y: float, x: float) -> np.ndarray:
    """uint8 [size, size, 3] at a share of the free space; smaller images are reflected first."""
    # round() halves to even, as torchvision's CenterCrop does
    top, left = round(max(image.height - size, 0) * y), round(max(image.width - size, 0) * x)
    box = (left, top, min(left + size, image.width), min(top + size, image.height))
    pixels = np.asarray(image.crop(box))
    down, right = size - pixels.shape[0], size - pixels.shape[1]
    if down or right:
        pad = ((down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0))
        pixels = np.pad(pixels, pad, mode="reflect")
    return pixels
