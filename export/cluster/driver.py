"""`infer` on a Ray cluster. One worker plans, Ray Data gives shards to workers, the journal is written here.

The files that result are those of one machine.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.cluster import nodes as cluster_nodes
from ensemble.cluster.connect import Node, connected, load_ray, nodes
from ensemble.core.errors import DataError, ManyeyesError, UnavailableError, error_line
from ensemble.core.log import Log
from ensemble.data.inputs import Inputs
from ensemble.models.runner import Runner
from export.cluster import saved_plan
from export.cluster.bundle_transfer import describe_bundle
from export.cluster.placement import ClusterOptions, WorkerPool, describe_cluster, plan_workers, resume_workers
from export.cluster.saved_plan import SavedPlan
from export.cluster.worker import PACKAGES, Coordinator, Job, Worker, WorkerPlan, prepare, task, unreadable_message
from export.inference.infer import PreparedEnsemble, Progress, ShardScorer
from export.inference.journal import Journal
from export.inference.loading import build_ensemble
from export.inference.pipeline import InferOptions, with_tta
from export.runtimes.settings import ON_CPU, ON_GPU, RuntimeOptions

MAX_TASK_SHARDS = 8  # a lost worker loses its task
MIN_WORKER_TASKS = 4  # for each worker, so that all end at about the same time
WAIT_LOG_SECONDS = 15  # for room in the cluster, before the log says that the job waits


@dataclass(frozen=True)
class ClusterRun:
    """What the cluster scores with: how many workers, what they are given, and the coordinator's handle."""

    pool: WorkerPool
    job: Job
    worker_plan: WorkerPlan
    coordinator: Any


def prepare_on_cluster(
    cluster: ClusterOptions, stack: ExitStack, options: InferOptions, inputs: Inputs, workdir: Path, log: Log
) -> PreparedEnsemble:
    """Decide on one worker what runs the bundle on all, as `load_bundle` does on one machine.

    The plan is stored in `workdir`, and a resumed job keeps it as long as a machine has room for its workers. This
    process stays connected to the cluster until `stack` is closed.
    """
    available = nodes(stack.enter_context(connected(cluster.address)))
    folder = options.source.locate_bundle(log, options.scores.adapted)
    if folder is None:
        raise UnavailableError("--engine ray runs a bundle: add --onnx, or name one with --bundle")
    run = plan_run(folder, options.runtime, cluster, available, inputs, workdir, log)
    plan = run.worker_plan.plan
    runners = [Runner(member.name, member.preprocess_config, _runs_elsewhere) for member in plan.members]
    ensemble = replace(build_ensemble(folder, plan, runners), identity=run.worker_plan.identity)
    scorer = cluster_scorer(run, inputs, options.scores.tta)
    return PreparedEnsemble(with_tta(ensemble, options), run.job.bundle.listed, run.worker_plan.libraries, scorer)


def plan_run(
    folder: Path,
    runtime: RuntimeOptions,
    options: ClusterOptions,
    nodes: Sequence[Node],
    inputs: Inputs,
    workdir: Path,
    log: Log,
) -> ClusterRun:
    """Choose the workers, start the coordinator, and have a worker decide what runs the bundle."""
    home, source = Path.cwd(), describe_bundle(folder)
    saved = saved_plan.read(workdir, source, runtime, options)
    pool = resume_workers(nodes, options, saved.cpus, saved.gpus) if saved else None
    if not pool:
        gpus_allowed = runtime.device != "cpu" and runtime.runtime not in ON_CPU
        gpus_required = runtime.device == "cuda" or runtime.runtime in ON_GPU
        pool, saved = plan_workers(nodes, options, gpus_allowed, gpus_required), None
    ray, versions = load_ray(), cluster_nodes.node_versions(PACKAGES)
    cluster_nodes.check_nodes(ray, nodes, PACKAGES)
    # what is gone here too is left out: it fails as on one machine
    paths = tuple(home / path for path in inputs.files if os.access(path, os.R_OK))
    job = Job(source, home, paths, pool.cpus, versions)
    images = inputs.rows
    if isinstance(images.data, Path):
        images = replace(images, data=images.data.absolute())
    here = ray.get_runtime_context().get_node_id()
    coordinator = cluster_nodes.on_node(ray, here, Coordinator).remote(source.folder, images)
    # without GPUs `auto` means the CPU, whatever the worker's machine has
    device = "cpu" if not pool.gpus and runtime.device == "auto" else runtime.device
    remote = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, max_retries=1)(prepare)
    planning = remote.remote(job, replace(runtime, device=device), coordinator, saved.worker_plan if saved else None)
    worker_plan = _wait_for_plan(ray, planning, nodes, log)
    saved_plan.write(workdir, source, runtime, SavedPlan(worker_plan, pool.cpus, pool.gpus))
    for line in worker_plan.lines:
        log(line)
    log(f"{pool} on a Ray cluster: {describe_cluster(nodes)}")
    return ClusterRun(pool, job, worker_plan, coordinator)


