"""Fit a stacker's weights by each method, and score it by (nested) cross-validation. Needs scikit-learn and SciPy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.core.metrics import auroc, log_loss, sigmoid
from ensemble.stacking.calibration import fit_calibration
from ensemble.stacking.grouped_cv import Fold, NestedFold, grouped_folds, nested_folds, single_threaded_blas
from ensemble.stacking.stacker import METHODS, Stacker

C_GRID = tuple(10.0**k for k in range(-4, 5))  # inverse L2 penalties tried
PENALISED_METHODS = ("logistic", "nonnegative")


@dataclass(frozen=True)
class FittedWeights:
    """Weights float64 [members] and intercept, and the inverse L2 penalty (scikit-learn's C) that they were fitted at.

    oof_logits: out-of-fold stack logits of the fitting rows, float64 [N], at that penalty.
    """

    coef: np.ndarray
    intercept: float
    inverse_penalty: float
    oof_logits: np.ndarray


@dataclass(frozen=True)
class StackLogits:
    """Stack logits float64 [N] of rows that the stacker was not fitted on, before and after calibration."""

    raw: np.ndarray
    calibrated: np.ndarray


def fit_stacker(
    names: Sequence[str],
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    method: str = METHODS[0],
    calibration: str = "none",
) -> Stacker:
    """Fit on held-out logits [N, members]; the penalty is chosen by grouped cross-validation."""
    return fit_on_folds(names, logits, labels, groups, grouped_folds(labels, groups), method, calibration)[0]


def fit_on_folds(
    names: Sequence[str],
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    folds: Sequence[Fold],
    method: str,
    calibration: str,
) -> tuple[Stacker, float]:
    """As `fit_stacker`, with known folds; also returns the inverse penalty chosen."""
    with single_threaded_blas():
        fitted = fit_weights(method, logits, labels, folds)
        calibrator = fit_calibration(calibration, fitted.oof_logits, labels, groups, folds)
    coef = tuple(fitted.coef.tolist())
    stacker = Stacker(tuple(names), coef, fitted.intercept, method=method, calibration=calibrator)
    return stacker, fitted.inverse_penalty


def nested_cv_logits(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    method: str = METHODS[0],
    calibration: str = "none",
    nests: Sequence[NestedFold] = (),
) -> StackLogits:
    """Stack logits, each by a stacker that saw no row of its group.

    All that is chosen (penalty, best member, calibration) is chosen anew inside each fold,
    so the scores owe it nothing. `nests`: from `nested_folds`, where they are known.
    """
    raw, calibrated = np.empty(len(labels)), np.empty(len(labels))
    with single_threaded_blas():
        for nest in nests or nested_folds(labels, groups):
            rows, held = nest.fit, nest.held_out
            fitted = fit_weights(method, logits[rows], labels[rows], nest.inner)
            raw[held] = logits[held].astype(np.float64) @ fitted.coef + fitted.intercept
            calibrator = fit_calibration(calibration, fitted.oof_logits, labels[rows], groups[rows], nest.inner)
            calibrated[held] = calibrator.apply(raw[held])
    return StackLogits(raw, calibrated)


def fit_weights(method: str, logits: np.ndarray, labels: np.ndarray, folds: Sequence[Fold]) -> FittedWeights:
    """Weights on these rows, at the penalty whose out-of-fold log-loss is lowest."""
    penalties = C_GRID if method in PENALISED_METHODS else (1.0,)
    oof_logits = {each: cross_val_logits(method, logits, labels, folds, each) for each in penalties}
    best = min(penalties, key=lambda each: log_loss(labels, sigmoid(oof_logits[each])))
    coef, intercept = solve_weights(method, logits, labels, best)
    return FittedWeights(coef, intercept, best, oof_logits[best])


def cross_val_logits(
    method: str,
    logits: np.ndarray,
    labels: np.ndarray,
    folds: Sequence[Fold],
    inverse_penalty: float,
) -> np.ndarray:
    """Stack logits float64 [N] of each fold's held rows by weights of its fitting rows, at one penalty."""
    result = np.empty(len(labels))
    for rows, held in folds:
        coef, intercept = solve_weights(method, logits[rows], labels[rows], inverse_penalty)
        result[held] = logits[held].astype(np.float64) @ coef + intercept
    return result


def solve_weights(
    method: str, logits: np.ndarray, labels: np.ndarray, inverse_penalty: float, weights: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Weights float64 [members] and intercept by one method, at one penalty; `weights`: how often each row counts."""
    count = logits.shape[1]
    if method == "mean":
        return np.full(count, 1 / count), 0.0
    if method == "best":
        return np.eye(count)[np.argmax([auroc(labels, column) for column in logits.T])], 0.0
    # Equal columns are fitted as one and share its weight: split, a penalty on squares would weigh them more.
    first = np.array([next(k for k in range(count) if np.array_equal(logits[:, k], column)) for column in logits.T])
    distinct, position, copies = np.unique(first, return_inverse=True, return_counts=True)
    least = _logistic if method == "logistic" else _nonnegative
    coef, intercept = least(logits[:, distinct].astype(np.float64), labels, inverse_penalty, weights)
    return (coef / copies)[position], intercept


def _logistic(
    logits: np.ndarray, labels: np.ndarray, inverse_penalty: float, weights: np.ndarray | None
) -> tuple[np.ndarray, float]:
    from sklearn.linear_model import LogisticRegression

    # Columns are not scaled: logits share a unit, and a member whose logits hardly move should hardly count.
    model = LogisticRegression(C=inverse_penalty, max_iter=1000).fit(logits, labels, sample_weight=weights)
    return model.coef_[0], float(model.intercept_[0])


def _nonnegative(
    logits: np.ndarray, labels: np.ndarray, inverse_penalty: float, weights: np.ndarray | None
) -> tuple[np.ndarray, float]:
    """As `_logistic`, the same penalised log-loss, with no weight below 0 (the intercept is free)."""
    from scipy.optimize import minimize

    counts = np.ones(len(labels)) if weights is None else weights
    share, penalty = counts / counts.sum(), 1 / (inverse_penalty * counts.sum())
    sign = np.where(labels == 1, 1.0, -1.0)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        coef, intercept = values[:-1], values[-1]
        margin = sign * (logits @ coef + intercept)
        slope = -share * sign * sigmoid(-margin)
        value = share @ np.logaddexp(0.0, -margin) + penalty / 2 * (coef @ coef)
        return float(value), np.append(logits.T @ slope + penalty * coef, slope.sum())

    start = np.zeros(logits.shape[1] + 1)
    bounds = [(0.0, None)] * logits.shape[1] + [(None, None)]
    options = {"maxiter": 1000, "gtol": 1e-6}
    solution = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return solution.x[:-1], float(solution.x[-1])
