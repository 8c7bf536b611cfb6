"""Images -> logits of one or several members, each image read and decoded once."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL.Image import Image

from ensemble.core.errors import ImageError
from ensemble.core.parallel import ordered_map
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.images import decode as images
from ensemble.images import preprocess

T = TypeVar("T")
Views = dict[tuple[Any, ...], np.ndarray]  # pixels by PreprocessConfig.view
OnLarge = Callable[[], object]  # what `images.decode` calls before it takes memory for a large image

AHEAD_CHUNKS = 2  # chunks decoded before the one that runs is done
MAX_CHUNK_ROWS = 128  # to a chunk
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # 64 rows and more of five full-size members; 128 on a GPU


@dataclass(frozen=True)
class Runner:
    """A member ready to run in torch or ONNX Runtime. run: uint8 [N, S, S, 3] -> float32 logits [N], for any N.

    batch: images that it runs at once. fixed: it pads smaller batches to that size, so that the bits of a row's logit
    depend on no other row.
    """

    name: str
    preprocess_config: PreprocessConfig
    run: Callable[[np.ndarray], np.ndarray]
    batch: int = 1
    fixed: bool = False


@dataclass(frozen=True)
class LogitBatch:
    """A chunk of rows: logits float32 [rows, runners], and why rows could not be read, by row in the chunk.

    NaN in rows with an error, and where a cascade did not run a member.
    """

    logits: np.ndarray
    errors: dict[int, str]


def score_stream(
    items: Iterable[T],
    read: Callable[[T, OnLarge], Image],
    runners: Sequence[Runner],
    chunk: int,
    together: bool = False,
    workers: int | None = None,
    name: Callable[[T], object] = lambda item: item,
) -> Generator[LogitBatch, None, None]:
    """Score any number of items in their order, `chunk` rows at a time; memory holds a few chunks.

    read: turns an item into a decoded image. Threads read and prepare the rows of up to AHEAD_CHUNKS chunks while the
    members run: one after the other, since on a CPU each takes all cores, or `together` on threads, so that on a GPU
    copies overlap with work. Rows that cannot be read are left out of their chunk and others do not move up, so that
    the composition of a batch depends on the list alone. Large images are decoded one at a time. Any error but
    ImageError ends the stream. name: what errors call an item.
    """
    configs = list({runner.preprocess_config.view: runner.preprocess_config for runner in runners}.values())
    large_image_lock = threading.Lock()

    def rows() -> Iterator[tuple[Views, int, T]]:
        """Each item with its chunk's pixels, uint8 [chunk, K, S, S, 3] by view, and its row there."""
        pixels: Views = {}
        for number, item in enumerate(items):
            if number % chunk == 0:
                pixels = {c.view: np.empty((chunk, c.count, c.size, c.size, 3), dtype=np.uint8) for c in configs}
            yield pixels, number % chunk, item

    def load(target: tuple[Views, int, T]) -> tuple[Views, str | None]:
        pixels, row, item = target
        try:
            with ExitStack() as locks:
                image = read(item, lambda: locks.enter_context(large_image_lock))
                with images.errors_with_name(name(item)):
                    prepared = preprocess.prepare(image, configs)
                for view, values in prepared.items():
                    pixels[view][row] = values
                del image, prepared  # before another large one may be decoded
        except ImageError as error:
            return pixels, str(error)
        return pixels, None

    with ExitStack() as stack:
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in runners] if together else []
        loads = stack.enter_context(closing(ordered_map(load, rows(), workers, ahead=AHEAD_CHUNKS * chunk)))
        running: deque[tuple[list[str | None], list[Callable[[], np.ndarray]]]] = deque()
        while loaded := list(islice(loads, chunk)):
            errors = [error for _, error in loaded]
            readable = [row for row, error in enumerate(errors) if error is None]
            # a slice is a view: pixels are copied only where a row failed
            part = readable if len(readable) < len(errors) else slice(len(errors))
            pixels = {view: values[part] for view, values in loaded[0][0].items()}
            calls: list[Callable[[], np.ndarray]] = [
                partial(run_views, runner, pixels[runner.preprocess_config.view]) for runner in runners
            ]
            if threads:
                calls = [thread.submit(call).result for thread, call in zip(threads, calls, strict=True)]
            running.append((errors, calls))
            if len(running) > bool(threads):  # with threads the next chunk waits at the members as this one runs
                yield _batch(*running.popleft())
        while running:
            yield _batch(*running.popleft())


