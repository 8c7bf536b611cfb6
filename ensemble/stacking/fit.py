"""Fit a stacker by each method, and score it by (nested) cross-validation. Needs scikit-learn and SciPy.

The methods of `stack --kind`; q is a member's calibrated probability (calibration.py), softened by a temperature t:
q = sigmoid(calibrated logit / t). t is 1 unless another of TEMPERATURES lowers the log-loss beyond noise, by grouped
cross-validation. At 1 a very large logit counts hardly more than a large one, which is better for detectors that are
confidently wrong on new generators; at 8 q is nearly linear in the logit, which is better where large logits are right.

- logistic: logistic regression on q, the weights penalised towards being equal: to the summed log-loss is added
  1/2 * sum of ((w_m - mean of w) / t)^2, the negative log of a normal prior of variance t^2 around a common weight,
  which is free itself. The targets are Platt's, so that weights stay finite where the rows can be separated.
- nonnegative: the same, with no weight below 0.
- mean: the same with all weights equal; it ranks as the mean of q.
- best: q of the member whose AUROC is highest on the rows.
- logit: logistic regression on the logits, penalised towards 0, the penalty chosen by grouped cross-validation.

Stackers of format version 1 are fitted anew, where a part of their members or rows is scored, by `logit` and three
methods on logits that `stack` no longer offers: logit-nonnegative, logit-mean and logit-best.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ensemble.core.metrics import auroc
from ensemble.stacking.calibration import (
    MIN_STANDARD_ERRORS,
    clustered_mean,
    fit_calibration,
    fit_member_calibrations,
    row_losses,
    soften,
)
from ensemble.stacking.grouped_cv import Fold, NestedFold, grouped_folds, nested_folds, single_threaded_blas
from ensemble.stacking.label_shift import log_odds
from ensemble.stacking.logistic import equal_weights_penalty, minimise_log_loss, smoothed_targets
from ensemble.stacking.stacker import METHODS, MemberCalibration, Stacker, calibrated_probabilities

C_GRID = tuple(10.0**k for k in range(-4, 5))  # inverse L2 penalties tried by methods whose penalty is chosen
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)  # the first is the default
WEIGHTED_METHODS = ("logistic", "nonnegative", "logit", "logit-nonnegative")  # those that estimate a weight per member
CHOSEN_PENALTY_METHODS = ("logit", "logit-nonnegative")
SOFTENED_METHODS = ("logistic", "nonnegative", "mean")


@dataclass(frozen=True)
class FittedStacker:
    """A stacker without calibration of its logit, and the strength that it was fitted at.

    strength: what cross-validation chose: scikit-learn's C of methods with a penalty towards 0, else the temperature.
    oof_logits: out-of-fold stack logits of the fitting rows, float64 [N], at that strength.
    """

    stacker: Stacker
    strength: float
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
    """Fit on held-out logits [N, members], NaN where a member gave no answer; folds are of whole groups."""
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
    """As `fit_stacker`, with known folds; also returns the strength chosen."""
    with single_threaded_blas():
        fitted = fit_with_strength(method, logits, labels, groups, folds)
        calibrator = fit_calibration(calibration, fitted.oof_logits, labels, groups, folds)
    return replace(fitted.stacker, members=tuple(names), calibration=calibrator), fitted.strength


def nested_cv_logits(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    method: str = METHODS[0],
    calibration: str = "none",
    nests: Sequence[NestedFold] = (),
) -> StackLogits:
    """Stack logits, each by a stacker that saw no row of its group.

    All that is chosen (calibrations, penalty, best member) is chosen anew inside each fold,
    so the scores owe it nothing. `nests`: from `nested_folds`, where they are known.
    """
    raw, calibrated = np.empty(len(labels)), np.empty(len(labels))
    with single_threaded_blas():
        for nest in nests or nested_folds(labels, groups):
            rows, held = nest.fit, nest.held_out
            fitted = fit_with_strength(method, logits[rows], labels[rows], groups[rows], nest.inner)
            raw[held] = fitted.stacker.raw_logit(fitted.stacker.fill_missing(logits[held]))
            calibrator = fit_calibration(calibration, fitted.oof_logits, labels[rows], groups[rows], nest.inner)
            calibrated[held] = calibrator.apply(raw[held])
    return StackLogits(raw, calibrated)


def fit_with_strength(
    method: str, logits: np.ndarray, labels: np.ndarray, groups: np.ndarray, folds: Sequence[Fold]
) -> FittedStacker:
    """A stacker of these rows, at the strength that grouped cross-validation chooses by the log-loss.

    Of penalties the best is taken, of temperatures the default unless another is better beyond noise.
    """
    softened = method in SOFTENED_METHODS
    choices = TEMPERATURES if softened else C_GRID if method in CHOSEN_PENALTY_METHODS else (1.0,)
    oof_logits = _cross_validate(method, logits, labels, folds, choices)
    losses = {each: row_losses(labels, column) for each, column in oof_logits.items()}
    best = min(losses, key=lambda each: losses[each].mean())
    if softened:
        gain, error = clustered_mean(losses[choices[0]] - losses[best], groups)
        best = best if gain > MIN_STANDARD_ERRORS * error else choices[0]
    return FittedStacker(solve(method, logits, labels, best), best, oof_logits[best])


def cross_val_logits(
    method: str, logits: np.ndarray, labels: np.ndarray, folds: Sequence[Fold], strength: float
) -> np.ndarray:
    """Stack logits float64 [N] of each fold's held rows by a stacker of its fitting rows, at one strength."""
    return _cross_validate(method, logits, labels, folds, [strength])[strength]


