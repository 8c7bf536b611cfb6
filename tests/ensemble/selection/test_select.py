from collections import Counter

import numpy as np
import pytest

from ensemble.core.errors import DataError
from ensemble.data.sources import UNLABELLED
from ensemble.models.features import Features
from ensemble.selection import neighbours, select
from ensemble.selection.neighbours import exact_search, make_search
from ensemble.selection.select import (
    Pool,
    assign_nearest,
    duplicates_of_test,
    kmeans_labels,
    largest_remainder,
    query_order,
    random_rows,
)


def unit(values):
    values = np.asarray(values, dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def features(vectors, copies=(), seed=0):
    """Images that look unlike, but for `copies`: pairs (row, of) that look the same to the eye, not to the hash."""
    rng = np.random.default_rng(seed)
    thumbs = rng.integers(0, 256, (len(vectors), 32, 32, 3), dtype=np.uint8)
    for row, of in copies:
        thumbs[row] = np.clip(thumbs[of].astype(int) + 1, 0, 255)
    hashes = np.array([select.near_duplicates.perceptual_hash(thumb) for thumb in thumbs], dtype=np.uint64)
    pixels = rng.integers(0, 256, (len(vectors), 32), dtype=np.uint8)
    rows = np.arange(len(vectors))
    return Features(rows, unit(vectors), thumbs, hashes, pixels, {})


def angles(degrees):
    """Unit vectors in the plane: their distances are plain to see."""
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1).astype(np.float32)


def choose(pool, labels, test, counts, allowed=None, **more):
    labels = np.asarray(labels)
    allowed = np.ones(len(labels), dtype=bool) if allowed is None else allowed
    return select.select(Pool(pool, labels, allowed), test, counts, **more)


@pytest.fixture(scope="module")
def crowd():
    rng = np.random.default_rng(3)
    pool = features(rng.normal(size=(300, 8)))
    return pool, rng.integers(0, 2, 300), unit(rng.normal(size=(20, 8)))


def test_quotas_are_proportional_and_sum_up():
    assert largest_remainder(np.array([1, 1, 2]), 8).tolist() == [2, 2, 4]
    assert largest_remainder(np.array([1, 1, 1]), 8).tolist() == [3, 3, 2]
    assert largest_remainder(np.array([5, 0, 5]), 3).tolist() == [2, 0, 1]
    assert largest_remainder(np.array([7]), 0).tolist() == [0]


def test_clusters_part_what_lies_apart_and_repeat():
    vectors = angles([0, 1, 2, 90, 91, 180, 181])
    found = kmeans_labels(vectors, 3, 0)
    assert [len(set(found[part])) for part in (slice(0, 3), slice(3, 5), slice(5, 7))] == [1, 1, 1]
    assert len(set(found)) == 3
    assert (found == kmeans_labels(vectors, 3, 0)).all()
    assert len(set(kmeans_labels(vectors, None, 0))) == 2  # sqrt(7 / 2)


def test_equal_test_images_make_fewer_clusters_without_a_warning():
    assert kmeans_labels(angles([5] * 6), 4, 0).tolist() == [0] * 6


def test_within_a_cluster_all_draw_in_turn():
    clusters = np.array([0] * 6 + [1] * 2)
    turns = query_order(clusters, 16, 0)
    assert Counter(turns.tolist()) == dict.fromkeys(range(8), 2)
    assert sorted(turns[:8]) == list(range(8))  # everyone once before anyone twice


def test_few_turns_fall_on_all_clusters():
    clusters = np.array([0] * 50 + [1] * 30 + [2] * 20)
    turns = query_order(clusters, 10, 0)
    assert Counter(clusters[turns].tolist()) == {0: 5, 1: 3, 2: 2}
    assert len(set(turns)) == 10
    assert not np.array_equal(turns, query_order(clusters, 10, 1))


def test_the_second_class_goes_on_where_the_first_stopped():
    clusters = np.zeros(10, dtype=np.int64)
    first, second = query_order(clusters, 5, 0), query_order(clusters, 5, 0, np.array([5]))
    assert sorted([*first, *second]) == list(range(10))


def test_each_turn_draws_the_nearest_that_is_left():
    base, queries = angles([0, 10, 20, 80]), angles([1, 82])
    available = np.ones(4, dtype=bool)
    rows = assign_nearest(np.array([0, 0, 1, 0]), queries, make_search(base), available)
    assert rows.tolist() == [0, 1, 3, 2]
    assert not available.any()


def test_an_empty_pool_leaves_turns_without_an_image():
    base, available = angles([0, 10]), np.array([True, False])
    rows = assign_nearest(np.array([0, 0]), angles([1]), make_search(base), available)
    assert rows.tolist() == [0, -1]


