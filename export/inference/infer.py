"""Score images with a loaded ensemble and write the result. Runs without torch."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
from tqdm import tqdm

from ensemble.core import artifacts, metrics
from ensemble.core.errors import ArtifactError
from ensemble.core.log import Log
from ensemble.data.inputs import Inputs, Item, ids, names
from ensemble.models.external import test_column
from ensemble.models.runner import with_flip
from ensemble.stacking.label_shift import names_sha256
from ensemble.stacking.stacker import Stacker
from export.inference import ensemble as ensembles
from export.inference import journal as journals
from export.inference.ensemble import Ensemble
from export.inference.journal import Journal, ScoredBatch
from export.inference.outputs import Failure, Scores, write_failures, write_scores
from export.inference.scoring import chunk_of, joined, score_rows, score_shards


@dataclass(frozen=True)
class InferOptions:
    """What decides the output beside members and images, by the names of the command's options."""

    members: bool = False
    tta: bool = False
    adapted: bool = False
    fill: float | None = None


# journal, missing shards, what is told of rows as they are scored -> (shard, its file), in any order
Scoring = Callable[[Journal, Sequence[int], Callable[[int], object]], Generator[tuple[int, bytes], None, None]]


@dataclass(frozen=True)
class InferResult:
    """What infer_to_file did: images scored and failed, the list of the failed, and how fast it was, by itself.

    left: how many of the scored left the cascade after each member, in its order; empty without one.
    """

    scored: int
    failed: int
    listing: Path | None
    images_per_second: float
    left: tuple[int, ...] = ()


def with_flips(ensemble: Ensemble, remedy: str) -> Ensemble:
    """Members that mirrored images helped on held-out rows, averaged over both; ArtifactError if none was measured."""
    tta_members = ensemble.stacker.tta_members
    if tta_members is None:
        raise ArtifactError(f"--tta: it was not measured which members mirrored images help; {remedy}")
    runners = (with_flip(runner) if runner.name in tta_members else runner for runner in ensemble.runners)
    return replace(ensemble, runners=tuple(runners))


