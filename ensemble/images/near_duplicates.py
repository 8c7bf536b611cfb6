"""Near-duplicates: which images show the same picture, also turned, mirrored, recompressed or a little cropped.

`duplicate_candidates` proposes pairs of thumbnails; `registration` lays one onto the other; the overlap is compared
here, by the thresholds below. Images that are joined share a group, which no split divides.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
from PIL import Image

from ensemble.core.parallel import ordered_map
from ensemble.images.duplicate_candidates import (
    BLOCK,
    LUMA,
    ROWS_AT_ONCE,
    ThumbnailFeatures,
    apply_turns,
    describe,
    propose,
    reach_factors,
)
from ensemble.images.registration import (
    STEPS,
    blur_planes,
    fine_detail,
    halve_planes,
    plane_similarity,
    register,
    warp_planes,
)

# A pair is a near-duplicate if the overlap of its thumbnails, in grey values 0..255, meets all of these.
MIN_CORRELATION = 0.88  # the near-duplicate threshold: correlation of grey values
MIN_COARSE_CORRELATION = 0.8  # the same at half size, or the pair is dropped early
MAX_GAIN = 1.2  # of grey values, either way
MAX_COLOUR_DIFFERENCE = 6.0  # mean absolute difference of a smoothed channel
MIN_DETAIL_CORRELATION = 0.3  # of grey values without their broad shading
MAX_DETAIL_ERROR = 0.65  # root mean square difference of that detail, as a share of its strength, beside:
RECOMPRESSION_NOISE = 0.3  # root mean square that recompression leaves in a thumbnail's detail
MIN_OVERLAP = 0.6  # of the area

THUMBNAIL_SIDE = 32  # pixels of the thumbnails that are compared
MAX_COMPARED_GROUP = 64  # images; in larger groups what is joined is not compared again

Needed = Callable[[np.ndarray, np.ndarray], np.ndarray]


_DCT = np.cos(np.arange(8)[:, None] * ((np.arange(THUMBNAIL_SIDE) + 0.5) * np.pi / THUMBNAIL_SIDE))


def thumbnail(image: Image.Image) -> np.ndarray:
    """uint8 [32, 32, 3] of a decoded image, for `near_duplicates`."""
    return np.asarray(
        image.convert("RGB").resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    )


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
    ones lie too far apart in them, so the thumbnails, uint8
    [N, 32, 32, 3], are compared; they may lie on disk.
    """
    copies = _copies(hashes, thumbs)
    described = describe(thumbs, np.array(list(copies), dtype=np.int64))
    found = _Groups(len(copies))
    pairs = {(first, other) for first, same in copies.items() for other in same[1:]}
    for a, b in matching_pairs(described, described, lambda image, other: found.needed(image, other)):
        found.add(a, b)
        pairs |= {(min(pair), max(pair)) for pair in _with_copies(copies, described.rows[a], copies, described.rows[b])}
    return sorted(pairs)


def near_duplicates_between(
    hashes_a: Sequence[int], thumbs_a: np.ndarray, hashes_b: Sequence[int], thumbs_b: np.ndarray
) -> list[tuple[int, int]]:
    """Pairs (index in a, index in b) of images that show the same picture, as `near_duplicates` finds them."""
    copies_a, copies_b = _copies(hashes_a, thumbs_a), _copies(hashes_b, thumbs_b)
    a = describe(thumbs_a, np.array(list(copies_a), dtype=np.int64))
    b = describe(thumbs_b, np.array(list(copies_b), dtype=np.int64))
    count = len(copies_a)
    found = _Groups(count + len(copies_b))
    positions = {_digest(thumbs_a[row]): i for i, row in enumerate(copies_a)}
    pairs: set[tuple[int, int]] = set()

    def add(i: int, j: int) -> None:
        found.add(i, count + j)
        pairs.update(_with_copies(copies_a, a.rows[i], copies_b, b.rows[j]))

    for j, row in enumerate(copies_b):
        if (equal := positions.get(_digest(thumbs_b[row]))) is not None:
            add(equal, j)
    for i, j in matching_pairs(a, b, lambda image, other: found.needed(image, count + other)):
        add(i, j)
    for j, i in matching_pairs(b, a, lambda image, other: found.needed(other, count + image)):
        add(i, j)
    return sorted(pairs)


