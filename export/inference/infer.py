"""Score images with a loaded ensemble: in memory, or into a file through the journal. Needs no torch."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import PIL
from tqdm import tqdm

from ensemble.core import artifacts, metrics
from ensemble.core.errors import ArtifactError
from ensemble.core.log import Log
from ensemble.data.inputs import Inputs, ids
from ensemble.data.readers import Item
from ensemble.models.external import test_column
from ensemble.models.runner import with_flip
from export.inference.ensemble import Ensemble
from export.inference.journal import SHARD_ROWS, Journal, ScoredBatch, open_journal
from export.inference.outputs import Failure, write_failures, write_scores
from export.inference.scoring import chunk_size, score_shards

Progress = Callable[[int], object]  # called with the number of rows that were scored since the last call
# Scores shards of a journal, in any order; yields each one's number and the content of its file.
ShardScorer = Callable[[Journal, Sequence[int], Progress], Generator[tuple[int, bytes], None, None]]


@dataclass(frozen=True)
class ScoreOptions:
    """What decides the output beside members and images; each field is the option of that name.

    The fields are part of the journal's key and of the provenance.
    """

    members: bool = False
    tta: bool = False
    adapted: bool = False
    fill: float | None = None


@dataclass(frozen=True)
class InferResult:
    """How many images were scored and failed, the list of those that failed, and the speed of this process.

    exits: how many of the scored images left the cascade after each member, in its order; empty without a cascade.
    """

    scored: int
    failed: int
    listing: Path | None
    images_per_second: float
    exits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PreparedEnsemble:
    """An ensemble that is ready to score.

    bundle: the content of bundle.json when the ensemble was loaded; None where no bundle runs. libraries: versions
    of what runs the members, by runtime. scorer: scores shards elsewhere than in this process.
    """

    ensemble: Ensemble
    bundle: Mapping[str, Any] | None
    libraries: Mapping[str, str]
    scorer: ShardScorer | None = None


def with_flips(ensemble: Ensemble, remedy: str) -> Ensemble:
    """The ensemble with test-time augmentation: its members that gained by mirrored images average over both.

    ArtifactError, with the remedy, if `stack --tta` did not measure which members gain.
    """
    flips = ensemble.stacker.tta_members
    if flips is None:
        raise ArtifactError(f"--tta: it was not measured which members mirrored images help; {remedy}")
    runners = (with_flip(runner) if runner.name in flips else runner for runner in ensemble.runners)
    return replace(ensemble, runners=tuple(runners))


def infer(inputs: Inputs, ensemble: Ensemble, with_members: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score every image once, in memory; returns the scores, and the images that could not be read.

    The scores have the rows and order of the input: `id`, `target` (P(ai), float64, NaN for an image that could not
    be read), and with `with_members` each member's p, which is NaN where a cascade left it out. The second frame:
    `id`, `path`, `error`.
    """
    batch = _score_all(inputs, ensemble)
    result, _ = _result(batch, ensemble, ScoreOptions(with_members))
    return result, pd.DataFrame(map(asdict, batch.failures.values()), columns=["id", "path", "error"])


def member_logits(
    inputs: Inputs, ensemble: Ensemble, progress: Progress = lambda count: None
) -> tuple[np.ndarray, dict[int, str]]:
    """Logits [images, members], members in the stacker's order, and why images could not be read, by row."""
    batch = _score_all(inputs, ensemble, progress)
    return _member_logits(batch, ensemble), {row: failure.error for row, failure in batch.failures.items()}


def infer_to_file(
    inputs: Inputs,
    ensemble: Ensemble,
    output: Path,
    workdir: Path,
    options: ScoreOptions,
    log: Log,
    scorer: ShardScorer | None = None,
) -> InferResult:
    """Score every image once into `output`, CSV or Parquet by its suffix, through the journal in `workdir`.

    Shards that were scored before are not scored again, and the same file results. Memory does not grow
    with the number of images. workdir: of `locked_workdir`. scorer: scores shards elsewhere; by default in this
    process.
    """
    _check_externals(inputs, ensemble)
    runners = [runner.name for runner in ensemble.runners]
    journal, changed = open_journal(workdir, _key(inputs, ensemble, options), runners, inputs.count)
    if changed:
        log(f"Starting anew: changed since {workdir.name} was begun: {', '.join(changed)}.")
    shards = journal.missing_shards()
    remaining = sum(stop - start for start, stop in map(journal.row_range, shards))
    if remaining < inputs.count:
        log(f"Going on: {inputs.count - remaining:,} of {inputs.count:,} rows were scored before.")
    started, initial = time.perf_counter(), inputs.count - remaining
    with (
        tqdm(total=inputs.count, initial=initial, desc="infer", unit="image", leave=False, disable=None) as bar,
        closing((scorer or partial(_score_here, inputs, ensemble))(journal, shards, bar.update)) as stream,
    ):
        for shard, data in stream:
            journal.write(shard, data)
    speed = remaining / (time.perf_counter() - started)
    result = _write_output(output, journal, inputs, ensemble, options, speed)
    journal.close()
    return result


