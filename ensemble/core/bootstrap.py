"""The cluster bootstrap: 95 % intervals of scores, of one model or of the difference between two.

Images of one group are not independent, so groups are drawn with replacement, not images (Field and Welsh,
"Bootstrapping clustered data", 2007); the ends are the 2.5 % and 97.5 % points of the scores over the draws. A draw is
how often each group counts, so no row is copied or sorted again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.core import metrics
from ensemble.core.metrics import SCORES, Interval

RESAMPLES, MIN_RESAMPLES = 2000, 400
CHUNK_WEIGHTS = 1 << 20  # weights held at a time: 8 MiB, and a few times that in passing


@dataclass(frozen=True)
class PairedDifference:
    """Model A against B on the same draws: A's AUROC minus B's, and the share of draws in which A is better.

    Draws in which both are equal count half.
    """

    difference: Interval
    better: float

    def to_dict(self) -> dict[str, object]:
        """JSON-ready values: null for NaN."""
        return {"difference": self.difference.to_dict(), "better": None if np.isnan(self.better) else self.better}


def score_intervals(
    labels: np.ndarray,
    p: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    threshold: float = 0.5,
    resamples: int = RESAMPLES,
    seed: int = 0,
    names: Sequence[str] = SCORES,
) -> dict[str, Interval]:
    """Each named score with its 95 % interval.

    Draws in which a score is undefined, for want of a class, are left out of its interval. With
    fewer than two groups the ends are NaN. `ece` is raised by chance, and more so in a draw than
    in the data: its interval lies high.
    """
    drawn = bootstrap_scores(labels, [p], groups, names, threshold, resamples, seed)
    return {name: percentile_interval(metrics.score(name, labels, p, threshold), drawn[name][0]) for name in names}


def paired_difference(
    labels: np.ndarray,
    p_a: np.ndarray,
    p_b: np.ndarray,
    groups: Sequence[str] | np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """The AUROC of A minus that of B, with both drawn together."""
    a, b = bootstrap_scores(labels, [p_a, p_b], groups, ("auroc",), resamples=resamples, seed=seed)["auroc"]
    value = metrics.auroc(labels, p_a) - metrics.auroc(labels, p_b)
    apart = (a - b)[np.isfinite(a - b)]
    better = float(np.mean((apart > 0) + (apart == 0) / 2)) if len(apart) else float("nan")
    return PairedDifference(percentile_interval(value, apart), better)


def percentile_interval(value: float, drawn: np.ndarray) -> Interval:
    """`value` between the 2.5 % and 97.5 % points of what was drawn, NaN left out."""
    drawn = drawn[~np.isnan(drawn)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (float("nan"), float("nan"))
    return Interval(value, float(low), float(high))


def bootstrap_scores(
    labels: np.ndarray,
    models: Sequence[np.ndarray] | np.ndarray,
    groups: Sequence[str] | np.ndarray,
    names: Sequence[str],
    threshold: float = 0.5,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Each named score of each model's p under the same draws: float64 [models, resamples], [models, 0] for one group.

    Sorted once; a draw of N rows costs a few passes over N numbers.
    """
    labels = np.asarray(labels)
    _, codes = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    ranked = [name for name in names if name in metrics.SCORES_OF_RANKS]
    plain = [name for name in names if name not in ranked]
    # scores of ranks need each model's rows in its own order; the others share one table of weights
    orders = [np.argsort(-np.asarray(p, dtype=np.float64), kind="stable") for p in models] if ranked else []
    drawn: dict[str, list[list[np.ndarray]]] = {name: [[] for _ in models] for name in names}
    for counts in _counts(codes, resamples, seed):
        weights = counts[:, codes] if plain else counts
        for model, p in enumerate(np.asarray(p) for p in models):
            scores = metrics.weighted_scores(labels, p, weights, plain, threshold)
            if ranked:
                order = orders[model]
                scores |= metrics.weighted_scores(labels[order], p[order], counts[:, codes[order]], ranked, threshold)
            for name, values in scores.items():
                drawn[name][model].append(values)
    return {
        name: np.array([np.concatenate([*parts, np.empty(0)]) for parts in columns]) for name, columns in drawn.items()
    }


def resamples_for(rows: int) -> int:
    """Draws for so many rows: 2,000, and fewer beyond 20,000 rows, whose intervals are narrow and whose draws slow."""
    return max(MIN_RESAMPLES, min(RESAMPLES, RESAMPLES * 20_000 // max(rows, 1)))


def _counts(codes: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each group is drawn, float64 [lines, groups], in chunks of lines; nothing for one group."""
    groups = int(codes.max()) + 1
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK_WEIGHTS // len(codes))
    for start in range(0, resamples if groups > 1 else 0, step):
        lines = min(step, resamples - start)
        chosen = rng.integers(groups, size=(lines, groups)) + groups * np.arange(lines)[:, None]
        yield np.bincount(chosen.ravel(), minlength=lines * groups).reshape(lines, groups).astype(np.float64)