def chunk_rows(configs: Iterable[PreprocessConfig], device: str) -> int:
    """Rows to a chunk: a power of two up to MAX_CHUNK_ROWS whose pixels, in all views, stay within CHUNK_BYTES."""
    views = {config.view: 3 * config.count * config.size**2 for config in configs}
    rows = CHUNK_BYTES[device] // max(1, sum(views.values()))
    return 1 << (max(1, min(rows, MAX_CHUNK_ROWS)).bit_length() - 1)


def score_images(
    files: Sequence[Path],
    runners: Sequence[Runner],
    batch_size: int = 16,
    workers: int | None = None,
    progress: Callable[[int], object] = lambda count: None,
    read: Callable[[int, Path], Image] | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Logits float32 [images, runners] in the order given, and why images could not be read.

    Rows of unreadable images are NaN; the errors are by position. progress: called with the number of images that were
    scored since its last call. read: turns (row, file) into a decoded image.
    """

    def decode(item: tuple[int, Path], large: OnLarge) -> Image:
        return read(*item) if read else images.decode(item[1], large=large)

    logits = np.full((len(files), len(runners)), np.nan, dtype=np.float32)
    errors: dict[int, str] = {}
    stream = score_stream(enumerate(files), decode, runners, batch_size, workers=workers, name=lambda item: item[1])
    with closing(stream):
        for start, scored in zip(range(0, len(files), batch_size), stream, strict=True):
            logits[start : start + batch_size] = scored.logits
            errors |= {start + row: text for row, text in scored.errors.items()}
            progress(len(scored.logits))
    return logits, errors


def image_scorer(runners: Sequence[Runner]) -> Callable[[Sequence[Image]], np.ndarray]:
    """A function: decoded images -> logits float32 [images, runners]; ImageError for one that cannot be resized."""
    configs = {runner.preprocess_config.view: runner.preprocess_config for runner in runners}

    def score(pictures: Sequence[Image]) -> np.ndarray:
        prepared = [preprocess.prepare(picture, configs.values()) for picture in pictures]
        pixels = {view: np.stack([views[view] for views in prepared]) for view in configs}
        return np.stack([run_views(runner, pixels[runner.preprocess_config.view]) for runner in runners], axis=1)

    return score


def with_flip(runner: Runner) -> Runner:
    """The same member, its logit averaged with that of the image mirrored left to right."""

    def run(pixels: np.ndarray) -> np.ndarray:
        mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
        return (runner.run(pixels) + runner.run(mirrored)) / 2

    return replace(runner, run=run)


def run_views(runner: Runner, views: np.ndarray) -> np.ndarray:
    """Logits float32 [N] of pixels uint8 [N, K, S, S, 3]: the mean over an image's K views."""
    if not len(views):
        return np.empty(0, dtype=np.float32)
    logits = runner.run(views.reshape(-1, *views.shape[2:]))
    return logits.reshape(len(views), -1).mean(axis=1)


def _batch(errors: Sequence[str | None], calls: Sequence[Callable[[], np.ndarray]]) -> LogitBatch:
    logits = np.full((len(errors), len(calls)), np.nan, dtype=np.float32)
    readable = np.array([error is None for error in errors])
    for column, call in enumerate(calls):
        logits[readable, column] = call()
    return LogitBatch(logits, {row: error for row, error in enumerate(errors) if error is not None})
