"""Traces that storing and resizing leave in the pixels: spectrum, 8x8 grids, resampling.

They are features of the audit's probes, not of the detector. NumPy only.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from ensemble.core.errors import ImageError
from ensemble.core.parallel import ordered_map
from ensemble.images import decode

CROP_SIDE = 256  # pixels; the middle of an image is looked at, at its own resolution
SPECTRUM_BINS = 48  # of the radial spectrum
QUANTISATION_STEPS = np.arange(2, 25)  # quantisation steps that are tried
MIN_SIDE = 32  # pixels; below that there is nothing to measure

SPECTRUM_COLUMNS = [f"spectrum_{i:02}" for i in range(SPECTRUM_BINS)]
DCT_COLUMNS = [f"dct_{i:02}" for i in range(24)]
GRID_COLUMNS = [*(f"grid_{i}" for i in range(8)), "grid_most", "grid_off", "comb", "step", *DCT_COLUMNS]
RESAMPLING_COLUMNS = ["periodic", "period"]
COLUMNS = [*SPECTRUM_COLUMNS, *GRID_COLUMNS, *RESAMPLING_COLUMNS]


def measure_files(files: Sequence[Path], workers: int | None = None, label: str = "probe") -> pd.DataFrame:
    """One row a file with the columns COLUMNS; NaN where it cannot be measured."""
    bar = tqdm(ordered_map(_probe_file, files, workers), label, len(files), unit="image", leave=False, disable=None)
    return pd.DataFrame(np.stack(list(bar)), columns=COLUMNS)


def _probe_file(file: Path) -> np.ndarray:
    try:
        return measure(decode.decode(file))
    except ImageError:
        return np.full(len(COLUMNS), np.nan, dtype=np.float32)


def measure(image: Image.Image) -> np.ndarray:
    """float32 features of one image, in the order of COLUMNS; NaN for an image below MIN_SIDE."""
    # the middle, of at most CROP_SIDE, cut on the 8x8 grid of the image's corner
    left, top = (max(side - CROP_SIDE, 0) // 16 * 8 for side in image.size)
    width, height = (min(side, CROP_SIDE) // 8 * 8 for side in image.size)
    grey = np.asarray(image.crop((left, top, left + width, top + height)).convert("L"), dtype=np.float32)
    if min(grey.shape) < MIN_SIDE:
        return np.full(len(COLUMNS), np.nan, dtype=np.float32)
    parts = (radial_spectrum(grey), grid_traces(grey), resampling_traces(grey))
    return np.concatenate(parts).astype(np.float32)


def radial_spectrum(grey: np.ndarray) -> np.ndarray:
    """Mean log power of a Hann-windowed image at SPECTRUM_BINS radii from 0 to half a cycle a pixel."""
    height, width = grey.shape
    window = np.hanning(height)[:, None] * np.hanning(width)[None, :]
    power = np.abs(np.fft.rfft2((grey - grey.mean()) * window)) ** 2 / (window**2).sum()
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    # corners beyond half a cycle go to a last bin, which is left out
    bins = np.minimum((radius * 2 * SPECTRUM_BINS).astype(int), SPECTRUM_BINS).ravel()
    sums = np.bincount(bins, power.ravel(), SPECTRUM_BINS + 1)[:SPECTRUM_BINS]
    counts = np.bincount(bins, minlength=SPECTRUM_BINS + 1)[:SPECTRUM_BINS]
    filled = np.flatnonzero(counts)  # a small image leaves radii out
    return np.interp(np.arange(SPECTRUM_BINS), filled, np.log10(sums[filled] / counts[filled] + 1e-3))


_DCT = np.cos((2 * np.arange(8) + 1) * np.arange(8)[:, None] * np.pi / 16) / 2
_DCT[0] /= np.sqrt(2)
_DCT = _DCT.astype(np.float32)
_LOW = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (2, 2), (0, 3), (3, 0))


def grid_traces(grey: np.ndarray) -> np.ndarray:
    """Traces of JPEG compression, also of one below the last, as in GRID_COLUMNS.

    Blockiness at each phase of an 8x8 grid; whether DCT coefficients on the corner's grid
    lie on a comb, and of which step; the histogram of the two lowest of them (after Fan and
    de Queiroz, "Identification of bitmap compression history", 2003; Popescu, 2004).
    """
    phases = np.log(_phases(grey) + _phases(grey.T) + 1e-6)
    phases -= np.median(phases)
    height, width = grey.shape
    blocks = (grey - 128).reshape(height // 8, 8, width // 8, 8).transpose(0, 2, 1, 3).reshape(-1, 8, 8)
    coefficients = _DCT @ blocks @ _DCT.T
    combs, steps = zip(*(_comb(coefficients[:, y, x]) for y, x in _LOW), strict=True)
    lowest = np.abs(np.concatenate([coefficients[:, 0, 1], coefficients[:, 1, 0]]))
    histogram = np.bincount(np.minimum(np.round(lowest).astype(int), 24), minlength=25)[:24] / len(lowest)
    # the last grid is at phase 7; an earlier one, shifted by a crop, at another
    return np.concatenate([phases, [phases.max(), phases[:7].max(), np.mean(combs), np.mean(steps)], histogram])


def _phases(grey: np.ndarray) -> np.ndarray:
    """Mean absolute third difference of rows by column modulo 8: [8]; a grid stands out at one phase."""
    third = np.abs(grey[:, :-3] - 3 * grey[:, 1:-2] + 3 * grey[:, 2:-1] - grey[:, 3:]).mean(axis=0)
    return np.array([third[phase::8].mean() for phase in range(8)])


def _comb(values: np.ndarray) -> tuple[float, float]:
    """How well coefficients lie on multiples of some step, -1 to 1, and the largest such step."""
    best, step = 0.0, 0.0
    for q in QUANTISATION_STEPS:
        beyond = values[np.abs(values) > 0.75 * q]
        if len(beyond) < 12:
            break
        fit = float(np.cos(2 * np.pi / q * beyond).mean())
        best = max(best, fit)
        step = float(q) if fit > 0.4 else step
    return best, step


def resampling_traces(grey: np.ndarray) -> np.ndarray:
    """The strongest period of interpolation, in log over the median, and its frequency: float32 [2].

    Interpolated pixels make the second difference's size periodic (Gallagher, "Detection of
    linear and cubic interpolation in JPEG compressed images", 2005). Multiples of 1/8 are
    JPEG's own and left out.
    """
    heights, frequencies = [], []
    for plane in (grey, grey.T):
        second = np.abs(plane[:, :-2] - 2 * plane[:, 1:-1] + plane[:, 2:]).mean(axis=0)
        second = second - np.convolve(np.pad(second, 4, mode="edge"), np.ones(9) / 9, mode="valid")
        size = np.abs(np.fft.rfft(second * np.hanning(len(second))))
        frequency = np.fft.rfftfreq(len(second))
        own = np.abs(frequency * 8 - np.round(frequency * 8)) < 16 / len(second)
        size[(frequency < 0.06) | (own & (frequency < 0.49))] = 0
        heights.append(np.log(size.max() / (np.median(size[size > 0]) + 1e-6) + 1e-6) if (size > 0).any() else 0.0)
        frequencies.append(frequency[size.argmax()])
    return np.array([np.mean(heights), np.mean(frequencies)])
