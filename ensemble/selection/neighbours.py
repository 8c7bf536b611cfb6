"""Nearest neighbours of unit vectors by cosine: exact by blocked products, by faiss beyond a million.

Throughout: base float32 [N, D] and queries float32 [Q, D], rows of length 1.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from ensemble.core.errors import UnavailableError

EXACT_LIMIT = 1_000_000  # vectors; beyond, an index answers
BLOCK = 16_384  # rows of the base in one product
SCRATCH = 2**25  # similarities held at once, of 4 bytes
PROBES = 128  # lists of the index that a query looks through

# (queries, k, allowed bool [N] or None) -> similarities float32 [Q, k], falling, and rows int64 [Q, k]
Search = Callable[[np.ndarray, int, np.ndarray | None], tuple[np.ndarray, np.ndarray]]


def make_search(base: np.ndarray, exact_limit: int = EXACT_LIMIT) -> Search:
    """A search of `base`: exact up to `exact_limit` rows, else by a faiss index.

    Where fewer than k rows are allowed, the rest is row -1 of similarity -inf. Raises
    UnavailableError as `check_search` does.
    """
    check_search(len(base), exact_limit)
    return partial(exact_search, base) if len(base) <= exact_limit else _indexed(base)


def check_search(count: int, exact_limit: int = EXACT_LIMIT) -> None:
    """UnavailableError where so many vectors need an index whose package is not installed."""
    if count > exact_limit and find_spec("faiss") is None:
        raise UnavailableError(
            f"a pool of over {exact_limit:,} images needs faiss; run: pip install 'manyeyes[select]'"
        )


def exact_search(
    base: np.ndarray, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar of the `allowed` rows of `base` for each query: see `Search`.

    Beyond the result, memory does not grow with N or Q.
    """
    k = min(k, len(base))
    similarities = np.empty((len(queries), k), dtype=np.float32)
    rows = np.empty((len(queries), k), dtype=np.int64)
    step = max(1, SCRATCH // (k + min(BLOCK, len(base))))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        similarities[part], rows[part] = _search_block(base, queries[part], k, allowed)
    return similarities, rows


def _search_block(
    base: np.ndarray, queries: np.ndarray, k: int, allowed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    values = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    for start in range(0, len(base), BLOCK):
        numbers = np.arange(start, min(start + BLOCK, len(base)))
        if allowed is not None:
            numbers = numbers[allowed[numbers]]
        if not len(numbers):
            continue
        block = base[start : start + BLOCK] if len(numbers) == BLOCK else base[numbers]
        found = queries @ block.T
        columns, found = _largest(found, k)
        values, rows = np.hstack([values, found]), np.hstack([rows, numbers[columns]])
        chosen, values = _largest(values, k)
        rows = np.take_along_axis(rows, chosen, axis=1)
    order = np.lexsort((rows, -values), axis=1)
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _largest(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns int64 [Q, k] of the k largest of each row, in no order, and their values."""
    if values.shape[1] <= k:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape), values
    columns = np.argpartition(values, values.shape[1] - k, axis=1)[:, -k:]
    return columns, np.take_along_axis(values, columns, axis=1)


def _indexed(base: np.ndarray) -> Search:
    """An inverted file of about sqrt(N) lists (Jegou et al., 2011); all of it is searched where it is small."""
    faiss: Any = import_module("faiss")  # has no types of use here
    count, width = base.shape
    lists = max(1, min(round(count**0.5), count // 39))  # faiss wants 39 points to train a list's centre
    index: Any = faiss.index_factory(width, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).permutation(count)[: 64 * lists]
    index.train(np.ascontiguousarray(base[np.sort(sample)]))
    for start in range(0, count, BLOCK):
        index.add(np.ascontiguousarray(base[start : start + BLOCK]))

    def search(queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        k = min(k, count)
        wanted = k if allowed is None else min(k, int(allowed.sum()))
        chosen: dict[str, Any] = {"nprobe": min(PROBES, lists)}
        if allowed is not None:
            chosen["sel"] = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        found = index.search(np.ascontiguousarray(queries), k, params=faiss.SearchParametersIVF(**chosen))
        values, rows = (np.array(part) for part in found)
        values[rows < 0] = -np.inf
        short = (rows >= 0).sum(axis=1) < wanted  # the lists looked through held too few allowed rows
        if short.any():
            values[short], rows[short] = exact_search(base, queries[short], k, allowed)
        return values, rows

    return search
