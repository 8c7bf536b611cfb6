"""Which images are the same picture: exact copies and near-duplicates share a group.

Which thumbnails show one picture, also turned, mirrored, recompressed or a little cropped.

Two sieves propose pairs of which one is a window of the other in any of the eight turns:
sorted colours, which turns leave alone and small crops hardly change, then low frequencies
of the grey picture seen through windows. What they propose is laid onto each other and the
pixels of the overlap are compared. All goes by blocks: no array grows with the square of N.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product

import numpy as np
from PIL import Image

from ensemble.core.parallel import ordered_map
from ensemble.images.registration import one_picture

# How far sorted colours may lie apart, in grey values, by their spread: a crop changes plain pictures less.
REACH, REACH_PER_SPREAD, MAX_REACH = 8.0, 0.8, 48.0
SPECTRUM_COSINE = 0.7  # smallest cosine between weighted low frequencies
CUTS = ((0.0, 0.0), (0.08, 0.0), (0.0, 0.08), (0.04, 0.04), (0.09, 0.09))  # (first, last) part cut off an axis
FREQUENCIES = 8  # on each axis
TURNS = 8  # turn t: transpose if t & 4, then upside down if t & 2, then mirror if t & 1
BINS = 8  # of the sorted values of each colour plane
ROWS = 64  # images compared with all others at a time
BLOCK = 1024  # images described, or pairs registered, at a time
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

_RADIUS = np.hypot(*np.mgrid[:FREQUENCIES, :FREQUENCIES])
_KEPT = (_RADIUS > 0) & (_RADIUS < FREQUENCIES)
_WEIGHTS = _RADIUS[_KEPT].astype(np.float32) ** 1.5  # amplitudes of photographs fall about so

Needed = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Described:
    """Images and what the sieves compare of them.

    thumbs: uint8 [N, n, n, 3], possibly on disk; n a multiple of 4. rows: int64 [M], those of
    `thumbs` that are meant. colours: float32 [M, 24], and their reach, float32 [M, 1]: two may
    be one picture if their squared distance is below the product of their reaches. spectra:
    float32 [M, 55] of length <= 1.
    """

    thumbs: np.ndarray
    rows: np.ndarray
    colours: np.ndarray
    reach: np.ndarray
    spectra: np.ndarray

    def pixels(self, places: np.ndarray | slice) -> np.ndarray:
        """float32 [C, n, n, 3] in 0..255 of these places in `rows`."""
        return self.thumbs[self.rows[places]].astype(np.float32)


@dataclass(frozen=True)
class Proposed:
    """Pairs where `other` may show a window of `image` after a turn.

    image, other: int64 [C], places in `rows`. turn: int64 [C]. windows: float32 [C, 4], the
    parts of 0..1 cut off the left, right, top and bottom of the turned image.
    """

    image: np.ndarray
    other: np.ndarray
    turn: np.ndarray
    windows: np.ndarray

    def __getitem__(self, part: np.ndarray | slice) -> "Proposed":
        return Proposed(self.image[part], self.other[part], self.turn[part], self.windows[part])


def describe(thumbs: np.ndarray, rows: np.ndarray) -> Described:
    """Describe `rows` of uint8 thumbnails [N, n, n, 3]."""
    colours, spectra = [np.empty((0, 3 * BINS), np.float32)], [np.empty((0, _WEIGHTS.size), np.float32)]
    whole = _cosines(0, 0, thumbs.shape[1])
    for start in range(0, len(rows), BLOCK):
        pixels = thumbs[rows[start : start + BLOCK]].astype(np.float32)
        colours.append(_sorted_colours(pixels))
        spectra.append(_weighted((whole @ (pixels @ LUMA) @ whole.T)[:, _KEPT]))
    sorted_colours = np.concatenate(colours)
    return Described(thumbs, rows, sorted_colours, _reach(sorted_colours), np.concatenate(spectra))


def matches(images: Described, others: Described, needed: Needed) -> Iterator[tuple[int, int]]:
    """Places (image, other) of which the other shows a window of the image.

    `needed(image, other)`, int64 [C] each, says which pairs to look at, bool [C]. It is asked
    late, so that it can leave out what earlier answers have settled.
    """
    from threadpoolctl import threadpool_limits

    starts = range(0, len(images.rows), ROWS)
    key = _sides(others, slice(None))[1]
    with threadpool_limits(1):  # products this small are many times slower when BLAS spreads each over threads
        for proposed in ordered_map(lambda start: _propose(images, others, key, start), starts):
            for start in range(0, len(proposed.image), BLOCK):
                part = proposed[start : start + BLOCK]
                part = part[needed(part.image, part.other)]
                if len(part.image):
                    pixels = turned(images.pixels(part.image), part.turn)
                    same = one_picture(pixels, others.pixels(part.other), part.windows)
                    yield from zip(part.image[same].tolist(), part.other[same].tolist(), strict=True)


def turned(images: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """[C, n, n, 3] after the turn, int [C], of each."""
    result = np.empty_like(images)
    for turn in range(TURNS):
        here = turns == turn
        part = images[here].swapaxes(1, 2) if turn & 4 else images[here]
        part = part[:, ::-1] if turn & 2 else part
        result[here] = part[:, :, ::-1] if turn & 1 else part
    return result


def _propose(images: Described, others: Described, key: np.ndarray, start: int) -> Proposed:
    block = slice(start, start + ROWS)
    near = _sides(images, block)[0] @ key.T < 0
    windows = _turned_windows(images.pixels(block))
    image, other, best = [], [], []
    for row in range(len(near)):
        columns = np.flatnonzero(near[row])
        cosines = others.spectra[columns] @ windows[row].T
        kept = np.flatnonzero(cosines.max(axis=1) > SPECTRUM_COSINE)
        image.append(np.full(len(kept), start + row))
        other.append(columns[kept])
        best.append(cosines[kept].argmax(axis=1))
    cut, turn = np.divmod(np.concatenate(best), TURNS)
    return Proposed(np.concatenate(image), np.concatenate(other), turn, _window(cut, turn))


def _sides(described: Described, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """float32 [M, 27] twice: the product of one's first and another's second is negative within reach."""
    colours, reach = described.colours[part], described.reach[part]
    squares, ones = (colours**2).sum(axis=1, keepdims=True), np.ones_like(reach)
    return np.hstack([-2 * colours, -reach, squares, ones]), np.hstack([colours, reach, ones, squares])


def _window(cut: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """float32 [C, 4] as in Proposed, of window numbers and turns, int [C]."""
    both = np.array(CUTS, dtype=np.float32)[np.stack(np.divmod(cut, len(CUTS)), axis=1)]  # [C, (y, x), (first, last)]
    both = np.where((turn & 4 > 0)[:, None, None], both[:, ::-1], both)
    vertical = np.where((turn & 2 > 0)[:, None], both[:, 0, ::-1], both[:, 0])
    horizontal = np.where((turn & 1 > 0)[:, None], both[:, 1, ::-1], both[:, 1])
    return np.concatenate([horizontal, vertical], axis=1)


def _sorted_colours(pixels: np.ndarray) -> np.ndarray:
    grey = pixels @ LUMA
    planes = (grey, (pixels[..., 2] - grey) * 1.13, (pixels[..., 0] - grey) * 1.43)  # twice Cb and Cr
    means = [
        np.sort(plane.reshape(len(plane), -1), axis=1).reshape(len(plane), BINS, -1).mean(axis=2) for plane in planes
    ]
    return np.concatenate(means, axis=1) / np.float32(np.sqrt(BINS))


def _reach(colours: np.ndarray) -> np.ndarray:
    planes = colours.reshape(len(colours), 3, BINS)
    spread = np.sqrt(((planes - planes.mean(axis=2, keepdims=True)) ** 2).sum(axis=(1, 2)))
    return np.asarray(np.minimum(REACH + REACH_PER_SPREAD * spread, MAX_REACH)[:, None], dtype=np.float32)


def _cosines(first: float, last: float, size: int) -> np.ndarray:
    """float32 [FREQUENCIES, size]: from a row of pixels to the cosine series of what is left between two cuts.

    The cosines are integrated over each pixel, so a cut may fall inside one.
    """
    edges = (np.clip(np.arange(size + 1) / size, first, 1 - last) - first) / (1 - first - last)
    k = np.arange(1, FREQUENCIES)[:, None]
    integrals = np.concatenate([edges[None], np.sin(np.pi * k * edges) / (np.pi * k) * np.sqrt(2)])
    return np.diff(integrals, axis=1).astype(np.float32)


def _turned_windows(pixels: np.ndarray) -> np.ndarray:
    """float32 [B, windows * TURNS, 55]: the spectra of all windows, as if each were turned and seen whole."""
    axes = np.stack([_cosines(*cut, pixels.shape[1]) for cut in CUTS])
    rows = np.einsum("akp,npq->nakq", axes, pixels @ LUMA, optimize=True)
    windows = np.einsum("nakq,blq->nabkl", rows, axes, optimize=True)
    odd = np.float32(-1) ** np.arange(FREQUENCIES, dtype=np.float32)  # a mirrored cosine changes its sign, or not
    spectra = []
    for transposed, down, mirrored in product((False, True), repeat=3):
        turn = windows.swapaxes(-1, -2) if transposed else windows
        turn = turn * odd[:, None] if down else turn
        spectra.append((turn * odd if mirrored else turn)[..., _KEPT])
    return _weighted(np.stack(spectra, axis=3)).reshape(len(pixels), -1, _WEIGHTS.size)


def _weighted(spectra: np.ndarray) -> np.ndarray:
    weighted = spectra * _WEIGHTS
    length = np.sqrt((weighted**2).sum(axis=-1, keepdims=True) + 1)  # a plain picture comes out short, like nothing
    return np.asarray(weighted / length, dtype=np.float32)


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
    described = describe(thumbs, np.array(list(copies), dtype=np.int64))
    found = _Groups(len(copies))
    pairs = {(first, other) for first, same in copies.items() for other in same[1:]}
    for a, b in matches(described, described, lambda image, other: found.needed(image, other)):
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
    places = {_digest(thumbs_a[row]): place for place, row in enumerate(copies_a)}
    both = [(places.get(_digest(thumbs_b[row])), place) for place, row in enumerate(copies_b)]
    pairs: set[tuple[int, int]] = set()

    def add(i: int, j: int) -> None:
        found.add(i, count + j)
        pairs.update(_with_copies(copies_a, a.rows[i], copies_b, b.rows[j]))

    for i, j in both:
        if i is not None:
            add(i, j)
    for i, j in matches(a, b, lambda image, other: found.needed(image, count + other)):
        add(i, j)
    for j, i in matches(b, a, lambda image, other: found.needed(other, count + image)):
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
