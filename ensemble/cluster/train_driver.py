"""train-all on a Ray cluster: a task a member, and the table of them all here."""

import glob
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensemble.cluster import connect, events, placement, train_worker
from ensemble.cluster import nodes as ray_look
from ensemble.cluster.placement import ResourceRequest
from ensemble.cluster.train_worker import TrainRequest
from ensemble.core import artifacts
from ensemble.core.errors import ManyeyesError, UnavailableError, error_line
from ensemble.core.log import Log
from ensemble.core.recipe import Recipe
from ensemble.models import checkpoints
from ensemble.training.live_progress import LiveProgress
from ensemble.training.train_all import Outcome
from ensemble.training.train_member import TrainContext

LOOK = 0.5  # seconds between two looks at what the tasks tell
NODES = 5.0  # seconds between two looks at which nodes live
ROOM = 30.0  # seconds without a member that begins, before that is said
LEFT = 86400.0  # seconds since a word of a member's, after which its process is surely gone


@dataclass(frozen=True)
class Cluster:
    """A connected cluster. device: cpu or cuda, of all members. cpus: that each member gets; None: as there are."""

    ray: Any
    device: str
    cpus: int | None = None


@contextmanager
def joined(address: str | None, recipes: Sequence[Recipe], device: str, cpus: int | None) -> Iterator[Cluster]:
    """The cluster at the address, or a local one for the block, if it can train these recipes.

    device: auto, cpu or cuda.
    """
    with connect.connected(address) as ray:
        yield Cluster(ray, placement.check_resources(recipes, connect.nodes(ray), device, cpus), cpus)


def train_members(
    cluster: Cluster,
    recipes: Sequence[Recipe],
    todo: Sequence[Recipe],
    weights: Mapping[str, int],
    run: Path,
    setup: TrainContext,
    log: Log,
    leads: Mapping[str, str],
) -> list[Outcome]:
    """The outcomes of all recipes; those `todo` are trained, as many at once as the cluster holds.

    weights: bytes of each one's. leads: what is said of each, up to where it is trained. Raises UnavailableError,
    before any training, where a node that a member may come to lacks what it needs.
    """
    clock = _Clock()
    outcomes = {recipe.name: Outcome(recipe.name, "unchanged") for recipe in recipes}
    with LiveProgress([recipe.name for recipe in recipes], log, clock=clock, several=True) as board:
        for recipe in recipes:
            if recipe not in todo:
                board.log(leads[recipe.name])
                board.finished(recipe.name, "unchanged")
        if not todo:
            return list(outcomes.values())
        orders, shares = _orders(cluster, todo, weights, run.absolute(), setup)
        _remove_left(run, list(orders))
        _check_nodes(cluster, list(orders.values()), shares)
        tasks = {
            _submit(cluster.ray, order, shares[name]): _Task(name, order.events, shares[name])
            for name, order in orders.items()
        }
        try:
            for outcome in _follow(cluster.ray, tasks, board, clock, leads):
                if outcome.status == "failed":
                    board.log(f"  {outcome.name}: failed: {outcome.error}")
                board.finished(outcome.name, outcome.status, outcome.score, outcome.seconds, outcome.error)
                outcomes[outcome.name] = outcome
        except BaseException:
            _cancel(cluster.ray, list(tasks))
            raise
        finally:
            for order in orders.values():
                order.events.unlink(missing_ok=True)
    return list(outcomes.values())


def at_once(cluster: Cluster, todo: Sequence[Recipe], weights: Mapping[str, int]) -> int:
    """How many of these members the cluster trains side by side, at most. weights: bytes of each one's."""
    nodes = connect.nodes(cluster.ray)
    return placement.parallel_members(
        placement.resource_requests(todo, weights, nodes, cluster.device, cluster.cpus).values(), nodes
    )


@dataclass
class _Clock:
    """Seconds of this process, or of a moment that an event tells of."""

    moment: float | None = None

    def __call__(self) -> float:
        return time.monotonic() if self.moment is None else self.moment


@dataclass
class _Task:
    """A member's task, as far as it was followed."""

    name: str
    path: Path  # of its events
    share: ResourceRequest
    read: int = 0  # bytes of its events
    node: str = ""  # where it is, by id
    ahead: float = 0.0  # seconds that its clock is ahead of this process's
    scored: Callable[[int], object] = field(default=lambda count: None)


def _orders(
    cluster: Cluster, todo: Sequence[Recipe], weights: Mapping[str, int], run: Path, setup: TrainContext
) -> tuple[dict[str, TrainRequest], dict[str, ResourceRequest]]:
    nodes = connect.nodes(cluster.ray)
    placement.check_resources(todo, nodes, cluster.device, cluster.cpus)  # they may be others than at the start
    shares = placement.resource_requests(todo, weights, nodes, cluster.device, cluster.cpus)
    for name, share in shares.items():
        if not any(placement.node_capacity(share, node) for node in nodes):
            asked = placement.describe_request(share)
            raise UnavailableError(
                f"{name} needs {asked} on one node, and the cluster has {placement.describe_nodes(nodes)}"
            )
    job = secrets.token_hex(4)
    data, versions = (
        artifacts.file_sha256(artifacts.dataset_path(run)),
        ray_look.node_versions(train_worker.COMPARED_PACKAGES),
    )
    orders = {
        recipe.name: TrainRequest(
            job=job,
            recipe=recipe.model_dump(mode="json"),
            run=str(run),
            data_sha256=data,
            versions=versions,
            folder=str(Path.cwd()),
            places=checkpoints.local_places(recipe.backbone),
            device=cluster.device,
            processes=max(shares[recipe.name].gpus, 1),
            cpus=shares[recipe.name].cpus,
            beside=placement.members_per_node(shares[recipe.name], len(todo), nodes),
            seed=setup.seed,
            report_to=setup.report_to,
            save_minutes=setup.save_minutes,
        )
        for recipe in todo
    }
    return orders, shares


