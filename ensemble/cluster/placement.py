"""Resources that each member's task asks of a cluster: numbers alone, without Ray."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ensemble.cluster.connect import Node
from ensemble.core.errors import UnavailableError
from ensemble.core.recipe import Recipe

BASE_MEMORY_BYTES = 2**30  # of a training process without its network
MEMORY_PER_WEIGHT = 6  # times the bytes of the weights: gradients, two moments, the EMA, the best epoch


@dataclass(frozen=True)
class ResourceRequest:
    """Resources of one member's task; memory in bytes. gpus is 0 on CPUs."""

    cpus: int
    gpus: int
    memory: int


def check_resources(
    recipes: Sequence[Recipe], nodes: Sequence[Node], device: str, cpus_per_member: int | None = None
) -> str:
    """The device that members are trained on, cpu or cuda; UnavailableError for what no node can give.

    device: auto, cpu or cuda; `auto` takes GPUs if any node has one.
    """
    most_cpus = max((node.cpus for node in nodes), default=0)
    if most_cpus < 1:
        raise UnavailableError("no node of the cluster has a CPU for tasks; add one: ray start --num-cpus N")
    most_gpus = max(node.gpus for node in nodes)
    if device == "cuda" and not most_gpus:
        raise UnavailableError(
            f"the cluster has no GPU ({describe_nodes(nodes)}); use --device cpu, or start Ray where GPUs are"
        )
    too_large = [recipe for recipe in recipes if recipe.train.gpus > max(most_gpus, 1)] if device != "cpu" else []
    if too_large:
        names = ", ".join(f"{recipe.name} asks for {recipe.train.gpus} GPUs" for recipe in too_large)
        raise UnavailableError(
            f"{names} (train.gpus), and the cluster has {describe_nodes(nodes)}; lower it, or add --device cpu"
        )
    if cpus_per_member is not None and cpus_per_member > most_cpus:
        raise UnavailableError(
            f"--cpus-per-member {cpus_per_member}: the cluster has {describe_nodes(nodes)}; choose fewer"
        )
    return ("cuda" if most_gpus else "cpu") if device == "auto" else device


def resource_requests(
    recipes: Sequence[Recipe],
    weight_bytes: Mapping[str, int],
    nodes: Sequence[Node],
    device: str,
    cpus_per_member: int | None = None,
) -> dict[str, ResourceRequest]:
    """Each member's request, by name. weight_bytes: size of each member's weights, by name.

    A member on CPUs gets as many as possible while as many members as possible run at once. A member on GPUs gets
    their share of the node's CPUs. No member asks for more memory than a node has that may train it.
    """
    memory = {recipe.name: BASE_MEMORY_BYTES + MEMORY_PER_WEIGHT * weight_bytes[recipe.name] for recipe in recipes}
    cpus_alone = cpus_for_parallel(len(recipes), nodes, max(memory.values(), default=0))
    requests = {}
    for recipe in recipes:
        gpus = recipe.train.gpus if device == "cuda" else 0
        # their share of a node's CPUs, on the node with the fewest a GPU
        with_gpus = [max(node.cpus * gpus // node.gpus, 1) for node in nodes if node.gpus >= gpus > 0]
        cpus = cpus_per_member or (min(with_gpus, default=1) if gpus else cpus_alone)
        most = max((node.memory for node in nodes if node.cpus >= cpus and node.gpus >= gpus), default=0)
        requests[recipe.name] = ResourceRequest(cpus, gpus, min(memory[recipe.name], most))
    return requests


def cpus_for_parallel(members: int, nodes: Sequence[Node], memory: int = 0) -> int:
    """The largest number of CPUs a member that still lets as many of the members run at once as 1 CPU each does.

    memory: bytes of the largest member.
    """
    memory = min(memory, max((node.memory for node in nodes), default=0))

    def parallel(cpus: int) -> int:
        return min(sum(node_capacity(ResourceRequest(cpus, 0, memory), node) for node in nodes), members)

    most_cpus = max((node.cpus for node in nodes), default=1)
    return max((cpus for cpus in range(1, most_cpus + 1) if parallel(cpus) >= parallel(1)), default=1)


def members_per_node(request: ResourceRequest, members: int, nodes: Sequence[Node]) -> int:
    """How many members with this request may run on one node at once, at most; of `members` in all."""
    return max(min(max(node_capacity(request, node) for node in nodes), members), 1)


def parallel_members(requests: Iterable[ResourceRequest], nodes: Sequence[Node]) -> int:
    """How many of these requests the cluster can serve at once, at most; 0 where no node has enough for one."""
    each = list(requests)
    return min(sum(max((node_capacity(request, node) for request in each), default=0) for node in nodes), len(each))


def node_capacity(request: ResourceRequest, node: Node) -> int:
    """How many members with this request the node can train at once."""
    pairs = [(node.cpus, request.cpus), (node.gpus, request.gpus), (node.memory, request.memory)]
    return min(available // needed for available, needed in pairs if needed)


def describe_request(request: ResourceRequest) -> str:
    """Such as '2 CPUs, 1 GPUs, 3.0 GiB of memory'."""
    gpus = f", {request.gpus} GPUs" if request.gpus else ""
    return f"{request.cpus} CPUs{gpus}, {request.memory / 2**30:.1f} GiB of memory"


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Such as 'a: 8 CPUs, 2 GPUs; b: 4 CPUs'."""
    parts = [f"{node.name}: {node.cpus} CPUs" + (f", {node.gpus} GPUs" if node.gpus else "") for node in nodes]
    return "; ".join(parts[:5]) + (f" and {len(parts) - 5} more nodes" if len(parts) > 5 else "")