def test_lists_that_run_out_are_prolonged(crowd):
    pool, _, _ = crowd
    rows = assign_nearest(
        np.zeros(300, dtype=np.int64), pool.vectors[:1], make_search(pool.vectors), np.ones(300, dtype=bool)
    )
    assert rows.tolist() == exact_search(pool.vectors, pool.vectors[:1], 300)[1][0].tolist()
    both = np.arange(300) % 2  # two images that want the same neighbours
    queries = np.repeat(pool.vectors[:1], 2, axis=0)
    rows = assign_nearest(both, queries, make_search(pool.vectors), np.ones(300, dtype=bool))
    assert sorted(rows) == list(range(300))


def test_counts_and_balance_are_kept(crowd):
    pool, labels, test = crowd
    for counts in ({1: 30, 0: 30}, {1: 45, 0: 15}, {1: 0, 0: 20}):
        chosen = choose(pool, labels, test, counts)
        assert len(set(chosen.rows)) == sum(counts.values())
        assert Counter(labels[chosen.rows].tolist()) == +Counter(counts)
        assert (chosen.duplicates, chosen.rows.dtype) == (0, np.int64)


def test_distances_are_one_minus_cosine_to_the_image_that_drew(crowd):
    pool, labels, test = crowd
    chosen = choose(pool, labels, test, {1: 30, 0: 30})
    cosines = (pool.vectors[chosen.rows] * test[chosen.test_rows]).sum(axis=1)
    assert np.allclose(chosen.distances, 1 - cosines, atol=1e-6)


def test_one_test_image_does_not_take_all():
    """All of the pool is nearest to image 0; each test image draws the same number all the same."""
    pool = features(angles(np.linspace(-4, 4, 40)))
    chosen = choose(pool, [UNLABELLED] * 40, angles([0, 30, 60, 90]), {UNLABELLED: 20}, clusters=4)
    assert Counter(chosen.test_rows.tolist()) == dict.fromkeys(range(4), 5)
    nearest = exact_search(angles([0, 30, 60, 90]), pool.vectors[chosen.rows], 1)[1]
    assert set(nearest[:, 0]) == {0}


def test_the_chosen_are_nearer_than_a_random_draw(crowd):
    pool, labels, test = crowd
    everything = np.ones(300, dtype=bool)
    chosen = choose(pool, labels, test, {1: 20, 0: 20})
    drawn = random_rows(Pool(pool, labels, everything), {1: 20, 0: 20}, 0)
    near, random = (select.nearest_distances(pool.vectors[rows], test) for rows in (chosen.rows, drawn))
    assert np.median(near) < 0.8 * np.median(random)
    assert Counter(labels[drawn].tolist()) == {0: 20, 1: 20}