def _cross_validate(
    method: str, logits: np.ndarray, labels: np.ndarray, folds: Sequence[Fold], strengths: Sequence[float]
) -> dict[float, np.ndarray]:
    """As `cross_val_logits`, by strength; members are calibrated once a fold."""
    result = {strength: np.empty(len(labels)) for strength in strengths}
    for rows, held in folds:
        calibrations = fit_member_calibrations(logits[rows], labels[rows])
        for strength, column in result.items():
            stacker = solve(method, logits[rows], labels[rows], strength, calibrations=calibrations)
            column[held] = stacker.raw_logit(stacker.fill_missing(logits[held]))
    return result


def solve(
    method: str,
    logits: np.ndarray,
    labels: np.ndarray,
    strength: float = 1.0,
    counts: np.ndarray | None = None,
    calibrations: Sequence[MemberCalibration] = (),
) -> Stacker:
    """A stacker by one method, at one strength, without names of members and calibration of its logit.

    logits: float [N, members], NaN where a member gave no answer. strength: of FittedStacker. counts: how often each
    row counts. calibrations: of the members on these rows, where they are known.
    """
    if method.startswith("logit-"):
        coef, intercept = _solve_on_logits(method.removeprefix("logit-"), logits, labels, strength, counts)
        return Stacker((), tuple(coef.tolist()), intercept, method=method.removeprefix("logit-"))
    temperature = strength if method in SOFTENED_METHODS else 1.0
    calibrations = calibrations or fit_member_calibrations(logits, labels, counts)
    calibrations = soften(calibrations, logits, temperature, counts)
    stacker = Stacker((), (), 0.0, method=method, member_calibrations=calibrations)
    logits = stacker.fill_missing(logits)
    if method == "logit":
        coef, intercept = _solve_on_logits("logistic", logits, labels, strength, counts)
    elif method == "best":
        p = calibrated_probabilities(logits, calibrations)
        best = int(np.argmax([auroc(labels, column) for column in p.T]))
        coef, intercept = calibrations[best].scale * np.eye(p.shape[1])[best], calibrations[best].shift
    else:
        coef, intercept = _solve_on_probabilities(method, stacker.parts(logits), labels, temperature, counts)
    return replace(stacker, coef=tuple(coef.tolist()), intercept=intercept)


def _solve_on_probabilities(
    method: str, p: np.ndarray, labels: np.ndarray, temperature: float, counts: np.ndarray | None
) -> tuple[np.ndarray, float]:
    """Weights float64 [members] and intercept of logistic, nonnegative or mean, from p float64 [N, members]."""
    targets, count = smoothed_targets(labels, counts), p.shape[1]
    if method == "mean":
        coef, intercept = minimise_log_loss(p.mean(axis=1)[:, None], targets, np.zeros((1, 1)), counts, lowest=0.0)
        return np.full(count, coef[0] / count), intercept
    varying = p.min(axis=0) < p.max(axis=0)  # a member whose calibrated probability never moves has no weight
    if not varying.any():
        return np.zeros(count), log_odds(np.average(targets, weights=counts))
    columns, share = _merge_equal_columns(p[:, varying])
    penalty = equal_weights_penalty(columns.shape[1]) / temperature**2
    lowest = 0.0 if method == "nonnegative" else None
    coef, intercept = minimise_log_loss(columns, targets, penalty, counts, lowest)
    weights = np.zeros(count)
    weights[varying] = share(coef)
    return weights, intercept


def _solve_on_logits(
    method: str, logits: np.ndarray, labels: np.ndarray, inverse_penalty: float, counts: np.ndarray | None
) -> tuple[np.ndarray, float]:
    """Weights float64 [members] and intercept on logits [N, members], penalised towards 0."""
    count = logits.shape[1]
    if method == "mean":
        return np.full(count, 1 / count), 0.0
    if method == "best":
        return np.eye(count)[np.argmax([auroc(labels, column) for column in logits.T])], 0.0
    columns, share = _merge_equal_columns(np.asarray(logits, dtype=np.float64))
    # Columns are not scaled: logits share a unit, and a member whose logits hardly move should hardly count.
    if method == "logistic":
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=inverse_penalty, max_iter=1000).fit(columns, labels, sample_weight=counts)
        coef, intercept = model.coef_[0], float(model.intercept_[0])
    else:
        penalty = np.eye(columns.shape[1]) / inverse_penalty
        coef, intercept = minimise_log_loss(columns, labels.astype(np.float64), penalty, counts, lowest=0.0)
    return share(coef), intercept


def _merge_equal_columns(columns: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """The distinct columns [N, distinct], and what shares their weights among the copies: a penalty on split weights
    would count a member that stands twice for more.
    """
    first = np.array(
        [next(k for k in range(columns.shape[1]) if np.array_equal(columns[:, k], column)) for column in columns.T]
    )
    distinct, position, copies = np.unique(first, return_inverse=True, return_counts=True)
    return columns[:, distinct], lambda coef: (coef / copies)[position]
