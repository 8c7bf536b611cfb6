"""Trains a run's members on a Ray cluster: one task a member; the driver prints the lines of their logs."""

import glob
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.cluster import connect, placement, train_worker
from ensemble.cluster import nodes as node_checks
from ensemble.cluster.placement import ResourceRequest
from ensemble.cluster.train_worker import TrainRequest
from ensemble.core import artifacts
from ensemble.core.errors import ManyeyesError, UnavailableError, error_line
from ensemble.core.log import Log
from ensemble.core.recipe import Recipe
from ensemble.models import checkpoints
from ensemble.training.train_all import TrainPlan
from ensemble.training.train_member import Outcome

POLL_SECONDS = 0.5  # between two reads of the tasks' logs
NODE_CHECK_SECONDS = 5.0  # between two checks of which nodes are alive
CAPACITY_HINT_SECONDS = 30.0  # without a member that begins, until the user is told
STALE_LOG_SECONDS = 86400.0  # a task's log grows every few minutes: one this old has no process that writes it


@dataclass(frozen=True)
class RayEngine:
    """An `Engine` of a connected Ray cluster: trains as many members at once as it has capacity for.

    device: cpu or cuda, of all members. cpus_per_member: None divides the CPUs that there are.
    """

    ray: Any
    device: str
    cpus_per_member: int | None = None

    def requests(self, plan: TrainPlan, nodes: Sequence[connect.Node]) -> dict[str, ResourceRequest]:
        """What each member's task asks for, by name."""
        return placement.resource_requests(plan.todo, plan.weight_bytes, nodes, self.device, self.cpus_per_member)

    def parallel_members(self, plan: TrainPlan) -> int:
        """See `Engine`; 0 where the cluster has no capacity for any."""
        nodes = connect.nodes(self.ray)
        return placement.parallel_members(self.requests(plan, nodes).values(), nodes)

    def train_members(self, plan: TrainPlan, log: Log) -> list[Outcome]:
        """See `Engine`; UnavailableError, before any training, where a node that may get a member cannot train it."""
        outcomes = {recipe.name: Outcome(recipe.name, "unchanged") for recipe in plan.recipes}
        for recipe in plan.recipes:
            if recipe not in plan.todo:
                log(plan.announcement(recipe))
        if not plan.todo:
            return list(outcomes.values())
        tasks = _prepare_tasks(self, plan)
        _remove_stale_logs(plan.run.absolute(), [task.name for task in tasks])
        _check_nodes(self.ray, tasks)
        running = {_submit(self.ray, task): task for task in tasks}
        try:
            for outcome in _follow(self.ray, running, log):
                if outcome.status == "failed":
                    log(f"  {outcome.name}: failed: {outcome.error}")
                outcomes[outcome.name] = outcome
        except BaseException:  # the members' processes are ended; what they saved is kept
            for reference in running:
                self.ray.cancel(reference)
            if running:
                self.ray.wait(list(running), num_returns=len(running), timeout=train_worker.KILL_SECONDS)
            raise
        finally:
            for task in tasks:
                task.request.log_path.unlink(missing_ok=True)
                task.request.outcome_path.unlink(missing_ok=True)
        return list(outcomes.values())


@contextmanager
def open_engine(
    address: str | None, recipes: Sequence[Recipe], device: str, cpus_per_member: int | None
) -> Iterator[RayEngine]:
    """The cluster at the address, or a local one for the block; UnavailableError if it cannot train these recipes.

    device: auto, cpu or cuda.
    """
    with connect.connected(address) as ray:
        chosen = placement.check_resources(recipes, connect.nodes(ray), device, cpus_per_member)
        yield RayEngine(ray, chosen, cpus_per_member)


@dataclass
class Task:
    """A member's task, and how much of its log was read. announcement: of its recipe, up to where it is trained."""

    request: TrainRequest
    resources: ResourceRequest
    announcement: str
    offset: int = 0  # bytes of its log
    node_id: str = ""  # where it runs; empty before it begins

    @property
    def name(self) -> str:
        """The member's name."""
        return self.request.name


def _prepare_tasks(engine: RayEngine, plan: TrainPlan) -> list[Task]:
    """A task for each member; UnavailableError where no node has the resources for one."""
    nodes, run = connect.nodes(engine.ray), plan.run.absolute()
    # the nodes may be others than at the start
    placement.check_resources(plan.todo, nodes, engine.device, engine.cpus_per_member)
    resources = engine.requests(plan, nodes)
    for name, request in resources.items():
        if not any(placement.node_capacity(request, node) for node in nodes):
            needs, has = placement.describe_request(request), placement.describe_nodes(nodes)
            raise UnavailableError(f"{name} needs {needs} on one node, and the cluster has {has}")
    job = secrets.token_hex(4)
    data_sha256 = artifacts.file_sha256(artifacts.dataset_path(run))
    versions = node_checks.node_versions(train_worker.COMPARED_PACKAGES)
    return [
        Task(
            TrainRequest(
                job=job,
                recipe=recipe.model_dump(mode="json"),
                run=str(run),
                data_sha256=data_sha256,
                versions=versions,
                folder=str(Path.cwd()),
                local_paths=checkpoints.local_paths(recipe.backbone),
                device=engine.device,
                processes=max(resources[recipe.name].gpus, 1),
                cpus=resources[recipe.name].cpus,
                parallel_members=placement.members_per_node(resources[recipe.name], len(plan.todo), nodes),
                seed=plan.context.seed,
                report_to=plan.context.report_to,
                save_minutes=plan.context.save_minutes,
            ),
            resources[recipe.name],
            plan.announcement(recipe),
        )
        for recipe in plan.todo
    ]