def infer(
    inputs: Inputs,
    ensemble: Ensemble,
    with_members: bool = False,
    adapted: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score every image once, in memory: (`id`, `target` and each member's p if asked; errors).

    The first frame has the rows and order of the input; `target` is P(ai), float64, NaN
    for an image that could not be read. The second lists those: `id`, `path`, `error`. With a
    cascade, a member's p is NaN where it did not run.
    `adapted` adds the stacker's stored shift.
    """
    rows = _all_rows(inputs, ensemble)
    logits = _stack_logits(rows, ensemble)
    result = pd.DataFrame({"id": pd.Series(rows.ids, dtype=object)})
    result["target"] = ensemble.stacker.target_of(ensembles.apply(ensemble, logits)[0], adapted)
    if with_members:
        result[list(ensemble.stacker.members)] = metrics.sigmoid(logits)
    return result, pd.DataFrame(map(asdict, rows.failures.values()), columns=["id", "path", "error"])


def member_logits(
    inputs: Inputs, ensemble: Ensemble, progress: Callable[[int], object] = lambda count: None
) -> tuple[np.ndarray, dict[int, str]]:
    """Logits [images, members], members in the stacker's order, and why images could not be read, by row."""
    rows = _all_rows(inputs, ensemble, progress)
    return _stack_logits(rows, ensemble), {row: failure.error for row, failure in rows.failures.items()}


def infer_to_file(
    inputs: Inputs,
    ensemble: Ensemble,
    output: Path,
    folder: Path,
    options: InferOptions,
    log: Log,
    scoring: Scoring | None = None,
) -> InferResult:
    """Score every image once into `output`, CSV or Parquet by its suffix, through the journal in the held `folder`.

    What was scored before is not scored again, and the same file results. Memory does not grow
    with the number of images. scoring: what scores shards in place of this process.
    """
    _check_externals(inputs, ensemble)
    journal, changed = journals.open_journal(
        folder, _key(inputs, ensemble, options), ensembles.runner_names(ensemble), inputs.count
    )
    if changed:
        log(f"Starting anew: changed since {folder.name} was begun: {', '.join(changed)}.")
    todo = journals.missing(journal)
    left = sum(stop - start for start, stop in map(journal.span, todo))
    if left < inputs.count:
        log(f"Going on: {inputs.count - left:,} of {inputs.count:,} rows were scored before.")
    began = time.perf_counter()
    with (
        tqdm(
            total=inputs.count, initial=inputs.count - left, desc="infer", unit="image", leave=False, disable=None
        ) as bar,
        closing((scoring or _scoring_here(inputs, ensemble))(journal, todo, bar.update)) as stream,
    ):
        for shard, data in stream:
            journals.store(journal, shard, data)
    speed = left / (time.perf_counter() - began)
    failed, listing, counts = _write(output, journal, inputs, ensemble, options)
    journals.close(journal)
    return InferResult(inputs.count - failed, failed, listing, speed, counts)


def _scoring_here(inputs: Inputs, ensemble: Ensemble) -> Scoring:
    def scoring(
        journal: Journal, shards: Sequence[int], progress: Callable[[int], object]
    ) -> Generator[tuple[int, bytes], None, None]:
        spans = [journal.span(shard) for shard in shards]
        sizes = [(shard, stop - start) for shard, (start, stop) in zip(shards, spans, strict=True)]
        items = _items(inputs, _merged(spans))
        with closing(score_shards(items, inputs.count, ensemble, sizes, progress)) as stream:
            for shard, rows in stream:
                yield shard, journals.encoded(journal, shard, rows)

    return scoring


def adaptation(inputs: Inputs, ensemble: Ensemble) -> str:
    """What `adapted` adds to these images' target, in one line; ArtifactError where nothing was estimated."""
    shift = ensemble.stacker.adaptation()
    known = f"share of ai {shift.prior:.2f}{', as given' if shift.estimator == 'share' else ''}"
    same = shift.names == names_sha256(names(inputs))
    return (
        f"Adapted: {shift.shift:+.2f} on the stack's logit, from {shift.images} images of {shift.data} ({known})"
        f"{'' if same else '; the images scored now are others'}."
    )


def average(name: str) -> Stacker:
    """The stacker of a single member: its own probability."""
    return Stacker(members=(name,), coef=(1.0,), intercept=0.0)


def _check_externals(inputs: Inputs, ensemble: Ensemble) -> None:
    """ArtifactError for an id without a score of a member that is looked up, before anything is scored."""
    keys = ids(inputs) if ensemble.externals else []
    for member in ensemble.externals:
        test_column(member, keys)


def _key(inputs: Inputs, ensemble: Ensemble, options: InferOptions) -> dict[str, object]:
    """All that decides the output, by what a user calls it."""
    return {
        "the members, or what runs them": ensemble.identity,
        "the stack": artifacts.json_sha256(ensemble.stacker.to_dict()),
        "the images": inputs.sha256,
        **{f"--{name}": value for name, value in asdict(options).items()},
        **({"--cascade": ensemble.cascade.to_dict()} if ensemble.cascade else {}),
        "the version of Pillow": PIL.__version__,
        # the first is nothing to a cascade, and changes with the members alone
        "the size of chunks": [chunk_of(ensemble), journals.ROWS],
    }


def _items(inputs: Inputs, spans: Iterable[tuple[int, int]]) -> Iterator[Item]:
    for start, stop in spans:
        for _, item in zip(range(start, stop), inputs.items(start, stop), strict=True):  # rows never move
            yield item


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that follow on each other as one, so that each stretch of the input is opened once."""
    merged: list[tuple[int, int]] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return merged


def _all_rows(
    inputs: Inputs, ensemble: Ensemble, progress: Callable[[int], object] = lambda count: None
) -> ScoredBatch:
    """Every row, in memory; what is looked up is known to be there."""
    _check_externals(inputs, ensemble)
    parts = []
    with closing(score_rows(_items(inputs, [(0, inputs.count)]), inputs.count, ensemble)) as stream:
        for part in stream:
            parts.append(part)
            progress(len(part.ids))
    return joined(parts)


def _stack_logits(rows: ScoredBatch, ensemble: Ensemble) -> np.ndarray:
    """Logits [N, members] in the stacker's order, with those that are looked up by id; NaN where an image failed."""
    table = ensembles.table(ensemble, rows.logits, rows.ids)
    table[list(rows.failures)] = np.nan
    return table


def _write(
    output: Path, journal: Journal, inputs: Inputs, ensemble: Ensemble, options: InferOptions
) -> tuple[int, Path | None, tuple[int, ...]]:
    """Write the output and the list of failures from the shards.

    How many failed, where they are listed, and how many left the cascade after each member.
    """
    stacker, failed = ensemble.stacker, 0
    left = np.zeros(len(stacker.members) if ensemble.cascade else 0, dtype=int)

    def shards() -> Iterator[ScoredBatch]:
        for shard in range(journal.shards):
            rows = journals.read_shard(journal, shard)
            if rows is None:
                raise ArtifactError(f"{journal.path(shard)} was changed meanwhile; run the same command again")
            yield rows

    def scores() -> Iterator[Scores]:
        for rows in shards():
            logits = _stack_logits(rows, ensemble)
            stack, places = ensembles.apply(ensemble, logits)
            if ensemble.cascade:
                left[:] += np.bincount(places[~np.isnan(stack)], minlength=len(left))
            members = metrics.sigmoid(logits) if options.members else None
            yield Scores(rows.ids, stacker.target_of(stack, options.adapted), members)

    def failures() -> Iterator[Failure]:
        nonlocal failed
        for rows in shards():
            failed += len(rows.failures)
            yield from rows.failures.values()

    write_scores(output, scores(), stacker.members if options.members else (), inputs.rows.returns, options.fill)
    listing = write_failures(output, failures())
    for written in filter(None, (output, listing)):
        artifacts.clear_unfinished(written)
    return failed, listing, tuple(left.tolist())