def connected_components(count: int, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """For each of `count` items the smallest index of its connected component."""
    parent = list(range(count))
    for a, b in pairs:
        a, b = sorted((_root(parent, a), _root(parent, b)))
        parent[b] = a
    return [_root(parent, i) for i in range(count)]


def matching_pairs(images: ThumbnailFeatures, others: ThumbnailFeatures, needed: Needed) -> Iterator[tuple[int, int]]:
    """Positions (image, other) in `rows` of pairs of which the other shows a window of the image.

    `needed(image, other)`, int64 [C] each, says which pairs to look at, bool [C]. It is called
    late, so that it can leave out pairs that earlier ones have settled.
    """
    from threadpoolctl import threadpool_limits  # comes with scikit-learn, which inference does without

    starts = range(0, len(images.rows), ROWS_AT_ONCE)
    key = reach_factors(others, slice(None))[1]
    with threadpool_limits(1):  # products this small are many times slower when BLAS spreads each over threads
        for candidates in ordered_map(lambda start: propose(images, others, key, start), starts):
            for start in range(0, len(candidates.image), BLOCK):
                part = candidates[start : start + BLOCK]
                part = part[needed(part.image, part.other)]
                if len(part.image):
                    pixels = apply_turns(images.pixels(part.image), part.turn)
                    same = same_picture(pixels, others.pixels(part.other), part.windows)
                    yield from zip(part.image[same].tolist(), part.other[same].tolist(), strict=True)


def same_picture(images: np.ndarray, others: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """bool [C]: whether each other is its image's window, give or take, in shading, detail and colour.

    images, others: float32 [C, n, n, 3] in 0..255. windows: float32 [C, 4], the parts cut off
    the image's left, right, top and bottom, to start from; below 0 the other shows more.
    """
    result = np.zeros(len(images), dtype=bool)
    grey, target = blur_planes(images @ LUMA), blur_planes(others @ LUMA)
    small, small_target = halve_planes(grey), halve_planes(target)
    windows = register(small, small_target, windows, STEPS[0])
    seen, overlap = warp_planes(small, windows)
    passed = np.flatnonzero(plane_similarity(seen, small_target, overlap).correlation >= MIN_COARSE_CORRELATION)
    if len(passed):
        windows = register(grey[passed], target[passed], windows[passed], STEPS[1])
        result[passed] = _alike(images[passed], others[passed], windows)
    return result


def _alike(images: np.ndarray, others: np.ndarray, windows: np.ndarray) -> np.ndarray:
    channels = [warp_planes(images[..., channel], windows) for channel in range(3)]
    seen, overlap = np.stack([plane for plane, _ in channels], axis=3), channels[0][1]
    area = np.maximum(overlap.sum(axis=(1, 2)), 1)
    off = np.moveaxis((seen - others) * overlap[..., None], 3, 0)
    colour = np.max(
        [np.abs(blur_planes(blur_planes(plane)) * overlap).sum(axis=(1, 2)) / area for plane in off], axis=0
    )
    grey, target = blur_planes(blur_planes(seen @ LUMA)), blur_planes(blur_planes(others @ LUMA))
    shading = plane_similarity(grey, target, overlap)
    detail = plane_similarity(fine_detail(grey), fine_detail(target), overlap)
    return (
        (area >= MIN_OVERLAP * overlap[0].size)
        & (shading.correlation >= MIN_CORRELATION)
        & (np.maximum(shading.gain, 1 / np.maximum(shading.gain, 1e-3)) <= MAX_GAIN)
        & (colour <= MAX_COLOUR_DIFFERENCE)
        & (detail.correlation >= MIN_DETAIL_CORRELATION)
        & (detail.difference**2 <= (MAX_DETAIL_ERROR * detail.strength) ** 2 + RECOMPRESSION_NOISE**2)
    )


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
    """Pairs found so far, and the groups of 0 .. count - 1 that they join."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))
        self._size = [1] * count
        self._pairs: set[tuple[int, int]] = set()

    def add(self, a: int, b: int) -> None:
        self._pairs |= {(a, b), (b, a)}
        a, b = _root(self._parent, a), _root(self._parent, b)
        if a != b:
            self._parent[b] = a
            self._size[a] += self._size[b]

    def needed(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """bool: whether two different positions, int64 each, are neither paired nor in one large group."""
        return np.array([self._needed(i, j) for i, j in zip(a.tolist(), b.tolist(), strict=True)], dtype=bool)

    def _needed(self, a: int, b: int) -> bool:
        if a == b or (a, b) in self._pairs:
            return False
        root = _root(self._parent, a)
        return self._size[root] <= MAX_COMPARED_GROUP or root != _root(self._parent, b)


def _root(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i
