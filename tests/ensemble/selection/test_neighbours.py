import numpy as np
import pytest

from ensemble.core.errors import UnavailableError
from ensemble.selection import neighbours
from ensemble.selection.neighbours import check_search, exact_search, make_search

ALLOWED = {
    "all": None,
    "half": np.arange(2000) % 2 == 0,
    "few": np.arange(2000) < 3,
    "none": np.zeros(2000, dtype=bool),
}


def unit(seed, rows, width=16):
    values = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def sorted_in_full(base, queries, k, allowed):
    full = queries @ base.T
    if allowed is not None:
        full[:, ~allowed] = -np.inf
    rows = np.argsort(-full, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(full, rows, axis=1)
    return values, np.where(values > -np.inf, rows, -1)


@pytest.fixture(scope="module")
def base():
    return unit(0, 2000)


@pytest.mark.parametrize("allowed", ALLOWED.values(), ids=ALLOWED)
@pytest.mark.parametrize("k", [1, 7, 2000])
def test_exact_search_is_a_full_sort_block_by_block(base, allowed, k, monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 300)
    monkeypatch.setattr(neighbours, "MAX_SIMILARITIES", 5000)  # queries are cut too
    queries = unit(1, 23)
    values, rows = exact_search(base, queries, k, allowed)
    wanted, wanted_rows = sorted_in_full(base, queries, k, allowed)
    assert (rows == wanted_rows).all()
    assert np.allclose(values, wanted, atol=1e-6)
    assert (values.dtype, rows.dtype) == (np.float32, np.int64)


def test_more_neighbours_than_there_are_give_all():
    values, rows = exact_search(unit(0, 3), unit(1, 2), 10)
    assert values.shape == (2, 3)
    assert sorted(rows[0]) == [0, 1, 2]


def test_equal_vectors_come_in_their_order():
    base = np.repeat(unit(0, 1), 5, axis=0)
    assert exact_search(base, base[:1], 5)[1].tolist() == [[0, 1, 2, 3, 4]]


def test_fields_of_records_are_searched_like_plain_arrays(base):
    records = np.zeros(len(base), dtype=[("thumb", "u1", 12), ("vector", "<f4", 16)])
    records["vector"] = base
    assert (exact_search(records["vector"], base[:5], 4)[1] == exact_search(base, base[:5], 4)[1]).all()


@pytest.mark.parametrize("allowed", [ALLOWED["all"], ALLOWED["half"], ALLOWED["none"]], ids=["all", "half", "none"])
def test_the_index_beyond_the_limit_gives_the_same_answer(base, allowed, monkeypatch):
    pytest.importorskip("faiss")
    queries = unit(1, 23)
    exact = make_search(base)
    monkeypatch.setattr(neighbours, "MAX_EXACT_VECTORS", 1999)
    indexed = make_search(base)
    assert indexed.__name__ == "search"  # not the exact one under another name
    (values, rows), (others, other_rows) = exact(queries, 9, allowed), indexed(queries, 9, allowed)
    assert (rows == other_rows).all()
    assert np.allclose(values, others, atol=1e-6)


def test_an_index_that_looks_nowhere_falls_back_on_exact_search(base, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(neighbours, "NPROBE", 1)
    monkeypatch.setattr(neighbours, "MAX_EXACT_VECTORS", 10)
    indexed = make_search(base)
    allowed = ALLOWED["few"]
    assert (indexed(unit(1, 23), 3, allowed)[1] == exact_search(base, unit(1, 23), 3, allowed)[1]).all()
    found = indexed(unit(1, 23), 9, None)[1]
    assert (found != exact_search(base, unit(1, 23), 9)[1]).any()  # one list is too few, so the patch did bite


def test_a_large_pool_without_faiss_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(neighbours, "find_spec", lambda name: None)
    monkeypatch.setattr(neighbours, "MAX_EXACT_VECTORS", 10)
    check_search(10)
    with pytest.raises(UnavailableError, match=r"pip install 'manyeyes\[select\]'"):
        check_search(11)
