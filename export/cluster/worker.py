"""What runs on the machines of a Ray cluster: the plan of a bundle, and the worker that scores shards by it."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import pyarrow as pa

from ensemble.cluster.connect import this_node
from ensemble.cluster.nodes import check_versions, node_versions
from ensemble.core.errors import ArtifactError, DataError, ManyeyesError, UnavailableError, error_line
from ensemble.data.byte_ranges import ByteRange
from ensemble.data.image_list import TEXT, ImageEntry, ImageList, read_list, write_list
from ensemble.data.inputs import Item
from ensemble.data.storage import readable
from ensemble.images.decode import silence_decoder_warnings
from export.bundle import bundle
from export.cluster import bundle_transfer
from export.cluster.bundle_transfer import Source
from export.inference import infer as inference
from export.inference import journal as journals
from export.inference import predictor
from export.inference.ensemble import Ensemble
from export.inference.journal import Journal
from export.inference.plan import Plan, open_member, plan_bundle
from export.inference.scoring import score_shards
from export.runtimes.capabilities import available
from export.runtimes.devices import version
from export.runtimes.settings import RuntimeOptions

PACKAGES = ("Pillow", "numpy")  # that decide a score, whatever runs the members
MOST_ATTEMPTS = 4  # to score the same rows, each ended by the death of its worker
MOST_THREADS = 16  # that read and decode, as on one machine

TASK = pa.schema([("start", pa.int64()), ("stop", pa.int64())])
ANSWER = pa.schema(
    [("shard", pa.int64()), ("data", pa.large_binary()), ("unseen", pa.list_(TEXT)), ("node", pa.string())]
)

Reader = Callable[[Iterable[ImageEntry], int, int], Iterator[Item]]


@dataclass(frozen=True)
class Job:
    """What all workers are given.

    home: the working folder where the job was started. places: folders and files of the input, which every machine
    has to see. cpus: cores of a worker. versions: of what decides a score, where the job was started.
    """

    bundle: Source
    home: Path
    places: tuple[Path, ...]
    cpus: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class WorkerPlan:
    """What a worker found to run the bundle with: its plan, of files relative to the bundle, and lines to say.

    libraries: versions of what runs the members, by runtime.
    """

    plan: Plan
    identity: str
    libraries: Mapping[str, str]
    lines: tuple[str, ...]


def task(shards: range) -> pa.Table:
    """Consecutive shards to score, as Ray carries them, in one row; whoever scores them asks for their images."""
    return pa.table({"start": [shards.start], "stop": [shards.stop]}, schema=TASK)


class Coordinator:
    """Stands by where the job was started: hands out the bundle and the list of images, counts attempts, and hears why
    a worker stopped.
    """

    def __init__(self, folder: Path, rows: ImageList) -> None:
        self._folder, self._rows = folder, rows
        self._attempts: dict[int, int] = {}
        self._refusal: ManyeyesError | None = None

    def piece(self, name: str, start: int) -> bytes:
        """Up to PIECE bytes of a file of the bundle."""
        try:
            return bundle_transfer.piece(self._folder, name, start)
        except OSError as error:
            raise ArtifactError(
                f"{self._folder / name} cannot be read: {error.strerror or error}; run the same command again"
            ) from None

    def rows(self, start: int, stop: int) -> bytes:
        """An Arrow file of the rows [start, stop)."""
        try:
            kept = write_list(read_list(self._rows, start, stop), None)
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{self._rows.place} cannot be read: {error}; the same command goes on") from None
        return bytes(cast(pa.Buffer, kept.place))

    def begin(self, task: int) -> int:
        """How often a task was begun, with this time."""
        self._attempts[task] = self._attempts.get(task, 0) + 1
        return self._attempts[task]

    def refuse(self, error: ManyeyesError) -> None:
        """A worker cannot go on."""
        self._refusal = self._refusal or error

    def refusal(self) -> ManyeyesError | None:
        """Why a worker could not go on, if one could not."""
        return self._refusal


def prepare(job: Job, wanted: RuntimeOptions, desk: Any, before: WorkerPlan | None = None) -> WorkerPlan:
    """Decide, on a worker's share of a machine, what runs the bundle.

    Members are opened only for their speeds, or where that takes minutes, to say so: each worker opens them anyway.

    before: what was decided when the job was begun, which holds where it can still be run alike.
    """
    with _told():
        folder, lines = settle(job, desk), list[str]()
        if before and still_runs(folder, before):
            return before
        machine = replace(available(), cores=job.cpus)
        plan = plan_bundle(folder, wanted, lines.append, machine)
        if wanted.cascade is not None or "tensorrt" in libraries_of(plan):
            plan, _ = predictor.open_plan(folder, plan, wanted, lines.append, machine)
    identity = predictor.assemble(folder, plan, ()).identity
    relative = _moved(plan, lambda path: path.relative_to(folder))
    return WorkerPlan(relative, identity, libraries_of(plan), tuple(lines))


def check_planned(folder: Path, plan: Plan) -> None:
    """ArtifactError unless the files that a plan runs, relative to the bundle, are those that were planned."""
    files = bundle.contents(folder)["files"]
    if any(files.get(member.path.as_posix()) != member.sha256 for member in plan.members):
        raise ArtifactError(f"{folder} was changed meanwhile; run the same command again")


def still_runs(folder: Path, before: WorkerPlan) -> bool:
    """Whether this machine can run what was decided before; ArtifactError for another bundle."""
    check_planned(folder, before.plan)
    unsupported = available().unsupported
    return libraries_of(before.plan) == before.libraries and not any(
        (member.setting.runtime, member.setting.precision) in unsupported for member in before.plan.members
    )


def libraries_of(plan: Plan) -> dict[str, str]:
    """Versions of what runs the members here, by runtime."""
    return {member.setting.runtime: version(member.setting.runtime) for member in plan.members}


def settle(job: Job, desk: Any) -> Path:
    """Check this machine, and find the bundle on it; whoever opens the bundle checks its files."""
    check_versions(this_node(), job.versions, node_versions(PACKAGES))
    for place in job.places:
        if not readable(place):
            raise DataError(unseen(place, this_node()))
    with suppress(OSError):  # it may be another machine's, or another user's
        os.chdir(job.home)  # the names of images may count from there
    return bundle_transfer.located(job.bundle, lambda name, start: bytes(_asked(desk.piece.remote(name, start))))


def _asked(answer: Any) -> Any:
    """What the desk answers; an error of ours as it was raised there."""
    import ray

    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ManyeyesError) else error) from None


@contextmanager
def _told() -> Iterator[None]:
    """What the system refuses in the block, as an error of ours."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error_line(error)}; mend that there, and the same command goes on") from None


