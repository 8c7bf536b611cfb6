"""Metrics of binary classification (AUROC, ECE, log-loss, ...) in NumPy, also of many weightings of the rows at once.

Throughout: labels int [N] with ai = 1 and real = 0; p float [N] in [0, 1]; scores float [N] of any range; weights
float [B, N], whose lines hold how often each row counts, in whole numbers. A plain metric is the weighted one with a
single line of ones. A metric is NaN where a class that it needs is missing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ensemble.core.errors import DataError

LOG_LOSS_EPSILON = 1e-15  # p is clipped to [eps, 1 - eps] in the logarithm
ECE_BINS = 15  # bins of equal width, as in Guo et al. (2017)


@dataclass(frozen=True)
class Interval:
    """A score with the ends of its 95 % interval; NaN ends where it could not be resampled."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """JSON-ready values: null for NaN."""
        return {key: None if np.isnan(value) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Interval":
        """The interval from `to_dict`'s values; TypeError for other keys, and for what is no number."""
        return cls(**{key: np.nan if value is None else 0.0 + value for key, value in values.items()})

    def __str__(self) -> str:
        ends = "" if np.isnan(self.low) else f" [{self.low:.4f}, {self.high:.4f}]"
        return f"{self.value:.4f}{ends}"


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)) in float64, without overflow at either end."""
    z = np.asarray(logits, dtype=np.float64)
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1.0 + small)


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the probability that an ai image scores above a real one; ties count half."""
    return float(_auroc(*roc_counts(labels, scores))[0])


def log_loss(labels: np.ndarray, p: np.ndarray) -> float:
    """Mean negative log-likelihood in nats; p is clipped to [1e-15, 1 - 1e-15]."""
    return score("log_loss", labels, p)


def expected_calibration_error(labels: np.ndarray, p: np.ndarray) -> float:
    """Expected calibration error (ECE): |mean p - share of ai| in each bin of p, averaged over bins by their rows.

    Guo et al., "On calibration of modern neural networks" (2017), with p of the class ai in
    place of confidence. Chance alone makes it positive: with n rows of calibrated p in a bin,
    the expected distance there is about sqrt(2 / (pi n)) times the standard deviation of the labels.
    """
    return score("ece", labels, p)


def score(name: str, labels: np.ndarray, p: np.ndarray, threshold: float = 0.5) -> float:
    """The metric called `name`, one of SCORES."""
    return float(weighted_scores(labels, p, np.ones((1, len(labels))), (name,), threshold)[name][0])


def weighted_scores(
    labels: np.ndarray, p: np.ndarray, weights: np.ndarray, names: Sequence[str], threshold: float = 0.5
) -> dict[str, np.ndarray]:
    """Each named metric under each line of weights: float64 [B]."""
    p = np.asarray(p)
    rows = _Rows(np.asarray(labels).astype(bool), p.astype(np.float64), p >= threshold)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {name: _SCORES_OF_ROWS[name](rows, weights) for name in names if name in _SCORES_OF_ROWS}
    ranked = [name for name in names if name in _SCORES_OF_CURVE]
    if ranked:
        curve = roc_counts(labels, p, weights)
        found |= {name: _SCORES_OF_CURVE[name](*curve) for name in ranked}
    return {name: found[name] for name in names}


