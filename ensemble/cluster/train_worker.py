"""Trains one member on a node of a cluster: checks that all is there, and starts a process for it.

In a process of its own, a crash or a lack of memory ends that process and not Ray's. It ends when Ray's worker does,
since it watches a pipe from it: no process is left when a task's driver or node is lost.
"""

import _thread
import json
import os
import re
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

from ensemble.cluster import connect, nodes
from ensemble.core import artifacts
from ensemble.core.errors import ManyeyesError, TrainingError, UnavailableError

# whose versions decide the result of a training: what computes, decodes, draws, fits probes and adapters
COMPARED_PACKAGES = ("Python", "torch", "transformers", "timm", "Pillow", "numpy", "scikit-learn", "accelerate", "peft")
MAX_TRIES = 4  # of a member whose process, worker or node is lost
FILE_VISIBLE_SECONDS = 15.0  # until a file that was just written is seen by other machines
CLOSE_SECONDS = 10.0  # for a training that must end to close its trackers and processes
KILL_SECONDS = 20.0  # until it is killed
LOG_TAIL_BYTES = 4096  # at the end of a process's output: its last line is in there
TASK_LOG = "progress"  # suffix of a task's log in the run's work folder
START_LINE = re.compile(r"== try (?P<attempt>\d+) on (?P<node>.+), node (?P<id>\w+) ==")  # of each try, in the log


class WorkerLostError(ManyeyesError):
    """The process that trained the member ended without a result: it is worth trying again."""


@dataclass(frozen=True)
class TrainRequest:
    """One member's training, JSON-ready.

    job: a random name of the driver's command; another command on the same run has another. recipe: its values and
    name. data_sha256: of the run's dataset.parquet. versions: of COMPARED_PACKAGES and ours, on the driver's machine.
    folder: the driver's working directory, which relative names in a recipe start from. local_paths: files and
    folders that the recipe names there, absolute. processes: of torchrun, one a GPU. The others: see `TrainContext`.
    """

    job: str
    recipe: dict[str, Any]
    run: str
    data_sha256: str
    versions: dict[str, str]
    folder: str
    local_paths: tuple[str, ...]
    device: str
    processes: int
    cpus: int
    parallel_members: int
    seed: int
    report_to: tuple[str, ...]
    save_minutes: float

    @property
    def name(self) -> str:
        """The member's name."""
        return str(self.recipe["name"])

    @property
    def log_path(self) -> Path:
        """The text file of what the user is told of this member, for this job alone; the driver prints it."""
        return artifacts.beside_work_path(Path(self.run), self.name, f"{self.job}.{TASK_LOG}")

    @property
    def outcome_path(self) -> Path:
        """Where the process that trains the member leaves its `Outcome`."""
        return artifacts.beside_work_path(Path(self.run), self.name, f"{self.job}.json")

    @classmethod
    def from_json(cls, text: str) -> "TrainRequest":
        """The request that `json.dumps(asdict(request))` wrote."""
        values = json.loads(text)
        return cls(**values | {name: tuple(values[name]) for name in ("local_paths", "report_to")})


def append_line(path: Path, line: str) -> None:
    """Add a line to a task's log."""
    artifacts.ensure_folder(path.parent)
    # opened for each line: network file systems show a file's new end to others when it is closed
    with path.open("a", encoding="utf-8") as file:
        file.write(" ".join(line.splitlines()) + "\n")


