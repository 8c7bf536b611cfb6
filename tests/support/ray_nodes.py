"""A Ray cluster of separate processes on this machine, for tests: its own ports and folder, gone afterwards."""

import contextlib
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

RAY = Path(sys.executable).with_name("ray")
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
STORE = 100_000_000


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Nodes:
    """Nodes by the process that holds each; the first is the head."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="mr-", dir="/tmp"))  # sockets need short paths
        self.address = f"127.0.0.1:{free_port()}"
        self.environment = QUIET | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.held = []

    def add(self, cpus=2, store=STORE, environment=None, gpus=0, hidden=()):
        """One more node; waits until it is there. hidden: folders that are empty for it, as on another machine."""
        port = self.address.rpartition(":")[2]
        place = ["--address", self.address]
        if not self.held:
            place = ["--head", "--port", port, "--temp-dir", self.folder, "--include-dashboard=false"]
            place += ["--dashboard-agent-listen-port", free_port(), "--ray-client-server-port", free_port()]
        command = [RAY, "start", "--block", *place, "--num-cpus", cpus, "--num-gpus", gpus]
        command += ["--object-store-memory", store, "--disable-usage-stats"]
        if hidden:
            hide = f'for folder in {shlex.join(map(str, hidden))}; do mount -t tmpfs none "$folder"; done; exec "$@"'
            command = ["unshare", "-m" if os.geteuid() == 0 else "-Urm", "sh", "-c", hide, "sh", *command]
        log = self.folder / f"node{len(self.held)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*map(str, command)],
                env=os.environ | self.environment | (environment or {}),
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.held.append(process)
        waited = time.monotonic() + 60
        while "--block" not in log.read_text():  # the last lines that it writes once the node runs
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < waited, log.read_text()
            time.sleep(0.1)
        return process

    def workers(self, word="Worker"):
        """Processes that score now."""
        found = []
        for process in self.held:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        if any(part.startswith("ray::") and word in part for part in child.cmdline()[:1]):
                            found.append(child)
        return found

    def kill(self, process):
        """End a node at once, with all that runs on it."""
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.wait(30)

    def close(self):
        for process in reversed(self.held):
            if process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.kill(process)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(*sizes, **options):
    """A cluster of nodes with so many cores."""
    nodes = Nodes()
    try:
        for cpus in sizes:
            nodes.add(cpus, **options)
        yield nodes
    finally:
        nodes.close()
