"""Pool images like the test's: spread over the test, balanced by class, without near-duplicates.

Throughout, rows are int64 positions in the pool's or the test's `Features`.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ensemble.core.errors import DataError
from ensemble.core.names import LABELS
from ensemble.images import near_duplicates
from ensemble.models.features import Features
from ensemble.selection.neighbours import EXACT_LIMIT, Search, exact_search, make_search

UNLABELLED = -1  # label of images of which the class is not known
MOST_CLUSTERS = 256
PART = 65_536  # pool images compared with the test at once


@dataclass(frozen=True)
class Selection:
    """The images chosen from the pool, in the order in which the test's images drew them.

    rows and test: int64 [N], the pool image and the test image that drew it. distances:
    float32 [N], 1 - cosine of the two, in [0, 2]. repeats: near-duplicates of images chosen
    before them, which were passed over.
    """

    rows: np.ndarray
    test: np.ndarray
    distances: np.ndarray
    repeats: int


class _SpentError(Exception):
    """The pool has no more images of a class."""


def class_counts(labels: np.ndarray, count: int, balance: float | None = None) -> dict[int, int]:
    """How many images of each class to choose: `balance` is the share of ai, by default a half.

    A pool of a single class, or an unlabelled one, gives all of them unless `balance` says otherwise.
    """
    present = set(labels.tolist())
    if present == {UNLABELLED}:
        return {UNLABELLED: count}
    if balance is None:
        balance = 0.5 if len(present) == 2 else float(present == {1})
    ai = round(count * balance)
    return {1: ai, 0: count - ai}


def duplicates_of_test(pool: Features, test: Features) -> np.ndarray:
    """bool [M]: pool images that show the same picture as some test image."""
    seen = {digest.tobytes() for digest in test.pixels}
    found = np.array([digest.tobytes() in seen for digest in pool.pixels], dtype=bool)
    for start in range(0, len(found), PART):
        hashes, thumbs = pool.hashes[start : start + PART].tolist(), pool.thumbs[start : start + PART]
        pairs = near_duplicates.near_duplicates_between(hashes, thumbs, test.hashes.tolist(), test.thumbs)
        found[[start + row for row, _ in pairs]] = True
    return found


def conflicting(pool: Features, labels: np.ndarray) -> np.ndarray:
    """bool [M]: images whose very pixels are in the pool as ai and as real."""
    seen: dict[bytes, set[int]] = {}
    for digest, label in zip(pool.pixels, labels, strict=True):
        seen.setdefault(digest.tobytes(), set()).add(int(label))
    return np.array([len(seen[digest.tobytes()]) > 1 for digest in pool.pixels], dtype=bool)


def cluster(vectors: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """int64 [T] cluster of each vector by k-means; by default about sqrt(T / 2) clusters."""
    from sklearn.cluster import KMeans

    wanted = count or max(1, min(MOST_CLUSTERS, round((len(vectors) / 2) ** 0.5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct vectors than clusters: the rest stay empty
        fitted = KMeans(min(wanted, len(vectors)), n_init=4, random_state=seed).fit(np.ascontiguousarray(vectors))
    return np.asarray(fitted.labels_, dtype=np.int64)


def quotas(sizes: np.ndarray, total: int) -> np.ndarray:
    """int64 [C]: `total` shared out in proportion to sizes int64 [C], by largest remainder."""
    exact = total * sizes / sizes.sum()
    shares = np.floor(exact).astype(np.int64)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: total - shares.sum()]] += 1
    return shares


def take_turns(clusters: np.ndarray, total: int, seed: int, before: np.ndarray | None = None) -> np.ndarray:
    """int64 [total]: which test image draws at each turn.

    Clusters have turns in proportion to their size; within one, the images follow each other
    in an order drawn from `seed`. before: int64 [C], turns that each cluster has had already,
    for another class.
    """
    sizes = np.bincount(clusters)
    order = np.random.default_rng(seed).permutation(len(clusters))
    turns, passes, places = [], [], []
    for number, share in enumerate(quotas(sizes, total)):
        members = order[clusters[order] == number]
        if share:
            steps = np.arange(share) + (before[number] if before is not None else 0)
            turns.append(members[steps % len(members)])
            passes.append(np.arange(share) // len(members))
            places.append(np.arange(share) % len(members) / len(members))
    if not turns:
        return np.empty(0, dtype=np.int64)
    return np.concatenate(turns)[np.lexsort((np.concatenate(places), np.concatenate(passes)))]


def draw(
    turns: np.ndarray, queries: np.ndarray, search: Search, available: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pool row, and its similarity, that each turn's test image draws: its nearest not yet drawn.

    queries: float32 [T, D]. available: bool [M], changed in place. Turns of which the image
    found its list of neighbours used up draw after the others, from a longer list. Row -1:
    the pool was empty.
    """
    rows = np.full(len(turns), -1, dtype=np.int64)
    similarities = np.full(len(turns), -np.inf, dtype=np.float32)
    waiting = np.arange(len(turns))
    length = 16
    while len(waiting) and available.any():
        tests, most = np.unique(turns[waiting], return_counts=True)
        length = max(2 * length, 2 * int(most.max()))
        values, lists = search(queries[tests], length, available)
        place = dict(zip(tests.tolist(), range(len(tests)), strict=True))
        at = np.zeros(len(tests), dtype=np.int64)
        for turn in waiting:
            line = place[int(turns[turn])]
            while at[line] < lists.shape[1] and (lists[line, at[line]] < 0 or not available[lists[line, at[line]]]):
                at[line] += 1
            if at[line] < lists.shape[1]:
                rows[turn], similarities[turn] = lists[line, at[line]], values[line, at[line]]
                available[rows[turn]] = False
        waiting = waiting[rows[waiting] < 0]
    return rows, similarities


