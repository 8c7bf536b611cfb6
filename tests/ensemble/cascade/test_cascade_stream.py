"""Rows that leave early: which pixels are prepared, what runs beside what, what is read again, what memory holds."""

import threading
import weakref
from contextlib import closing
from dataclasses import replace
from itertools import count, islice

import numpy as np
import pytest
from helpers import PREPROCESS_CONFIG
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ensemble.cascade import stream as module
from ensemble.cascade.stream import (
    MAX_CHUNK_ROWS,
    MAX_WAITING_BATCHES,
    MAX_WAITING_ROWS,
    EarlyExitScheduler,
    cascade_chunk_rows,
    cascade_stream,
    rows_per_batch,
)
from ensemble.core.errors import ImageError
from ensemble.images import preprocess
from ensemble.models.runner import AHEAD_CHUNKS, Runner

SMALL = replace(PREPROCESS_CONFIG, size=4)
CROPS = replace(PREPROCESS_CONFIG, geometry="native_crops", count=4)


def grey(value, large=None):
    return Image.new("RGB", (20, 12), (value % 256,) * 3)


def runner(preprocess_config=PREPROCESS_CONFIG, batch=1, given=None):
    """The brightness of an image; the images of each call go to `given`."""

    def run(pixels):
        if given is not None:
            given.append(pixels[:, 0, 0, 0].tolist())
        return pixels.mean(axis=(1, 2, 3)).astype(np.float32)

    return Runner(f"{preprocess_config.size}", preprocess_config, run, batch)


def above(*limits):
    """Needs runner k: an item that is larger than limit k."""
    return lambda number, logits, items: np.array([item > limits[number] for item in items])


MANY = 10**6  # rows of the whole input, in which no batch has room for all


def scored(items, runners, chunk, needs, read=grey, total=MANY):
    with closing(cascade_stream(items, read, runners, chunk, needs, total, workers=2)) as stream:
        found = list(stream)
    errors = {
        sum(len(f.logits) for f in found[:k]) + row: e for k, f in enumerate(found) for row, e in f.errors.items()
    }
    return np.concatenate([each.logits for each in found]), errors, [len(each.logits) for each in found]


@settings(deadline=None)  # a busy machine is no fault
@given(
    values=st.lists(st.integers(0, 99), min_size=1, max_size=60),
    limits=st.lists(st.integers(-1, 99), min_size=1, max_size=4),
    batches=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    chunk=st.sampled_from([1, 2, 8, 16]),
)
def test_rows_keep_their_order_and_a_runner_gets_whole_batches_of_those_that_need_it(values, limits, batches, chunk):
    given = [[] for _ in limits]
    kinds = [PREPROCESS_CONFIG, CROPS, SMALL, PREPROCESS_CONFIG]
    runners = [runner(kinds[k], batches[k], given[k]) for k in range(len(limits))]
    logits, errors, sizes = scored(iter(values), runners, chunk, above(*limits))
    stays = np.minimum.accumulate([[value > limit for limit in limits] for value in values], axis=1)
    np.testing.assert_array_equal(logits, np.where(stays, np.array(values)[:, None], np.nan))
    assert errors == {}
    assert all(size == chunk for size in sizes[:-1])
    for k, calls in enumerate(given):
        assert all(len(call) % batches[k] == 0 for call in calls)
        wasted = sum(map(len, calls)) - stays[:, k].sum() * kinds[k].count
        assert wasted < rows_per_batch(runners[k], MANY) * kinds[k].count  # the last batch alone is filled up


def test_a_runner_sees_what_the_ones_before_it_said():
    seen = []

    def needs(number, logits, items):
        seen.append((number, list(items), logits.copy()))
        return logits[:, 0] > 5 if number else np.ones(len(items), dtype=bool)

    logits, *_ = scored(range(4, 8), [runner(), runner(SMALL)], 4, needs)
    np.testing.assert_array_equal(logits[:, 1], [np.nan, np.nan, 6, 7])
    assert all(np.isnan(known).all() for number, _, known in seen if number == 0)
    ((_, items, known),) = [each for each in seen if each[0] == 1]
    assert items == [4, 5, 6, 7]
    np.testing.assert_array_equal(known, [[4, np.nan], [5, np.nan], [6, np.nan], [7, np.nan]])


@pytest.mark.parametrize(("limit", "expected"), [(99, {8}), (8, {8, 4})])
def test_a_view_that_no_image_needs_is_never_prepared(monkeypatch, limit, expected):
    asked, prepare = [], preprocess.prepare

    def spy(image, preprocess_configs):
        asked.extend(preprocess_config.size for preprocess_config in preprocess_configs)
        return prepare(image, preprocess_configs)

    monkeypatch.setattr(preprocess, "prepare", spy)
    scored(range(10), [runner(), runner(SMALL), runner()], 4, above(-1, limit, limit))
    assert set(asked) == expected
    assert asked.count(8) == 10  # the third runner's view was there
    assert asked.count(4) == (1 if 4 in expected else 0)