def test_the_seed_decides_and_repeats(crowd):
    pool, labels, test = crowd
    everything, counts = np.ones(300, dtype=bool), {1: 7, 0: 6}
    one, same, other = (choose(pool, labels, test, counts, seed=seed) for seed in (0, 0, 1))
    assert one.rows.tolist() == same.rows.tolist()
    assert one.rows.tolist() != other.rows.tolist()
    draws = [random_rows(Pool(pool, labels, everything), counts, seed).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_an_index_for_a_large_pool_chooses_the_same(crowd, monkeypatch):
    pytest.importorskip("faiss")
    pool, labels, test = crowd
    exact = choose(pool, labels, test, {1: 40, 0: 40})
    monkeypatch.setattr(neighbours, "MAX_EXACT_VECTORS", 299)
    indexed = choose(pool, labels, test, {1: 40, 0: 40})
    assert exact.rows.tolist() == indexed.rows.tolist()


def test_near_duplicates_of_each_other_are_drawn_once():
    pool = features(angles([0, 1, 2, 3, 50, 51]), copies=[(1, 0), (3, 2)])
    chosen = choose(pool, [UNLABELLED] * 6, angles([0, 50]), {UNLABELLED: 4}, clusters=1)
    assert sorted(chosen.rows) == [0, 2, 4, 5]
    assert chosen.duplicates == 1  # row 1 was drawn and passed over; row 3 nobody came to
    drawn = [
        random_rows(Pool(pool, np.full(6, UNLABELLED), np.ones(6, dtype=bool)), {UNLABELLED: 4}, s) for s in range(9)
    ]
    assert all({0, 1} - set(rows) and {2, 3} - set(rows) for rows in drawn)


def test_copies_with_equal_pixels_are_drawn_once_even_where_they_are_blank():
    pool = features(angles([0, 1, 40]))
    pool.thumbs[:2] = 128  # blank pictures are never near-duplicates by their thumbnails
    pool.pixels[1] = pool.pixels[0]
    chosen = choose(pool, [UNLABELLED] * 3, angles([0]), {UNLABELLED: 2})
    assert sorted(chosen.rows) == [0, 2]


def test_a_chain_of_near_duplicates_loses_only_what_repeats(monkeypatch):
    """Row 1 is like 0 and like 2, which are not alike: with 1 passed over, both stay."""
    pool = features(angles([0, 1, 2]))
    pairs = {3: [(0, 1), (1, 2)], 2: []}
    monkeypatch.setattr(select.near_duplicates, "near_duplicates", lambda hashes, thumbs: pairs[len(hashes)])
    rows = random_rows(Pool(pool, np.ones(3), np.ones(3, dtype=bool)), {1: 2}, 0)
    assert len(rows) == 2
    with pytest.raises(DataError, match="the pool holds 2 ai"):
        random_rows(Pool(pool, np.ones(3), np.ones(3, dtype=bool)), {1: 3}, 0)


def test_of_a_large_group_of_near_duplicates_one_stays():
    """`groups` joins a large group by some of its pairs only."""
    pool = features(angles(range(120)), copies=[(row, 0) for row in range(1, 119)])
    with pytest.raises(DataError, match="the pool holds 2 images"):
        random_rows(Pool(pool, np.full(120, UNLABELLED), np.ones(120, dtype=bool)), {UNLABELLED: 3}, 0)


def test_a_photograph_and_its_reconstruction_may_both_be_chosen():
    pool = features(angles([0, 1]), copies=[(1, 0)])
    assert sorted(choose(pool, [0, 1], angles([0]), {1: 1, 0: 1}).rows) == [0, 1]
    with pytest.raises(DataError, match="without near-duplicates"):
        choose(pool, [1, 1], angles([0]), {1: 2, 0: 0})


@pytest.mark.parametrize("part", [select.BLOCK_ROWS, 1, 3])
def test_pool_images_that_show_a_test_image_are_found(part, monkeypatch):
    monkeypatch.setattr(select, "BLOCK_ROWS", part)
    test, pool = features(angles([0, 30]), seed=1), features(angles([0, 1, 2, 3]), seed=2)
    pool.thumbs[2], pool.hashes[2] = test.thumbs[1], test.hashes[1]
    pool.pixels[3] = test.pixels[0]
    assert duplicates_of_test(pool, test).tolist() == [False, False, True, True]


def test_what_is_not_allowed_is_never_chosen(crowd):
    pool, labels, test = crowd
    allowed = np.arange(300) % 3 == 0
    assert allowed[choose(pool, labels, test, {1: 20, 0: 20}, allowed).rows].all()
    assert allowed[random_rows(Pool(pool, labels, allowed), {1: 20, 0: 20}, 0)].all()


def test_a_pool_spent_by_duplicates_says_what_is_left_of_each_class():
    pool = features(angles(range(7)), copies=[(1, 0), (2, 0), (5, 4)])
    labels, allowed = [1, 1, 1, 1, 0, 0, 0], np.array([True] * 6 + [False])
    message = "--count 4 needs 2 ai and 2 real, but .* the pool holds 2 ai and 1 real; lower --count"
    with pytest.raises(DataError, match=message):
        choose(pool, labels, angles([0]), {1: 2, 0: 2}, allowed)
    with pytest.raises(DataError, match=message):
        random_rows(Pool(pool, np.array(labels), allowed), {1: 2, 0: 2}, 0)
    assert len(choose(pool, labels, angles([0]), {1: 2, 0: 1}, allowed).rows) == 3


def test_equal_pixels_in_both_classes_are_found():
    pool = features(angles(range(5)))
    pool.pixels[[2, 3]] = pool.pixels[0]
    assert select.conflicting_labels(pool, np.array([0, 1, 0, 1, 1])).tolist() == [True, False, True, True, False]
    assert not select.conflicting_labels(pool, np.array([1, 0, 1, 1, 0])).any()


def test_class_counts_follow_the_balance():
    labels = np.array([0, 1])
    assert select.class_counts(labels, 10, 0.5) == {1: 5, 0: 5}
    assert select.class_counts(labels, 10, 0.25) == {1: 2, 0: 8}
    assert select.class_counts(labels, 10, 1.0) == {1: 10, 0: 0}
    assert select.class_counts(np.array([UNLABELLED] * 2), 10, 0.5) == {UNLABELLED: 10}
