"""The figures of a report as SVG, and the mean spectra of its images. Names are in the page's own legend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ensemble.core import metrics
from ensemble.core.errors import ImageError
from ensemble.core.metrics import ECE_BINS
from ensemble.core.parallel import ordered_map
from ensemble.evaluation.report_scores import ScoredImages
from ensemble.images.canonical import WHITE
from ensemble.images.figures import CLASS_COLOURS, GRID, INK, Plot, new_figure, svg_uri
from ensemble.images.pixel_traces import CROP_SIDE, MIN_SIDE, radial_spectrum
from ensemble.images.preprocess import flatten

STACK, MEAN = "#111111", "#8a8a8a"
COLOURS = ("#4269d0", "#d0632a", "#2f8f5b", "#7a4fb0", "#c2a018", "#c2417c", "#3aa6b9", "#8c5a3c", "#9bb04a", "#5c6b7a")
MAX_SPECTRUM_IMAGES = 300  # images a class
TOO_SMALL_SHARE = 0.10  # share of images that may be too small for the common square


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each of the members, their mean and the stack."""
    members = [name for name in names if name not in ("mean", "stack")]
    chosen = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(members)}
    return {**chosen, "mean": MEAN, "stack": STACK}


def roc(labels: np.ndarray, scores: Mapping[str, np.ndarray]) -> Plot:
    """ROC curves of all scores [N] by name."""
    figure, axes = new_figure("false positive rate (reals called ai)", "true positive rate (ai called ai)")
    axes.plot([0, 1], [0, 1], color=GRID, linestyle=":")
    for name, values in scores.items():
        hits, alarms = (counts[0] for counts in metrics.roc_counts(labels, values))
        axes.plot(alarms / alarms[-1], hits / hits[-1], **_style(name, scores))
    return Plot("ROC", svg_uri(figure), "ROC curves of the stack, the mean and each member; the dotted line is chance.")


def precision_recall(labels: np.ndarray, scores: Mapping[str, np.ndarray]) -> Plot:
    """Precision over recall of all scores [N] by name; the dotted line is the share of ai."""
    figure, axes = new_figure("recall (ai called ai)", "precision (of those called ai)")
    axes.axhline(float(np.mean(labels)), color=GRID, linestyle=":")
    for name, values in scores.items():
        hits, alarms = (counts[0] for counts in metrics.roc_counts(labels, values))
        called = hits > 0  # before, precision is 0 or undefined
        axes.step(
            hits[called] / hits[-1], (hits / (hits + alarms).clip(1))[called], where="pre", **_style(name, scores)
        )
    alt = "Precision over recall of the stack, the mean and each member; the dotted line is the share of ai."
    return Plot("Precision and recall", svg_uri(figure), alt)


def reliability(labels: np.ndarray, p: Mapping[str, np.ndarray], eces: Mapping[str, float]) -> Plot:
    """The share of ai images over the predicted P(ai); `p` and `eces` by "stack" and "before calibration"."""
    figure, axes = new_figure("predicted P(ai)", "share that was ai")
    axes.plot([0, 1], [0, 1], color=GRID, linestyle=":")
    for number, (name, values) in enumerate(p.items()):
        mean_p, share, count = reliability_bins(labels, values)
        colour = (STACK, COLOURS[1])[number]
        axes.plot(mean_p, share, color=colour, linewidth=1.2, label=f"{name}: ECE {eces[name]:.3f}")
        axes.scatter(mean_p, share, 8 + 120 * count / len(labels), color=colour)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left")
    summary = ", ".join(f"ECE {eces[name]:.3f} {name}" for name in p)
    alt = f"Share of ai images over the stack's P(ai), in {ECE_BINS} bins; larger dots hold more images; {summary}."
    return Plot("Reliability", svg_uri(figure), alt)


def reliability_bins(labels: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean p, share of ai, images) of each bin of equal width that holds any."""
    bins = np.searchsorted(np.linspace(0, 1, ECE_BINS + 1)[1:-1], p)  # as `metrics.expected_calibration_error` has them
    count = np.bincount(bins, minlength=ECE_BINS)
    filled = count > 0
    mean_p, share = (np.bincount(bins, weights, ECE_BINS)[filled] / count[filled] for weights in (p, labels))
    return mean_p, share, count[filled]


def histograms(labels: np.ndarray, target: np.ndarray, threshold: float) -> Plot:
    """The stack's target by class, with the threshold."""
    figure, axes = new_figure("target: the stack's P(ai)", "images")
    edges = np.linspace(0, 1, 31).tolist()
    for label, name, colour in CLASS_COLOURS:
        axes.hist(target[labels == label], edges, color=colour, alpha=0.5, label=name)
    axes.axvline(threshold, color=INK, linestyle="--", linewidth=1, label=f"threshold {threshold:.3f}")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    alt = f"Histograms of the stack's P(ai) for real and for ai images; the threshold is at {threshold:.3f}."
    return Plot("Scores by class", svg_uri(figure), alt)


