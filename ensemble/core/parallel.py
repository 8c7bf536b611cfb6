"""Threads that work ahead of the reader, without letting results pile up."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def available_cores() -> int:
    """Cores that this process may run on: fewer than the machine's under taskset, Slurm or a container's cpuset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[T], R],
    items: Iterable[T],
    workers: int | None = None,
    ahead: int | None = None,
    stop: Event | None = None,
) -> Generator[R, None, None]:
    """`map` on threads: results in the order of `items`, at most `ahead` of them waiting.

    `stop` is set once no more results are wanted, for a long `function` to look at: its end is waited for.
    Image decoding and hashing release Python's lock, so threads do run side by side.
    """
    workers = workers or min(available_cores(), 16)
    ahead = ahead or 4 * workers
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            if stop:
                stop.set()
            for future in waiting:
                future.cancel()
