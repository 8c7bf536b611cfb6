"""Run an ensemble's members over a stream of images: batches of logits, by chunk or by shard. Needs no torch."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from operator import attrgetter

import numpy as np
from PIL.Image import Image

from ensemble.cascade.stream import cascade_chunk_rows, cascade_stream
from ensemble.core.errors import ArtifactError, join_limited
from ensemble.data.readers import Item
from ensemble.images import decode
from ensemble.models.runner import LogitBatch, OnLarge, chunk_rows, score_stream
from export.inference.ensemble import Ensemble
from export.inference.journal import ScoredBatch
from export.inference.outputs import Failure


def score_shards(
    items: Iterable[Item],
    total: int,
    ensemble: Ensemble,
    sizes: Iterable[tuple[int, int]],
    progress: Callable[[int], object] = lambda count: None,
    threads: int | None = None,
) -> Generator[tuple[int, ScoredBatch], None, None]:
    """Score the items of several shards; yields each shard's number and its batch.

    items: of all the shards, in order. sizes: each shard's number, and how many rows it has. total: rows of the
    whole input. threads: that read and decode; by default one for each core. ArtifactError where a member has no
    finite logit for an image that could be read.
    """
    with closing(_score_chunks(items, total, ensemble, threads)) as stream:
        for shard, size in sizes:
            ids: list[str] = []
            logits: list[np.ndarray] = []
            failures: dict[int, Failure] = {}
            while len(ids) < size:
                batch = next(stream)
                failures |= {len(ids) + row: failure for row, failure in batch.failures.items()}
                ids += batch.ids
                logits.append(batch.logits)
                progress(len(batch.ids))
            yield shard, ScoredBatch(ids, np.concatenate(logits), failures)


def _score_chunks(
    items: Iterable[Item], total: int, ensemble: Ensemble, threads: int | None
) -> Generator[ScoredBatch, None, None]:
    pending: deque[tuple[str, str]] = deque()  # id and path of the items that were read and not yet scored

    def remembered() -> Iterator[Item]:
        for item in items:
            pending.append((item.id, item.path))
            yield item

    with closing(_stream(remembered(), total, ensemble, threads)) as stream:
        for scored in stream:
            names = [pending.popleft() for _ in scored.logits]
            ids = [key for key, _ in names]
            failures = {row: Failure(*names[row], error) for row, error in scored.errors.items()}
            missing = np.flatnonzero(ensemble.has_missing_logits(scored.logits, ids))
            if lost := [ids[row] for row in missing if row not in failures]:
                raise ArtifactError(
                    f"a member gave no finite logit for images it could read ({join_limited(lost)}); train it again"
                )
            yield ScoredBatch(ids, scored.logits, failures)


def _stream(
    items: Iterable[Item], total: int, ensemble: Ensemble, threads: int | None
) -> Generator[LogitBatch, None, None]:
    runners, name = ensemble.runners, attrgetter("path")

    def read(item: Item, large: OnLarge) -> Image:
        return decode.decode(item.source, item.path, large)

    if not (cascade := ensemble.cascade):
        together = ensemble.device == "cuda"
        return score_stream(items, read, runners, chunk_size(ensemble), together, threads, name)

    def needs(number: int, logits: np.ndarray, waiting: Sequence[Item]) -> np.ndarray:
        before = cascade.order[: cascade.order.index(runners[number].name)]
        return cascade.stays(ensemble.with_externals(logits, [item.id for item in waiting], before), ensemble.stacker)

    chunk = cascade_chunk_rows(runners, ensemble.device)
    return cascade_stream(items, read, runners, chunk, needs, total, threads, name)


def chunk_size(ensemble: Ensemble) -> int:
    """Rows that run together without a cascade."""
    return chunk_rows([runner.preprocess_config for runner in ensemble.runners], ensemble.device)