def test_nothing_is_prepared_for_rows_that_need_no_runner_but_they_are_read(monkeypatch):
    asked, prepare = [], preprocess.prepare
    monkeypatch.setattr(preprocess, "prepare", lambda image, some: asked.extend(some) or prepare(image, some))

    def read(item, large):
        if item == 2:
            raise ImageError("2: not an image")
        return grey(item)

    logits, errors, _ = scored(range(4), [runner()], 2, above(99), read)
    assert (asked, errors) == ([], {2: "2: not an image"})
    assert np.isnan(logits).all()
    scored(range(4), [runner()], 2, above(-1), read)
    assert len(asked) == 3


IMAGE = 4 * 20 * 12  # bytes in memory


@pytest.mark.parametrize(("room", "reads"), [(1 << 20, 1), (0, 2)])
def test_an_image_is_read_again_only_where_there_is_no_room_to_keep_it(monkeypatch, room, reads):
    monkeypatch.setattr(module, "IMAGE_CACHE_BYTES", room)
    read, lock = [], threading.Lock()

    def counted(item, large):
        with lock:
            read.append(item)
        return grey(item)

    logits, *_ = scored(range(40), [runner(), runner(SMALL)], 4, above(-1, 29), counted)
    np.testing.assert_array_equal(logits[:, 1], [*[np.nan] * 30, *range(30, 40)])
    assert [read.count(item) for item in (0, 29, 30, 39)] == [1, 1, reads, reads]


def test_room_is_given_back(monkeypatch):
    monkeypatch.setattr(module, "IMAGE_CACHE_BYTES", 8 * IMAGE)
    read = []

    def counted(item, large):
        read.append(item)
        return grey(item)

    scored(range(100), [runner(), runner(SMALL)], 1, above(-1, 50), counted)
    assert sorted(read) == list(range(100))  # more than eight are never under way here
    read.clear()
    scored(range(32), [runner(), runner(SMALL, 16)], 16, above(-1, -1), counted)
    assert len(read) > 40  # of sixteen that wait together half are read again


def test_an_image_that_is_gone_when_it_is_read_again_is_an_unreadable_one(monkeypatch):
    monkeypatch.setattr(module, "IMAGE_CACHE_BYTES", 0)
    read = []

    def once(item, large):
        if item in read:
            raise ImageError(f"{item}: no such file")
        read.append(item)
        return grey(item)

    logits, errors, _ = scored(range(6), [runner(), runner(SMALL)], 3, above(-1, 3), once)
    assert errors == {4: "4: no such file", 5: "5: no such file"}
    np.testing.assert_array_equal(logits[:, 0], [0, 1, 2, 3, np.nan, np.nan])


def test_an_image_that_a_later_contract_cannot_take_is_named():
    thin = replace(PREPROCESS_CONFIG, geometry="center_crop", size=224)
    logits, errors, _ = scored(
        range(2), [runner(), runner(thin)], 2, above(-1, 0), lambda item, large: Image.new("RGB", (1, 20_000))
    )
    assert errors == {1: "1: an image of 1x20000 is too thin to be resized to 224x4480000"}
    np.testing.assert_array_equal(logits, [[0, np.nan], [np.nan, np.nan]])


@pytest.mark.parametrize("batch", [4, 32])
def test_rows_that_wait_for_a_full_batch_do_not_hold_up_others_for_ever(batch):
    most = max(MAX_WAITING_ROWS, MAX_WAITING_BATCHES * batch)
    taken = []

    def items():
        for row in count():
            taken.append(row)
            yield row

    def needs(number, logits, some):
        return np.array([number == 0 or item % 100 == 0 for item in some])

    given = []
    stream = cascade_stream(items(), grey, [runner(), runner(SMALL, batch, given)], 8, needs, MANY)
    with closing(stream):
        for done in range(1, 400):
            next(stream)
            assert len(taken) <= 8 * done + most + 8 * (AHEAD_CHUNKS + 2)
    assert {len(call) for call in given} == {batch}  # filled up


@pytest.mark.parametrize("batch", [8, 64])
def test_few_images_are_filled_up_where_few_stay(batch):
    given = []
    scored(
        range(5000),
        [runner(batch=batch), runner(SMALL, batch, given)],
        32,
        lambda number, logits, items: np.array([number == 0 or item % 100 == 0 for item in items]),
    )
    assert 50 <= sum(map(len, given)) <= 3 * 50


