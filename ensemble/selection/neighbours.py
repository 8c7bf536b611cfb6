"""Nearest neighbours of unit vectors by cosine: exact search in blocks, a faiss index beyond a million vectors.

Throughout: base float32 [N, D] and queries float32 [Q, D], rows of norm 1.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from ensemble.core.errors import UnavailableError

MAX_EXACT_VECTORS = 1_000_000  # a larger base is searched by an index
BLOCK_ROWS = 16_384  # rows of the base in one matrix product
MAX_SIMILARITIES = 2**25  # similarities in memory at once, 4 bytes each
NPROBE = 128  # inverted lists that one query visits

# (queries, k, allowed bool [N] or None) -> similarities float32 [Q, k], descending, and rows int64 [Q, k]
Search = Callable[[np.ndarray, int, np.ndarray | None], tuple[np.ndarray, np.ndarray]]


def make_search(base: np.ndarray) -> Search:
    """A search of `base`: exact up to MAX_EXACT_VECTORS rows, else by a faiss index.

    Where fewer than k rows are allowed, the result is padded by row -1 of similarity -inf.
    UnavailableError where faiss is needed and missing.
    """
    check_search(len(base))
    return partial(exact_search, base) if len(base) <= MAX_EXACT_VECTORS else _faiss_search(base)


def check_search(count: int) -> None:
    """UnavailableError where `count` vectors need a faiss index and faiss is not installed."""
    if count > MAX_EXACT_VECTORS and find_spec("faiss") is None:
        raise UnavailableError(
            f"a pool of over {MAX_EXACT_VECTORS:,} images needs faiss; run: pip install 'manyeyes[select]'"
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
    step = max(1, MAX_SIMILARITIES // (k + min(BLOCK_ROWS, len(base))))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        similarities[part], rows[part] = _search_block(base, queries[part], k, allowed)
    return similarities, rows


def _search_block(
    base: np.ndarray, queries: np.ndarray, k: int, allowed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    values = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    for start in range(0, len(base), BLOCK_ROWS):
        numbers = np.arange(start, min(start + BLOCK_ROWS, len(base)))
        if allowed is not None:
            numbers = numbers[allowed[numbers]]
        if not len(numbers):
            continue
        block = base[start : start + BLOCK_ROWS] if len(numbers) == BLOCK_ROWS else base[numbers]
        columns, block_values = _top_k(queries @ block.T, k)
        values, rows = np.hstack([values, block_values]), np.hstack([rows, numbers[columns]])
        columns, values = _top_k(values, k)
        rows = np.take_along_axis(rows, columns, axis=1)
    order = np.lexsort((rows, -values), axis=1)
    return np.take_along_axis(values, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _top_k(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns int64 [Q, k] of the k largest values of each row, unsorted, and these values."""
    if values.shape[1] <= k:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape), values
    columns = np.argpartition(values, values.shape[1] - k, axis=1)[:, -k:]
    return columns, np.take_along_axis(values, columns, axis=1)


def _faiss_search(base: np.ndarray) -> Search:
    """An inverted file index of about sqrt(N) lists (Jegou et al., 2011); a small one is searched whole."""
    faiss: Any = import_module("faiss")  # has no usable types
    count, width = base.shape
    lists = max(1, min(round(count**0.5), count // 39))  # faiss warns below 39 training points per centroid
    index: Any = faiss.index_factory(width, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    sample = np.random.default_rng(0).permutation(count)[: 64 * lists]
    index.train(np.ascontiguousarray(base[np.sort(sample)]))
    for start in range(0, count, BLOCK_ROWS):
        index.add(np.ascontiguousarray(base[start : start + BLOCK_ROWS]))

    def search(queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        k = min(k, count)
        expected = k if allowed is None else min(k, int(allowed.sum()))
        parameters: dict[str, Any] = {"nprobe": min(NPROBE, lists)}
        if allowed is not None:
            parameters["sel"] = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        results = index.search(np.ascontiguousarray(queries), k, params=faiss.SearchParametersIVF(**parameters))
        values, rows = (np.array(part) for part in results)
        values[rows < 0] = -np.inf
        short = (rows >= 0).sum(axis=1) < expected  # the visited lists held too few allowed rows
        if short.any():
            values[short], rows[short] = exact_search(base, queries[short], k, allowed)
        return values, rows

    return search