def _check_nodes(cluster: Cluster, orders: Sequence[TrainRequest], shares: Mapping[str, ResourceRequest]) -> None:
    """UnavailableError that names the first node where members would fail; others that join later check themselves."""
    ray, run, data = cluster.ray, Path(orders[0].run), orders[0].data_sha256
    asked = {}
    for node in connect.nodes(ray):
        come = [order for order in orders if placement.node_capacity(shares[order.name], node)]
        if come:
            asked[node] = [place for order in come for place in order.places]
    ray_look.check_nodes(ray, list(asked), train_worker.COMPARED_PACKAGES)
    answers = {
        node: ray_look.on_node(ray, node.id, train_worker.node_problem).remote(run, data, asked[node]) for node in asked
    }
    get = ray_look.get_with_deadline(ray)
    for node, answer in answers.items():
        try:
            why = get(answer)
        except ray.exceptions.RayError as error:
            why = f"does not answer: {error_line(getattr(error, 'cause', None) or error, first=True)}"
        if why:
            raise UnavailableError(f"{node.name} {why}")


def _submit(ray: Any, order: TrainRequest, share: ResourceRequest) -> Any:
    """The task's reference. Ray repeats it when its node, worker or process is lost, not for an error of ours."""
    task = ray.remote(
        num_cpus=share.cpus,
        num_gpus=share.gpus,
        memory=share.memory or None,
        max_retries=train_worker.MAX_TRIES,
        retry_exceptions=[train_worker.WorkerLostError],
        name=order.name,
    )(train_worker.train)
    return task.remote(order)


def _follow(
    ray: Any, tasks: dict[Any, _Task], board: LiveProgress, clock: _Clock, leads: Mapping[str, str]
) -> Iterator[Outcome]:
    """Outcomes as they come; meanwhile the board is told what the members tell. Finished tasks leave `tasks`."""
    looked = time.monotonic()
    room = looked + ROOM
    while tasks:
        ready, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=0)
        if not ready:
            time.sleep(LOOK)
        for task in tasks.values():
            _replay(task, board, clock, leads)
        if any(task.read for task in tasks.values()):
            room = math.inf
        elif time.monotonic() > room:
            room = math.inf
            wanted, nodes = next(iter(tasks.values())), connect.nodes(ray)
            needs = f"{wanted.name} needs {placement.describe_request(wanted.share)}"
            board.log(
                f"  waiting for room: {needs}; the cluster has {placement.describe_nodes(nodes)}, which others may use"
            )
        for reference in ready:
            yield _outcome(ray, reference, tasks.pop(reference))
        if time.monotonic() - looked > NODES:
            looked = time.monotonic()
            _miss_nodes(ray, list(tasks.values()), board)


def _replay(task: _Task, board: LiveProgress, clock: _Clock, leads: Mapping[str, str]) -> None:
    """Tell the board what a member told since the last time, at the times when it did."""
    found, task.read = events.read(task.path, task.read)
    if not found:
        return
    begins = any(event["what"] == "begin" for event in found)  # maybe on another machine
    ahead = found[-1]["time"] - time.monotonic()  # or more: what arrived may have been on its way
    task.ahead = ahead if begins else max(ahead, task.ahead)
    for event in found:
        what, clock.moment = event.pop("what"), event.pop("time") - task.ahead
        if what == "begin":
            task.node = event["node_id"]
            again = f" (try {event['attempt']})" if event["attempt"] > 1 else ""
            board.log(f"{leads[task.name]}{event['node']}{again}")
            board.member(task.name, event["node"])
        board.turn(task.name)
        if what == "log":
            board.log(f"  {task.name}: {event['line'].strip().removeprefix(f'{task.name}: ')}")
        elif what == "scoring":
            task.scored = board.scoring(**event)
        elif what == "scored":
            task.scored(event["count"])
        elif what in ("part", "step", "epoch"):
            getattr(board, what)(**event)
    clock.moment = None


def _outcome(ray: Any, reference: Any, task: _Task) -> Outcome:
    try:
        return Outcome(**ray.get(reference))
    except (ray.exceptions.RayError, ManyeyesError) as error:
        return Outcome(task.name, "failed", error=error_line(getattr(error, "cause", None) or error, first=True))


def _miss_nodes(ray: Any, tasks: Sequence[_Task], board: LiveProgress) -> None:
    """Say which members' nodes are gone: Ray repeats them where there is room."""
    alive = {node.id for node in connect.nodes(ray)}
    for task in tasks:
        if task.node and task.node not in alive:
            task.node = ""
            board.log(f"  {task.name}: its node is gone; it goes on from its last saved state where there is room")
            board.waits(task.name)


def _remove_left(run: Path, names: Sequence[str]) -> None:
    """Remove events of earlier jobs whose driver was killed; a young file may have a worker that still writes it."""
    for name in names:
        path = artifacts.beside_work_path(run, name, "events")
        for left in path.parent.glob(f"{glob.escape(path.stem)}.*{path.suffix}"):
            with suppress(OSError):  # another command may remove it at the same time
                if time.time() - left.stat().st_mtime > LEFT:
                    left.unlink()


def _cancel(ray: Any, references: list[Any]) -> None:
    """End the members' processes; what they saved is kept."""
    for reference in references:
        ray.cancel(reference)
    if references:
        ray.wait(references, num_returns=len(references), timeout=train_worker.KILL_SECONDS)
