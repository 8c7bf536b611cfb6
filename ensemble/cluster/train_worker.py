"""What a node of a cluster does for one member: see that all is there, and train it in a process of its own.

In its own, so that a crash or a lack of memory ends that process and not Ray's. It ends when Ray's
worker does, since it watches a pipe from it: a task whose driver or node is lost trains on for no one.
"""

import _thread
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ensemble.cluster import connect, events, nodes
from ensemble.core import artifacts
from ensemble.core.errors import ManyeyesError, TrainingError, UnavailableError

# whose versions decide what comes of a training: what computes, decodes, draws, fits probes and adapters
COMPARED_PACKAGES = ("Python", "torch", "transformers", "timm", "Pillow", "numpy", "scikit-learn", "accelerate", "peft")
MAX_TRIES = 4  # of a member whose process, worker or node is lost
FILE_VISIBLE_SECONDS = 15.0  # seconds until a file that was just written shows on other machines
CLOSE_SECONDS = 10.0  # seconds for a training that is told to end to close its trackers and processes
KILL_SECONDS = 20.0  # seconds until it is killed
LOG_TAIL_BYTES = 4096  # bytes at the end of a log, where a process's last words are


class WorkerLostError(ManyeyesError):
    """The process that trained the member ended without a word: it is worth trying again."""


@dataclass(frozen=True)
class TrainRequest:
    """One member's training, JSON-ready.

    job: a word for the driver's command, which another one on the same run does not have. recipe: its values
    and name. data_sha256: of the run's dataset.parquet. versions: of PACKAGES and ours, on the driver's machine.
    folder: the driver's working directory, which relative names in a recipe start from. places: files and folders
    that the recipe names there, absolute. processes: of torchrun, one a GPU. The others: see `Setup`.
    """

    job: str
    recipe: dict[str, Any]
    run: str
    data_sha256: str
    versions: dict[str, str]
    folder: str
    places: tuple[str, ...]
    device: str
    processes: int
    cpus: int
    beside: int
    seed: int
    report_to: tuple[str, ...]
    save_minutes: float

    @property
    def name(self) -> str:
        """The member's."""
        return str(self.recipe["name"])

    @property
    def events(self) -> Path:
        """The file where what the member tells stands, for this job alone."""
        return artifacts.beside_work_path(Path(self.run), self.name, f"{self.job}.events")

    @classmethod
    def of(cls, text: str) -> "TrainRequest":
        """From its JSON."""
        values = json.loads(text)
        return cls(**values | {name: tuple(values[name]) for name in ("places", "report_to")})


def node_problem(run: Path, data_sha256: str, places: Sequence[str], patience: float = FILE_VISIBLE_SECONDS) -> str:
    """Why members of this run cannot be trained on this machine, as the rest of a line; empty if they can."""
    path, until = artifacts.dataset_path(run), time.monotonic() + patience
    while not (path.is_file() and artifacts.file_sha256(path) == data_sha256):
        if time.monotonic() >= until:
            seen = "has another" if path.is_file() else "does not see"
            return f"{seen} {path}; put --run, and the images, on storage that all nodes share at the same path"
        time.sleep(0.5)
    unseen = [place for place in places if not Path(place).exists()]
    if unseen:  # a checkpoint's folder would be taken for a name on the Hub
        return f"does not see {unseen[0]}; put checkpoints and weights on storage that all nodes share at the same path"
    return ""


def train(order: TrainRequest) -> dict[str, Any]:
    """The Outcome of this member's training, as a dict; Ray runs this on a worker.

    Raises UnavailableError where this node cannot, LostError where the process ended without an outcome, and
    TrainingError where that was once too often.
    """
    run = Path(order.run)
    node, number = _node()
    nodes.check_versions(node, order.versions, nodes.node_versions(COMPARED_PACKAGES))  # of one that joined later
    if why := node_problem(run, order.data_sha256, order.places):
        raise UnavailableError(f"{node} {why}")
    before = [event for event in events.read(order.events)[0] if event["what"] == "begin"]
    log = artifacts.beside_work_path(run, order.name, "log")
    if len(before) >= MAX_TRIES:
        raise TrainingError(
            f"its worker was lost {len(before)} times: fewer members at once (--cpus-per-member) need less memory"
        )
    spoken = log.stat().st_size if log.exists() else 0
    events.Events(order.events).tell("begin", node=node, node_id=number, attempt=len(before) + 1)
    code = _run(command(order), environment(order), Path(order.folder), log)
    told = events.read(order.events)[0]
    begun = max((place for place, event in enumerate(told) if event["what"] == "begin"), default=0)
    outcomes = [event["values"] for event in told[begun:] if event["what"] == "outcome"]
    if not outcomes:
        how = f"killed by signal {-code} (out of memory?)" if code < 0 else f"exit code {code}"
        lost = f"its process ended without a result on {node}: {how}{_log_tail(log, spoken)}"
        if len(before) + 1 >= MAX_TRIES:
            raise TrainingError(
                f"{lost}; tried {MAX_TRIES} times: fewer members at once (--cpus-per-member) need less memory"
            )
        raise WorkerLostError(lost)
    if outcomes[0]["status"] != "failed":
        log.unlink(missing_ok=True)
    return dict(outcomes[0])  # of several processes, the others only tell that one failed


def command(order: TrainRequest) -> list[str]:
    """The member's own process, or torchrun with one for each GPU."""
    entry = ["-m", "ensemble.cluster.train_process", json.dumps(asdict(order))]
    if order.processes == 1:
        return [sys.executable, *entry]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(order.processes)]
    return [sys.executable, *launcher, *entry]


def environment(order: TrainRequest) -> dict[str, str]:
    """What the process inherits: Ray has chosen the GPUs; threads are the CPUs that were asked for."""
    here = str(Path(__file__).resolve().parents[2])
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    threads = max(order.cpus // order.processes, 1)
    safe = {"PYTHONSAFEPATH": "1"}  # nothing is imported from the working directory
    return {**os.environ, **safe, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}


def end_with_input() -> None:
    """From now on, the end of standard input interrupts this process: whoever ordered its work is gone."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    while os.read(0, 4096):
        pass
    _thread.interrupt_main()
    time.sleep(CLOSE_SECONDS)
    os._exit(130)


def _run(command: list[str], environment: dict[str, str], folder: Path, log: Path) -> int:
    """The exit code of the command, whose words go to `log`; it ends with this process, or if this is interrupted."""
    with log.open("ab") as words:
        process = subprocess.Popen(  # noqa: S603 our own module
            command,
            stdin=subprocess.PIPE,
            stdout=words,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder if folder.is_dir() else None,
            start_new_session=True,
        )
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(0.5)  # in turns: Ray interrupts between them
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Close the pipe, which tells the training to end, and see that it does."""
    if process.stdin is not None:
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _node() -> tuple[str, str]:
    """This machine's name, and Ray's id of it."""
    import ray

    return connect.this_node(), str(ray.get_runtime_context().get_node_id())


def _log_tail(log: Path, start: int) -> str:
    """The end of what stands in the log from byte `start` on, for a message."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return f"; it last said: {lines[-1].strip()[:200]} (more in {log})" if lines else ""
