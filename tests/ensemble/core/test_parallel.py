import threading
import time
from collections.abc import Iterator

import pytest

from ensemble.core.parallel import ordered_map


class Counter:
    """Numbers up to `count`, which remembers how many were taken."""

    def __init__(self, count: int) -> None:
        self.count, self.taken = count, 0

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count):
            self.taken += 1
            yield number


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (4, None), (4, 2), (None, None), (8, 100)])
def test_results_come_in_order(workers, ahead):
    def slower_first(number):
        time.sleep(0.002 * (number % 4 == 0))
        return -number

    assert list(ordered_map(slower_first, range(40), workers, ahead)) == [-number for number in range(40)]


def test_no_items_give_no_results():
    assert list(ordered_map(str, [])) == []


def test_work_is_done_side_by_side():
    meeting = threading.Barrier(3, timeout=10)  # passes only once three threads wait at it
    assert list(ordered_map(lambda number: (meeting.wait(), number)[1], range(3), workers=3)) == [0, 1, 2]


@pytest.mark.parametrize(("workers", "ahead", "limit"), [(2, 5, 5), (2, None, 8), (1, 1, 1)])
def test_reading_ahead_is_bounded(workers, ahead, limit):
    items = Counter(1000)
    results = ordered_map(str, items, workers, ahead)
    for number in range(20):
        assert next(results) == str(number)
        assert items.taken <= number + limit
    results.close()


def test_nothing_starts_before_the_first_result_is_asked_for():
    items = Counter(10)
    ordered_map(str, items)
    assert items.taken == 0


def test_an_exception_comes_in_its_place():
    def fail(number):
        if number == 3:
            raise ValueError(f"bad {number}")
        return number

    results = ordered_map(fail, range(1000), workers=2, ahead=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="bad 3"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_an_exception_of_the_items_is_passed_on():
    def items():
        yield 1
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        list(ordered_map(str, items(), ahead=1))


def test_work_that_runs_is_told_that_nobody_waits_for_it_any_more():
    stop = threading.Event()

    def work(number):
        return "told" if stop.wait(10 * number) else "not told"

    began = time.monotonic()
    results = ordered_map(work, range(9), workers=4, stop=stop)
    assert next(results) == "not told"
    results.close()
    assert time.monotonic() - began < 5


def test_closing_early_cancels_what_waits():
    started, go_on = [], threading.Event()

    def work(number):
        started.append(number)
        if number:
            go_on.wait(10)
        return number

    results = ordered_map(work, range(100), workers=1, ahead=50)
    assert next(results) == 0
    threading.Timer(0.2, go_on.set).start()  # after close() has cancelled and waits for the one that runs
    results.close()
    assert len(started) <= 2
