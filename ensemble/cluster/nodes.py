"""Whether the machines of a cluster have the same manyeyes and libraries as this one. Ray is imported late.

`look` needs nothing of ours where it runs, so none may be there: Ray carries it there whole.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ANSWER_SECONDS = 120.0  # seconds for all nodes to say what they have


def node_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of these packages (or Python) on this machine, and of ours with a hash of our sources.

    The standard library alone, and nothing outside the function.
    """
    import hashlib
    import importlib.metadata
    import importlib.util
    import pathlib
    import platform

    def version(name: str) -> str:
        if name == "Python":
            return platform.python_version()
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    digest = hashlib.sha256()
    for package in ("ensemble", "export"):
        spec = importlib.util.find_spec(package)
        for root in map(pathlib.Path, (spec.submodule_search_locations or ()) if spec else ()):
            for file in sorted(root.rglob("*.py")):
                digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return {
        "manyeyes": f"{version('manyeyes')} ({digest.hexdigest()[:8]})",
        **{name: version(name) for name in packages},
    }


def check_nodes(ray: Any, nodes: Sequence[Any], packages: Sequence[str]) -> None:
    """UnavailableError for a `Node` with other versions; what works by them cannot even be sent there."""
    here, ours = node_versions(packages), sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(ours)
    try:
        looks = {node: on_node(ray, node.id, node_versions).remote(packages) for node in nodes}
        get = get_with_deadline(ray)
        for node, found in looks.items():
            with contextlib.suppress(ray.exceptions.RayError):  # it went meanwhile
                check_versions(node.name, here, get(found))
    finally:
        ray.cloudpickle.unregister_pickle_by_value(ours)


def get_with_deadline(ray: Any) -> Callable[[Any], Any]:
    """`ray.get`, whose calls wait ANSWERS seconds together."""
    until = time.monotonic() + ANSWER_SECONDS
    return lambda answer: ray.get(answer, timeout=max(until - time.monotonic(), 0))


def on_node(ray: Any, node: str, work: Any) -> Any:
    """A function or class that Ray runs on this node, by id, beside what else runs there."""
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=strategy)(work)


def check_versions(where: str, wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    """UnavailableError if a machine has other versions than those wanted."""
    from ensemble.core.errors import UnavailableError

    def compared(name: str, text: str) -> str:
        # by the hash of our sources alone: they may be installed here and lie in a folder there
        return text.rpartition(" ")[2] if name == "manyeyes" else text

    different = [
        f"{name} {found[name]} there, {version} here"
        for name, version in wanted.items()
        if compared(name, found[name]) != compared(name, version)
    ]
    if different:
        raise UnavailableError(
            f"{where} has other versions: {'; '.join(different)}; install the same on every machine of the cluster, "
            "with 'manyeyes[cluster]'"
        )
