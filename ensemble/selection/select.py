"""Choose pool images like the test's: spread over the test, balanced by class, without near-duplicates.

Throughout: M pool images, T test images, D the width of a feature vector; rows are int64 positions in the pool
or the test.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ensemble.core.errors import DataError
from ensemble.core.names import LABELS
from ensemble.data.dataset import equal_pairs
from ensemble.data.sources import UNLABELLED
from ensemble.images import near_duplicates
from ensemble.models.features import Features
from ensemble.selection.neighbours import Search, exact_search, make_search

MAX_CLUSTERS = 256
BLOCK_ROWS = 65_536  # pool images compared with the test at once
FIRST_NEIGHBOURS = 32  # neighbours looked up per test image at first; doubled while turns remain


@dataclass(frozen=True)
class Pool:
    """The images to choose from. labels: int64 [M], maybe UNLABELLED. allowed: bool [M], may be chosen."""

    features: Features
    labels: np.ndarray
    allowed: np.ndarray

    def candidates(self, label: int) -> np.ndarray:
        """bool [M]: the allowed images of one class."""
        return np.asarray(self.allowed & (self.labels == label))


@dataclass(frozen=True)
class Selection:
    """The chosen pool images, in the order of choice.

    rows and test_rows: int64 [N], the pool image and the test image that it was chosen for.
    distances: float32 [N], 1 - cosine of the two, in [0, 2]. duplicates: how many images were
    skipped as near-duplicates of images chosen before them.
    """

    rows: np.ndarray
    test_rows: np.ndarray
    distances: np.ndarray
    duplicates: int


def class_counts(labels: np.ndarray, count: int, balance: float | None = None) -> dict[int, int]:
    """How many images of each class to choose. balance: the share of ai, by default a half.

    From a pool of one class, or an unlabelled one, all come from it unless `balance` is given.
    """
    present = set(labels.tolist())
    if present == {UNLABELLED}:
        return {UNLABELLED: count}
    if balance is None:
        balance = 0.5 if len(present) == 2 else float(present == {1})
    ai = round(count * balance)
    return {1: ai, 0: count - ai}


def duplicates_of_test(pool: Features, test: Features) -> np.ndarray:
    """bool [M]: pool images that are near-duplicates of a test image, or have exactly its pixels."""
    test_pixels = {digest.tobytes() for digest in test.pixels}
    mask = np.array([digest.tobytes() in test_pixels for digest in pool.pixels], dtype=bool)
    for start in range(0, len(mask), BLOCK_ROWS):
        hashes, thumbs = pool.hashes[start : start + BLOCK_ROWS].tolist(), pool.thumbs[start : start + BLOCK_ROWS]
        pairs = near_duplicates.near_duplicates_between(hashes, thumbs, test.hashes.tolist(), test.thumbs)
        mask[[start + row for row, _ in pairs]] = True
    return mask


def conflicting_labels(pool: Features, labels: np.ndarray) -> np.ndarray:
    """bool [M]: images whose exact pixels are in the pool both as ai and as real."""
    by_pixels = pd.Series(labels).groupby([digest.tobytes() for digest in pool.pixels])
    return (by_pixels.transform("nunique") > 1).to_numpy()


def kmeans_labels(vectors: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """int64 [T]: the k-means cluster of each vector; by default about sqrt(T / 2) clusters (Mardia et al., 1979)."""
    from sklearn.cluster import KMeans

    clusters = count or max(1, min(MAX_CLUSTERS, round((len(vectors) / 2) ** 0.5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct vectors than clusters: the rest stay empty
        fitted = KMeans(min(clusters, len(vectors)), n_init=4, random_state=seed).fit(np.ascontiguousarray(vectors))
    return np.asarray(fitted.labels_, dtype=np.int64)


def largest_remainder(sizes: np.ndarray, total: int) -> np.ndarray:
    """int64 [C]: `total` divided in proportion to sizes int64 [C] by the largest remainder method."""
    exact = total * sizes / sizes.sum()
    shares = np.floor(exact).astype(np.int64)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: total - shares.sum()]] += 1
    return shares


def query_order(clusters: np.ndarray, total: int, seed: int, before: np.ndarray | None = None) -> np.ndarray:
    """int64 [total]: the test image that queries the pool at each turn.

    Clusters (int64 [T]) have turns in proportion to their size. Within one, its images take
    turns in an order shuffled by `seed`; the turns of all clusters are interleaved evenly.
    before: int64 [C], turns that each cluster has had already, for another class.
    """
    sizes = np.bincount(clusters)
    order = np.random.default_rng(seed).permutation(len(clusters))
    queries, rounds, fractions = [], [], []
    for cluster, share in enumerate(largest_remainder(sizes, total)):
        members = order[clusters[order] == cluster]
        if share:
            steps = np.arange(share) + (before[cluster] if before is not None else 0)
            queries.append(members[steps % len(members)])
            rounds.append(np.arange(share) // len(members))
            fractions.append(np.arange(share) % len(members) / len(members))
    if not queries:
        return np.empty(0, dtype=np.int64)
    return np.concatenate(queries)[np.lexsort((np.concatenate(fractions), np.concatenate(rounds)))]


def assign_nearest(turns: np.ndarray, vectors: np.ndarray, search: Search, available: np.ndarray) -> np.ndarray:
    """int64 [turns]: the pool row nearest to each turn's test image among those not assigned before; -1 for none.

    turns: rows of `vectors` float32 [T, D]. available: bool [M], changed in place. A turn whose
    list of neighbours has nothing left waits for the next round, with a list twice as long.
    """
    rows = np.full(len(turns), -1, dtype=np.int64)
    waiting = np.arange(len(turns))
    count = FIRST_NEIGHBOURS // 2
    while len(waiting) and available.any():
        queries, inverse, repeats = np.unique(turns[waiting], return_inverse=True, return_counts=True)
        count = max(2 * count, 2 * int(repeats.max()))
        neighbours = search(vectors[queries], count, available)[1].tolist()
        unread = [iter(row) for row in neighbours]
        for turn, query in zip(waiting.tolist(), inverse.tolist(), strict=True):
            row = next((row for row in unread[query] if row >= 0 and available[row]), -1)
            if row >= 0:
                rows[turn], available[row] = row, False
        waiting = waiting[rows[waiting] < 0]
    return rows


def choose_distinct(
    choose: Callable[[np.ndarray], np.ndarray], pool: Pool, label: int, counts: dict[int, int]
) -> tuple[np.ndarray, int]:
    """counts[label] pool rows without near-duplicates among them, and how many near-duplicates were skipped.

    choose: indices of turns -> a pool row for each, never the same row twice, -1 where none is left.
    Raises DataError where there are too few.
    """
    chosen = np.full(counts[label], -1, dtype=np.int64)
    open_turns, skipped = np.arange(counts[label]), 0
    while len(open_turns):
        rows = choose(open_turns)
        if (rows < 0).any():
            raise _too_few(pool, counts)
        duplicate = _duplicate_mask(pool.features, chosen[chosen >= 0], rows)
        chosen[open_turns[~duplicate]] = rows[~duplicate]
        open_turns, skipped = open_turns[duplicate], skipped + int(duplicate.sum())
    return chosen, skipped


def _duplicate_mask(pool: Features, chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """bool [rows]: near-duplicates of a chosen image, or of an image before them in `rows` that is none itself."""
    duplicate = np.zeros(len(rows), dtype=bool)
    if len(chosen):
        hashes, thumbs = pool.hashes[rows].tolist(), pool.thumbs[rows]
        pairs = near_duplicates.near_duplicates_between(
            hashes, thumbs, pool.hashes[chosen].tolist(), pool.thumbs[chosen]
        )
        duplicate[[i for i, _ in pairs]] = True
    pairs = equal_pairs(digest.tobytes() for digest in pool.pixels[rows])
    while True:  # near_duplicates gives only some pairs of a large group, so the remaining images are compared again
        remaining = np.flatnonzero(~duplicate)
        if len(remaining) < 2:
            return duplicate
        near = near_duplicates.near_duplicates(pool.hashes[rows[remaining]].tolist(), pool.thumbs[rows[remaining]])
        pairs += [(int(remaining[i]), int(remaining[j])) for i, j in near]
        if not pairs:
            return duplicate
        for i, j in sorted(pairs):
            duplicate[j] |= not duplicate[i]
        pairs = []


def select(
    pool: Pool,
    test: np.ndarray,
    counts: dict[int, int],
    seed: int = 0,
    clusters: int | None = None,
) -> Selection:
    """Choose `counts` images of each class, near the test's images and spread over them.

    test: float32 [T, D]. Near-duplicates are avoided within a class only: a photograph and its
    AI reconstruction are a good pair to learn from. Raises DataError where the pool is too small.
    """
    vectors = pool.features.vectors
    search = make_search(vectors)
    test_clusters = kmeans_labels(test, clusters, seed)
    before = np.zeros(test_clusters.max() + 1, dtype=np.int64)
    parts, duplicates = [], 0
    for label, count in counts.items():
        turns = query_order(test_clusters, count, seed, before)
        before += np.bincount(test_clusters[turns], minlength=len(before))
        available = pool.candidates(label)

        def choose(todo: np.ndarray, turns: np.ndarray = turns, available: np.ndarray = available) -> np.ndarray:
            return assign_nearest(turns[todo], test, search, available)

        rows, skipped = choose_distinct(choose, pool, label, counts)
        parts.append((rows, turns))
        duplicates += skipped
    rows, turns = (np.concatenate(part) for part in zip(*parts, strict=True))
    cosines = np.einsum("nd,nd->n", vectors[rows], test[turns])
    return Selection(rows, turns, (1 - cosines).clip(0, 2).astype(np.float32), duplicates)


def random_rows(pool: Pool, counts: dict[int, int], seed: int) -> np.ndarray:
    """As many pool rows of each class chosen at random, also without near-duplicates among them."""
    rng = np.random.default_rng(seed)
    parts = []
    for label in counts:
        shuffled = iter(rng.permutation(np.flatnonzero(pool.candidates(label))).tolist())

        def choose(todo: np.ndarray, shuffled: Iterator[int] = shuffled) -> np.ndarray:
            return np.array([next(shuffled, -1) for _ in todo], dtype=np.int64)

        parts.append(choose_distinct(choose, pool, label, counts)[0])
    return np.concatenate(parts)


def _too_few(pool: Pool, counts: dict[int, int]) -> DataError:
    distinct = {}
    for label in counts:
        rows = np.flatnonzero(pool.candidates(label))
        distinct[label] = len(rows) - int(_duplicate_mask(pool.features, rows[:0], rows).sum())
    return DataError(
        f"--count {sum(counts.values())} needs {describe_counts(counts)}, but without near-duplicates of the test and "
        f"of each other the pool holds {describe_counts(distinct)}; lower --count, change --balance, or add a --pool"
    )


def describe_counts(counts: dict[int, int]) -> str:
    """Counts of classes in words: "3 ai and 2 real"."""
    if UNLABELLED in counts:
        return f"{counts[UNLABELLED]} images"
    return " and ".join(f"{count} {LABELS[label]}" for label, count in counts.items())


def nearest_distances(vectors: np.ndarray, test: np.ndarray) -> np.ndarray:
    """float32 [N]: 1 - cosine of each vector, float32 [N, D], to the nearest of test float32 [T, D]."""
    return (1 - exact_search(test, vectors, 1)[0][:, 0]).clip(0, 2)
