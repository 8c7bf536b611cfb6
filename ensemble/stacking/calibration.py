"""Calibration of the stack's logit by one number. Needs scikit-learn and SciPy."""

from collections.abc import Sequence

import numpy as np

from ensemble.stacking.grouped_cv import Fold
from ensemble.stacking.stacker import Calibration

MIN_STANDARD_ERRORS = 2.0  # standard errors that the log-loss must fall by before `auto` calibrates


def fit_calibration(
    choice: str, logits: np.ndarray, labels: np.ndarray, groups: np.ndarray, folds: Sequence[Fold]
) -> Calibration:
    """The calibration of stack logits float64 [N] that were made by weights fitted on other rows.

    `auto` keeps none, unless one number fitted on other groups lowers the log-loss by more
    than two of its standard errors over groups; of two that do, the one that lowers it more.
    """
    if choice == "none":
        return Calibration(reason="--calibration none")
    if choice != "auto":
        return _fit(choice, logits, labels, f"--calibration {choice}")
    before, best = _losses(labels, logits), (0.0, Calibration(reason="none lowers the log-loss beyond noise"))
    for kind in ("temperature", "shift"):
        held = np.empty(len(labels))
        for fit, rest in folds:
            held[rest] = _fit(kind, logits[fit], labels[fit]).apply(logits[rest])
        gain, error = clustered_mean(before - _losses(labels, held), groups)
        if gain > max(best[0], MIN_STANDARD_ERRORS * error):
            reason = f"lowers the log-loss by {gain:.4f}, standard error {error:.4f}, on groups it was not fitted on"
            best = (gain, _fit(kind, logits, labels, reason))
    return best[1]


def clustered_mean(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """The mean of values float [N] and its standard error, rows of a group taken as dependent.

    The linearised variance of a ratio mean over clusters (Cochran, "Sampling techniques", 1977, 6.13).
    """
    _, codes = np.unique(groups, return_inverse=True)
    mean = float(values.mean())
    sums = np.bincount(codes, weights=values - mean)
    spread = float(np.sqrt(np.sum(sums**2) * len(sums) / max(len(sums) - 1, 1)) / len(values))
    return mean, spread


def _fit(kind: str, logits: np.ndarray, labels: np.ndarray, reason: str = "") -> Calibration:
    """Temperature: Guo et al., "On calibration of modern neural networks" (2017); shift: an intercept alone."""
    from scipy.optimize import minimize_scalar

    def calibration(value: float) -> Calibration:
        return Calibration(kind, reason=reason, **({"scale": float(np.exp(value))} if scaled else {"shift": value}))

    scaled = kind == "temperature"
    limit = 8.0 if scaled else 40.0
    solution = minimize_scalar(
        lambda value: _losses(labels, calibration(value).apply(logits)).mean(),
        bounds=(-limit, limit),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return calibration(float(solution.x))


def _losses(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Log-loss of each row in nats, from its logit."""
    return np.logaddexp(0.0, np.where(labels == 1, -logits, logits))
