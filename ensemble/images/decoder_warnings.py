"""What decoders say of damaged files, kept from a user's screen: files that cannot be read are listed anyway."""

import ctypes
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from PIL import _imaging


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """No warnings of Pillow's, which may be thousands for a file or errors by -W, and no messages of libtiff's.

    Around whatever starts the threads that decode: they share warning filters. libtiff stays quiet afterwards.
    """
    with suppress(OSError, AttributeError):  # where Pillow hides its libtiff, as on Windows
        decoders = ctypes.CDLL(_imaging.__file__)
        for handler in (decoders.TIFFSetErrorHandler, decoders.TIFFSetWarningHandler):
            handler(None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
