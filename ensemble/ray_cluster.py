"""A Ray cluster to work on: one that runs, or a local one for this job alone. Ray is imported only here and late.

Several packages of Ray's own would talk on the user's terminal, count its users and open a dashboard: none does here.
"""

import logging
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from ensemble.errors import UnavailableError

PATIENCE = 5.0  # seconds for a port to open
HEALTH = 20.0  # seconds for what listens there to answer as Ray; ray.init itself would try for minutes
OBJECT_STORE = 100 * 2**20  # bytes of a local Ray's: little travels through it
CLIENT = "ray://"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray advises to set it
}


@dataclass(frozen=True)
class Node:
    """A living machine of the cluster and what all tasks together may use there; memory in bytes."""

    id: str
    name: str
    cpus: int
    gpus: int = 0
    memory: int = 0


def load() -> Any:
    """The module ray; UnavailableError where it is not installed."""
    if find_spec("ray") is None:
        raise UnavailableError("--engine ray needs Ray; run: pip install 'manyeyes[cluster]'")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

    return ray


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The module ray, connected to a cluster; what it started ends with the block, a running cluster goes on.

    address: "host:port", "ray://host:port" or "auto"; None takes RAY_ADDRESS, or else starts a local Ray.
    Raises UnavailableError within seconds where no cluster answers.
    """
    ray = load()
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local = address == "local"
    if not local and address != "auto":
        _check_answers(address)
    options = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if local else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        ray.shutdown()
        brief = " ".join(str(error).split())
        if address == "auto":
            raise UnavailableError("no Ray cluster runs on this machine; start one (ray start --head)") from None
        if local:
            raise UnavailableError(f"a local Ray could not be started: {brief}") from None
        raise UnavailableError(f"cannot join the Ray cluster at {address}: {brief}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def nodes(ray: Any) -> tuple[Node, ...]:
    """The cluster's living nodes, by name."""
    found = [_node(entry) for entry in ray.nodes() if entry["Alive"]]
    return tuple(sorted(found, key=lambda node: (node.name, node.id)))


def _node(entry: dict[str, Any]) -> Node:
    has = entry["Resources"]
    name = entry.get("NodeManagerHostname") or entry["NodeManagerAddress"]
    return Node(entry["NodeID"], name, int(has.get("CPU", 0)), int(has.get("GPU", 0)), int(has.get("memory", 0)))


def _check_answers(address: str) -> None:
    """UnavailableError unless a Ray cluster listens at the address."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not host or not port.isdigit():
        raise UnavailableError(f"--address {address}: write it as HOST:PORT, or auto for a Ray on this machine")
    nobody = UnavailableError(
        f"no Ray cluster answers at {address}; start one (ray start --head) or correct --address; "
        "without it a local Ray is started"
    )
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except (OSError, OverflowError):
        raise nobody from None
    if address.startswith(CLIENT):
        return  # another protocol, which gives up by itself
    probe = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--skip-version-check", "--address"]
    try:
        done = subprocess.run([*probe, f"{host}:{port}"], timeout=HEALTH, capture_output=True, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise nobody from None
    if done.returncode:
        raise nobody
