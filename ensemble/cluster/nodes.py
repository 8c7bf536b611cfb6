"""Whether the machines of a cluster have the same manyeyes and libraries as this one. Ray is imported late.

`node_versions` runs on machines where manyeyes may be missing: Ray sends this module's code, which must import nothing
of ours at its top.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ANSWER_SECONDS = 120.0  # for all nodes together to report their versions


def node_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of these packages (or Python) on this machine, and of manyeyes with a hash of its sources.

    Uses the standard library alone, and nothing outside the function.
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
    """UnavailableError for a `Node` with other versions."""
    here, this_module = node_versions(packages), sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(this_module)
    try:
        answers = {node: on_node(ray, node.id, node_versions).remote(packages) for node in nodes}
        get = get_with_deadline(ray)
        for node, answer in answers.items():
            with contextlib.suppress(ray.exceptions.RayError):  # the node was lost meanwhile
                check_versions(node.name, here, get(answer))
    finally:
        ray.cloudpickle.unregister_pickle_by_value(this_module)


def get_with_deadline(ray: Any) -> Callable[[Any], Any]:
    """`ray.get`; all calls together wait at most ANSWER_SECONDS."""
    until = time.monotonic() + ANSWER_SECONDS
    return lambda answer: ray.get(answer, timeout=max(until - time.monotonic(), 0))


def on_node(ray: Any, node: str, work: Any) -> Any:
    """The function or class as Ray's remote one on the node with this id; it needs no free CPU there."""
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=strategy)(work)


def check_versions(node: str, expected: Mapping[str, str], versions: Mapping[str, str]) -> None:
    """UnavailableError if a machine has other versions than the expected ones."""
    from ensemble.core.errors import UnavailableError

    def compared(name: str, text: str) -> str:
        # only the hash of our sources: they may be installed here, and a plain folder there
        return text.rpartition(" ")[2] if name == "manyeyes" else text

    different = [
        f"{name} {versions[name]} there, {version} here"
        for name, version in expected.items()
        if compared(name, versions[name]) != compared(name, version)
    ]
    if different:
        raise UnavailableError(
            f"{node} has other versions: {'; '.join(different)}; install the same on every machine of the cluster, "
            "with 'manyeyes[cluster]'"
        )