def roc_counts(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """True positives and false positives at each threshold of the ROC curve: float64 [B, 1 + U] twice.

    The thresholds are the U distinct scores, from high to low, after one above them all. Fastest where scores come
    sorted from high to low.
    """
    labels, scores = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    weights = np.ones((1, len(labels))) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    labels, scores, weights = labels[order], scores[order], weights[:, order]
    above = np.zeros((2, len(weights), 1 + len(order)))
    np.cumsum(weights * labels, axis=1, out=above[0, :, 1:])
    np.cumsum(weights * ~labels, axis=1, out=above[1, :, 1:])
    ends = np.r_[True, scores[1:] != scores[:-1], np.ones(min(len(scores), 1), bool)]
    return (above[0], above[1]) if ends.all() else (above[0][:, ends], above[1][:, ends])


def _auroc(tp: np.ndarray, fp: np.ndarray) -> np.ndarray:
    steps = np.diff(fp, axis=1)
    # twice the area in whole numbers: exact up to the division
    doubled = np.einsum("ij,ij->i", steps, tp[:, 1:]) + np.einsum("ij,ij->i", steps, tp[:, :-1])
    return _where_both(tp, fp, doubled / np.maximum(2 * tp[:, -1] * fp[:, -1], 1))


def _average_precision(tp: np.ndarray, fp: np.ndarray) -> np.ndarray:
    precision = tp / np.maximum(tp + fp, 1)
    found = np.einsum("ij,ij->i", np.diff(tp, axis=1), precision[:, 1:])
    return _where_both(tp, fp, found / np.maximum(tp[:, -1], 1))


def _tpr_at_fpr(tp: np.ndarray, fp: np.ndarray, fpr: float) -> np.ndarray:
    allowed = fp <= fpr * fp[:, -1:] + 1e-9  # 0.29 * 100 is a little less than 29
    found = tp[np.arange(len(tp)), np.count_nonzero(allowed, axis=1) - 1]
    return _where_both(tp, fp, found / np.maximum(tp[:, -1], 1))


def _where_both(tp: np.ndarray, fp: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where((tp[:, -1] > 0) & (fp[:, -1] > 0), values, np.nan)


@dataclass(frozen=True)
class _Rows:
    """labels bool [N], p float64 [N], predicted bool [N]: p is at or above the threshold."""

    labels: np.ndarray
    p: np.ndarray
    predicted: np.ndarray


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (weights @ values) / weights.sum(axis=1)


def _on_real(rows: _Rows, weights: np.ndarray) -> np.ndarray:
    return (weights @ (~rows.labels & ~rows.predicted)) / (weights @ ~rows.labels)


def _on_ai(rows: _Rows, weights: np.ndarray) -> np.ndarray:
    return (weights @ (rows.labels & rows.predicted)) / (weights @ rows.labels)


def _balanced_accuracy(rows: _Rows, weights: np.ndarray) -> np.ndarray:
    return (_on_ai(rows, weights) + _on_real(rows, weights)) / 2


def _f1(rows: _Rows, weights: np.ndarray) -> np.ndarray:
    ai, predicted, tp = (weights @ side for side in (rows.labels, rows.predicted, rows.labels & rows.predicted))
    return np.where(ai > 0, 2 * tp / (ai + predicted), np.nan)


def _log_loss(rows: _Rows, weights: np.ndarray) -> np.ndarray:
    p = np.clip(rows.p, LOG_LOSS_EPSILON, 1 - LOG_LOSS_EPSILON)
    return _mean(-np.log(np.where(rows.labels, p, 1 - p)), weights)


def _ece(rows: _Rows, weights: np.ndarray) -> np.ndarray:
    off = np.zeros((len(rows.p), ECE_BINS))
    bin_of = np.searchsorted(np.linspace(0, 1, ECE_BINS + 1)[1:-1], rows.p)
    off[np.arange(len(rows.p)), bin_of] = rows.p - rows.labels
    return np.abs(weights @ off).sum(axis=1) / weights.sum(axis=1)


_SCORES_OF_ROWS: dict[str, Callable[[_Rows, np.ndarray], np.ndarray]] = {
    "balanced_accuracy": _balanced_accuracy,
    "f1": _f1,
    "accuracy_real": _on_real,
    "accuracy_ai": _on_ai,
    "log_loss": _log_loss,
    "brier": lambda rows, weights: _mean((rows.p - rows.labels) ** 2, weights),
    "ece": _ece,
}
_SCORES_OF_CURVE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "auroc": _auroc,
    "average_precision": _average_precision,
    "tpr_at_1": partial(_tpr_at_fpr, fpr=0.01),
    "tpr_at_5": partial(_tpr_at_fpr, fpr=0.05),
}
SCORES = tuple(
    "auroc average_precision balanced_accuracy f1 accuracy_real accuracy_ai "
    "tpr_at_1 tpr_at_5 log_loss brier ece".split()
)
SCORES_OF_RANKS = tuple(_SCORES_OF_CURVE)  # those that depend on the order of p alone


def check_fpr_resolvable(labels: np.ndarray, fpr: float) -> None:
    """Raise DataError if the reals are too few for a threshold at this false positive rate."""
    if not 0 < fpr < 1:
        raise DataError(f"a false positive rate lies between 0 and 1, not at {fpr:g}")
    reals, needed = int((np.asarray(labels) == 0).sum()), int(np.ceil(1 / fpr - 1e-9))
    if reals < needed:
        raise DataError(
            f"a threshold at a false positive rate of {fpr:g} needs at least {needed} reals, and here are {reals}: "
            "add real images, or ask for a higher rate"
        )
