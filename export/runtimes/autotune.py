"""Measure which setting is fastest for each member on this machine, and remember it outside the bundle."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, UnavailableError, join_limited
from ensemble.models.runner import Runner
from export.runtimes.capabilities import Machine
from export.runtimes.devices import version
from export.runtimes.settings import RUNTIMES, RuntimeConfig

FINALISTS, ROUNDS = 3, 5
SECONDS = 0.3  # that one timing takes at least

Clock = Callable[[], float]


@dataclass(frozen=True)
class Job:
    """A member, the hash of its file, and the settings to choose from."""

    name: str
    sha256: str
    candidates: tuple[RuntimeConfig, ...]


@dataclass(frozen=True)
class Timed:
    """A setting, and the seconds a view that it was measured to take."""

    setting: RuntimeConfig
    seconds: float


def tune(
    jobs: Sequence[Job],
    machine: Machine,
    opened: Callable[[Job, RuntimeConfig], Runner],
    clock: Clock = time.perf_counter,
) -> dict[str, Timed]:
    """Each member's fastest setting, measured now and remembered at once."""
    best = {}
    with tqdm(total=sum(len(job.candidates) for job in jobs), desc="tune", unit="setting", disable=None) as bar:
        for job in jobs:
            bar.set_postfix_str(job.name)
            seconds = measure(job, opened, clock, bar.update)
            fastest = min(seconds, key=lambda setting: seconds[setting])
            best[job.name] = Timed(fastest, seconds[fastest])
            _remember(_key(job, machine), asdict(best[job.name]))
    return best


def measure(
    job: Job,
    opened: Callable[[Job, RuntimeConfig], Runner],
    clock: Clock = time.perf_counter,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[RuntimeConfig, float]:
    """Seconds an image of the fastest candidates, the median of rounds in which they take turns.

    Each candidate is timed once, and only the fastest FINALISTS stay loaded for the rounds.
    One that fails is left out. Raises UnavailableError if all do.
    """
    first: dict[RuntimeConfig, float] = {}
    timers: dict[RuntimeConfig, Callable[[], float]] = {}
    problem = UnavailableError(f"{job.name}: there is no setting to measure")
    for setting in job.candidates:
        try:
            once = timer(opened(job, setting), setting, clock)
            first[setting], timers[setting] = once(), once
        except UnavailableError as error:
            problem = error
        for loser in sorted(timers, key=lambda each: first[each])[FINALISTS:]:
            del timers[loser]
        progress(1)
    rounds: dict[RuntimeConfig, list[float]] = {setting: [] for setting in timers}
    for _ in range(ROUNDS):
        for setting in list(timers):
            try:
                rounds[setting].append(timers[setting]())
            except UnavailableError as error:
                problem = error
                del timers[setting]
    if not timers:
        raise problem
    return {setting: statistics.median(rounds[setting]) for setting in timers}


def timer(runner: Runner, setting: RuntimeConfig, clock: Clock = time.perf_counter) -> Callable[[], float]:
    """Seconds a view of one timing; the runner has run before, so that nothing is set up in it."""
    size, count = runner.preprocess_config.size, setting.batch * setting.streams
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    runner.run(pixels)

    def once() -> float:
        started, done = clock(), 0
        while True:
            runner.run(pixels)
            done += count
            if (passed := clock() - started) >= SECONDS:
                return passed / done

    return once


def recall(jobs: Sequence[Job], machine: Machine) -> dict[str, Timed]:
    """What was measured before on this machine for these files to be the fastest, by member."""
    kept = _read()
    found = {}
    for job in jobs:
        values = kept.get(_key(job, machine))
        for setting in job.candidates:
            if isinstance(values, dict) and values.get("setting") == asdict(setting):
                found[job.name] = Timed(setting, float(values["seconds"]))
    return found


def image_seconds(
    runner: Runner, setting: RuntimeConfig, sha256: str, machine: Machine, clock: Clock = time.perf_counter
) -> float:
    """Seconds an image of an open member, whose file has this hash: measured once on this machine, then recalled.

    The same number later means the same cascade, and so the same scores.
    """
    key = artifacts.json_sha256(["seconds", _key(Job(runner.name, sha256, (setting,)), machine)])
    value = _read().get(key)
    if not isinstance(value, float):
        once = timer(runner, setting, clock)
        value = statistics.median(once() for _ in range(ROUNDS))
        _remember(key, value)
    return value * runner.preprocess_config.count


def told(settings: Mapping[str, RuntimeConfig]) -> str:
    """Settings and the members that have them, in words."""
    members: dict[RuntimeConfig, list[str]] = {}
    for name, setting in settings.items():
        members.setdefault(setting, []).append(name)
    return "; ".join(
        f"{setting}, batch {setting.batch}, {setting.streams} stream{'s' * (setting.streams > 1)} "
        f"({join_limited(names)})"
        for setting, names in members.items()
    )


def _key(job: Job, machine: Machine) -> str:
    """What an answer holds for: the machine, its libraries, the file, and what there was to choose from."""
    libraries = [version(runtime) for runtime in RUNTIMES if runtime != "torch"]
    choices = [asdict(setting) for setting in job.candidates]
    return artifacts.json_sha256([machine.cpu, machine.cores, machine.gpu, libraries, job.sha256, choices])


def _read() -> dict[str, object]:
    with suppress(ArtifactError):  # a lost or damaged cache costs a new measurement
        return artifacts.read_json(artifacts.cache_path() / "runtimes.json", "")
    return {}


def _remember(key: str, value: object) -> None:
    with suppress(ArtifactError):
        artifacts.write_json(artifacts.cache_path() / "runtimes.json", {**_read(), key: value})