def cluster_scorer(run: ClusterRun, inputs: Inputs, tta: bool) -> ShardScorer:
    """Scores shards on the cluster."""

    def score(journal: Journal, shards: Sequence[int], progress: Progress) -> Generator[tuple[int, bytes], None, None]:
        remaining = set(shards)
        if not remaining:
            return
        with _translate_errors(run.coordinator), closing(_answers(run, inputs, journal, shards, tta)) as answers:
            for answer in answers:
                for name in answer["unseen"]:
                    path = Path(name.decode(errors="surrogatepass"))
                    if os.access(path, os.R_OK):  # else it is gone everywhere, and fails as it would on one machine
                        raise DataError(unreadable_message(path, answer["node"]))
                shard = answer["shard"]
                if shard in remaining:  # what a lost worker had done may come twice
                    remaining.remove(shard)
                    start, stop = journal.row_range(shard)
                    progress(stop - start)
                    yield shard, answer["data"]
        if remaining:
            raise UnavailableError(f"the cluster left {len(remaining)} parts of the list out; the same command goes on")

    return score


def split_tasks(shards: Sequence[int], workers: int) -> list[range]:
    """Tasks of consecutive shards: up to MAX_TASK_SHARDS, fewer if each worker would get under MIN_WORKER_TASKS."""
    most = max(1, min(MAX_TASK_SHARDS, len(shards) // (MIN_WORKER_TASKS * workers)))
    tasks: list[range] = []
    for shard in shards:
        if tasks and tasks[-1].stop == shard and len(tasks[-1]) < most:
            tasks.append(range(tasks.pop().start, shard + 1))
        else:
            tasks.append(range(shard, shard + 1))
    return tasks


def _answers(
    run: ClusterRun, inputs: Inputs, journal: Journal, shards: Sequence[int], tta: bool
) -> Generator[dict[str, Any], None, None]:
    ray = load_ray()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # each answer is sent as soon as it is there
    arguments = (run.job, run.worker_plan, tta, inputs.loader, replace(journal, folder=Path()), run.coordinator)
    tasks = split_tasks(shards, run.pool.workers)
    workers = min(run.pool.workers, len(tasks))
    # Ray Data replaces lost workers and repeats their tasks without end, by default: the coordinator counts attempts.
    answers = ray.data.from_blocks([task(shards) for shards in tasks]).map_batches(
        Worker,
        fn_constructor_args=arguments,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=run.pool.cpus,
        num_gpus=run.pool.gpus,
    )
    for table in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        yield from table.to_pylist()


@contextmanager
def _translate_errors(coordinator: Any) -> Iterator[None]:
    """Raise Ray's errors in the block as one error of ours: why a worker stopped, or that the cluster failed."""
    ray = load_ray()
    try:
        yield
    except ray.exceptions.RayError as error:
        try:
            failure = ray.get(coordinator.failure.remote(), timeout=10)
        except ray.exceptions.RayActorError:
            raise UnavailableError(
                "what hands out bundle and images beside this command died, most likely for want of memory here; the "
                "same command goes on"
            ) from None
        except ray.exceptions.RayError:
            failure = None
        if failure:
            raise failure from None
        if isinstance(error, ray.exceptions.RayTaskError):
            raise  # an error in the code of a worker
        raise UnavailableError(f"the cluster failed: {error_line(error)}; the same command goes on") from None


def _wait_for_plan(ray: Any, planning: Any, nodes: Sequence[Node], log: Log) -> WorkerPlan:
    try:
        if not ray.wait([planning], timeout=WAIT_LOG_SECONDS)[0]:
            waits = "Waiting for a worker to decide what runs the bundle, or for room"
            log(f"{waits}: {describe_cluster(nodes)}, which others may use")
        plan: WorkerPlan = ray.get(planning)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ManyeyesError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise UnavailableError(
            f"a worker died as it decided what runs the bundle ({error_line(error)}); most likely for want of memory: "
            "give fewer --workers, or machines with more"
        ) from None
    return plan


def _runs_elsewhere(pixels: np.ndarray) -> np.ndarray:
    raise UnavailableError("members run on the cluster, not here")
