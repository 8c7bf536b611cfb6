"""infer on a Ray cluster: what runs is decided once, Ray Data hands shards to workers, the journal is written here."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.cluster import nodes as ray_look
from ensemble.cluster.connect import Node, load_ray
from ensemble.core.errors import DataError, ManyeyesError, UnavailableError, error_line
from ensemble.core.log import Log
from ensemble.data.image_list import ImageList
from ensemble.data.inputs import Inputs
from ensemble.data.storage import readable
from ensemble.models.runner import Runner
from export.cluster import bundle_transfer, saved_plan
from export.cluster.placement import ClusterOptions, Size, sized, sized_as, told
from export.cluster.saved_plan import SavedPlan
from export.cluster.worker import PACKAGES, Coordinator, Job, Worker, WorkerPlan, prepare, task, unseen
from export.inference import predictor
from export.inference.ensemble import Ensemble
from export.inference.infer import Scoring
from export.inference.journal import Journal
from export.runtimes.settings import ON_CPU, ON_GPU, RuntimeOptions

MOST_SHARDS = 8  # to a task, which is lost with its worker
TASKS = 4  # that each worker gets at least, so that all end at about the same time
WAITING = 15  # seconds for room in the cluster, before that is said


@dataclass(frozen=True)
class Ready:
    """A bundle that was planned on the cluster. ensemble: its facts; its members do not run here."""

    ensemble: Ensemble
    size: Size
    job: Job
    prepared: WorkerPlan
    desk: Any


def plan(
    folder: Path,
    wanted: RuntimeOptions,
    asked: ClusterOptions,
    nodes: Sequence[Node],
    inputs: Inputs,
    partial: Path,
    log: Log,
) -> Ready:
    """Decide on one worker what runs the bundle on all, as `predictor.load_bundle` does on one machine.

    It is kept in `partial`, the journal's held folder, and holds for a job that goes on, where a machine has room.
    """
    home, source = Path.cwd(), bundle_transfer.source_of(folder)
    kept = saved_plan.read(partial, source, wanted, asked)
    size = sized_as(nodes, asked, kept.cpus, kept.gpus) if kept else None
    if not size:
        may = wanted.device != "cpu" and wanted.runtime not in ON_CPU
        size, kept = sized(nodes, asked, may, wanted.device == "cuda" or wanted.runtime in ON_GPU), None
    ray, versions = load_ray(), ray_look.node_versions(PACKAGES)
    ray_look.check_nodes(ray, nodes, PACKAGES)
    job = Job(source, home, _places(inputs, home), size.cpus, versions)
    desk = _desk(ray, source.folder, inputs.rows)
    here = replace(wanted, device="cpu") if not size.gpus and wanted.device == "auto" else wanted
    prepared = _prepare(ray, job, here, size, desk, kept.prepared if kept else None, nodes, log)
    saved_plan.write(partial, source, wanted, SavedPlan(prepared, size.cpus, size.gpus))
    for line in prepared.lines:
        log(line)
    log(f"{size} on a Ray cluster: {told(nodes)}")
    runners = [Runner(member.name, member.preprocess_config, _not_here) for member in prepared.plan.members]
    facts = replace(predictor.assemble(folder, prepared.plan, runners), identity=prepared.identity)
    return Ready(facts, size, job, prepared, desk)


def scoring(ready: Ready, inputs: Inputs, tta: bool) -> Scoring:
    """What has the cluster score shards, for `infer.infer_to_file`."""

    def score(
        journal: Journal, shards: Sequence[int], progress: Callable[[int], object]
    ) -> Generator[tuple[int, bytes], None, None]:
        left = set(shards)
        if not left:
            return
        with _told(ready.desk), closing(_answers(ready, inputs, journal, shards, tta)) as answers:
            for answer in answers:
                _check_seen(answer)
                shard = answer["shard"]
                if shard in left:  # what a lost worker had done may come twice
                    left.remove(shard)
                    start, stop = journal.span(shard)
                    progress(stop - start)
                    yield shard, answer["data"]
        if left:
            raise UnavailableError(f"the cluster left {len(left)} parts of the list out; the same command goes on")

    return score


def stretches(shards: Sequence[int], workers: int) -> list[range]:
    """Tasks of consecutive shards: up to MOST_SHARDS, and fewer where each worker would get fewer than TASKS."""
    most = max(1, min(MOST_SHARDS, len(shards) // (TASKS * workers)))
    found: list[range] = []
    for shard in shards:
        if found and found[-1].stop == shard and len(found[-1]) < most:
            found.append(range(found.pop().start, shard + 1))
        else:
            found.append(range(shard, shard + 1))
    return found


def _answers(
    ready: Ready, inputs: Inputs, journal: Journal, shards: Sequence[int], tta: bool
) -> Generator[dict[str, Any], None, None]:
    ray = load_ray()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # each answer is sent as soon as it is there
    given = (ready.job, ready.prepared, tta, inputs.reader, replace(journal, folder=Path()), ready.desk)
    parts = stretches(shards, ready.size.workers)
    workers = min(ready.size.workers, len(parts))
    # Lost workers are replaced and their tasks repeated without end, as is Ray Data's default: the desk counts.
    answers = ray.data.from_blocks([task(part) for part in parts]).map_batches(
        Worker,
        fn_constructor_args=given,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=ready.size.cpus,
        num_gpus=ready.size.gpus,
    )
    for table in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        yield from table.to_pylist()


@contextmanager
def _told(desk: Any) -> Iterator[None]:
    """What ends the job on the cluster as one error, in place of all that Ray says of it."""
    ray = load_ray()
    try:
        yield
    except ray.exceptions.RayError as error:
        try:
            refusal = ray.get(desk.refusal.remote(), timeout=10)
        except ray.exceptions.RayActorError:
            raise UnavailableError(
                "what hands out bundle and images beside this command died, most likely for want of memory here; the "
                "same command goes on"
            ) from None
        except ray.exceptions.RayError:
            refusal = None
        if refusal:
            raise refusal from None
        if isinstance(error, ray.exceptions.RayTaskError):
            raise  # an error in the code of a worker
        raise UnavailableError(f"the cluster failed: {error_line(error)}; the same command goes on") from None


def _check_seen(answer: dict[str, Any]) -> None:
    for name in answer["unseen"]:
        path = Path(name.decode(errors="surrogatepass"))
        if readable(path):  # else it is gone everywhere, and fails as it would on one machine
            raise DataError(unseen(path, answer["node"]))


def _places(inputs: Inputs, home: Path) -> tuple[Path, ...]:
    """What every machine has to see, as far as it is here: else it is gone, and is told as on one machine."""
    return tuple(home / place for place in inputs.needs if readable(place))


def _desk(ray: Any, folder: Path, rows: ImageList) -> Any:
    if isinstance(rows.place, Path):
        rows = replace(rows, place=rows.place.absolute())
    return ray_look.on_node(ray, ray.get_runtime_context().get_node_id(), Coordinator).remote(folder, rows)


def _prepare(
    ray: Any,
    job: Job,
    wanted: RuntimeOptions,
    size: Size,
    desk: Any,
    before: WorkerPlan | None,
    nodes: Sequence[Node],
    log: Log,
) -> WorkerPlan:
    remote = ray.remote(num_cpus=size.cpus, num_gpus=size.gpus, max_retries=1)(prepare)
    found = remote.remote(job, wanted, desk, before)
    try:
        if not ray.wait([found], timeout=WAITING)[0]:
            waits = "Waiting for a worker to decide what runs the bundle, or for room"
            log(f"{waits}: {told(nodes)}, which others may use")
        return ray.get(found)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ManyeyesError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise UnavailableError(
            f"a worker died as it decided what runs the bundle ({error_line(error)}); most likely for want of memory: "
            "give fewer --workers, or machines with more"
        ) from None


def _not_here(pixels: np.ndarray) -> np.ndarray:
    raise UnavailableError("members run on the cluster, not here")
