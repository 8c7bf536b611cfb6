"""Calibration of each member's probability (Platt), and of the stack's logit by one number. Needs SciPy."""

from collections.abc import Sequence

import numpy as np

from ensemble.core.metrics import sigmoid
from ensemble.stacking.grouped_cv import Fold
from ensemble.stacking.label_shift import log_odds
from ensemble.stacking.logistic import minimise_log_loss, smoothed_targets
from ensemble.stacking.stacker import Calibration, MemberCalibration

MIN_STANDARD_ERRORS = 2.0  # standard errors that the log-loss must fall by before `auto` calibrates
MIN_SCALE = 1e-9  # of a column in standard deviations; below it a member says nothing


def fit_member_calibrations(
    logits: np.ndarray, labels: np.ndarray, counts: np.ndarray | None = None
) -> tuple[MemberCalibration, ...]:
    """A calibration of each column of logits [N, members], fitted on the rows where the member gave an answer.

    Scale and shift are those of least log-loss to Platt's targets ("Probabilistic outputs for support vector
    machines", 1999) with scale >= 0: a member that ranks the wrong way round, and one with the same logit for all
    rows, gets scale 0. counts: how often each row counts.
    """
    counts = np.ones(len(labels)) if counts is None else counts
    result = []
    for column in np.asarray(logits, dtype=np.float64).T:
        rows = ~np.isnan(column) & (counts > 0)
        result.append(_fit_member(column[rows], labels[rows], counts[rows]))
    return tuple(result)


def soften(
    calibrations: Sequence[MemberCalibration],
    logits: np.ndarray,
    temperature: float,
    counts: np.ndarray | None = None,
) -> tuple[MemberCalibration, ...]:
    """Calibrations whose logits are divided by a temperature; logits, counts: that they were fitted on."""
    if temperature == 1:
        return tuple(calibrations)
    counts = np.ones(len(logits)) if counts is None else counts
    result = []
    for one, column in zip(calibrations, np.asarray(logits, dtype=np.float64).T, strict=True):
        rows = ~np.isnan(column) & (counts > 0)
        result.append(_with_mean(one.scale / temperature, one.shift / temperature, column[rows], counts[rows]))
    return tuple(result)


def _fit_member(logits: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> MemberCalibration:
    if not len(logits):
        return MemberCalibration(0.0, 0.0, 0.0)
    targets = smoothed_targets(labels, counts)
    center, spread = logits.mean(), logits.std()
    columns = ((logits - center) / (spread or 1.0))[:, None]  # logits of any size are fitted equally well
    (slope,), shift = minimise_log_loss(columns, targets, np.zeros((1, 1)), counts)
    if not spread or slope < MIN_SCALE:
        return MemberCalibration(0.0, log_odds(np.average(targets, weights=counts)), 0.0)
    return _with_mean(slope / spread, shift - slope / spread * center, logits, counts)


def _with_mean(scale: float, shift: float, logits: np.ndarray, counts: np.ndarray) -> MemberCalibration:
    """The calibration, with the logit whose calibrated probability is the mean over these answers."""
    if scale == 0:
        return MemberCalibration(0.0, float(shift), 0.0)
    mean = np.average(sigmoid(scale * logits + shift), weights=counts)
    return MemberCalibration(float(scale), float(shift), float((log_odds(mean) - shift) / scale))


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
    before, best = row_losses(labels, logits), (0.0, Calibration(reason="none lowers the log-loss beyond noise"))
    for kind in ("temperature", "shift"):
        held = np.empty(len(labels))
        for fit, rest in folds:
            held[rest] = _fit(kind, logits[fit], labels[fit]).apply(logits[rest])
        gain, error = clustered_mean(before - row_losses(labels, held), groups)
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
        lambda value: row_losses(labels, calibration(value).apply(logits)).mean(),
        bounds=(-limit, limit),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return calibration(float(solution.x))


def row_losses(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Log-loss of each row in nats, float64 [N], from its logit."""
    return np.logaddexp(0.0, np.where(labels == 1, -logits, logits))
