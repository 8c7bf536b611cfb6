"""What of a cluster each member gets: numbers alone, without Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ensemble.errors import UnavailableError
from ensemble.ray_cluster import Node
from ensemble.recipe import Recipe

BASE_MEMORY = 2**30  # bytes of a training process without its network
WEIGHTS = 6  # times those of its weights: gradients, two moments, their average, the best epoch's


@dataclass(frozen=True)
class Share:
    """What one member's task asks for; memory in bytes. gpus is 0 on CPUs."""

    cpus: int
    gpus: int
    memory: int


def choose_device(asked: str, nodes: Sequence[Node]) -> str:
    """cpu or cuda, for auto, cpu or cuda: `auto` takes GPUs if any node has one."""
    gpus = max((node.gpus for node in nodes), default=0)
    if asked == "cuda" and not gpus:
        raise UnavailableError(f"the cluster has no GPU ({told(nodes)}); use --device cpu, or start Ray where GPUs are")
    return ("cuda" if gpus else "cpu") if asked == "auto" else asked


def check(recipes: Sequence[Recipe], nodes: Sequence[Node], asked: str, cpus_per_member: int | None = None) -> str:
    """The device that members are trained on; UnavailableError for what no node can give.

    asked: auto, cpu or cuda.
    """
    device = choose_device(asked, nodes)
    most = max((node.gpus for node in nodes), default=0)
    greedy = [recipe for recipe in recipes if recipe.train.gpus > max(most, 1)] if asked != "cpu" else []
    if greedy:
        names = ", ".join(f"{recipe.name} asks for {recipe.train.gpus} GPUs" for recipe in greedy)
        raise UnavailableError(
            f"{names} (train.gpus), and the cluster has {told(nodes)}; lower it, or add --device cpu"
        )
    largest = max((node.cpus for node in nodes), default=0)
    if largest < 1:
        raise UnavailableError("no node of the cluster has a CPU for tasks; add one: ray start --num-cpus N")
    if cpus_per_member is not None and cpus_per_member > largest:
        raise UnavailableError(f"--cpus-per-member {cpus_per_member}: the cluster has {told(nodes)}; choose fewer")
    return device


def shares(
    recipes: Sequence[Recipe],
    weights: Mapping[str, int],
    nodes: Sequence[Node],
    device: str,
    cpus_per_member: int | None = None,
) -> dict[str, Share]:
    """Each member's share, by name. weights: bytes of each one's.

    On CPUs as many as let all members run at once, at least 1. On GPUs the CPUs that go with them.
    """
    memory = max((node.memory for node in nodes), default=0)
    at_once = cpus_each(len(recipes), nodes)
    found = {}
    for recipe in recipes:
        gpus = recipe.train.gpus if device == "cuda" else 0
        cpus = cpus_per_member or (cpus_beside(gpus, nodes) if gpus else at_once)
        found[recipe.name] = Share(cpus, gpus, min(BASE_MEMORY + WEIGHTS * weights[recipe.name], memory))
    return found


def cpus_each(members: int, nodes: Sequence[Node]) -> int:
    """The most CPUs a member with which all of them run at once, or 1 where they cannot."""
    largest = max((node.cpus for node in nodes), default=1)
    fits = [cpus for cpus in range(1, largest + 1) if sum(node.cpus // cpus for node in nodes) >= members]
    return max(fits, default=1)


def cpus_beside(gpus: int, nodes: Sequence[Node]) -> int:
    """The CPUs that go with so many GPUs on the node with the fewest of them, at least 1."""
    return min((max(node.cpus * gpus // node.gpus, 1) for node in nodes if node.gpus >= gpus), default=1)


def together(share: Share, members: int, nodes: Sequence[Node]) -> int:
    """How many such members may be on one node at once, of so many in all."""
    most = max(node.gpus // share.gpus if share.gpus else node.cpus // share.cpus for node in nodes)
    return max(min(most, members), 1)


def holds(share: Share, node: Node) -> bool:
    """Whether a member with this share may come to this node."""
    return node.cpus >= share.cpus and node.gpus >= share.gpus


def told(nodes: Sequence[Node]) -> str:
    """What the cluster has, in words: 'a: 8 CPUs, 2 GPUs; b: 4 CPUs'."""
    parts = [f"{node.name}: {node.cpus} CPUs" + (f", {node.gpus} GPUs" if node.gpus else "") for node in nodes]
    return "; ".join(parts[:5]) + (f" and {len(parts) - 5} more nodes" if len(parts) > 5 else "")
