"""Which images are the same picture: exact copies and near-duplicates share a group.

A perceptual hash proposes pairs, a comparison of small thumbnails confirms them, so that
unrelated pictures with equal hashes (skies, blank pages) do not chain together.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

THUMBNAIL = 32  # side of the thumbnail that is compared, in pixels
MAX_DISTANCE = 6  # of 64 hash bits, for a pair to be proposed
MAX_DIFFERENCE = 8.0  # mean absolute difference of two thumbnails, in 0..255, to confirm it
MIN_CORRELATION = 0.95  # of their grey values, which a shared brightness alone does not give


def _dct_matrix(size: int) -> np.ndarray:
    positions = (np.arange(size) + 0.5) * np.pi / size
    return np.cos(np.arange(size)[:, None] * positions[None, :])


_DCT = _dct_matrix(32)[:8]


def thumbnail(image: Image.Image) -> np.ndarray:
    """uint8 [32, 32, 3] of a decoded image, for `near_duplicates`."""
    return np.asarray(image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, reducing_gap=2.0))


def perceptual_hash(thumb: np.ndarray) -> int:
    """64-bit hash of a thumbnail: the signs of its 8x8 lowest DCT frequencies about their median.

    The pHash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash
    Functions" (2010). Near-duplicates differ in few bits.
    """
    grey = thumb.astype(np.float64) @ (0.299, 0.587, 0.114)
    low = (_DCT @ grey @ _DCT.T).ravel()
    bits = np.round(low, 6) > np.median(np.round(low[1:], 6))
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_duplicates(hashes: Sequence[int], thumbs: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of images that show the same picture.

    hashes: N values of `perceptual_hash`. thumbs: uint8 [N, 32, 32, 3].
    """
    values = np.array(hashes, dtype=np.uint64)
    pairs = []
    for i in range(len(values) - 1):
        distances = np.bitwise_count(values[i + 1 :] ^ values[i])
        candidates = np.flatnonzero(distances <= MAX_DISTANCE) + i + 1
        pairs += [(i, int(j)) for j in candidates if same_picture(thumbs[i], thumbs[j])]
    return pairs


def same_picture(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two thumbnails, uint8 [32, 32, 3], are of one picture."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    if np.abs(x - y).mean() > MAX_DIFFERENCE:
        return False
    x, y = x.mean(axis=2) - x.mean(), y.mean(axis=2) - y.mean()
    norm = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return norm > 0 and float((x * y).sum()) / norm >= MIN_CORRELATION


def connected(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` items the smallest index of its connected component."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        a, b = sorted((root(a), root(b)))
        parent[b] = a
    return [root(i) for i in range(count)]
