"""Mean spectra of the images that a report speaks of: what generators leave behind, and what storing does."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from ensemble.core.errors import ImageError
from ensemble.core.parallel import ordered_map
from ensemble.images.canonical import WHITE
from ensemble.images.decode import flatten
from ensemble.images.pixel_traces import SIDE, SMALLEST, radial_spectrum
from ensemble.report_rows import Rows

MOST = 300  # images a class
SHORTER = 0.10  # share of images that may be too small for the common square


@dataclass(frozen=True)
class Spectra:
    """Of the middle squares of `side` pixels, by label.

    planes: mean log10 power float [side, side], zero frequency in the middle. radial: mean
    log power by radius of each image, float [images, bins]. left_out: images that could not be read
    or are smaller than the square.
    """

    side: int
    planes: dict[int, np.ndarray]
    radial: dict[int, np.ndarray]
    left_out: int


def mean_spectra(rows: Rows, most: int = MOST, seed: int = 0) -> Spectra | None:
    """Of at most `most` images a class, drawn at random; None where a class has none of 32 pixels or more."""
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(rows.labels == label))[:most] for label in (0, 1)])

    def grey(row: int) -> np.ndarray | None:
        try:
            return middle(np.asarray(flatten(rows.read(row), WHITE).convert("L")), SIDE)
        except ImageError:
            return None

    bar = tqdm(ordered_map(grey, chosen.tolist()), "spectra", len(chosen), unit="image", leave=False, disable=None)
    read = [(label, pixels) for label, pixels in zip(rows.labels[chosen], bar, strict=True) if pixels is not None]
    if not read:
        return None
    shorter = np.quantile([min(pixels.shape) for _, pixels in read], SHORTER, method="higher")
    side = 2 ** int(np.log2(shorter))
    kept = [(label, middle(pixels, side).astype(np.float64)) for label, pixels in read if min(pixels.shape) >= side]
    by_class = {label: [pixels for own, pixels in kept if own == label] for label in (0, 1)}
    if side < SMALLEST or not all(by_class.values()):
        return None
    return Spectra(
        side,
        {label: np.mean([plane(pixels) for pixels in squares], axis=0) for label, squares in by_class.items()},
        {label: np.stack([radial_spectrum(pixels) for pixels in squares]) for label, squares in by_class.items()},
        len(chosen) - len(kept),
    )


def middle(pixels: np.ndarray, side: int) -> np.ndarray:
    """The middle of [H, W], each side cut to at most `side`."""
    top, left = (max(length - side, 0) // 2 for length in pixels.shape)
    return pixels[top : top + side, left : left + side]


def plane(grey: np.ndarray) -> np.ndarray:
    """log10 power of a square under a Hann window, float64 [side, side], zero frequency in the middle."""
    window = np.hanning(len(grey))
    window = window[:, None] * window[None, :]
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2 / (window**2).sum()
    return np.fft.fftshift(np.log10(power + 1e-3))
