"""An ensemble's members over a stream of images: rows of logits by chunks or shards. Runs without torch."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing

import numpy as np
from PIL.Image import Image

from ensemble.core.errors import ArtifactError, join_limited
from ensemble.data.inputs import Item
from ensemble.images import decode
from ensemble.models.runner import Large, Scored, chunk_rows, score_stream
from ensemble.stacking.cascade_stream import cascade_chunk_rows, cascade_stream
from export.inference import ensemble as ensembles
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
    """Each (shard, number of its rows) of `sizes` with its rows, from the items of them all in order.

    total: rows of the whole input. threads: that read and decode; by default one for each core.
    """
    with closing(score_rows(items, total, ensemble, threads)) as stream:
        for shard, size in sizes:
            parts: list[ScoredBatch] = []
            while sum(len(part.ids) for part in parts) < size:
                parts.append(next(stream))
                progress(len(parts[-1].ids))
            yield shard, joined(parts)


def score_rows(
    items: Iterable[Item], total: int, ensemble: Ensemble, threads: int | None = None
) -> Generator[ScoredBatch, None, None]:
    """The items' rows, chunk by chunk.

    ArtifactError where a member has no finite logit for an image that could be read.
    """
    named: deque[tuple[str, str]] = deque()

    def noted() -> Iterator[Item]:
        for item in items:
            named.append((item.id, item.path))
            yield item

    with closing(_stream(noted(), total, ensemble, threads)) as stream:
        for scored in stream:
            places = [named.popleft() for _ in scored.logits]
            failures = {row: Failure(*places[row], error) for row, error in scored.errors.items()}
            silent = np.flatnonzero(ensembles.silent(ensemble, scored.logits, [key for key, _ in places]))
            if lost := [places[row][0] for row in silent if row not in failures]:
                raise ArtifactError(
                    f"a member gave no finite logit for images it could read ({join_limited(lost)}); train it again"
                )
            yield ScoredBatch([key for key, _ in places], scored.logits, failures)


def _stream(
    items: Iterable[Item], total: int, ensemble: Ensemble, threads: int | None
) -> Generator[Scored, None, None]:
    def read(item: Item, large: Large) -> Image:
        return decode.decode(item.source, item.path, large)

    def path(item: Item) -> str:
        return item.path

    if cascade := ensemble.cascade:

        def needs(number: int, logits: np.ndarray, asking: Sequence[Item]) -> np.ndarray:
            return ensembles.needs(ensemble, cascade, number, logits, [item.id for item in asking])

        chunk = cascade_chunk_rows(ensemble.runners, ensemble.device)
        return cascade_stream(items, read, ensemble.runners, chunk, needs, total, threads, name=path)
    together = ensemble.device == "cuda"
    return score_stream(items, read, ensemble.runners, chunk_of(ensemble), together, threads, name=path)


def joined(parts: Sequence[ScoredBatch]) -> ScoredBatch:
    """Rows that follow on each other as one."""
    keys: list[str] = []
    failures: dict[int, Failure] = {}
    for part in parts:
        failures |= {len(keys) + row: failure for row, failure in part.failures.items()}
        keys += part.ids
    return ScoredBatch(keys, np.concatenate([part.logits for part in parts]), failures)


def chunk_of(ensemble: Ensemble) -> int:
    """Rows that run together without a cascade."""
    return chunk_rows([runner.preprocess_config for runner in ensemble.runners], ensemble.device)
