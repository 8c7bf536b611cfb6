"""How sure the stack's weights are, and which members say the same. Needs scikit-learn."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from ensemble.core.metrics import Interval
from ensemble.grouped import one_thread
from ensemble.stackers import PENALISED, solve

DRAWS = 200
COLLINEAR = 0.98


def weight_intervals(
    kind: str, logits: np.ndarray, labels: np.ndarray, groups: np.ndarray, strength: float, seed: int = 0
) -> list[Interval] | None:
    """Each member's weight with its 95 % interval: refitted at this penalty on 200 draws of whole groups.

    None for kinds whose weights are not estimated.
    """
    if kind not in PENALISED:
        return None
    names, codes = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = []
    with one_thread():
        for _ in range(DRAWS):
            counts = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[codes]
            if len(np.unique(labels[counts > 0])) == 2:
                rows = counts > 0
                drawn.append(solve(kind, logits[rows], labels[rows], strength, counts[rows].astype(np.float64))[0])
        coef, _ = solve(kind, logits, labels, strength)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0) if drawn else np.full((2, len(coef)), np.nan)
    return [Interval(*map(float, values)) for values in zip(coef, low, high, strict=True)]


def near_collinear(names: Sequence[str], logits: np.ndarray) -> list[tuple[str, str, float]]:
    """Pairs of members whose logits [N, members] are correlated above 0.98: their weights mean little apart."""
    table = np.atleast_2d(np.corrcoef(logits, rowvar=False))
    pairs = combinations(range(len(names)), 2)
    return [(names[a], names[b], float(table[a, b])) for a, b in pairs if table[a, b] > COLLINEAR]
