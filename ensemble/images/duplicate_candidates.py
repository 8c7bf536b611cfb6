"""Candidate pairs of near-duplicates: which thumbnails may show one picture, also turned, mirrored or a little cropped.

Two cheap comparisons propose pairs of which one is a window of the other in any of the eight orientations: sorted
colours, which turns leave alone and small crops hardly change, then low frequencies of the grey picture seen through
windows. All goes by blocks: no array grows with the square of N.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

# How far sorted colours may lie apart, in grey values, by their spread: a crop changes plain pictures less.
REACH, REACH_PER_SPREAD, MAX_REACH = 8.0, 0.8, 48.0
MIN_SPECTRUM_COSINE = 0.7  # between weighted low frequencies
CUTS = ((0.0, 0.0), (0.08, 0.0), (0.0, 0.08), (0.04, 0.04), (0.09, 0.09))  # (first, last) part cut off an axis
FREQUENCIES = 8  # on each axis
TURNS = 8  # turn t: transpose if t & 4, then upside down if t & 2, then mirror if t & 1
COLOUR_BINS = 8  # of the sorted values of each colour plane
ROWS_AT_ONCE = 64  # images compared with all others at a time
BLOCK = 1024  # images described, or pairs registered, at a time
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)

_RADIUS = np.hypot(*np.mgrid[:FREQUENCIES, :FREQUENCIES])
_KEPT = (_RADIUS > 0) & (_RADIUS < FREQUENCIES)
_WEIGHTS = _RADIUS[_KEPT].astype(np.float32) ** 1.5  # amplitudes of photographs fall about so


@dataclass(frozen=True)
class ThumbnailFeatures:
    """Thumbnails and the features by which candidates are found.

    thumbs: uint8 [N, n, n, 3], possibly on disk; n a multiple of 4. rows: int64 [M], the
    rows of `thumbs` that are meant. colours: float32 [M, 24], and their reach, float32 [M, 1]: two may
    be one picture if their squared distance is below the product of their reaches. spectra:
    float32 [M, 55] of length <= 1.
    """

    thumbs: np.ndarray
    rows: np.ndarray
    colours: np.ndarray
    reach: np.ndarray
    spectra: np.ndarray

    def pixels(self, positions: np.ndarray | slice) -> np.ndarray:
        """float32 [C, n, n, 3] in 0..255 of these positions in `rows`."""
        return self.thumbs[self.rows[positions]].astype(np.float32)


@dataclass(frozen=True)
class CandidatePairs:
    """Pairs where `other` may show a window of `image` after a turn.

    image, other: int64 [C], positions in `rows`. turn: int64 [C]. windows: float32 [C, 4], the
    parts of 0..1 cut off the left, right, top and bottom of the turned image.
    """

    image: np.ndarray
    other: np.ndarray
    turn: np.ndarray
    windows: np.ndarray

    def __getitem__(self, part: np.ndarray | slice) -> "CandidatePairs":
        return CandidatePairs(self.image[part], self.other[part], self.turn[part], self.windows[part])


def describe(thumbs: np.ndarray, rows: np.ndarray) -> ThumbnailFeatures:
    """Features of `rows` of uint8 thumbnails [N, n, n, 3]."""
    colours, spectra = [np.empty((0, 3 * COLOUR_BINS), np.float32)], [np.empty((0, _WEIGHTS.size), np.float32)]
    whole = _cosines(0, 0, thumbs.shape[1])
    for start in range(0, len(rows), BLOCK):
        pixels = thumbs[rows[start : start + BLOCK]].astype(np.float32)
        colours.append(_sorted_colours(pixels))
        spectra.append(_weighted((whole @ (pixels @ LUMA) @ whole.T)[:, _KEPT]))
    sorted_colours = np.concatenate(colours)
    planes = sorted_colours.reshape(len(sorted_colours), 3, COLOUR_BINS)
    spread = np.sqrt(((planes - planes.mean(axis=2, keepdims=True)) ** 2).sum(axis=(1, 2)))
    reach = np.asarray(np.minimum(REACH + REACH_PER_SPREAD * spread, MAX_REACH)[:, None], dtype=np.float32)
    return ThumbnailFeatures(thumbs, rows, sorted_colours, reach, np.concatenate(spectra))


def propose(images: ThumbnailFeatures, others: ThumbnailFeatures, key: np.ndarray, start: int) -> CandidatePairs:
    """Candidates for ROWS_AT_ONCE images from `start` on; key: the second `reach_factors` of all others."""
    block = slice(start, start + ROWS_AT_ONCE)
    near = reach_factors(images, block)[0] @ key.T < 0
    windows = _turned_windows(images.pixels(block))
    image, other, best = [], [], []
    for row in range(len(near)):
        columns = np.flatnonzero(near[row])
        cosines = others.spectra[columns] @ windows[row].T
        kept = np.flatnonzero(cosines.max(axis=1) > MIN_SPECTRUM_COSINE)
        image.append(np.full(len(kept), start + row))
        other.append(columns[kept])
        best.append(cosines[kept].argmax(axis=1))
    cut, turn = np.divmod(np.concatenate(best), TURNS)
    return CandidatePairs(np.concatenate(image), np.concatenate(other), turn, _window(cut, turn))


def reach_factors(described: ThumbnailFeatures, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """float32 [M, 27] twice: the product of one's first and another's second is negative within reach."""
    colours, reach = described.colours[part], described.reach[part]
    squares, ones = (colours**2).sum(axis=1, keepdims=True), np.ones_like(reach)
    return np.hstack([-2 * colours, -reach, squares, ones]), np.hstack([colours, reach, ones, squares])


def _window(cut: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """float32 [C, 4] as in CandidatePairs, of window numbers and turns, int [C]."""
    both = np.array(CUTS, dtype=np.float32)[np.stack(np.divmod(cut, len(CUTS)), axis=1)]  # [C, (y, x), (first, last)]
    both = np.where((turn & 4 > 0)[:, None, None], both[:, ::-1], both)
    vertical = np.where((turn & 2 > 0)[:, None], both[:, 0, ::-1], both[:, 0])
    horizontal = np.where((turn & 1 > 0)[:, None], both[:, 1, ::-1], both[:, 1])
    return np.concatenate([horizontal, vertical], axis=1)


def _sorted_colours(pixels: np.ndarray) -> np.ndarray:
    grey = pixels @ LUMA
    planes = (grey, (pixels[..., 2] - grey) * 1.13, (pixels[..., 0] - grey) * 1.43)  # twice Cb and Cr
    means = [
        np.sort(plane.reshape(len(plane), -1), axis=1).reshape(len(plane), COLOUR_BINS, -1).mean(axis=2)
        for plane in planes
    ]
    return np.concatenate(means, axis=1) / np.float32(np.sqrt(COLOUR_BINS))


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


def apply_turns(images: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """[C, n, n, 3] after the turn, int [C], of each."""
    result = np.empty_like(images)
    for turn in range(TURNS):
        here = turns == turn
        part = images[here].swapaxes(1, 2) if turn & 4 else images[here]
        part = part[:, ::-1] if turn & 2 else part
        result[here] = part[:, :, ::-1] if turn & 1 else part
    return result
