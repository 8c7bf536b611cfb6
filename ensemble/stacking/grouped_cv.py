"""Cross-validation in which no group stands on both sides. Needs scikit-learn."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from ensemble.core.errors import ArtifactError

MAX_FOLDS = 5

Fold = tuple[np.ndarray, np.ndarray]  # positions of the rows to fit on, and of those held out


@dataclass(frozen=True)
class NestedFold:
    """A fold, and folds of its fitting rows; positions in `inner` count within those."""

    fit: np.ndarray
    held_out: np.ndarray
    inner: list[Fold]


def nested_folds(labels: np.ndarray, groups: np.ndarray) -> list[NestedFold]:
    """Folds within folds. Worth keeping: of 2,500 groups, a split takes most of a second."""
    return [
        NestedFold(fit, held_out, grouped_folds(labels[fit], groups[fit]))
        for fit, held_out in grouped_folds(labels, groups)
    ]


def grouped_folds(labels: np.ndarray, groups: np.ndarray) -> list[Fold]:
    """(fit, held) positions of grouped, stratified folds in which every fitting part has both classes."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    # Of each class: with fewer, a fold could lack one.
    count = min(MAX_FOLDS, *(len(np.unique(groups[labels == label])) for label in (0, 1)))
    if count < 2:
        raise ArtifactError(
            "the held-out rows have too few groups with ai or with real images to cross-validate the stack; "
            "train with a larger --heldout or more groups"
        )
    # where each row is its own group, the same folds' properties in a moment, not in minutes of 100,000 groups
    alone = len(np.unique(groups)) == len(groups)
    splitter = (StratifiedKFold if alone else StratifiedGroupKFold)(count, shuffle=True, random_state=0)
    folds = list(splitter.split(np.zeros(len(labels)), labels, None if alone else groups))
    if any(len(np.unique(labels[fit])) < 2 for fit, _ in folds):
        raise ArtifactError(
            "some cross-validation folds of the held-out rows have one class only; "
            "train with a larger --heldout or more groups"
        )
    return folds


def single_threaded_blas() -> AbstractContextManager[object]:
    """No threads in linear algebra: on so few columns they wait for each other, on a busy machine for seconds."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, user_api="blas")