def _score_here(
    inputs: Inputs, ensemble: Ensemble, journal: Journal, shards: Sequence[int], progress: Progress
) -> Generator[tuple[int, bytes], None, None]:
    ranges = [journal.row_range(shard) for shard in shards]
    sizes = [(shard, stop - start) for shard, (start, stop) in zip(shards, ranges, strict=True)]
    items = _items(inputs, _merge_ranges(ranges))
    with closing(score_shards(items, inputs.count, ensemble, sizes, progress)) as stream:
        for shard, batch in stream:
            yield shard, journal.encode(shard, batch)


def _check_externals(inputs: Inputs, ensemble: Ensemble) -> None:
    """ArtifactError for an id without a score of a member that is looked up, before anything is scored."""
    keys = ids(inputs) if ensemble.externals else []
    for member in ensemble.externals:
        test_column(member, keys)


def _key(inputs: Inputs, ensemble: Ensemble, options: ScoreOptions) -> dict[str, object]:
    """All that decides the output, by names that a user knows."""
    return {
        "the members, or what runs them": ensemble.identity,
        "the stack": artifacts.json_sha256(ensemble.stacker.to_dict()),
        "the images": inputs.sha256,
        **{f"--{name}": value for name, value in asdict(options).items()},
        **({"--cascade": ensemble.cascade.to_dict()} if ensemble.cascade else {}),
        "the version of Pillow": PIL.__version__,
        # a cascade does not use the first, which changes only if the members do
        "the size of chunks": [chunk_size(ensemble), SHARD_ROWS],
    }


def _items(inputs: Inputs, ranges: Iterable[tuple[int, int]]) -> Iterator[Item]:
    for start, stop in ranges:
        for _, item in zip(range(start, stop), inputs.items(start, stop), strict=True):  # rows never move
            yield item


def _merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Adjacent ranges as one, so that each stretch of the input is opened once."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return merged


def _score_all(inputs: Inputs, ensemble: Ensemble, progress: Progress = lambda count: None) -> ScoredBatch:
    """Every row, in memory."""
    _check_externals(inputs, ensemble)
    rows = _items(inputs, [(0, inputs.count)])
    with closing(score_shards(rows, inputs.count, ensemble, [(0, inputs.count)], progress)) as stream:
        return next(stream)[1]


def _member_logits(batch: ScoredBatch, ensemble: Ensemble) -> np.ndarray:
    """Logits [N, members] in the stacker's order, with those that are looked up by id; NaN where an image failed."""
    logits = ensemble.with_externals(batch.logits, batch.ids)
    logits[list(batch.failures)] = np.nan
    return logits


def _result(batch: ScoredBatch, ensemble: Ensemble, options: ScoreOptions) -> tuple[pd.DataFrame, np.ndarray]:
    """`id`, `target` and perhaps the members' p of scored rows; the position in the cascade of the last member used."""
    logits = _member_logits(batch, ensemble)
    stack, last = ensemble.apply(logits)
    target = ensemble.stacker.target_of(stack, options.adapted)
    frame = pd.DataFrame({"id": pd.Series(batch.ids, dtype=object), "target": target})
    if options.members:
        frame[list(ensemble.stacker.members)] = metrics.sigmoid(logits)
    return frame, last


def _write_output(
    output: Path, journal: Journal, inputs: Inputs, ensemble: Ensemble, options: ScoreOptions, speed: float
) -> InferResult:
    """Write the output and the list of failures from the shards."""
    stacker, failed = ensemble.stacker, 0
    exits = np.zeros(len(stacker.members), dtype=int)

    def batches() -> Iterator[ScoredBatch]:
        for shard in range(journal.shard_count):
            batch = journal.read(shard)
            if batch is None:
                raise ArtifactError(f"{journal.path(shard)} was changed meanwhile; run the same command again")
            yield batch

    def scores() -> Iterator[pd.DataFrame]:
        for batch in batches():
            frame, last = _result(batch, ensemble, options)
            exits[:] += np.bincount(last[frame["target"].notna()], minlength=len(exits))
            yield frame

    def failures() -> Iterator[Failure]:
        nonlocal failed
        for batch in batches():
            failed += len(batch.failures)
            yield from batch.failures.values()

    write_scores(
        output, scores(), stacker.members if options.members else (), inputs.rows.has_carriage_returns, options.fill
    )
    listing = write_failures(output, failures())
    for written in filter(None, (output, listing)):
        artifacts.clear_unfinished(written)
    order = ensemble.cascade.order if ensemble.cascade else ()
    return InferResult(inputs.count - failed, failed, listing, speed, dict(zip(order, exits.tolist(), strict=False)))