def read_lines(path: Path, offset: int = 0) -> tuple[list[str], int]:
    """The whole lines of a task's log from byte `offset` on, and where they end; none where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            text = file.read()
    except OSError:  # the task has not begun, or the file is not seen from here yet
        return [], offset
    whole = text[: text.rfind(b"\n") + 1]
    return whole.decode("utf-8", "replace").split("\n")[:-1], offset + len(whole)


def node_problem(
    run: Path, data_sha256: str, local_paths: Sequence[str], wait_seconds: float = FILE_VISIBLE_SECONDS
) -> str:
    """Why members of this run cannot be trained on this machine, as the rest of a line; empty if they can."""
    path, until = artifacts.dataset_path(run), time.monotonic() + wait_seconds
    while not (path.is_file() and artifacts.file_sha256(path) == data_sha256):
        if time.monotonic() >= until:
            seen = "has another" if path.is_file() else "does not see"
            return f"{seen} {path}; put --run, and the images, on storage that all nodes share at the same path"
        time.sleep(0.5)
    missing = [path for path in local_paths if not Path(path).exists()]
    if missing:  # a checkpoint's folder would be taken for a name on the Hub
        return (
            f"does not see {missing[0]}; put checkpoints and weights on storage that all nodes share at the same path"
        )
    return ""


def train(request: TrainRequest) -> dict[str, Any]:
    """The Outcome of this member's training, as a dict; Ray runs this on a worker.

    Raises UnavailableError where this node cannot train it, WorkerLostError where the process ended without an
    outcome, and TrainingError where that happened MAX_TRIES times.
    """
    run = Path(request.run)
    node, node_id = _node()
    nodes.check_versions(node, request.versions, nodes.node_versions(COMPARED_PACKAGES))  # of one that joined later
    if problem := node_problem(run, request.data_sha256, request.local_paths):
        raise UnavailableError(f"{node} {problem}")
    earlier = sum(START_LINE.fullmatch(line) is not None for line in read_lines(request.log_path)[0])
    remedy = "fewer members at once (--cpus-per-member) need less memory"
    if earlier >= MAX_TRIES:
        raise TrainingError(f"its worker was lost {earlier} times: {remedy}")
    output = artifacts.beside_work_path(run, request.name, "log")
    output_start = output.stat().st_size if output.exists() else 0
    append_line(request.log_path, f"== try {earlier + 1} on {node}, node {node_id} ==")
    request.outcome_path.unlink(missing_ok=True)
    code = _run(command(request), environment(request), Path(request.folder), output)
    if not request.outcome_path.exists():
        how = f"killed by signal {-code} (out of memory?)" if code < 0 else f"exit code {code}"
        lost = f"its process ended without a result on {node}: {how}{_log_tail(output, output_start)}"
        if earlier + 1 >= MAX_TRIES:
            raise TrainingError(f"{lost}; tried {MAX_TRIES} times: {remedy}")
        raise WorkerLostError(lost)
    outcome: dict[str, Any] = json.loads(request.outcome_path.read_text(encoding="utf-8"))
    request.outcome_path.unlink(missing_ok=True)
    if outcome["status"] != "failed":
        output.unlink(missing_ok=True)
    return outcome


def command(request: TrainRequest) -> list[str]:
    """The member's own process, or torchrun with one for each GPU."""
    entry = ["-m", "ensemble.cluster.train_process", json.dumps(asdict(request))]
    if request.processes == 1:
        return [sys.executable, *entry]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.processes)]
    return [sys.executable, *launcher, *entry]


def environment(request: TrainRequest) -> dict[str, str]:
    """The process's environment: Ray has chosen the GPUs; threads are the CPUs of the task."""
    here = str(Path(__file__).resolve().parents[2])
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    threads = max(request.cpus // request.processes, 1)
    safe = {"PYTHONSAFEPATH": "1"}  # nothing is imported from the working directory
    return {**os.environ, **safe, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}


def end_with_input() -> None:
    """From now on, the end of standard input interrupts this process: the worker that started it is gone."""

    def wait_for_end() -> None:
        while os.read(0, 4096):
            pass
        _thread.interrupt_main()
        time.sleep(CLOSE_SECONDS)
        os._exit(130)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
    threading.Thread(target=wait_for_end, daemon=True).start()


def _run(command: list[str], environment: dict[str, str], folder: Path, output: Path) -> int:
    """The exit code of the command; it ends with this process, or if this is interrupted. output: of the command."""
    with output.open("ab") as file:
        process = subprocess.Popen(  # noqa: S603 our own module
            command,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder if folder.is_dir() else None,
            start_new_session=True,
        )
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(0.5)  # in short waits: Ray interrupts between them
    finally:
        if process.stdin is not None:
            process.stdin.close()  # which makes the training end; it is killed if it does not
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
    """The last line of the file's bytes from `start` on, for a message."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return f"; it last said: {lines[-1].strip()[:200]} (more in {log})" if lines else ""