def _check_nodes(ray: Any, tasks: Sequence[Task]) -> None:
    """UnavailableError that names the first node where members would fail; nodes that join later check themselves."""
    run, data_sha256 = Path(tasks[0].request.run), tasks[0].request.data_sha256
    paths = {}
    for node in connect.nodes(ray):
        placed = [task.request for task in tasks if placement.node_capacity(task.resources, node)]
        if placed:
            paths[node] = [path for request in placed for path in request.local_paths]
    node_checks.check_nodes(ray, list(paths), train_worker.COMPARED_PACKAGES)
    answers = {
        node: node_checks.on_node(ray, node.id, train_worker.node_problem).remote(run, data_sha256, paths[node])
        for node in paths
    }
    get = node_checks.get_with_deadline(ray)
    for node, answer in answers.items():
        try:
            problem = get(answer)
        except ray.exceptions.RayError as error:
            problem = f"does not answer: {_cause(error)}"
        if problem:
            raise UnavailableError(f"{node.name} {problem}")


def _submit(ray: Any, task: Task) -> Any:
    """The task's reference. Ray repeats it when its node, worker or process is lost, not for an error of ours."""
    remote = ray.remote(
        num_cpus=task.resources.cpus,
        num_gpus=task.resources.gpus,
        memory=task.resources.memory or None,
        max_retries=train_worker.MAX_TRIES,
        retry_exceptions=[train_worker.WorkerLostError],
        name=task.name,
    )(train_worker.train)
    return remote.remote(task.request)


def _follow(ray: Any, tasks: dict[Any, Task], log: Log) -> Iterator[Outcome]:
    """Outcomes as they come, and meanwhile the lines of the members' logs. Finished tasks are taken out of `tasks`."""
    checked = time.monotonic()
    hint_at = checked + CAPACITY_HINT_SECONDS
    while tasks:
        ready, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=0)
        if not ready:
            time.sleep(POLL_SECONDS)
        for task in tasks.values():
            _print_log(task, log)
        if any(task.offset for task in tasks.values()):
            hint_at = math.inf
        elif time.monotonic() > hint_at:
            hint_at = math.inf
            task = next(iter(tasks.values()))
            needs, has = placement.describe_request(task.resources), placement.describe_nodes(connect.nodes(ray))
            log(f"  waiting for room: {task.name} needs {needs}; the cluster has {has}, which others may use")
        for reference in ready:
            task = tasks.pop(reference)
            try:
                outcome = Outcome(**ray.get(reference))
            except (ray.exceptions.RayError, ManyeyesError) as error:
                outcome = Outcome(task.name, "failed", error=_cause(error))
            yield outcome
        if time.monotonic() - checked > NODE_CHECK_SECONDS:
            checked = time.monotonic()
            _report_lost_nodes(ray, list(tasks.values()), log)


def _print_log(task: Task, log: Log) -> None:
    """Print what the member's log has more than the last time."""
    lines, task.offset = train_worker.read_lines(task.request.log_path, task.offset)
    for line in lines:
        if start := train_worker.START_LINE.fullmatch(line):
            task.node_id, attempt = start["id"], int(start["attempt"])
            log(f"{task.announcement}{start['node']}{f' (try {attempt})' if attempt > 1 else ''}")
        else:
            log(f"  {task.name}: {line.strip().removeprefix(f'{task.name}: ')}")


def _cause(error: Exception) -> str:
    """The line of an error, or of the one that Ray wraps in it."""
    return error_line(getattr(error, "cause", None) or error, first=True)


def _report_lost_nodes(ray: Any, tasks: Sequence[Task], log: Log) -> None:
    """Print which members' nodes are gone: Ray repeats them where there is capacity."""
    alive = {node.id for node in connect.nodes(ray)}
    for task in tasks:
        if task.node_id and task.node_id not in alive:
            task.node_id = ""
            log(f"  {task.name}: its node is gone; it goes on from its last saved state where there is room")


def _remove_stale_logs(run: Path, names: Sequence[str]) -> None:
    """Remove logs of earlier jobs whose driver was killed; a worker may still write to one that is not old."""
    for name in names:
        path = artifacts.beside_work_path(run, name, train_worker.TASK_LOG)
        for old in path.parent.glob(f"{glob.escape(path.stem)}.*{path.suffix}"):
            with suppress(OSError):  # another command may remove it at the same time
                if time.time() - old.stat().st_mtime > STALE_LOG_SECONDS:
                    old.unlink()
