"""What of a cluster each member gets: numbers alone, without Ray."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ensemble.cluster.connect import Node
from ensemble.core.errors import UnavailableError
from ensemble.core.recipe import Recipe

BASE_MEMORY_BYTES = 2**30  # bytes of a training process without its network
MEMORY_PER_WEIGHT = 6  # times those of its weights: gradients, two moments, their average, the best epoch's


@dataclass(frozen=True)
class ResourceRequest:
    """What one member's task asks for; memory in bytes. gpus is 0 on CPUs."""

    cpus: int
    gpus: int
    memory: int


def choose_device(asked: str, nodes: Sequence[Node]) -> str:
    """cpu or cuda, for auto, cpu or cuda: `auto` takes GPUs if any node has one."""
    gpus = max((node.gpus for node in nodes), default=0)
    if asked == "cuda" and not gpus:
        raise UnavailableError(
            f"the cluster has no GPU ({describe_nodes(nodes)}); use --device cpu, or start Ray where GPUs are"
        )
    return ("cuda" if gpus else "cpu") if asked == "auto" else asked


def check_resources(
    recipes: Sequence[Recipe], nodes: Sequence[Node], asked: str, cpus_per_member: int | None = None
) -> str:
    """The device that members are trained on; UnavailableError for what no node can give.

    asked: auto, cpu or cuda.
    """
    largest = max((node.cpus for node in nodes), default=0)
    if largest < 1:
        raise UnavailableError("no node of the cluster has a CPU for tasks; add one: ray start --num-cpus N")
    device = choose_device(asked, nodes)
    most = max((node.gpus for node in nodes), default=0)
    greedy = [recipe for recipe in recipes if recipe.train.gpus > max(most, 1)] if asked != "cpu" else []
    if greedy:
        names = ", ".join(f"{recipe.name} asks for {recipe.train.gpus} GPUs" for recipe in greedy)
        raise UnavailableError(
            f"{names} (train.gpus), and the cluster has {describe_nodes(nodes)}; lower it, or add --device cpu"
        )
    if cpus_per_member is not None and cpus_per_member > largest:
        raise UnavailableError(
            f"--cpus-per-member {cpus_per_member}: the cluster has {describe_nodes(nodes)}; choose fewer"
        )
    return device


def resource_requests(
    recipes: Sequence[Recipe],
    weights: Mapping[str, int],
    nodes: Sequence[Node],
    device: str,
    cpus_per_member: int | None = None,
) -> dict[str, ResourceRequest]:
    """Each member's share, by name. weights: bytes of each one's.

    On CPUs as many as let all members run at once, or as many of them as memory does; at least 1. On GPUs the CPUs
    that go with them.
    """
    needed = {recipe.name: BASE_MEMORY_BYTES + MEMORY_PER_WEIGHT * weights[recipe.name] for recipe in recipes}
    at_once = cpus_for_parallel(len(recipes), nodes, max(needed.values(), default=0))
    found = {}
    for recipe in recipes:
        gpus = recipe.train.gpus if device == "cuda" else 0
        cpus = cpus_per_member or (cpus_with_gpus(gpus, nodes) if gpus else at_once)
        most = max((node.memory for node in nodes if node.cpus >= cpus and node.gpus >= gpus), default=0)
        found[recipe.name] = ResourceRequest(cpus, gpus, min(needed[recipe.name], most))
    return found


def cpus_for_parallel(members: int, nodes: Sequence[Node], memory: int = 0) -> int:
    """The most CPUs a member with which as many of them run at once as with 1. memory: bytes of the largest member."""
    memory = min(memory, max((node.memory for node in nodes), default=0))

    def at_once(cpus: int) -> int:
        return min(sum(node_capacity(ResourceRequest(cpus, 0, memory), node) for node in nodes), members)

    largest = max((node.cpus for node in nodes), default=1)
    return max((cpus for cpus in range(1, largest + 1) if at_once(cpus) >= at_once(1)), default=1)


def cpus_with_gpus(gpus: int, nodes: Sequence[Node]) -> int:
    """The CPUs that go with so many GPUs on the node with the fewest of them, at least 1."""
    return min((max(node.cpus * gpus // node.gpus, 1) for node in nodes if node.gpus >= gpus), default=1)


def members_per_node(share: ResourceRequest, members: int, nodes: Sequence[Node]) -> int:
    """How many such members may be on one node at once, of so many in all."""
    return max(min(max(node_capacity(share, node) for node in nodes), members), 1)


def parallel_members(shares: Iterable[ResourceRequest], nodes: Sequence[Node]) -> int:
    """How many members of these shares the cluster trains at once, at most; 0 where it has no room for one."""
    each = list(shares)
    return min(sum(max((node_capacity(share, node) for share in each), default=0) for node in nodes), len(each))


def node_capacity(share: ResourceRequest, node: Node) -> int:
    """How many members with this share the node holds at once."""
    both = [(node.cpus, share.cpus), (node.gpus, share.gpus), (node.memory, share.memory)]
    return min(has // needs for has, needs in both if needs)


def describe_request(share: ResourceRequest) -> str:
    """A share in words: '2 CPUs, 1 GPUs, 3.0 GiB of memory'."""
    gpus = f", {share.gpus} GPUs" if share.gpus else ""
    return f"{share.cpus} CPUs{gpus}, {share.memory / 2**30:.1f} GiB of memory"


def describe_nodes(nodes: Sequence[Node]) -> str:
    """What the cluster has, in words: 'a: 8 CPUs, 2 GPUs; b: 4 CPUs'."""
    parts = [f"{node.name}: {node.cpus} CPUs" + (f", {node.gpus} GPUs" if node.gpus else "") for node in nodes]
    return "; ".join(parts[:5]) + (f" and {len(parts) - 5} more nodes" if len(parts) > 5 else "")
