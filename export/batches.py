"""What every runtime does with a pile of images: batches, the last one filled up where a shape is fixed."""

from collections.abc import Callable

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]  # uint8 [N, S, S, 3] -> float32 [N]


def padded(pixels: np.ndarray, batch: int) -> np.ndarray:
    """1 to `batch` images as a contiguous array of just `batch`, its last image repeated."""
    missing = batch - len(pixels)
    return np.ascontiguousarray(np.concatenate([pixels, pixels[-1:].repeat(missing, axis=0)]) if missing else pixels)