def test_only_the_members_that_the_first_rows_wait_for_get_less_than_a_batch():
    calls = {"second": [], "third": []}
    runners = [runner(), runner(SMALL, 8, calls["second"]), runner(PREPROCESS_CONFIG, 8, calls["third"])]

    def needs(number, logits, items):
        # the first row alone waits at the third, and holds up all others
        return np.array([number == 0 or item == 0 or (number == 1 and item % 20 == 0) for item in items])

    scored(range(1400), runners, 8, needs)
    assert [len(call) for call in calls["second"]] == [8] * 9  # 70 rows
    assert [call[0] for call in calls["third"]] == [0]


@pytest.mark.parametrize(
    ("preprocess_config", "batch", "rows", "total", "fixed", "ran"),
    [
        (SMALL, 8, 1, 1, False, 1),
        (SMALL, 8, 3, 5, False, 5),
        (SMALL, 8, 3, 20, False, 8),
        (SMALL, 8, 3, 20, True, 3),
        (CROPS, 8, 1, 1, False, 4),
        (CROPS, 8, 1, 2, False, 8),
        (CROPS, 8, 3, 20, False, 16),
    ],
)
def test_the_last_rows_are_filled_up_to_a_batch_or_to_all_rows_of_the_input(
    preprocess_config, batch, rows, total, fixed, ran
):
    given = []
    logits, *_ = scored(
        range(rows), [replace(runner(preprocess_config, batch, given), fixed=fixed)], 8, above(-1), total=total
    )
    assert sum(map(len, given)) == ran
    np.testing.assert_array_equal(logits[:, 0], range(rows))


def test_images_are_read_while_a_member_runs():
    read = [threading.Event() for _ in range(12)]

    def reads(row, large):
        read[row].set()
        return grey(row)

    def run(pixels):
        first = int(pixels[0, 0, 0, 0])
        assert all(event.wait(10) for event in read[: first + (1 + AHEAD_CHUNKS) * 2 - 1])
        return pixels[:, 0, 0, 0].astype(np.float32)

    logits, *_ = scored(range(12), [Runner("one", PREPROCESS_CONFIG, run)], 2, above(-1), reads)
    assert logits[:, 0].tolist() == list(range(12))


