"""The threshold on target, chosen once on held-out rows and then frozen. NumPy only."""

from math import floor

import numpy as np

from ensemble.core.errors import DataError
from ensemble.core.metrics import check_fpr_resolvable

BALANCED = "balanced"
ROUNDING = 1e-9  # 0.05 of 20 reals is 1, whatever floating point makes of it


def parse_rule(text: str) -> str | float:
    """`balanced` and `fpr=SHARE` as they are, a number in 0..1 as a float; ValueError for anything else."""
    if text == BALANCED:
        return text
    if text.startswith("fpr="):
        if not 0 < float(text.removeprefix("fpr=")) < 1:
            raise ValueError("the share after fpr= lies between 0 and 1")
        return text
    if not 0 <= (value := float(text)) <= 1:
        raise ValueError("a threshold lies in 0..1")
    return value


def rule_of_threshold(threshold: float, threshold_rule: str) -> str | float:
    """The rule that gave `choose_threshold`'s answer: by it a threshold is chosen on other targets."""
    if threshold_rule == "balanced_accuracy":
        return BALANCED
    return threshold_rule if threshold_rule.startswith("fpr=") else threshold


def choose_threshold(rule: str | float, labels: np.ndarray, target: np.ndarray) -> tuple[float, str]:
    """(threshold, threshold_rule) by a rule of `parse_rule`, on targets float64 [N] of held-out rows.

    balanced: the highest balanced accuracy, of several thresholds the nearest to 0.5.
    fpr=SHARE: the lowest threshold that calls at most that share of real images ai.
    """
    if isinstance(rule, float):
        return rule, "given"
    values = np.unique(target)
    if len(values) < 2:
        raise DataError("the stack gives every held-out image the same target; no threshold separates ai from real")
    between = (values[:-1] + values[1:]) / 2
    # neighbouring floats have nothing in between
    candidates = np.append(values[0], np.where(between > values[:-1], between, values[1:]))
    real, ai = np.sort(target[labels == 0]), np.sort(target[labels == 1])
    called_real = 1 - np.searchsorted(real, candidates) / len(real)
    if rule == BALANCED:
        score = (1 - np.searchsorted(ai, candidates) / len(ai) + 1 - called_real) / 2
        best = candidates[score >= score.max() - ROUNDING]
        return float(best[np.argmin(np.abs(best - 0.5))]), "balanced_accuracy"
    share = float(str(rule).removeprefix("fpr="))
    check_fpr_resolvable(labels, share)
    allowed = floor(share * len(real) + ROUNDING) / len(real)
    low_enough = candidates[called_real <= allowed + ROUNDING]
    if not len(low_enough):
        raise DataError(f"--threshold {rule}: more real images than that have the highest target; take a larger share")
    return float(low_enough[0]), str(rule)
