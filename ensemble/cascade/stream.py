"""Stream images through a cascade: each member scores, in full batches, only the images that still need it."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
from ensemble.models.runner import AHEAD_CHUNKS, LogitBatch, OnLarge, Runner, T, Views, chunk_rows, run_views

# index of a runner, logits float32 [N, runners] so far (NaN where none ran), items -> bool [N]: who needs that runner
NeedsRunner = Callable[[int, np.ndarray, Sequence[T]], np.ndarray]

MAX_CHUNK_ROWS = {"cpu": 32, "cuda": 128}  # rows read at a time
# Beyond so many waiting rows, or so many times a runner's batch, the first rows are emitted whether or not their
# batches are full: where one image of 100 stays, a batch is then two thirds full.
MAX_WAITING_ROWS, MAX_WAITING_BATCHES = 512, 64
IMAGE_CACHE_BYTES = 256 << 20  # of decoded images; an image without room there is decoded again where its row stays


@dataclass
class _Row(Generic[T]):
    """An item on its way through the runners.

    logits: float32 [runners], NaN where none ran. views: pixels that are ready. pending_views: pixels
    that a thread prepares. image: the decoded image, if the cache holds it. A row that is done
    keeps its logits or error alone, since an item may hold an image's bytes.
    """

    item: T
    logits: np.ndarray
    views: Views = field(default_factory=dict)
    pending_views: Future[Views] | None = None
    image: Image | None = None
    error: str | None = None
    done: bool = False


def cascade_stream(
    items: Iterable[T],
    read: Callable[[T, OnLarge], Image],
    runners: Sequence[Runner],
    chunk: int,
    needs: NeedsRunner[T],
    total: int,
    workers: int | None = None,
    name: Callable[[T], object] = lambda item: item,
) -> Generator[LogitBatch, None, None]:
    """Like `score_stream`, but a runner gets only the rows that need it; a row that exits needs no later runner.

    Rows come out in their order, `chunk` at a time. AHEAD chunks are read ahead by `workers` threads.
    total: rows of the whole input. name: what an item is called in error messages. How rows are
    gathered into batches: `EarlyExitScheduler`.
    """
    workers = workers or min(available_cores(), 16)
    with ExitStack() as stack:
        scheduler = EarlyExitScheduler(read, runners, needs, total, chunk, workers, name)
        stack.callback(scheduler.close)
        loads = stack.enter_context(closing(ordered_map(scheduler.load, items, workers, ahead=AHEAD_CHUNKS * chunk)))
        loaded = list(islice(loads, chunk))
        while scheduler.rows or loaded:
            scheduler.submit(loaded)
            scheduler.run(last=not loaded)
            yield from scheduler.emit(last=not loaded)
            loaded = list(islice(loads, chunk))


class EarlyExitScheduler(Generic[T]):
    """Batches rows for runners that they reach one after another, until they exit.

    `load` reads a row (on any thread), `submit` takes rows in, `run` runs what is due, `emit` hands out
    what is done. Rows wait at a runner until they fill its batches, so that a batch costs no more than it
    scores. Their pixels are prepared on threads meanwhile, only for the runner that they wait for.

    The last rows are padded with copies of one row to whole batches, or to `total` rows where a batch has room
    for the whole input. The shape of a batch can change the last bits of a logit: so it depends on `total`
    alone, not on where a run was interrupted and resumed.
    """

    def __init__(
        self,
        read: Callable[[T, OnLarge], Image],
        runners: Sequence[Runner],
        needs: NeedsRunner[T],
        total: int,
        chunk: int,
        workers: int,
        name: Callable[[T], object] = lambda item: item,
    ) -> None:
        self.rows: deque[_Row[T]] = deque()  # submitted, not yet emitted, in their order
        self._read, self._runners, self._needs, self._chunk, self._name = read, runners, needs, chunk, name
        self._waiting: list[deque[_Row[T]]] = [deque() for _ in runners]
        self._batch_rows = [rows_per_batch(runner, total) for runner in runners]
        self._max_rows = max([MAX_WAITING_ROWS, *(MAX_WAITING_BATCHES * size for size in self._batch_rows)])
        self._free_cache_bytes, self._cache_lock = IMAGE_CACHE_BYTES, threading.Lock()
        self._large_image_lock = threading.Lock()
        self._pool = ThreadPoolExecutor(workers)

    def close(self) -> None:
        """Cancel what threads have not begun; so Ctrl-C waits for no image that is queued."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def load(self, item: T) -> _Row[T]:
        """A row with its image read, and with the first runner's pixels if it needs that runner. Thread-safe."""
        row = _Row(item, np.full(len(self._runners), np.nan, dtype=np.float32))
        needed = bool(self._runners) and bool(self._needs(0, row.logits[None], [item])[0])
        self._add_views(row, lambda: self._prepare(row, self._runners[:1] if needed else []))
        if not (needed or row.done):
            self._finish(row)
        return row

    def submit(self, rows: Sequence[_Row[T]]) -> None:
        """Take loaded rows in: they wait at the first runner, unless they are done."""
        self.rows += rows
        for row in rows:
            if not row.done:
                self._waiting[0].append(row)

    def run(self, last: bool) -> None:
        """Each runner once, on the full batches that waited before this call; pixels of rows that join now take time.

        A runner runs all its rows, in a batch that is not full, if no more rows come (last), or if too many rows
        wait and it holds up the first chunk.
        """
        overdue = list(islice(self.rows, self._chunk if len(self.rows) > self._max_rows else 0))
        ready = [len(queue) for queue in self._waiting]
        for index, queue in enumerate(self._waiting):
            flush = last or any(queue[0] is row for row in overdue if queue)
            full = ready[index] // self._batch_rows[index] * self._batch_rows[index]
            self._run_batch(index, [queue.popleft() for _ in range(len(queue) if flush else full)])

    def emit(self, last: bool) -> Iterator[LogitBatch]:
        """Chunks whose rows are all done, as long as the first is; last: the rest may be less than a chunk."""
        rows, chunk = self.rows, self._chunk
        while rows and (last or len(rows) >= chunk) and all(row.done for row in islice(rows, chunk)):
            done = [rows.popleft() for _ in range(min(chunk, len(rows)))]
            errors = {position: row.error for position, row in enumerate(done) if row.error is not None}
            yield LogitBatch(np.stack([row.logits for row in done]), errors)

    def _run_batch(self, index: int, rows: Sequence[_Row[T]]) -> None:
        """Run one runner on rows, and let them go on to the next."""
        runner = self._runners[index]
        for row in rows:
            if row.pending_views:
                self._add_views(row, row.pending_views.result)
        readable = [row for row in rows if not row.done]
        if readable:
            padding = 0 if runner.fixed else -len(readable) % self._batch_rows[index]
            padded = readable + readable[-1:] * padding
            pixels = np.stack([row.views[runner.preprocess_config.view] for row in padded])
            for row, logit in zip(readable, run_views(runner, pixels), strict=False):
                row.logits[index] = logit
        self._arrive(index + 1, readable)

    def _arrive(self, index: int, rows: Sequence[_Row[T]]) -> None:
        """Rows that need this runner wait for it while threads prepare their pixels; the others are done."""
        stays = np.zeros(len(rows), dtype=bool)
        if rows and index < len(self._runners):
            stays = self._needs(index, np.stack([row.logits for row in rows]), [row.item for row in rows])
        later_views = [runner.preprocess_config.view for runner in self._runners[index:]]
        for row, stay in zip(rows, stays, strict=True):
            if not stay:
                self._finish(row)
                continue
            row.views = {view: pixels for view, pixels in row.views.items() if view in later_views}
            ready = later_views[0] in row.views
            row.pending_views = (
                None if ready else self._pool.submit(self._prepare, row, self._runners[index : index + 1])
            )
            self._waiting[index].append(row)

    def _prepare(self, row: _Row[T], runners: Sequence[Runner]) -> Views:
        """The pixels that these runners take. Large images are read one at a time, to bound the memory."""
        with ExitStack() as stack:
            image = row.image or self._read(row.item, lambda: stack.enter_context(self._large_image_lock))
            with self._cache_lock:
                if row.image is None and _image_bytes(image) <= self._free_cache_bytes:
                    self._free_cache_bytes -= _image_bytes(image)
                    row.image = image
            with decode.errors_with_name(self._name(row.item)):
                views = preprocess.prepare(image, [runner.preprocess_config for runner in runners])
            del image  # before another large one may be decoded
        return views

    def _finish(self, row: _Row[T]) -> None:
        """Mark the row as done and drop its item, image and pixels."""
        with self._cache_lock:
            self._free_cache_bytes += _image_bytes(row.image) if row.image else 0
        row.views, row.pending_views, row.image, row.done = {}, None, None, True
        del row.item

    def _add_views(self, row: _Row[T], prepare: Callable[[], Views]) -> None:
        """Give the row its pixels; one whose image cannot be read is done, with the error and without logits."""
        try:
            row.views |= prepare()
        except ImageError as error:
            row.error, row.logits = str(error), np.full_like(row.logits, np.nan)
            self._finish(row)


def cascade_chunk_rows(runners: Sequence[Runner], device: str) -> int:
    """The `chunk` of `cascade_stream` for these runners, a power of two: most rows hold one view at a time."""
    return min([MAX_CHUNK_ROWS[device], *(chunk_rows([runner.preprocess_config], device) for runner in runners)])


def rows_per_batch(runner: Runner, total: int) -> int:
    """The fewest rows whose views fill whole batches; all `total` rows if their views are fewer than a batch."""
    batch = min(runner.batch, total * runner.preprocess_config.count)
    return batch // gcd(batch, runner.preprocess_config.count)


def _image_bytes(image: Image) -> int:
    return 4 * image.width * image.height  # Pillow pads RGB