def distinct(choose: Callable[[np.ndarray], np.ndarray], count: int, pool: Features) -> tuple[np.ndarray, int]:
    """`count` pool rows of which no two are near-duplicates, and how many were passed over.

    choose: numbers of turns -> their pool rows, never twice the same, -1 where none is left.
    """
    chosen = np.full(count, -1, dtype=np.int64)
    todo, repeats = np.arange(count), 0
    while len(todo):
        rows = choose(todo)
        if (rows < 0).any():
            raise _SpentError
        repeated = _repeated(pool, chosen[chosen >= 0], rows)
        chosen[todo[~repeated]] = rows[~repeated]
        todo, repeats = todo[repeated], repeats + int(repeated.sum())
    return chosen, repeats


def _repeated(pool: Features, kept: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """bool [rows]: near-duplicates of a kept image, or of one of `rows` before them that stays."""
    hashes, thumbs = pool.hashes[rows].tolist(), pool.thumbs[rows]
    repeated = np.zeros(len(rows), dtype=bool)
    if len(kept):
        pairs = near_duplicates.near_duplicates_between(hashes, thumbs, pool.hashes[kept].tolist(), pool.thumbs[kept])
        repeated[[i for i, _ in pairs]] = True
    pairs = _same_pixels(pool.pixels[rows])
    while True:  # of a large group not all pairs are given: what stays is looked through again
        left = np.flatnonzero(~repeated)
        if len(left) < 2:
            return repeated
        found = near_duplicates.near_duplicates(pool.hashes[rows[left]].tolist(), pool.thumbs[rows[left]])
        pairs += [(int(left[i]), int(left[j])) for i, j in found]
        if not pairs:
            return repeated
        for i, j in sorted(pairs):
            repeated[j] |= not repeated[i]
        pairs = []


def _same_pixels(pixels: np.ndarray) -> list[tuple[int, int]]:
    first: dict[bytes, int] = {}
    pairs = ((first.setdefault(digest.tobytes(), row), row) for row, digest in enumerate(pixels))
    return [(i, j) for i, j in pairs if i != j]


def select(
    pool: Features,
    labels: np.ndarray,
    allowed: np.ndarray,
    test: np.ndarray,
    counts: dict[int, int],
    seed: int = 0,
    clusters: int | None = None,
    exact_limit: int = EXACT_LIMIT,
) -> Selection:
    """Choose `counts` images of each class, near the test's images and spread over them.

    labels: int [M] of the pool. allowed: bool [M], images that may be chosen. test: float32
    [T, D]. Near-duplicates are looked for within a class: a photograph and its
    reconstruction teach best together. Raises DataError where the pool does not suffice.
    """
    search = make_search(pool.vectors, exact_limit)
    of_test = cluster(test, clusters, seed)
    before = np.zeros(of_test.max() + 1, dtype=np.int64)
    parts, repeats = [], 0
    for label, count in counts.items():
        turns = take_turns(of_test, count, seed, before)
        before += np.bincount(of_test[turns], minlength=len(before))
        available = allowed & (labels == label)

        def choose(todo: np.ndarray, turns: np.ndarray = turns, available: np.ndarray = available) -> np.ndarray:
            return draw(turns[todo], test, search, available)[0]

        try:
            rows, passed = distinct(choose, count, pool)
        except _SpentError:
            raise too_few(pool, labels, allowed, counts) from None
        parts.append((rows, turns))
        repeats += passed
    rows, turns = (np.concatenate(part) for part in zip(*parts, strict=True))
    cosines = np.einsum("nd,nd->n", pool.vectors[rows], test[turns])
    return Selection(rows, turns, (1 - cosines).clip(0, 2).astype(np.float32), repeats)


def random_rows(
    pool: Features, labels: np.ndarray, allowed: np.ndarray, counts: dict[int, int], seed: int
) -> np.ndarray:
    """As many pool rows of each class drawn at random, again without near-duplicates of each other."""
    rng = np.random.default_rng(seed)
    parts = []
    for label, count in counts.items():
        waiting = iter(rng.permutation(np.flatnonzero(allowed & (labels == label))).tolist())

        def choose(todo: np.ndarray, waiting: Iterator[int] = waiting) -> np.ndarray:
            return np.array([next(waiting, -1) for _ in todo], dtype=np.int64)

        try:
            parts.append(distinct(choose, count, pool)[0])
        except _SpentError:
            raise too_few(pool, labels, allowed, counts) from None
    return np.concatenate(parts)


def too_few(pool: Features, labels: np.ndarray, allowed: np.ndarray, counts: dict[int, int]) -> DataError:
    """The error of a pool that does not hold `counts` images once duplicates are dropped."""
    left = {}
    for label in counts:
        rows = np.flatnonzero(allowed & (labels == label))
        left[label] = len(rows) - int(_repeated(pool, rows[:0], rows).sum()) if len(rows) else 0
    return DataError(
        f"--count {sum(counts.values())} needs {by_class(counts)}, but without near-duplicates of the test and of "
        f"each other the pool holds {by_class(left)}; lower --count, change --balance, or add a --pool"
    )


def by_class(counts: dict[int, int]) -> str:
    """Counts of classes in words: "3 ai and 2 real"."""
    if UNLABELLED in counts:
        return f"{counts[UNLABELLED]} images"
    return " and ".join(f"{count} {LABELS[label]}" for label, count in counts.items())


def nearest_distances(rows: np.ndarray, pool: Features, test: np.ndarray) -> np.ndarray:
    """float32 [N]: 1 - cosine of each pool row to the test image nearest to it."""
    return (1 - exact_search(test, pool.vectors[rows], 1)[0][:, 0]).clip(0, 2)
