"""Which images are the same picture: exact copies and near-duplicates share a group."""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from PIL import Image

from ensemble import near

THUMBNAIL = 32  # side of the thumbnail that is compared, in pixels
LARGE_GROUP = 64  # images; in larger groups what is joined is not compared again


def _dct_matrix(size: int) -> np.ndarray:
    positions = (np.arange(size) + 0.5) * np.pi / size
    return np.cos(np.arange(size)[:, None] * positions[None, :])


_DCT = _dct_matrix(THUMBNAIL)[:8]


def thumbnail(image: Image.Image) -> np.ndarray:
    """uint8 [32, 32, 3] of a decoded image, for `near_duplicates`."""
    return np.asarray(image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX, reducing_gap=2.0))


def perceptual_hash(thumb: np.ndarray) -> int:
    """64-bit hash of a thumbnail: the signs of its 8x8 lowest DCT frequencies about their median.

    The pHash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash
    Functions" (2010). Near-duplicates differ in few bits, unless they are turned or cropped.
    """
    grey = thumb.astype(np.float64) @ (0.299, 0.587, 0.114)
    low = (_DCT @ grey @ _DCT.T).ravel()
    bits = np.round(low, 6) > np.median(np.round(low[1:], 6))
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_duplicates(hashes: Sequence[int], thumbs: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of images that show the same picture.

    Also when one is mirrored, turned by quarter turns, recompressed, resized, or has lost up to
    a tenth at its sides. A group of more than 64 is joined, but not each pair in it listed.
    hashes: N values of `perceptual_hash`; beside the thumbnails they tell equal ones. Changed
    ones lie too far apart in them, so `near` compares the thumbnails, uint8 [N, 32, 32, 3],
    which may lie on disk.
    """
    copies = _copies(hashes, thumbs)
    described = near.describe(thumbs, np.array(list(copies), dtype=np.int64))
    found = _Groups(len(copies))
    pairs = {(first, other) for first, same in copies.items() for other in same[1:]}
    for a, b in near.matches(described, described, lambda image, other: found.needed(image, other)):
        found.add(a, b)
        pairs |= {(min(pair), max(pair)) for pair in _with_copies(copies, described.rows[a], copies, described.rows[b])}
    return sorted(pairs)


def near_duplicates_between(
    hashes_a: Sequence[int], thumbs_a: np.ndarray, hashes_b: Sequence[int], thumbs_b: np.ndarray
) -> list[tuple[int, int]]:
    """Pairs (index in a, index in b) of images that show the same picture, as `near_duplicates` finds them."""
    copies_a, copies_b = _copies(hashes_a, thumbs_a), _copies(hashes_b, thumbs_b)
    a = near.describe(thumbs_a, np.array(list(copies_a), dtype=np.int64))
    b = near.describe(thumbs_b, np.array(list(copies_b), dtype=np.int64))
    count = len(copies_a)
    found = _Groups(count + len(copies_b))
    places = {_digest(thumbs_a[row]): place for place, row in enumerate(copies_a)}
    both = [(places.get(_digest(thumbs_b[row])), place) for place, row in enumerate(copies_b)]
    pairs: set[tuple[int, int]] = set()

    def add(i: int, j: int) -> None:
        found.add(i, count + j)
        pairs.update(_with_copies(copies_a, a.rows[i], copies_b, b.rows[j]))

    for i, j in both:
        if i is not None:
            add(i, j)
    for i, j in near.matches(a, b, lambda image, other: found.needed(image, count + other)):
        add(i, j)
    for j, i in near.matches(b, a, lambda image, other: found.needed(other, count + image)):
        add(i, j)
    return sorted(pairs)


def _copies(hashes: Sequence[int], thumbs: np.ndarray) -> dict[int, list[int]]:
    """For each first of equal thumbnails the rows of all, itself before the others."""
    if len(hashes) != len(thumbs):
        raise ValueError(f"{len(hashes)} hashes for {len(thumbs)} thumbnails")
    firsts: dict[tuple[int, bytes], int] = {}
    copies: dict[int, list[int]] = {}
    for row, value in enumerate(hashes):
        copies.setdefault(firsts.setdefault((value, _digest(thumbs[row])), row), []).append(row)
    return copies


def _digest(thumb: np.ndarray) -> bytes:
    return blake2b(thumb.tobytes(), digest_size=16).digest()


def _with_copies(
    copies_a: dict[int, list[int]], a: int, copies_b: dict[int, list[int]], b: int
) -> list[tuple[int, int]]:
    """The pair, each copy of one with the other, and not each copy with each."""
    return [(int(a), other) for other in copies_b[b]] + [(other, int(b)) for other in copies_a[a][1:]]


class _Groups:
    """Pairs found so far, and which of `count` places they join."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))
        self._size = [1] * count
        self._pairs: set[tuple[int, int]] = set()

    def add(self, a: int, b: int) -> None:
        self._pairs |= {(a, b), (b, a)}
        a, b = self._root(a), self._root(b)
        if a != b:
            self._parent[b] = a
            self._size[a] += self._size[b]

    def needed(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """bool: whether two unlike places, int64 each, are neither paired nor in one large group."""
        return np.array([self._needed(i, j) for i, j in zip(a.tolist(), b.tolist(), strict=True)], dtype=bool)

    def _needed(self, a: int, b: int) -> bool:
        if a == b or (a, b) in self._pairs:
            return False
        root = self._root(a)
        return self._size[root] <= LARGE_GROUP or root != self._root(b)

    def _root(self, place: int) -> int:
        return _root(self._parent, place)


def connected(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` items the smallest index of its connected component."""
    parent = list(range(count))
    for a, b in pairs:
        a, b = sorted((_root(parent, a), _root(parent, b)))
        parent[b] = a
    return [_root(parent, i) for i in range(count)]


def _root(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i
