"""Scores part by part: by generator, by source, by degradation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ensemble.core.bootstrap import score_intervals
from ensemble.core.metrics import Interval, sigmoid

TITLES = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy_real": "accuracy on real",
    "accuracy_ai": "accuracy on ai",
}


@dataclass(frozen=True)
class Part:
    """The scores of one part; NaN where it lacks a class.

    real and ai: how many images they are of. groups: that its own images form; an interval
    over a handful of groups says little.
    """

    name: str
    real: int
    ai: int
    groups: int
    scores: dict[str, Interval]

    def to_dict(self) -> dict[str, object]:
        """JSON-ready values: null for NaN."""
        return vars(self) | {"scores": {name: score.to_dict() for name, score in self.scores.items()}}


def by(frame: pd.DataFrame, column: str, threshold: float = 0.5, resamples: int = 2000, seed: int = 0) -> list[Part]:
    """The scores of each value of `column`, in the order in which they first come.

    frame: a row an image, with label, group, logit and `column`. A generator's ai images are
    scored against all reals, since reals have no generator; a source and a cell by their own
    rows. The threshold is on p.
    """
    labels, values = frame["label"].to_numpy(), np.where(frame[column].isna(), "", frame[column].astype(str))
    p, groups = sigmoid(frame["logit"].to_numpy()), frame["group"].to_numpy(dtype=str)
    shared = (labels == 0) & (column == "generator")
    parts = []
    for name in pd.unique(values[~shared]):
        own = (values == name) & ~shared
        rows = own | shared
        scores = score_intervals(labels[rows], p[rows], groups[rows], threshold, resamples, seed, tuple(TITLES))
        real, ai = np.bincount(labels[rows], minlength=2).tolist()
        parts.append(Part(name or "not named", real, ai, len(set(groups[own])), scores))
    return parts


def as_table(parts: Sequence[Part], title: str = "") -> pd.DataFrame:
    """A row a part, as text for people; empty where there is no score."""
    named = {
        title: [part.name for part in parts],
        "real": [part.real for part in parts],
        "ai": [part.ai for part in parts],
        "groups": [part.groups for part in parts],
    }
    scores = {heading: [_text(part.scores[name]) for part in parts] for name, heading in TITLES.items()}
    return pd.DataFrame(named | scores)


def _text(score: Interval) -> str:
    return "" if np.isnan(score.value) else str(score)