def test_pixels_of_rows_that_stay_are_prepared_while_members_run(monkeypatch):
    calls, second, prepare = [], threading.Event(), preprocess.prepare

    def run(pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            second.set()
        return pixels[:, 0, 0, 0].astype(np.float32)

    def slow(image, preprocess_configs):
        assert preprocess_configs[0].size == 8 or second.wait(10)  # done only as the first runner has its next rows
        return prepare(image, preprocess_configs)

    monkeypatch.setattr(preprocess, "prepare", slow)
    logits, *_ = scored(range(4), [Runner("one", PREPROCESS_CONFIG, run), runner(SMALL)], 2, above(-1, -1))
    assert logits[:, 1].tolist() == [0, 1, 2, 3]


def test_large_images_are_read_one_at_a_time_again_too(monkeypatch):
    monkeypatch.setattr(module, "IMAGE_CACHE_BYTES", 0)
    busy, read = threading.Lock(), []

    def reads(row, large):
        large()
        assert busy.acquire(blocking=False)
        read.append(row)
        image = grey(row)
        busy.release()
        return image

    scored(range(40), [runner(), runner(SMALL)], 8, above(-1, 9), reads)
    assert len(read) == 40 + 30


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_a_failing_member_or_thread_ends_the_stream(error):
    def fail(*given):
        raise error("out of memory")

    with pytest.raises(error, match="out of memory"):
        scored(count(), [runner(), Runner("two", SMALL, fail)], 4, above(-1, 2))
    with pytest.raises(error, match="out of memory"):
        scored(count(), [runner()], 4, above(-1), fail)
    assert len(list(islice(cascade_stream(count(), grey, [runner()], 4, above(-1), MANY), 3))) == 3


def test_who_stops_it_waits_for_no_image_that_is_to_be_read_again(monkeypatch):
    monkeypatch.setattr(module, "IMAGE_CACHE_BYTES", 0)
    read, again, calls, stopped = set(), [], count(), threading.Event()

    def reads(row, large):
        if row in read:
            again.append(row)
            stopped.wait(0.5)
        read.add(row)
        return grey(row)

    def stops(pixels):
        if next(calls):
            raise KeyboardInterrupt
        return pixels[:, 0, 0, 0].astype(np.float32)

    with pytest.raises(KeyboardInterrupt):
        scored(range(16), [Runner("one", PREPROCESS_CONFIG, stops, 4), runner(SMALL, 16)], 4, above(-1, -1), reads)
    assert len(again) <= 2  # of four, on two threads
    stopped.set()


def test_what_is_done_holds_no_item():
    """A Parquet file's items hold the bytes of their images."""

    class Item:
        def __init__(self, row):
            self.row = row

    alive: weakref.WeakSet[Item] = weakref.WeakSet()

    def items():
        for row in range(2000):
            item = Item(row)
            alive.add(item)
            yield item

    most = []

    def run(pixels):
        most.append(len(alive))
        return pixels[:, 0, 0, 0].astype(np.float32)

    def needs(number, logits, some):
        return np.array([number == 0 or item.row % 100 == 0 for item in some])

    def reads(item, large):
        if item.row % 7 == 1:
            raise ImageError("not an image")
        return grey(item.row)

    scored(items(), [Runner("one", PREPROCESS_CONFIG, run, 8), runner(SMALL, 1000)], 8, needs, reads)
    assert max(most) < 8 * (AHEAD_CHUNKS + 3) + 20  # those on their way, and those that wait


def test_rows_to_a_chunk():
    assert cascade_chunk_rows([runner()], "cpu") == MAX_CHUNK_ROWS["cpu"]
    assert cascade_chunk_rows([runner(replace(CROPS, size=512, count=16)), runner()], "cpu") == 4
    assert cascade_chunk_rows([], "cuda") == MAX_CHUNK_ROWS["cuda"]


@pytest.fixture
def schedule():
    """A scheduler of two runners in chunks of two; the second takes four rows a batch and sees values above 9."""
    given = [[], []]
    runners = [runner(batch=2, given=given[0]), runner(SMALL, 4, given[1])]

    def read(item, large):
        if item == 5:
            raise ImageError("5: not an image")
        return grey(item)

    scheduler = EarlyExitScheduler(read, runners, above(-1, 9), MANY, 2, 1)
    yield scheduler, given
    scheduler.close()


def test_a_loaded_row_has_the_first_view_or_an_error_or_needs_nothing(schedule):
    scheduler, _ = schedule
    row = scheduler.load(10)
    assert ([view.shape for view in row.views.values()], row.done) == ([(1, 8, 8, 3)], False)
    unreadable = scheduler.load(5)
    assert (unreadable.error, unreadable.done, hasattr(unreadable, "item")) == ("5: not an image", True, False)
    needless = scheduler.load(-2)
    assert (needless.views, needless.error, needless.done) == ({}, None, True)


def test_a_submitted_row_waits_for_a_full_batch(schedule):
    scheduler, given = schedule
    scheduler.submit([scheduler.load(10)])
    scheduler.run(last=False)
    assert (given, list(scheduler.emit(last=False))) == ([[], []], [])
    scheduler.submit([scheduler.load(1)])
    scheduler.run(last=False)
    assert given == [[[10, 1]], []]


def test_a_row_that_exits_is_done_and_one_that_stays_gets_the_next_view(schedule):
    scheduler, given = schedule
    stays, leaves = rows = [scheduler.load(10), scheduler.load(1)]
    scheduler.submit(rows)
    scheduler.run(last=False)
    assert (leaves.done, leaves.logits[0], stays.done) == (True, 1, False)
    assert [view.shape for view in stays.pending_views.result().values()] == [(1, 4, 4, 3)]
    assert stays.views == {}  # no later runner takes the first view
    assert list(scheduler.emit(last=False)) == []  # in their order: the first is not done
    scheduler.run(last=True)
    (chunk,) = scheduler.emit(last=True)
    np.testing.assert_array_equal(chunk.logits, [[10, 10], [1, np.nan]])
    assert given[1] == [[10] * 4]  # padded with copies


def test_rows_that_hold_up_a_chunk_for_too_long_run_in_less_than_a_batch(schedule, monkeypatch):
    scheduler, given = schedule
    monkeypatch.setattr(scheduler, "_max_rows", 3)
    for value, ran in ((10, []), (1, []), (2, []), (3, [[10] * 4])):
        scheduler.submit([scheduler.load(value)])
        scheduler.run(last=False)
        assert given[1] == ran
    assert [len(chunk.logits) for chunk in scheduler.emit(last=False)] == [2, 2]


def test_what_is_emitted_is_a_chunk_or_at_the_end_the_rest(schedule):
    scheduler, _ = schedule
    scheduler.submit([scheduler.load(item) for item in (1, 5, 2)])
    scheduler.run(last=True)
    chunks = list(scheduler.emit(last=False))
    assert [(len(chunk.logits), chunk.errors) for chunk in chunks] == [(2, {1: "5: not an image"})]
    assert [len(chunk.logits) for chunk in scheduler.emit(last=True)] == [1]
    assert not scheduler.rows