def unseen(place: Path, where: str) -> str:
    """What is said of a file or folder that is here, and not on a machine where a worker runs."""
    return (
        f"{place} is not on {where}, where a worker runs, or may not be read there: put it where every machine sees "
        "it, on shared storage"
    )


def _answer(shard: int, data: bytes, unseen: Sequence[str]) -> pa.Table:
    names = [path.encode(errors="surrogatepass") for path in unseen]
    return pa.table({"shard": [shard], "data": [data], "unseen": [names], "node": [this_node()]}, schema=ANSWER)


def _moved(plan: Plan, move: Callable[[Path], Path]) -> Plan:
    return replace(plan, members=tuple(replace(member, path=move(member.path)) for member in plan.members))


class Worker:
    """Scores tasks: consecutive shards. Opens the bundle with the first.

    Each answer is a table of one row: `shard`; `data`, the bytes of its file; `unseen`, files that this machine lacks,
    as far as the list of images has their size; `node`, this machine.
    """

    def __init__(self, job: Job, prepared: WorkerPlan, tta: bool, reader: Reader, journal: Journal, desk: Any) -> None:
        self._job, self._prepared, self._tta = job, prepared, tta
        self._reader, self._journal, self._desk = reader, journal, desk
        self._ensemble: Ensemble | None = None

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """An answer for each shard of the `task` that `table` holds."""
        (row,) = table.to_pylist()
        shards = range(row["start"], row["stop"])
        try:
            with _told():
                self._begin(shards[0])
                with silence_decoder_warnings():
                    self._ensemble = self._ensemble or self._open()
                    yield from self._answers(self._ensemble, shards)
        except ManyeyesError as error:
            self._refuse(error)

    def _begin(self, shard: int) -> None:
        if _asked(self._desk.begin.remote(shard)) > MOST_ATTEMPTS:
            start = self._journal.span(shard)[0]
            raise UnavailableError(
                f"workers died {MOST_ATTEMPTS} times at the images from row {start + 1} on, most likely for want of "
                "memory; give fewer --workers, or machines with more"
            )

    def _open(self) -> Ensemble:
        folder = settle(self._job, self._desk)
        bundle.open_bundle(folder)
        check_versions(this_node(), self._prepared.libraries, libraries_of(self._prepared.plan))
        check_planned(folder, self._prepared.plan)
        plan = _moved(self._prepared.plan, lambda path: folder / path)
        opened = predictor.assemble(folder, plan, [open_member(member, lambda line: None) for member in plan.members])
        return inference.with_flips(opened, "") if self._tta else opened

    def _answers(self, opened: Ensemble, shards: range) -> Iterator[pa.Table]:
        spans = {shard: self._journal.span(shard) for shard in shards}
        start, stop = spans[shards[0]][0], spans[shards[-1]][1]
        sent = pa.py_buffer(_asked(self._desk.rows.remote(start, stop)))
        listed = list(read_list(ImageList(stop - start, "", False, sent), 0, stop - start))
        sizes = [(shard, after - before) for shard, (before, after) in spans.items()]
        items, threads = self._reader(iter(listed), start, stop), min(self._job.cpus, MOST_THREADS)
        scored = score_shards(items, self._journal.count, opened, sizes, threads=threads)
        with closing(scored) as stream:
            for shard, found in stream:
                places = [spans[shard][0] + row for row in found.failures]
                unseen = [path for place in places for path in self._absent(listed[place - start], place)]
                yield _answer(shard, journals.encoded(self._journal, shard, found), unseen)

    def _absent(self, row: ImageEntry, place: int) -> list[str]:
        """The file of a row that was there when it was listed, and is not on this machine."""
        if row.size < 0:
            return []
        (item,) = self._reader(iter([row]), place, place + 1)
        source = item.source.place if isinstance(item.source, ByteRange) else item.source
        return [str(source)] if isinstance(source, Path) and not readable(source) else []

    def _refuse(self, error: ManyeyesError) -> NoReturn:
        import ray

        where = this_node()
        text = str(error) if where in str(error) else f"on {where}: {error}"
        ray.get(self._desk.refuse.remote(type(error)(text)))
        raise error
