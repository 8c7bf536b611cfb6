"""File or bytes -> upright RGB image, within limits on size and memory.

What a stranger's file can hold is refused here: other decoders than the listed ones, decompression bombs, pipes
and devices. NumPy and Pillow only.
"""

import ctypes
import io
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, _imaging

from ensemble.core.errors import DataError, ImageError

# Decoders that read pixels and nothing else (Pillow's EPS runs Ghostscript, for one).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
MAX_PIXELS = 178_956_970  # Pillow's own hard limit: 512 MiB of RGB
MAX_BYTES = 8 * MAX_PIXELS  # of a file: 16-bit RGBA as it is
LARGE_IMAGE = 40_000_000  # pixels, or bytes of a file: beyond it, threads wait for each other's memory
MAX_SCANNED_PIXELS = 100 * MAX_PIXELS  # times scans, of a progressive JPEG: empty scans cost time and few bytes

# EXIF orientation (1: upright) -> what turns the image upright
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class StoredBytes(Protocol):
    """An encoded image in an archive or an object store."""

    @property
    def size(self) -> int:
        """Length in bytes."""
        ...

    def read(self) -> bytes:
        """The whole file."""
        ...


ImageSource = Path | bytes | StoredBytes  # where one encoded image is read from


def decode(source: ImageSource, name: str | None = None, large: Callable[[], object] = lambda: None) -> Image.Image:
    """Decode an image to mode RGB, or RGBA if it has transparency, upright by its EXIF.

    The first frame of an animation is taken. 16-bit grey is scaled to 8 bits. Raises
    ImageError, naming `name` or the path, for a file that is missing, empty, truncated, not
    an image, larger than MAX_PIXELS, or of floating-point pixels.

    `large` is called once, before memory is taken, if the image or its file is larger than LARGE_IMAGE;
    threads can wait for each other in it:

        with ExitStack() as held:
            image = decode(file, large=lambda: held.enter_context(lock))
            ...  # the lock is held until nobody needs the image
    """
    name = name or (str(source) if isinstance(source, Path) else "image")
    try:
        size = _size(source, name)
        if size > LARGE_IMAGE:
            large()
        stored = source.read_bytes() if isinstance(source, Path) else source
        data = stored if isinstance(stored, bytes) else stored.read()
        if not data:
            raise ImageError(f"{name}: the file is empty")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if _checked_pixels(image, data, name) > LARGE_IMAGE >= size:
                large()
            image.load()
            return _to_rgb(_upright(image), name)
    except (DataError, MemoryError):  # an ImageError, or its storage cannot be read at all
        raise
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: over {MAX_PIXELS} pixels, refused as a decompression bomb") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image in a known format ({', '.join(FORMATS)})") from None
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except Exception as error:  # decoders raise anything from SyntaxError to struct.error
        raise ImageError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from None


def _size(source: ImageSource, name: str) -> int:
    """Length in bytes; ImageError if it is too long to be read as a whole."""
    if isinstance(source, bytes):
        return len(source)
    if isinstance(source, Path):
        info = source.stat()
        if not stat.S_ISREG(info.st_mode):  # reading a pipe may wait forever, a device may have no end
            raise ImageError(f"{name}: not a file")
        size = info.st_size
    else:
        size = source.size
    if size > MAX_BYTES:
        raise ImageError(f"{name}: {size} bytes, more than {MAX_PIXELS} pixels need")
    return size


def _checked_pixels(image: Image.Image, data: bytes, name: str) -> int:
    """Pixels that decoding will take memory for, by the header; ImageError if they are too many."""
    shape, pixels = f"{image.width}x{image.height}", image.width * image.height
    if isinstance(image, TiffImagePlugin.TiffImageFile) and TiffImagePlugin.TILEWIDTH in image.tag_v2:
        # tiles are decoded whole, and may be larger than their image
        width, height = (image.tag_v2[tag] for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
        shape, pixels = f"{shape} in tiles of {width}x{height}", max(pixels, width * height)
    if pixels > MAX_PIXELS:
        raise ImageError(f"{name}: {shape} is over {MAX_PIXELS} pixels")
    if image.info.get("progressive") and pixels * data.count(b"\xff\xda") > MAX_SCANNED_PIXELS:
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
        transpose = _TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Damaged EXIF beside intact pixels: shown unrotated, as viewers do.
        return image
    return image if transpose is None else image.transpose(transpose)


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
def errors_with_name(name: object) -> Iterator[None]:
    """Put the image's name before the message of an ImageError of the block, as `decode` does."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None


@contextmanager
def silence_decoder_warnings() -> Iterator[None]:
    """Silence the warnings of Pillow (a damaged file may give thousands; -W makes them errors) and of libtiff.

    Files that cannot be read are listed anyway. Enter it before the threads that decode start: they share warning
    filters. libtiff stays silent afterwards.
    """
    with suppress(OSError, AttributeError):  # Pillow hides its libtiff, as on Windows
        decoders = ctypes.CDLL(_imaging.__file__)
        for handler in (decoders.TIFFSetErrorHandler, decoders.TIFFSetWarningHandler):
            handler(None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
