"""The stacker: logistic regression over member logits. Fitting needs scikit-learn, applying NumPy."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensemble.errors import ArtifactError
from ensemble.metrics import log_loss, sigmoid

STRENGTHS = tuple(10.0**k for k in range(-4, 5))  # inverse L2 penalties tried
FOLDS = 5


@dataclass(frozen=True)
class Stacker:
    """target = sigmoid(intercept + sum of coef * logit), members in this order.

    threshold: target at or above it means ai.
    """

    members: tuple[str, ...]
    coef: tuple[float, ...]
    intercept: float
    threshold: float = 0.5

    def logit(self, logits: np.ndarray) -> np.ndarray:
        """float64 [N] from member logits [N, members]."""
        # summed member by member: the same sum for one row as for a thousand
        total = np.full(len(logits), self.intercept, dtype=np.float64)
        for column, weight in enumerate(self.coef):
            total += weight * np.asarray(logits[:, column], dtype=np.float64)
        return total

    def target(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated P(ai), float64 [N], from member logits [N, members]."""
        return sigmoid(self.logit(logits))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "members": list(self.members),
            "coef": list(self.coef),
            "intercept": self.intercept,
            "calibration": {"kind": "none", "reason": "logistic regression is fitted on the log-loss itself"},
            "threshold": self.threshold,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Stacker":
        """The stacker from `to_dict`'s values, or ArtifactError."""
        try:
            stacker = cls(
                tuple(values["members"]),
                tuple(float(c) for c in values["coef"]),
                float(values["intercept"]),
                float(values["threshold"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"stacker.json is damaged ({error!r}); run stack again") from None
        sound = 0 < len(stacker.members) == len(stacker.coef)
        if not sound or not np.isfinite([*stacker.coef, stacker.intercept]).all():
            raise ArtifactError("stacker.json is damaged (coefficients); run stack again")
        return stacker


def fit_stacker(names: Sequence[str], logits: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> Stacker:
    """Fit on held-out logits [N, members], the strength chosen by grouped cross-validation."""
    with _one_thread():
        strength = _choose_strength(logits, labels, groups)
        coef, intercept = _fit(logits, labels, strength)
    return Stacker(tuple(names), tuple(coef.tolist()), intercept)


def out_of_fold(logits: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Stack logits float64 [N], each by a stacker that saw no row of its group.

    The choice of strength is repeated inside each fold, so the scores owe it nothing.
    """
    result = np.empty(len(labels))
    with _one_thread():
        for fit, held in _folds(labels, groups):
            strength = _choose_strength(logits[fit], labels[fit], groups[fit])
            coef, intercept = _fit(logits[fit], labels[fit], strength)
            result[held] = logits[held].astype(np.float64) @ coef + intercept
    return result


def _one_thread() -> AbstractContextManager[object]:
    """No threads in linear algebra: on so few columns they wait for each other, on a busy machine for seconds."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")


def _folds(labels: np.ndarray, groups: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Grouped, stratified folds in which every fitting part has both classes."""
    from sklearn.model_selection import StratifiedGroupKFold

    # Of each class: with fewer, a fold could lack one.
    count = min(FOLDS, *(len(np.unique(groups[labels == label])) for label in (0, 1)))
    if count < 2:
        raise ArtifactError(
            "the held-out rows have too few groups with ai or with real images to cross-validate the stack; "
            "train with a larger --heldout or more groups"
        )
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=0)
    folds = list(splitter.split(np.zeros(len(labels)), labels, groups))
    if any(len(np.unique(labels[fit])) < 2 for fit, _ in folds):
        raise ArtifactError(
            "some cross-validation folds of the held-out rows have one class only; "
            "train with a larger --heldout or more groups"
        )
    return folds


def _choose_strength(logits: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    folds = _folds(labels, groups)
    losses = [np.mean([_fold_loss(logits, labels, fold, c) for fold in folds]) for c in STRENGTHS]
    return STRENGTHS[int(np.argmin(losses))]


def _fold_loss(logits: np.ndarray, labels: np.ndarray, fold: tuple[np.ndarray, np.ndarray], strength: float) -> float:
    fit, held = fold
    coef, intercept = _fit(logits[fit], labels[fit], strength)
    return log_loss(labels[held], sigmoid(logits[held].astype(np.float64) @ coef + intercept))


def _fit(logits: np.ndarray, labels: np.ndarray, strength: float) -> tuple[np.ndarray, float]:
    from sklearn.linear_model import LogisticRegression

    # Columns are not scaled: logits share a unit, and a member whose logits hardly move should hardly count.
    model = LogisticRegression(C=strength, max_iter=1000).fit(logits.astype(np.float64), labels)
    return model.coef_[0], float(model.intercept_[0])