def planes(spectra: Mapping[int, np.ndarray]) -> list[Plot]:
    """Mean log-spectra [H, W] of real (0) and of ai (1), zero frequency in the middle, and ai minus real."""
    low, high = (float(f(np.concatenate(list(spectra.values())))) for f in (np.min, np.max))
    most = max(float(np.abs(spectra[1] - spectra[0]).max()), 1e-6)
    axes = "zero frequency in the middle, half a cycle a pixel at the edges"
    return [
        _plane("Mean spectrum of reals", spectra[0], "magma", low, high, f"Mean log power of real images, {axes}."),
        _plane("Mean spectrum of ai", spectra[1], "magma", low, high, f"Mean log power of ai images, {axes}."),
        _plane("ai minus real", spectra[1] - spectra[0], "RdBu_r", -most, most, f"Difference of the two, {axes}."),
    ]


def _plane(title: str, values: np.ndarray, colour: str, low: float, high: float, alt: str) -> Plot:
    figure, axes = new_figure("cycles a pixel", "")
    image = axes.imshow(
        values, cmap=colour, vmin=low, vmax=high, extent=(-0.5, 0.5, 0.5, -0.5), interpolation="nearest"
    )
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="log10 power", fraction=0.07, pad=0.03)
    return Plot(title, svg_uri(figure), alt)


def _style(name: str, names: Mapping[str, object]) -> dict[str, Any]:
    strong = name == "stack"
    return {
        "color": colours(list(names))[name],
        "linewidth": 2.2 if strong else 1.0,
        "linestyle": "--" if name == "mean" else "-",
        "zorder": 3 if strong else 2,
    }


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


def mean_spectra(rows: ScoredImages, most: int = MAX_SPECTRUM_IMAGES, seed: int = 0) -> Spectra | None:
    """Of at most `most` images a class, drawn at random; None where a class has none of 32 pixels or more."""
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(rows.labels == label))[:most] for label in (0, 1)])

    def grey(row: int) -> np.ndarray | None:
        try:
            return center_square(np.asarray(flatten(rows.read(row), WHITE).convert("L")), CROP_SIDE)
        except ImageError:
            return None

    bar = tqdm(ordered_map(grey, chosen.tolist()), "spectra", len(chosen), unit="image", leave=False, disable=None)
    read = [(label, pixels) for label, pixels in zip(rows.labels[chosen], bar, strict=True) if pixels is not None]
    if not read:
        return None
    shorter = np.quantile([min(pixels.shape) for _, pixels in read], TOO_SMALL_SHARE, method="higher")
    side = 2 ** int(np.log2(shorter))
    squares = [
        (label, center_square(pixels, side).astype(np.float64)) for label, pixels in read if min(pixels.shape) >= side
    ]
    by_class = {label: [pixels for own, pixels in squares if own == label] for label in (0, 1)}
    if side < MIN_SIDE or not all(by_class.values()):
        return None
    return Spectra(
        side,
        {label: np.mean([log_spectrum(pixels) for pixels in images], axis=0) for label, images in by_class.items()},
        {label: np.stack([radial_spectrum(pixels) for pixels in images]) for label, images in by_class.items()},
        len(chosen) - len(squares),
    )


def center_square(pixels: np.ndarray, side: int) -> np.ndarray:
    """The middle of [H, W], each side cut to at most `side`."""
    top, left = (max(length - side, 0) // 2 for length in pixels.shape)
    return pixels[top : top + side, left : left + side]


def log_spectrum(grey: np.ndarray) -> np.ndarray:
    """log10 power of a square under a Hann window, float64 [side, side], zero frequency in the middle."""
    window = np.hanning(len(grey))
    window = window[:, None] * window[None, :]
    power = np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2 / (window**2).sum()
    return np.fft.fftshift(np.log10(power + 1e-3))
