"""Scores, in NumPy, of rows that may count several times.

Throughout: labels int [N] with ai = 1 and real = 0, p float [N] in [0, 1], scores float [N] of
any range, weights float [B, N] whose lines say how often each row counts, in whole numbers. A plain
score is the weighted one with a single line of ones. A score is NaN without a class that it needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ensemble.core.errors import DataError

EPSILON = 1e-15  # probabilities are clipped to [eps, 1 - eps] in the logarithm
BINS = 15  # of the calibration error, as in Guo et al. (2017)


@dataclass(frozen=True)
class Interval:
    """A score with the ends of its 95 % interval; NaN ends where it could not be resampled."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """JSON-ready values: null for NaN."""
        return {key: None if np.isnan(value) else value for key, value in vars(self).items()}

    def __str__(self) -> str:
        ends = "" if np.isnan(self.low) else f" [{self.low:.4f}, {self.high:.4f}]"
        return f"{self.value:.4f}{ends}"


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)) in float64, without overflow at either end."""
    z = np.asarray(logits, dtype=np.float64)
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1.0 + small)


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the chance that an ai image scores above a real one, ties a half."""
    return float(_area(*roc(labels, scores))[0])


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Precision averaged over the steps of recall, without interpolation; ties are one step."""
    return float(_average_precision(*roc(labels, scores))[0])


def tpr_at_fpr(labels: np.ndarray, scores: np.ndarray, fpr: float) -> float:
    """The largest share of ai images found by a threshold that calls at most the share `fpr` of reals ai.

    A threshold that the data has, so nothing is interpolated; with fewer than 1 / fpr reals it calls none of them.
    """
    return float(_tpr(*roc(labels, scores), fpr=fpr)[0])


def balanced_accuracy(labels: np.ndarray, p: np.ndarray, threshold: float = 0.5) -> float:
    """Mean of the shares of ai and of real images that fall on their side."""
    return score("balanced_accuracy", labels, p, threshold)


def f1(labels: np.ndarray, p: np.ndarray, threshold: float = 0.5) -> float:
    """Harmonic mean of precision and recall of the ai class."""
    return score("f1", labels, p, threshold)


def accuracy_by_class(labels: np.ndarray, p: np.ndarray, threshold: float = 0.5) -> tuple[float, float]:
    """The shares of reals below the threshold, and of ai images at or above it."""
    return score("accuracy_real", labels, p, threshold), score("accuracy_ai", labels, p, threshold)


def log_loss(labels: np.ndarray, p: np.ndarray) -> float:
    """Mean negative log-likelihood in nats; p is clipped to [1e-15, 1 - 1e-15]."""
    return score("log_loss", labels, p)


def brier(labels: np.ndarray, p: np.ndarray) -> float:
    """Mean squared distance of p from the label, 0 to 1."""
    return score("brier", labels, p)


