"""What runs on the machines of a Ray cluster: the plan of a bundle, and the workers that score shards by it."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from ensemble.cluster.connect import this_node
from ensemble.cluster.nodes import check_versions, node_versions
from ensemble.core.errors import ArtifactError, DataError, ManyeyesError, UnavailableError, error_line
from ensemble.core.log import no_log
from ensemble.data.byte_ranges import ByteRange
from ensemble.data.image_list import TEXT, ImageEntry, ImageList, read_list, write_list
from ensemble.data.readers import Item
from ensemble.images.decode import silence_decoder_warnings
from export.cluster.bundle_transfer import CHUNK_BYTES, BundleSource, local_bundle
from export.inference.ensemble import Ensemble
from export.inference.infer import with_flips
from export.inference.journal import Journal
from export.inference.loading import build_ensemble, open_plan
from export.inference.plan import Plan, open_member, plan_bundle
from export.inference.scoring import score_shards
from export.runtimes.capabilities import available
from export.runtimes.devices import version
from export.runtimes.settings import RuntimeOptions

PACKAGES = ("Pillow", "numpy")  # that decide a score, whatever runs the members
MAX_ATTEMPTS = 4  # to score the same rows, each ended by the death of its worker
MAX_THREADS = 16  # that read and decode, as on one machine

ANSWER = pa.schema(
    [("shard", pa.int64()), ("data", pa.large_binary()), ("unseen", pa.list_(TEXT)), ("node", pa.string())]
)

Reader = Callable[[Iterable[ImageEntry], int, int], Iterator[Item]]


@dataclass(frozen=True)
class Job:
    """What all workers are given.

    workdir: the working folder where the job was started. paths: folders and files of the input, which every machine
    has to see. cpus: cores of a worker. versions: of the packages that decide a score, where the job was started.
    """

    bundle: BundleSource
    workdir: Path
    paths: tuple[Path, ...]
    cpus: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class WorkerPlan:
    """What one worker decided for all: the bundle's plan, with paths relative to the bundle, and lines for the log.

    identity: of the ensemble. libraries: versions of what runs the members, by runtime.
    """

    plan: Plan
    identity: str
    libraries: Mapping[str, str]
    lines: tuple[str, ...]


def task(shards: range) -> pa.Table:
    """Consecutive shards to score, as one row for Ray; the worker asks the coordinator for the list of their images."""
    return pa.table({"start": [shards.start], "stop": [shards.stop]})


class Coordinator:
    """An actor on the machine where the job was started.

    It sends the bundle and the list of images to the workers, counts the attempts at each task, and remembers why a
    worker stopped.
    """

    def __init__(self, folder: Path, images: ImageList) -> None:
        self._folder, self._images = folder, images
        self._attempts: dict[int, int] = {}
        self._failure: ManyeyesError | None = None

    def read_chunk(self, name: str, start: int) -> bytes:
        """Up to CHUNK_BYTES of a file of the bundle."""
        try:
            with (self._folder / name).open("rb") as file:
                file.seek(start)
                return file.read(CHUNK_BYTES)
        except OSError as error:
            raise ArtifactError(
                f"{self._folder / name} cannot be read: {error.strerror or error}; run the same command again"
            ) from None

    def rows(self, start: int, stop: int) -> bytes:
        """An Arrow file of the rows [start, stop) of the list of images."""
        try:
            written = write_list(read_list(self._images, start, stop), None)
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{self._images.data} cannot be read: {error}; the same command goes on") from None
        return bytes(cast(pa.Buffer, written.data))

    def count_attempt(self, task: int) -> int:
        """How often a task was begun, this time included."""
        self._attempts[task] = self._attempts.get(task, 0) + 1
        return self._attempts[task]

    def report_failure(self, error: ManyeyesError) -> None:
        """A worker cannot go on; the first error counts."""
        self._failure = self._failure or error

    def failure(self) -> ManyeyesError | None:
        """The error by which a worker stopped, if one did."""
        return self._failure


def prepare(job: Job, runtime: RuntimeOptions, coordinator: Any, before: WorkerPlan | None = None) -> WorkerPlan:
    """Decide, with a worker's share of a machine, what runs the bundle.

    Members are opened only to measure their speed for a cascade, or to log that TensorRT builds its engines, which
    takes minutes: each worker opens them anyway.
    before: the plan that the job was begun with, which stays if this machine can run it in the same way.
    """
    with _translate_errors():
        folder, lines = set_up_worker(job, coordinator), list[str]()
        if before and still_runs(job.bundle, before):
            return before
        machine = replace(available(), cores=job.cpus)
        plan = plan_bundle(folder, runtime, lines.append, machine, job.bundle.listed)
        if runtime.cascade is not None or "tensorrt" in libraries_of(plan):
            plan, _ = open_plan(folder, plan, runtime, lines.append, machine)
    identity = build_ensemble(folder, plan, ()).identity
    relative = _map_paths(plan, lambda path: path.relative_to(folder))
    return WorkerPlan(relative, identity, libraries_of(plan), tuple(lines))


def check_plan(source: BundleSource, plan: Plan) -> None:
    """ArtifactError unless the bundle has the files that were planned."""
    files = source.listed["files"]
    if any(files.get(member.path.as_posix()) != member.sha256 for member in plan.members):
        raise ArtifactError(f"{source.folder} was changed meanwhile; run the same command again")


def still_runs(source: BundleSource, before: WorkerPlan) -> bool:
    """Whether this machine can run an earlier plan in the same way; ArtifactError if it is of another bundle."""
    check_plan(source, before.plan)
    unsupported = available().unsupported
    return libraries_of(before.plan) == before.libraries and not any(
        (member.setting.runtime, member.setting.precision) in unsupported for member in before.plan.members
    )


def libraries_of(plan: Plan) -> dict[str, str]:
    """Versions of what runs the members on this machine, by runtime."""
    return {member.setting.runtime: version(member.setting.runtime) for member in plan.members}


def set_up_worker(job: Job, coordinator: Any) -> Path:
    """Check this machine and enter the job's working folder; returns the bundle's folder, every file of it checked."""
    check_versions(this_node(), job.versions, node_versions(PACKAGES))
    for path in job.paths:
        if not os.access(path, os.R_OK):
            raise DataError(unreadable_message(path, this_node()))
    with suppress(OSError):  # it may be another machine's, or another user's
        os.chdir(job.workdir)  # relative names of images count from there
    return local_bundle(job.bundle, lambda name, start: bytes(_get(coordinator.read_chunk.remote(name, start))))


def _get(answer: Any) -> Any:
    """What the coordinator answers; an error of ours is raised as it was raised there."""
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ManyeyesError) else error) from None


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Raise the operating system's errors in the block as errors of ours."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error_line(error)}; mend that there, and the same command goes on") from None


def unreadable_message(path: Path, node: str) -> str:
    """The message for a file or folder that exists where the job was started, and not where a worker runs."""
    return (
        f"{path} is not on {node}, where a worker runs, or may not be read there: put it where every machine sees "
        "it, on shared storage"
    )


def _map_paths(plan: Plan, change: Callable[[Path], Path]) -> Plan:
    return replace(plan, members=tuple(replace(member, path=change(member.path)) for member in plan.members))


class Worker:
    """Scores tasks: consecutive shards. Opens the bundle with the first.

    Each answer is a table of one row: `shard`; `data`, the bytes of its file; `unseen`, files that this machine does
    not have although the list of images gives their size; `node`, this machine.
    """

    def __init__(
        self, job: Job, worker_plan: WorkerPlan, tta: bool, reader: Reader, journal: Journal, coordinator: Any
    ) -> None:
        self._job, self._worker_plan, self._tta = job, worker_plan, tta
        self._reader, self._journal, self._coordinator = reader, journal, coordinator
        self._ensemble: Ensemble | None = None

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """An answer for each shard of the `task` that `table` holds."""
        (row,) = table.to_pylist()
        shards = range(row["start"], row["stop"])
        try:
            with _translate_errors():
                if _get(self._coordinator.count_attempt.remote(shards[0])) > MAX_ATTEMPTS:
                    start = self._journal.row_range(shards[0])[0]
                    raise UnavailableError(
                        f"workers died {MAX_ATTEMPTS} times at the images from row {start + 1} on, most likely for "
                        "want of memory; give fewer --workers, or machines with more"
                    )
                with silence_decoder_warnings():
                    self._ensemble = self._ensemble or self._open()
                    yield from self._answers(self._ensemble, shards)
        except ManyeyesError as error:
            node = this_node()
            text = str(error) if node in str(error) else f"on {node}: {error}"
            _get(self._coordinator.report_failure.remote(type(error)(text)))
            raise

    def _open(self) -> Ensemble:
        folder = set_up_worker(self._job, self._coordinator)
        check_versions(this_node(), self._worker_plan.libraries, libraries_of(self._worker_plan.plan))
        check_plan(self._job.bundle, self._worker_plan.plan)
        plan = _map_paths(self._worker_plan.plan, lambda path: folder / path)
        ensemble = build_ensemble(folder, plan, [open_member(member, no_log) for member in plan.members])
        return with_flips(ensemble, "") if self._tta else ensemble

    def _answers(self, ensemble: Ensemble, shards: range) -> Iterator[pa.Table]:
        ranges = {shard: self._journal.row_range(shard) for shard in shards}
        start, stop = ranges[shards[0]][0], ranges[shards[-1]][1]
        sent = pa.py_buffer(_get(self._coordinator.rows.remote(start, stop)))
        entries = list(read_list(ImageList(stop - start, "", False, sent), 0, stop - start))
        sizes = [(shard, after - before) for shard, (before, after) in ranges.items()]
        items, threads = self._reader(iter(entries), start, stop), min(self._job.cpus, MAX_THREADS)
        scored = score_shards(items, self._journal.count, ensemble, sizes, threads=threads)
        with closing(scored) as stream:
            for shard, batch in stream:
                failed = [ranges[shard][0] + row for row in batch.failures]
                unseen = [path for row in failed for path in self._unseen(entries[row - start], row)]
                names = [path.encode(errors="surrogatepass") for path in unseen]
                answer = {"shard": [shard], "data": [self._journal.encode(shard, batch)], "unseen": [names]}
                yield pa.table({**answer, "node": [this_node()]}, schema=ANSWER)

    def _unseen(self, entry: ImageEntry, row: int) -> list[str]:
        """The file of an entry that existed when it was listed, and that this machine does not have."""
        if entry.size < 0:
            return []
        (item,) = self._reader(iter([entry]), row, row + 1)
        source = item.source.location if isinstance(item.source, ByteRange) else item.source
        return [str(source)] if isinstance(source, Path) and not os.access(source, os.R_OK) else []
