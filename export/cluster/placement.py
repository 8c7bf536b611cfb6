"""How many workers a Ray cluster has room for, and what each may use. Light: no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from ensemble.cluster.connect import Node
from ensemble.core.errors import UnavailableError

LEAST_GPU = 0.0001  # that Ray can count


@dataclass(frozen=True)
class ClusterOptions:
    """What a user asked of the cluster; None leaves it to what the cluster has.

    address: HOST:PORT of its head, or auto for one on this machine. workers: processes that score,
    each with a bundle of its own, on cpus cores and gpus GPUs (a fraction shares one).
    """

    address: str | None = None
    workers: int | None = None
    cpus: int | None = None
    gpus: float | None = None


@dataclass(frozen=True)
class Size:
    """Workers, and the cores and GPUs of each."""

    workers: int
    cpus: int
    gpus: float

    def __str__(self) -> str:
        return f"{_count(self.workers, 'worker')} of {_told(self.cpus, self.gpus)}{' each' * (self.workers > 1)}"


def sized(nodes: Sequence[Node], asked: ClusterOptions, gpus_may: bool, gpus_must: bool) -> Size:
    """Workers for a cluster of these nodes; UnavailableError, saying what it has, for more than there is room for.

    By default a worker for each GPU, where members may run on GPUs and there are any; else one for
    each node, or as many as have room where only their cores were given. Its cores are then an equal share.
    """
    if gpus_must and (asked.gpus == 0 or not any(node.gpus for node in nodes)):
        raise UnavailableError(f"members should run on GPUs, and {told(nodes)}; use --device cpu, or add nodes")
    gpus = asked.gpus
    if gpus is None:
        gpus = 1.0 if gpus_may and any(node.gpus for node in nodes) else 0.0
    if gpus and not LEAST_GPU <= gpus < inf:  # nor NaN
        raise UnavailableError(f"--gpus-per-worker is 0, or from {LEAST_GPU} on, not {gpus:g}")
    if gpus > 1 and gpus != int(gpus):
        raise UnavailableError(f"--gpus-per-worker {gpus:g}: above 1 only whole GPUs can be given to a worker")
    able = [node for node in nodes if node.cpus >= (asked.cpus or 1) and node.gpus >= gpus]
    if not able:
        raise UnavailableError(f"no node has room for a worker of {_told(asked.cpus or 1, gpus)}: {told(nodes)}")
    workers = asked.workers or _workers(able, asked.cpus, gpus)
    most = _room(able, asked.cpus or 1, gpus)
    if most < workers:
        each = _told(asked.cpus or 1, gpus)
        raise UnavailableError(f"there is no room for {workers} workers of {each}, only for {most}: {told(nodes)}")
    if asked.cpus:
        return Size(workers, asked.cpus, gpus)
    most = min(sum(node.cpus for node in able) // workers, min(node.cpus for node in able))
    cpus = next(cpus for cpus in range(max(most, 1), 0, -1) if _room(able, cpus, gpus) >= workers)
    return Size(workers, cpus, gpus)


def sized_as(nodes: Sequence[Node], asked: ClusterOptions, cpus: int, gpus: float) -> Size | None:
    """Workers of the cores and GPUs that a job was begun with: as many as were asked for or have room; None if none."""
    try:
        found = sized(nodes, replace(asked, workers=None, cpus=cpus, gpus=gpus), False, False)
    except UnavailableError:
        return None
    return replace(found, workers=min(found.workers, asked.workers or found.workers))


def told(nodes: Sequence[Node]) -> str:
    """What the cluster has, in words."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    largest = f", at most {max(node.cpus for node in nodes)} cores on one" if len(nodes) > 1 else ""
    return f"the cluster has {_count(cpus, 'core')} and {_count(gpus, 'GPU')} on {_count(len(nodes), 'node')}{largest}"


def _workers(able: Sequence[Node], cpus: int | None, gpus: float) -> int:
    return _room(able, cpus or 1, gpus) if gpus or cpus else len(able)


def _room(nodes: Sequence[Node], cpus: int, gpus: float) -> int:
    """How many workers have room."""
    # Ray counts in ten thousandths, and does not put a share of a GPU together from several
    by_gpus = [inf if not gpus else int(node.gpus) * int(1 / gpus) if gpus < 1 else node.gpus // gpus for node in nodes]
    return sum(int(min(node.cpus // cpus, most)) for node, most in zip(nodes, by_gpus, strict=True))


def _told(cpus: int, gpus: float) -> str:
    return " and ".join([_count(cpus, "core"), *([_count(gpus, "GPU")] if gpus else [])])


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'s' * (number != 1)}"
