"""To a Ray cluster and back: one that runs, or one started on this machine for the job. Ray is imported late."""

import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ensemble.errors import UnavailableError
from ensemble.parallel import available_cores

OBJECT_STORE = 256 << 20  # bytes, of a Ray of our own: what is on its way is small, and the rest goes to disk
CONNECTS, ANSWERS = 5, 30  # seconds
FOLDER = "manyeyes-ray-"  # and the process's number
MOST_TEMPORARY = 8  # characters of the folder for temporary files, before /tmp is taken
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its C++ parts write to the terminal
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns of a change that does not matter here
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
# Ray itself waits for minutes for a cluster that does not answer, and may end the process then
TRIAL = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR'); ray.shutdown()"


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, and what Ray may use of it; memory in bytes. id: Ray's own name of it."""

    name: str
    cpus: int
    gpus: int = 0
    memory: int = 0
    id: str = ""


def load_ray() -> Any:
    """The package ray, quiet, with ray.data; UnavailableError where it is not installed."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError:
        raise UnavailableError("Ray is not installed; run: pip install 'manyeyes[cluster]'") from None
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return ray


@contextmanager
def _hushed() -> Iterator[None]:
    """Nothing on standard error meanwhile, below Python too: Ray says there that it was told to be quiet."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The package ray, connected to the cluster at `address`, or at RAY_ADDRESS, or to one started here for the block.

    Afterwards all that was started is gone, after SIGTERM too. UnavailableError, within seconds, where no cluster
    answers.
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    with _own_token() if address == "local" else nullcontext():
        loaded = "ray" in sys.modules
        ray = load_ray()
        if loaded and address == "local":
            raise UnavailableError(
                f"Ray was loaded in this process before the token of a Ray of its own was set; {REMEDY}"
            )
        own = _folder() if address == "local" else None
        try:
            if own:
                _start(ray, own)
            else:
                _check(address)
                with _hushed():
                    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            with _ended_by_sigterm():  # Ray sets its own as it starts, which would leave everything behind
                yield ray
        finally:
            ray.shutdown()
            if own:
                shutil.rmtree(own, ignore_errors=True)


def nodes(ray: Any) -> list[Node]:
    """Those that are alive and have cores to give, by name."""
    return sorted(
        (_node(entry) for entry in ray.nodes() if entry["Alive"] and entry["Resources"].get("CPU", 0) >= 1),
        key=lambda node: (node.name, node.id),
    )


def _node(entry: Mapping[str, Any]) -> Node:
    has = entry["Resources"]
    name = shown(entry["NodeManagerHostname"], entry["NodeManagerAddress"])
    return Node(name, int(has["CPU"]), int(has.get("GPU", 0)), int(has.get("memory", 0)), entry["NodeID"])


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C, with exit code 143; a signal is for the main thread alone."""
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


def shown(host: str, address: str) -> str:
    """How a node is named wherever it is told of."""
    return f"{host} ({address})"


def _folder() -> str:
    """For logs and what does not fit into memory; short, since a socket's path has at most 107 bytes.

    Those of processes that were killed are removed.
    """
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) <= MOST_TEMPORARY else "/tmp"  # noqa: S108
    for left in Path(base).glob(f"{FOLDER}*-*"):
        number = left.name.removeprefix(FOLDER).partition("-")[0]
        if number.isdecimal() and _gone(int(number)):  # another user's cannot be removed, and stays
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=base)


def _gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, ProcessLookupError)
    return False


@contextmanager
def _own_token() -> Iterator[None]:
    """A token for a Ray that is started meanwhile, so that no other user reaches it; Ray would keep one at home.

    Ray looks for it as it is imported.
    """
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start(ray: Any, folder: str) -> None:
    try:
        with _hushed():
            ray.init(
                "local",
                num_cpus=available_cores(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE,
                _temp_dir=folder,
            )
    except Exception as error:  # of many kinds: no memory, no ports, a path that is too long
        why = LOGS.sub("", str(error))
        raise UnavailableError(f"Ray could not be started here: {_line(why)}; {REMEDY}") from None


REMEDY = "name a cluster that runs with --address HOST:PORT"
LOGS = re.compile(r"\s*(Last 0 lines|Please check).*", re.DOTALL)  # and where: in a folder that is gone by then


def _check(address: str) -> None:
    """UnavailableError unless a cluster answers there, to which this machine belongs."""
    if "://" in address:
        raise UnavailableError(
            f"--address {address}: Ray's client cannot run such a job; run the command on a machine of the cluster, "
            "with --address HOST:PORT of its head, or auto"
        )
    host, _, port = address.rpartition(":")
    start = "start one with: ray start --head, or leave out --address"
    if address != "auto":
        if not host or not port.isdigit():
            raise UnavailableError(f"--address {address} is not HOST:PORT, and not auto")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECTS).close()
        except (OSError, OverflowError, UnicodeError) as error:
            why = _line(getattr(error, "strerror", None) or str(error))
            raise UnavailableError(f"no Ray cluster at {address} ({why}); {start}") from None
    try:
        trial = subprocess.run(  # noqa: S603  # our own words; the address is an argument
            [sys.executable, "-c", TRIAL, address], capture_output=True, text=True, timeout=ANSWERS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"no Ray cluster answers at {address} within {ANSWERS} s; {start}") from None
    if "InvalidAuthToken" in trial.stderr or "AuthenticationError" in trial.stderr:
        raise UnavailableError(
            f"the Ray cluster at {address} asks for another token than the one here; set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH here as on its machines"
        )
    if trial.returncode:
        why = _line(trial.stderr.strip().rpartition("\n")[2])
        raise UnavailableError(f"no Ray cluster can be used at {address} ({why}); {start}")


def _line(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(".") or "no reason given"
