"""How many workers a Ray cluster has room for, and how many cores and GPUs each gets. Imports no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from ensemble.cluster.connect import Node
from ensemble.core.errors import UnavailableError

SMALLEST_GPU_SHARE = 0.0001  # that Ray can count


@dataclass(frozen=True)
class ClusterOptions:
    """What a user asked of the cluster; None leaves it to what the cluster has.

    address: HOST:PORT of its head, or auto for one on this machine. workers: processes that score,
    each with a bundle of its own, on `cpus` cores and `gpus` GPUs (a fraction shares one).
    """

    address: str | None = None
    workers: int | None = None
    cpus: int | None = None
    gpus: float | None = None


@dataclass(frozen=True)
class WorkerPool:
    """How many workers, and the cores and GPUs of each."""

    workers: int
    cpus: int
    gpus: float

    def __str__(self) -> str:
        each = " each" * (self.workers > 1)
        return f"{_count(self.workers, 'worker')} of {_describe_worker(self.cpus, self.gpus)}{each}"


def plan_workers(nodes: Sequence[Node], options: ClusterOptions, gpus_allowed: bool, gpus_required: bool) -> WorkerPool:
    """Workers for a cluster of these nodes; UnavailableError, with what the cluster has, if there is no room for them.

    By default one worker for each GPU, if `gpus_allowed` and there are any; else one for each node, or as many as
    there is room for if only their cores were given. The cores of each are then an equal share.
    """
    if gpus_required and (options.gpus == 0 or not any(node.gpus for node in nodes)):
        has = describe_cluster(nodes)
        raise UnavailableError(f"members should run on GPUs, and {has}; use --device cpu, or add nodes")
    gpus = options.gpus
    if gpus is None:
        gpus = 1.0 if gpus_allowed and any(node.gpus for node in nodes) else 0.0
    if gpus and not SMALLEST_GPU_SHARE <= gpus < inf:  # nor NaN
        raise UnavailableError(f"--gpus-per-worker is 0, or from {SMALLEST_GPU_SHARE} on, not {gpus:g}")
    if gpus > 1 and gpus != int(gpus):
        raise UnavailableError(f"--gpus-per-worker {gpus:g}: above 1 only whole GPUs can be given to a worker")
    each, has = _describe_worker(options.cpus or 1, gpus), describe_cluster(nodes)
    usable = [node for node in nodes if node.cpus >= (options.cpus or 1) and node.gpus >= gpus]
    if not usable:
        raise UnavailableError(f"no node has room for a worker of {each}: {has}")
    capacity = _capacity(usable, options.cpus or 1, gpus)
    workers = options.workers or (capacity if gpus or options.cpus else len(usable))
    if capacity < workers:
        raise UnavailableError(f"there is no room for {workers} workers of {each}, only for {capacity}: {has}")
    if options.cpus:
        return WorkerPool(workers, options.cpus, gpus)
    most = min(sum(node.cpus for node in usable) // workers, min(node.cpus for node in usable))
    cpus = next(cpus for cpus in range(max(most, 1), 0, -1) if _capacity(usable, cpus, gpus) >= workers)
    return WorkerPool(workers, cpus, gpus)


def resume_workers(nodes: Sequence[Node], options: ClusterOptions, cpus: int, gpus: float) -> WorkerPool | None:
    """Workers of the cores and GPUs that a resumed job was begun with; None if no node has room for one.

    As many as `options` asks for, or as the cluster has room for.
    """
    try:
        pool = plan_workers(nodes, replace(options, workers=None, cpus=cpus, gpus=gpus), False, False)
    except UnavailableError:
        return None
    return replace(pool, workers=min(pool.workers, options.workers or pool.workers))


def describe_cluster(nodes: Sequence[Node]) -> str:
    """What the cluster has, in words."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    largest = f", at most {max(node.cpus for node in nodes)} cores on one" if len(nodes) > 1 else ""
    return f"the cluster has {_count(cpus, 'core')} and {_count(gpus, 'GPU')} on {_count(len(nodes), 'node')}{largest}"


def _capacity(nodes: Sequence[Node], cpus: int, gpus: float) -> int:
    """How many workers of so many cores and GPUs the nodes have room for."""
    # Ray counts in ten thousandths, and does not put a share of a GPU together from several
    by_gpus = [inf if not gpus else int(node.gpus) * int(1 / gpus) if gpus < 1 else node.gpus // gpus for node in nodes]
    return sum(int(min(node.cpus // cpus, most)) for node, most in zip(nodes, by_gpus, strict=True))


def _describe_worker(cpus: int, gpus: float) -> str:
    return " and ".join([_count(cpus, "core"), *([_count(gpus, "GPU")] if gpus else [])])


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'s' * (number != 1)}"
