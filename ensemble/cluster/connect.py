"""Connects to a Ray cluster: to one that runs, or to one started on this machine for the job. Ray is imported late."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from tqdm import tqdm

from ensemble.cluster import local_ray
from ensemble.core.errors import UnavailableError, error_line

CONNECT_SECONDS, ANSWER_SECONDS = 5, 30  # for a socket to open, for Ray to answer
POLL_SECONDS, MAX_MISSED_POLLS = 5.0, 3  # checks of the head; so many in a row must fail until it counts as gone
QUIET_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its C++ parts write to the terminal
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns of a change that does not matter here
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
# Ray itself waits for minutes for a cluster that does not answer, and may end the process then
PROBE_CODE = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR'); ray.shutdown()"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, and what Ray may use of it; memory in bytes. id: of the node in Ray."""

    name: str
    cpus: int
    gpus: int = 0
    memory: int = 0
    id: str = ""


def load_ray() -> Any:
    """The package ray, quiet, with ray.data; UnavailableError where it is not installed."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError:
        raise UnavailableError("Ray is not installed; run: pip install 'manyeyes[cluster]'") from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return ray


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The package ray, connected to the cluster at `address`, or at RAY_ADDRESS, or to one started here for the block.

    Afterwards all that was started is ended, also after SIGTERM. UnavailableError, within seconds, where no cluster
    answers.
    """
    if address is None:
        address = os.environ.get("RAY_ADDRESS") or "local"
    with ExitStack() as stack:
        if address == "local":
            stack.enter_context(local_ray.private_token())
        loaded = "ray" in sys.modules
        ray = load_ray()
        if address == "local":
            if loaded:
                raise UnavailableError(
                    f"Ray was loaded in this process before the token of a Ray of its own was set; {local_ray.REMEDY}"
                )
            own = stack.enter_context(local_ray.private_folder())
            stack.callback(ray.shutdown)
            local_ray.start(ray, own)
        else:
            _check_address(address)
            stack.callback(ray.shutdown)
            with local_ray.silence_stderr():
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            stack.enter_context(_head_watched(ray.get_runtime_context().gcs_address))
        stack.enter_context(_ended_by_sigterm())  # Ray's own handler would leave everything behind
        yield ray


def nodes(ray: Any) -> list[Node]:
    """The nodes that are alive and offer CPUs, by name."""
    found = []
    for entry in ray.nodes():
        has = entry["Resources"]
        if entry["Alive"] and has.get("CPU", 0) >= 1:
            name = node_label(entry["NodeManagerHostname"], entry["NodeManagerAddress"])
            found.append(
                Node(name, int(has["CPU"]), int(has.get("GPU", 0)), int(has.get("memory", 0)), entry["NodeID"])
            )
    return sorted(found, key=lambda node: (node.name, node.id))


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C, with exit code 143; only the main thread can handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _head_watched(address: str) -> Iterator[None]:
    """Print once on standard error if the cluster's head is gone: Ray waits for it, then ends the process silently.

    address: HOST:PORT.
    """
    done = threading.Event()

    def watch() -> None:
        missed = 0
        while missed < MAX_MISSED_POLLS:
            if done.wait(POLL_SECONDS):
                return
            try:
                _open_socket(address)
                missed = 0
            except OSError:
                missed += 1
        tqdm.write(
            f"The head of the cluster at {address} is gone. If it does not come back, this command ends within about "
            "a minute; what was finished is kept, and the same command goes on, on a cluster that runs.",
            file=sys.stderr,
        )

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _open_socket(address: str) -> None:
    """OSError unless something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def this_node() -> str:
    """The name of this machine, as `Node.name`."""
    import ray

    return node_label(socket.gethostname(), ray.util.get_node_ip_address())


def node_label(host: str, address: str) -> str:
    """A node's name in messages."""
    return f"{host} ({address})"


def _check_address(address: str) -> None:
    """UnavailableError unless a cluster to which this machine belongs answers at the address."""
    if "://" in address:
        raise UnavailableError(
            f"--address {address}: Ray's client cannot run such a job; run the command on a machine of the cluster, "
            "with --address HOST:PORT of its head, or auto"
        )
    host, _, port = address.rpartition(":")
    start = "start one with: ray start --head, or leave out --address"
    if address != "auto":
        if not host or not (port.isascii() and port.isdigit()):
            raise UnavailableError(f"--address {address} is not HOST:PORT, and not auto")
        try:
            _open_socket(address)
        except (OSError, OverflowError, ValueError) as error:  # ValueError: a port of thousands of digits, a bad name
            why = error_line(getattr(error, "strerror", None) or error)
            raise UnavailableError(f"no Ray cluster at {address} ({why}); {start}") from None
    try:
        trial = subprocess.run(  # noqa: S603  # our own code; the address is an argument
            [sys.executable, "-P", "-c", PROBE_CODE, address],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"no Ray cluster answers at {address} within {ANSWER_SECONDS} s; {start}") from None
    if "InvalidAuthToken" in trial.stderr or "AuthenticationError" in trial.stderr:
        raise UnavailableError(
            f"the Ray cluster at {address} asks for another token than the one here; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH here as on its machines"
        )
    if trial.returncode:
        why = error_line(trial.stderr.strip().rpartition("\n")[2])
        raise UnavailableError(f"no Ray cluster can be used at {address} ({why}); {start}")
