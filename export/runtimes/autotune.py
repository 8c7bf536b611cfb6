"""Measure the fastest config of each member on this machine; answers lie in the user's cache, not in the bundle."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from ensemble.core import answer_cache, artifacts
from ensemble.core.errors import UnavailableError, join_limited
from ensemble.models.runner import Runner
from export.runtimes.capabilities import Machine
from export.runtimes.devices import version
from export.runtimes.settings import RUNTIMES, RuntimeConfig

CACHE_FILE = "runtimes.json"
FINALISTS, TIMING_ROUNDS = 3, 5
MIN_TIMING_SECONDS = 0.3  # of one timing


@dataclass(frozen=True)
class TuneRequest:
    """A member, the SHA-256 of its ONNX file, and the configs to choose from."""

    name: str
    sha256: str
    candidates: tuple[RuntimeConfig, ...]


OpenRunner = Callable[[TuneRequest, RuntimeConfig], Runner]


@dataclass(frozen=True)
class TimedConfig:
    """A config, and the seconds that it was measured to take for one view of an image."""

    config: RuntimeConfig
    seconds: float


def tune(jobs: Sequence[TuneRequest], machine: Machine, open_runner: OpenRunner) -> dict[str, TimedConfig]:
    """Each member's fastest config, measured now and put into the cache at once."""
    best = {}
    with tqdm(total=sum(len(job.candidates) for job in jobs), desc="tune", unit="setting", disable=None) as bar:
        for job in jobs:
            bar.set_postfix_str(job.name)
            seconds = measure(job, open_runner, bar.update)
            fastest = min(seconds, key=lambda config: seconds[config])
            best[job.name] = TimedConfig(fastest, seconds[fastest])
            answer = {"setting": asdict(fastest), "seconds": seconds[fastest]}
            answer_cache.put(CACHE_FILE, _key(job, machine), answer)
    return best


def measure(
    job: TuneRequest, open_runner: OpenRunner, progress: Callable[[int], object] = lambda count: None
) -> dict[RuntimeConfig, float]:
    """Seconds for one image of the fastest candidates: medians over rounds in which they take turns.

    Each candidate is timed once, and only the fastest FINALISTS stay loaded for the rounds.
    One that fails is left out. Raises UnavailableError if all do.
    """
    timers: dict[RuntimeConfig, Callable[[], float]] = {}
    seconds: dict[RuntimeConfig, list[float]] = {}
    problem = UnavailableError(f"{job.name}: there is no config to measure")
    for config in job.candidates:
        try:
            once = timer(open_runner(job, config), config)
            seconds[config], timers[config] = [once()], once
        except UnavailableError as error:
            problem = error
        for loser in sorted(timers, key=lambda each: seconds[each])[FINALISTS:]:
            del timers[loser]
        progress(1)
    for _ in range(TIMING_ROUNDS):
        for config in list(timers):
            try:
                seconds[config].append(timers[config]())
            except UnavailableError as error:
                problem = error
                del timers[config]
    if not timers:
        raise problem
    return {config: statistics.median(seconds[config][1:]) for config in timers}


def timer(runner: Runner, config: RuntimeConfig) -> Callable[[], float]:
    """A function that times a runner: seconds for one view. The runner is warmed up before."""
    size, count = runner.preprocess_config.size, config.batch * config.streams
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    runner.run(pixels)

    def once() -> float:
        started, count_done = time.perf_counter(), 0
        while True:
            runner.run(pixels)
            count_done += count
            if (passed := time.perf_counter() - started) >= MIN_TIMING_SECONDS:
                return passed / count_done

    return once


def cached_configs(jobs: Sequence[TuneRequest], machine: Machine) -> dict[str, TimedConfig]:
    """The fastest configs that were measured before on this machine for these files, by member."""
    configs = {}
    for job in jobs:
        answer = answer_cache.get(CACHE_FILE, _key(job, machine))
        for config in job.candidates:
            if isinstance(answer, dict) and answer.get("setting") == asdict(config):
                configs[job.name] = TimedConfig(config, float(answer["seconds"]))
    return configs


def seconds_per_image(runner: Runner, config: RuntimeConfig, sha256: str, machine: Machine) -> float:
    """Seconds for one image of an open member, whose file has this hash: measured once on this machine, then cached.

    The same number in later runs gives the same cascade, and so the same scores.
    """
    key = artifacts.json_sha256(["seconds", _key(TuneRequest(runner.name, sha256, (config,)), machine)])
    value = answer_cache.get(CACHE_FILE, key)
    if not isinstance(value, float):
        once = timer(runner, config)
        value = statistics.median(once() for _ in range(TIMING_ROUNDS))
        answer_cache.put(CACHE_FILE, key, value)
    return value * runner.preprocess_config.count


def describe_configs(configs: Mapping[str, RuntimeConfig]) -> str:
    """Configs and the members that have them, in one line of text."""
    members: dict[RuntimeConfig, list[str]] = {}
    for name, config in configs.items():
        members.setdefault(config, []).append(name)
    return "; ".join(
        f"{config}, batch {config.batch}, {config.streams} stream{'s' * (config.streams > 1)} ({join_limited(names)})"
        for config, names in members.items()
    )


def _key(job: TuneRequest, machine: Machine) -> str:
    """Hash of all that an answer depends on: machine, library versions, file and candidates."""
    libraries = [version(runtime) for runtime in RUNTIMES if runtime != "torch"]
    choices = [asdict(config) for config in job.candidates]
    return artifacts.json_sha256([machine.cpu, machine.cores, machine.gpu, libraries, job.sha256, choices])
