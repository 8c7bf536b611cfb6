"""Scores and their intervals, in NumPy.

Throughout: labels int [N] with ai = 1 and real = 0, p float [N] in [0, 1], logits float [N].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

EPSILON = 1e-15  # probabilities are clipped to [eps, 1 - eps] in the logarithm

Score = Callable[[np.ndarray, np.ndarray], float]


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
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-z)) in float64, without overflow at either end."""
    z = np.asarray(logits, dtype=np.float64)
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1.0 + small)


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the chance that an ai image scores above a real one, ties a half.

    The Mann-Whitney form. NaN if a class is missing.
    """
    labels, scores = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[inverse]
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def log_loss(labels: np.ndarray, p: np.ndarray) -> float:
    """Mean negative log-likelihood in nats; p is clipped to [1e-15, 1 - 1e-15]."""
    labels, p = np.asarray(labels).astype(bool), np.clip(np.asarray(p, dtype=np.float64), EPSILON, 1 - EPSILON)
    return float(-np.mean(np.log(np.where(labels, p, 1 - p))))


def balanced_accuracy(labels: np.ndarray, p: np.ndarray, threshold: float = 0.5) -> float:
    """Mean of the shares of ai and of real images that fall on their side; NaN if a class is missing."""
    labels, called = np.asarray(labels).astype(bool), np.asarray(p) >= threshold
    if labels.all() or not labels.any():
        return float("nan")
    return float((called[labels].mean() + (~called[~labels]).mean()) / 2)


def balanced_accuracy_interval(
    labels: np.ndarray, p: np.ndarray, groups: Sequence[str] | np.ndarray, resamples: int = 1000, seed: int = 0
) -> Interval:
    """`balanced_accuracy` with the interval of `cluster_interval`, fast for many groups.

    The score is a ratio of sums over groups, so a draw is a vector of counts.
    """
    labels, called = np.asarray(labels).astype(bool), np.asarray(p) >= 0.5
    _, codes = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    parts = (labels & called, labels, ~labels & ~called, ~labels)
    sums = np.stack([np.bincount(codes, weights=part) for part in parts], axis=1)
    rng = np.random.default_rng(seed)
    chances = np.full(len(sums), 1 / len(sums))
    drawn = []
    for _ in range(resamples if len(sums) > 1 else 0):
        hits, ai, rejections, real = rng.multinomial(len(sums), chances) @ sums
        if ai and real:
            drawn.append((hits / ai + rejections / real) / 2)
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (float("nan"), float("nan"))
    return Interval(balanced_accuracy(labels, p), float(low), float(high))


def cluster_interval(
    score: Score,
    labels: np.ndarray,
    values: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """`score` with its 95 % percentile interval under a cluster bootstrap.

    Whole groups are drawn with replacement, since images of one group are not independent
    (Field and Welsh, "Bootstrapping clustered data", 2007). Draws that lack a class are left out.
    """
    labels, values = np.asarray(labels), np.asarray(values)
    _, codes = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples if len(rows) > 1 else 0):
        chosen = np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])
        if 0 < labels[chosen].sum() < len(chosen):
            drawn.append(score(labels[chosen], values[chosen]))
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (float("nan"), float("nan"))
    return Interval(score(labels, values), float(low), float(high))