def ece(labels: np.ndarray, p: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: |mean p - share of ai| over bins of p of equal width, weighted by their rows.

    Guo et al., "On calibration of modern neural networks" (2017), with p of the class ai in
    place of confidence. Chance alone makes it positive: with n rows of calibrated p in a bin,
    the expected distance there is about sqrt(2 / (pi n)) times the standard deviation of the labels.
    """
    return float(_ece(_Rows.of(labels, p), _once(labels), bins)[0])


def score(name: str, labels: np.ndarray, p: np.ndarray, threshold: float = 0.5) -> float:
    """The score called `name`, one of SCORES."""
    return float(weighted(labels, p, _once(labels), (name,), threshold)[name][0])


def weighted(
    labels: np.ndarray, p: np.ndarray, weights: np.ndarray, names: Sequence[str], threshold: float = 0.5
) -> dict[str, np.ndarray]:
    """Each named score under each line of weights: float64 [B]."""
    rows = _Rows.of(labels, p, threshold)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {name: _SUMMED[name](rows, weights) for name in names if name in _SUMMED}
    ranked = [name for name in names if name in _RANKED]
    if ranked:
        curve = roc(labels, p, weights)
        found |= {name: _RANKED[name](*curve) for name in ranked}
    return {name: found[name] for name in names}


def roc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """How many ai images, and how many reals, lie at or above each of U distinct scores: float64 [B, 1 + U] twice.

    From none, above the highest score, to all. Fastest where scores come sorted from high to low.
    """
    labels, scores = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    weights = _once(labels) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    labels, scores, weights = labels[order], scores[order], weights[:, order]
    above = np.zeros((2, len(weights), 1 + len(order)))
    np.cumsum(weights * labels, axis=1, out=above[0, :, 1:])
    np.cumsum(weights * ~labels, axis=1, out=above[1, :, 1:])
    ends = np.r_[True, scores[1:] != scores[:-1], np.ones(min(len(scores), 1), bool)]
    return (above[0], above[1]) if ends.all() else (above[0][:, ends], above[1][:, ends])


def _area(hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
    steps = np.diff(alarms, axis=1)
    # twice the area in whole numbers: exact up to the division
    doubled = np.einsum("ij,ij->i", steps, hits[:, 1:]) + np.einsum("ij,ij->i", steps, hits[:, :-1])
    return _where_both(hits, alarms, doubled / np.maximum(2 * hits[:, -1] * alarms[:, -1], 1))


def _average_precision(hits: np.ndarray, alarms: np.ndarray) -> np.ndarray:
    precision = hits / np.maximum(hits + alarms, 1)
    found = np.einsum("ij,ij->i", np.diff(hits, axis=1), precision[:, 1:])
    return _where_both(hits, alarms, found / np.maximum(hits[:, -1], 1))


def _tpr(hits: np.ndarray, alarms: np.ndarray, fpr: float) -> np.ndarray:
    allowed = alarms <= fpr * alarms[:, -1:] + 1e-9  # 0.29 * 100 is a little less than 29
    found = hits[np.arange(len(hits)), np.count_nonzero(allowed, axis=1) - 1]
    return _where_both(hits, alarms, found / np.maximum(hits[:, -1], 1))


def _where_both(hits: np.ndarray, alarms: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where((hits[:, -1] > 0) & (alarms[:, -1] > 0), values, np.nan)


@dataclass(frozen=True)
class _Rows:
    """labels bool [N], p float64 [N], called bool [N]: at or above the threshold."""

    labels: np.ndarray
    p: np.ndarray
    called: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, p: np.ndarray, threshold: float = 0.5) -> "_Rows":
        p = np.asarray(p)
        return cls(np.asarray(labels).astype(bool), p.astype(np.float64), p >= threshold)


def _once(labels: np.ndarray) -> np.ndarray:
    return np.ones((1, len(labels)))


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (weights @ values) / weights.sum(axis=1)


def _on_real(rows: _Rows, weights: np.ndarray) -> np.ndarray:
    return (weights @ (~rows.labels & ~rows.called)) / (weights @ ~rows.labels)


def _on_ai(rows: _Rows, weights: np.ndarray) -> np.ndarray:
    return (weights @ (rows.labels & rows.called)) / (weights @ rows.labels)


def _balanced_accuracy(rows: _Rows, weights: np.ndarray) -> np.ndarray:
    return (_on_ai(rows, weights) + _on_real(rows, weights)) / 2


def _f1(rows: _Rows, weights: np.ndarray) -> np.ndarray:
    ai, called, hits = (weights @ side for side in (rows.labels, rows.called, rows.labels & rows.called))
    return np.where(ai > 0, 2 * hits / (ai + called), np.nan)


def _log_loss(rows: _Rows, weights: np.ndarray) -> np.ndarray:
    p = np.clip(rows.p, EPSILON, 1 - EPSILON)
    return _mean(-np.log(np.where(rows.labels, p, 1 - p)), weights)


def _brier(rows: _Rows, weights: np.ndarray) -> np.ndarray:
    return _mean((rows.p - rows.labels) ** 2, weights)


def _ece(rows: _Rows, weights: np.ndarray, bins: int = BINS) -> np.ndarray:
    off = np.zeros((len(rows.p), bins))
    bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], rows.p)
    off[np.arange(len(rows.p)), bin_of] = rows.p - rows.labels
    return np.abs(weights @ off).sum(axis=1) / weights.sum(axis=1)


_SUMMED: dict[str, Callable[[_Rows, np.ndarray], np.ndarray]] = {
    "balanced_accuracy": _balanced_accuracy,
    "f1": _f1,
    "accuracy_real": _on_real,
    "accuracy_ai": _on_ai,
    "log_loss": _log_loss,
    "brier": _brier,
    "ece": _ece,
}
_RANKED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "auroc": _area,
    "average_precision": _average_precision,
    "tpr_at_1": partial(_tpr, fpr=0.01),
    "tpr_at_5": partial(_tpr, fpr=0.05),
}
SCORES = tuple(
    "auroc average_precision balanced_accuracy f1 accuracy_real accuracy_ai "
    "tpr_at_1 tpr_at_5 log_loss brier ece".split()
)
LOWER_IS_BETTER = ("log_loss", "brier", "ece")


def check_scores(labels: np.ndarray, p: np.ndarray) -> None:
    """Raise DataError, one line that says what to do, for what cannot be scored."""
    labels, p = np.asarray(labels), np.asarray(p, dtype=np.float64)
    if labels.shape != p.shape:
        raise DataError(f"{len(labels)} labels for {len(p)} probabilities: give one of each for every image")
    unknown = labels[~np.isin(labels, (0, 1))]
    if len(unknown):
        raise DataError(
            f"label {unknown[0]} of {len(unknown)} images is neither 0 (real) nor 1 (ai): correct the labels"
        )
    if np.isnan(p).any():
        raise DataError(
            f"p is missing (NaN) for {np.isnan(p).sum()} of {len(p)} images: score them again or leave them out"
        )
    outside = p[(p < 0) | (p > 1)]
    if len(outside):
        raise DataError(
            f"p of {len(outside)} images is outside 0 to 1 ({outside[0]:g}): give probabilities, not logits"
        )
    if len(set(labels.tolist())) < 2:
        missing = "ai" if not labels.any() else "real"
        raise DataError(f"none of the {len(labels)} images is {missing}: add some, a score needs both classes")
    if p.min() == p.max():
        raise DataError(
            f"p is {p[0]:g} for all {len(p)} images, so nothing is told apart: check what gave these scores"
        )


def resolvable(labels: np.ndarray, fpr: float) -> None:
    """Raise DataError if the reals are too few for a threshold at this false positive rate."""
    if not 0 < fpr < 1:
        raise DataError(f"a false positive rate lies between 0 and 1, not at {fpr:g}")
    reals, needed = int((np.asarray(labels) == 0).sum()), int(np.ceil(1 / fpr - 1e-9))
    if reals < needed:
        raise DataError(
            f"a threshold at a false positive rate of {fpr:g} needs at least {needed} reals, and here are {reals}: "
            "add real images, or ask for a higher rate"
        )
