"""Logistic regression with targets between 0 and 1, any quadratic penalty and a bound on the weights."""

from collections.abc import Callable

import numpy as np

from ensemble.core.metrics import sigmoid

MAX_STEPS, MIN_STEP = 100, 1e-6
DECREMENT_TOLERANCE = 1e-16  # twice what the mean loss could still fall by
RIDGE = 1e-12  # of the mean curvature, which is singular where a column is constant


def smoothed_targets(labels: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Targets float64 [N] a little off 0 and 1, so that the fit is finite where the rows can be separated.

    (A + 1) / (A + 2) for the A rows of ai, 1 / (R + 2) for the R real ones: Platt, "Probabilistic outputs for support
    vector machines" (1999). counts: how often each row counts.
    """
    counts = np.ones(len(labels)) if counts is None else counts
    ai, real = counts[labels == 1].sum(), counts[labels == 0].sum()
    return np.where(labels == 1, (ai + 1) / (ai + 2), 1 / (real + 2))


def equal_weights_penalty(members: int) -> np.ndarray:
    """The matrix S [members, members] with w' S w = sum of (w_m - mean of w)^2."""
    return np.eye(members) - 1 / members


def minimise_log_loss(
    features: np.ndarray,
    targets: np.ndarray,
    penalty: np.ndarray,
    counts: np.ndarray | None = None,
    lowest: float | None = None,
) -> tuple[np.ndarray, float]:
    """Weights w float64 [features] and intercept with the least summed log-loss + w' penalty w / 2.

    features: float64 [N, features]. targets: float64 [N] in 0..1. penalty: [features, features], positive
    semidefinite. counts: how often each row counts. lowest: a bound on the weights; the intercept is free.
    """
    counts = np.ones(len(targets)) if counts is None else counts
    size, total = features.shape[1], counts.sum()
    x = np.column_stack([features, np.ones(len(features))])
    s = np.zeros((size + 1, size + 1))
    s[:size, :size] = penalty

    def loss(b: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ b
        value = counts @ (np.logaddexp(0.0, z) - targets * z) + b @ s @ b / 2
        return float(value) / total, (x.T @ (counts * (sigmoid(z) - targets)) + s @ b) / total

    def curvature(b: np.ndarray) -> np.ndarray:
        p = sigmoid(x @ b)
        return ((x * (counts * p * (1 - p))[:, None]).T @ x + s) / total

    solution = _newton(loss, curvature, size + 1)
    if lowest is not None and (solution[:-1] < lowest).any():
        from scipy.optimize import minimize

        bounds = [(lowest, None)] * size + [(None, None)]
        options = {"maxiter": 1000, "gtol": 1e-8, "ftol": 1e-14}
        start = np.append(np.maximum(solution[:-1], lowest), solution[-1])
        solution = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return solution[:-1], float(solution[-1])


def _newton(
    loss: Callable[[np.ndarray], tuple[float, np.ndarray]], curvature: Callable[[np.ndarray], np.ndarray], size: int
) -> np.ndarray:
    """The minimum of a convex loss by Newton's method with step halving, from 0.

    As Lin, Lin and Weng, "A note on Platt's probabilistic outputs for support vector machines" (2007). SciPy's
    trust-region methods find the same in five times the time, most of it overhead of so small a problem.
    """
    b = np.zeros(size)
    value, gradient = loss(b)
    for _ in range(MAX_STEPS):
        step = np.linalg.solve(curvature(b) + RIDGE * np.eye(size), -gradient)
        if -float(gradient @ step) < DECREMENT_TOLERANCE:
            break
        length = 1.0
        while length > MIN_STEP:
            tried, tried_gradient = loss(b + length * step)
            if tried <= value + 1e-4 * length * float(gradient @ step):
                break
            length /= 2
        else:
            break  # no step is downhill: as near as floating point gets
        b, value, gradient = b + length * step, tried, tried_gradient
    return b
