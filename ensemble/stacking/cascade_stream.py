"""Images -> logits of the members that each needs: in full batches, pixels prepared only for members that run."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice
from math import gcd
from typing import Generic

import numpy as np
from PIL.Image import Image

from ensemble.core.errors import ImageError
from ensemble.core.parallel import available_cores, ordered_map
from ensemble.images import decode, preprocess
from ensemble.models.runner import AHEAD, Large, Runner, Scored, T, Views, chunk_rows, run_views

# a runner's number, logits float32 [N, runners] so far (NaN where none ran), items -> bool [N]: who needs that runner
NeedsRunner = Callable[[int, np.ndarray, Sequence[T]], np.ndarray]

MAX_CHUNK_ROWS = {"cpu": 32, "cuda": 128}  # rows that are read at a time, at most
# Beyond so many rows that wait, or so many times a runner's batch, the first are handed on, whether or not their
# batches are full: where one image of 100 stays, a batch is then two thirds full.
MAX_WAITING_ROWS, MAX_WAITING_BATCHES = 512, 64
IMAGE_CACHE_BYTES = 256 << 20  # of decoded images; without room, an image whose row stays is decoded again


@dataclass
class _Row(Generic[T]):
    """An item on its way: logits so far, pixels by view and those being prepared, and its image if that was kept.

    Once done it has its logits or error alone: an item may hold an image's bytes.
    """

    item: T
    logits: np.ndarray
    views: Views = field(default_factory=dict)
    coming: Future[Views] | None = None
    picture: Image | None = None
    error: str | None = None
    done: bool = False


class _ImageCache:
    """Memory for decoded images, which threads share."""

    def __init__(self, size: int) -> None:
        self._left, self._lock = size, threading.Lock()

    def keep(self, row: _Row[T], picture: Image) -> None:
        """Leave the row its image, if there is room."""
        size = _bytes(picture)
        with self._lock:
            if row.picture is None and size <= self._left:
                self._left -= size
                row.picture = picture

    def clear(self, row: _Row[T]) -> None:
        """Take the row's item, image and pixels: it is done."""
        with self._lock:
            self._left += _bytes(row.picture) if row.picture else 0
        row.views, row.coming, row.picture, row.done = {}, None, None, True
        del row.item


def cascade_stream(
    items: Iterable[T],
    read: Callable[[T, Large], Image],
    runners: Sequence[Runner],
    chunk: int,
    needs: NeedsRunner[T],
    total: int,
    workers: int | None = None,
    name: Callable[[T], object] = lambda item: item,
) -> Generator[Scored, None, None]:
    """As `score_stream`, but a runner gets only the rows that need it; one that does not need it needs none after it.

    Rows gather at a runner until they fill its batches, and are handed on in their order, `chunk`
    at a time. Threads read AHEAD chunks and prepare the first runner's view, then each later
    one for the rows that need it. The last rows are filled up with copies of one to whole
    batches, or to the `total` rows of the whole input where a batch has room for all: what a row
    is given beside depends on that number alone, wherever a run goes on, and one image costs one.
    """
    workers = workers or min(available_cores(), 16)
    alone, room = threading.Lock(), _ImageCache(IMAGE_CACHE_BYTES)
    rows: deque[_Row[T]] = deque()  # not yet handed on
    waiting: list[deque[_Row[T]]] = [deque() for _ in runners]
    full = [rows_per_batch(runner, total) for runner in runners]
    most = max([MAX_WAITING_ROWS, *(MAX_WAITING_BATCHES * size for size in full)])

    def load(item: T) -> _Row[T]:
        row = _Row(item, np.full(len(runners), np.nan, dtype=np.float32))
        wanted = bool(runners) and bool(needs(0, row.logits[None], [item])[0])
        prepared(row, lambda: prepare(row, runners[:1] if wanted else []))
        if not (wanted or row.done):
            room.clear(row)
        return row

    def prepare(row: _Row[T], some: Sequence[Runner]) -> Views:
        with ExitStack() as held:
            image = row.picture or read(row.item, lambda: held.enter_context(alone))
            room.keep(row, image)
            with decode.errors_with_name(name(row.item)):
                views = preprocess.prepare(image, [runner.preprocess_config for runner in some])
            del image  # before another large one may be decoded
        return views

    def prepared(row: _Row[T], found: Callable[[], Views]) -> None:
        try:
            row.views |= found()
        except ImageError as error:
            row.error, row.logits = str(error), np.full_like(row.logits, np.nan)
            room.clear(row)

    def arrive(number: int, some: Sequence[_Row[T]]) -> None:
        """Rows wait at a runner that they need, and their pixels are prepared meanwhile; the others are done."""
        stays = np.zeros(len(some), dtype=bool)
        if some and number < len(runners):
            stays = needs(number, np.stack([row.logits for row in some]), [row.item for row in some])
        later = [runner.preprocess_config.view for runner in runners[number:]]
        for row, stay in zip(some, stays, strict=True):
            if not stay:
                room.clear(row)
                continue
            row.views = {view: pixels for view, pixels in row.views.items() if view in later}
            row.coming = None if later[0] in row.views else pool.submit(prepare, row, runners[number : number + 1])
            waiting[number].append(row)

    def run(number: int, some: Sequence[_Row[T]]) -> None:
        runner = runners[number]
        for row in some:
            if row.coming:
                prepared(row, row.coming.result)
        sound = [row for row in some if not row.done]
        if sound:
            filled = sound + sound[-1:] * (0 if runner.fixed else -len(sound) % full[number])
            pixels = np.stack([row.views[runner.preprocess_config.view] for row in filled])
            for row, logit in zip(sound, run_views(runner, pixels), strict=False):
                row.logits[number] = logit
        arrive(number + 1, sound)

    with ExitStack() as stack:
        pool = ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # Ctrl-C waits for no image that is in line
        loads = stack.enter_context(closing(ordered_map(load, items, workers, ahead=AHEAD * chunk)))
        loaded = list(islice(loads, chunk))
        while rows or loaded:
            rows += loaded
            for row in loaded:
                if not row.done:
                    waiting[0].append(row)
            first = list(islice(rows, chunk if len(rows) > most else 0))  # those that wait too long
            ready = [len(queue) for queue in waiting]  # the pixels of rows that join now are prepared while these run
            for number, queue in enumerate(waiting):
                late = not loaded or any(queue[0] is row for row in first if queue)
                whole = ready[number] // full[number] * full[number]
                run(number, [queue.popleft() for _ in range(len(queue) if late else whole)])
            while rows and (not loaded or len(rows) >= chunk) and all(row.done for row in islice(rows, chunk)):
                yield _scored([rows.popleft() for _ in range(min(chunk, len(rows)))])
            loaded = list(islice(loads, chunk))


def cascade_chunk_rows(runners: Sequence[Runner], device: str) -> int:
    """Rows to a chunk of `cascade_stream`, a power of two: most are in memory in one view at a time."""
    return min([MAX_CHUNK_ROWS[device], *(chunk_rows([runner.preprocess_config], device) for runner in runners)])


def rows_per_batch(runner: Runner, total: int) -> int:
    """The fewest rows whose views fill whole batches; all rows of an input whose views are fewer than a batch."""
    batch = min(runner.batch, total * runner.preprocess_config.count)
    return batch // gcd(batch, runner.preprocess_config.count)


def _bytes(picture: Image) -> int:
    return 4 * picture.width * picture.height  # Pillow pads RGB


def _scored(rows: Sequence[_Row[T]]) -> Scored:
    errors = {place: row.error for place, row in enumerate(rows) if row.error is not None}
    return Scored(np.stack([row.logits for row in rows]), errors)
