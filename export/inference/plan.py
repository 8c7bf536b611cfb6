"""What a bundle's members will be run by: chosen, or as measured, before any of them is opened."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ensemble.core.errors import UnavailableError, join_limited
from ensemble.core.log import Log
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.models import external
from ensemble.models.runner import Runner
from ensemble.stacking.cascade import Cascade
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle, operating_point
from export.bundle.operating_point import OperatingPoint
from export.runtimes import autotune, runner, runtime_selection
from export.runtimes.capabilities import Machine, available
from export.runtimes.onnx_session import engine_is_built
from export.runtimes.settings import ON_GPU, PRECISIONS, RuntimeConfig, RuntimeOptions

Entries = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Planned:
    """A member, the file that is run, its hash, and how; gflop of one view, 0 if it was not counted."""

    name: str
    path: Path
    sha256: str
    preprocess_config: PreprocessConfig
    gflop: float
    setting: RuntimeConfig


@dataclass(frozen=True)
class Plan:
    """What a bundle runs: a stacker, its members in that order but for those that are looked up, perhaps a cascade."""

    stacker: Stacker
    members: tuple[Planned, ...]
    cascade: Cascade | None


def plan_bundle(folder: Path, wanted: RuntimeOptions, log: Log, machine: Machine | None = None) -> Plan:
    """What a bundle runs: what frontier chose for it, unless `wanted.full`, else all; every file is checked.

    `log` is told what was chosen and why. What was measured before is used; with `wanted.tune` the
    rest is measured first. machine: what this one has, if not all of it may be used.
    """
    values = bundle.open_bundle(folder)
    point = None if wanted.full else operating_point.read(folder, values)
    machine = machine or available()
    stacker, allowed, cascade = bundle.stacker_of(folder), bundle.may_run(values), None
    if point:
        log(operating_point.told(point, len(stacker.members)))
        stacker, cascade = point.stacker, point.cascade
    # what has no entry was trained elsewhere: its scores are looked up
    entries = {name: values["members"][name] for name in stacker.members if not external.is_external(folder, name)}
    if point:
        wanted, allowed = _as_chosen(point, values, entries, wanted, machine, log)
    settings, lines = runtime_selection.choose(entries, allowed, wanted, machine)
    for line in lines:
        log(line)
    plan = partial(_planned, folder, values)
    every = runtime_selection.choices(entries, allowed, wanted, machine)
    if point and every[-1] != settings:  # ONNX Runtime's int8, which is not taken unasked
        settings, every = every[-1], every[-1:]
        log(f"as frontier chose: {autotune.told(settings)}")
    measured = [_tuned(values["files"], entries, one, wanted, machine, partial(_open, plan, log)) for one in every]
    known = _fastest(measured, entries)
    if known:
        log(f"as tuned: {autotune.told(known)}")
    return Plan(stacker, tuple(plan(name, setting) for name, setting in (settings | known).items()), cascade)


def _as_chosen(
    point: OperatingPoint,
    values: Mapping[str, Any],
    entries: Entries,
    wanted: RuntimeOptions,
    machine: Machine,
    log: Log,
) -> tuple[RuntimeOptions, dict[tuple[str, str], frozenset[str]]]:
    """What is wanted of a point's members, and what they may run at; UnavailableError for what they cannot do.

    A certificate for the bundle would not be one for the point's stack: what has none runs at fp32.
    """
    if wanted.cascade is not None and len(point.stacker.members) < 2:
        raise UnavailableError(
            f"--cascade needs two members or more, and frontier chose {point.stacker.members[0]} alone for this "
            "bundle: add --full for a cascade of all members"
        )
    if (
        wanted.runtime == "auto"
        and _fits(point.runtime, wanted.device)
        and (point.runtime, "fp32") not in machine.unsupported
    ):
        wanted = replace(wanted, runtime=point.runtime)
    settings, _ = runtime_selection.choose(entries, {}, replace(wanted, precision="fp32"), machine)
    runtime = next((setting.runtime for setting in settings.values()), "")
    lower = {(runtime, precision) for precision in PRECISIONS if wanted.precision in ("auto", precision)}
    allowed = operating_point.allowed(point, values, lower - set(machine.unsupported), log)
    if wanted.precision == "auto" and not allowed:
        return replace(wanted, precision="fp32"), allowed
    missing = set(entries) - allowed.get((runtime, wanted.precision), frozenset())
    if missing and wanted.precision not in ("auto", "fp32") and (runtime, wanted.precision) not in machine.unsupported:
        raise UnavailableError(
            f"{join_limited(sorted(missing))} may not run at {runtime} {wanted.precision} in the stack that "
            "frontier chose: "
            f"add --full to run all members, or {operating_point.AGAIN}"
        )
    return wanted, allowed


def _fits(runtime: str, device: str) -> bool:
    return "auto" in (runtime, device) or (device == "cuda") == (runtime in ON_GPU)


def _tuned(
    files: Mapping[str, str],
    entries: Entries,
    settings: Mapping[str, RuntimeConfig],
    wanted: RuntimeOptions,
    machine: Machine,
    opened: Callable[[autotune.Job, RuntimeConfig], Runner],
) -> dict[str, autotune.Timed]:
    """The members' fastest settings where `settings` were chosen, measured now or before."""
    jobs = [
        autotune.Job(
            name,
            files[bundle.member_file(entry, settings[name])],
            tuple(runtime_selection.candidates(settings[name], wanted, machine)),
        )
        for name, entry in entries.items()
    ]
    known = autotune.recall(jobs, machine)
    unknown = [job for job in jobs if job.name not in known]
    if wanted.tune and unknown:  # measured anew, another setting might win, and what it scored would not count
        known |= autotune.tune(unknown, machine, opened)
    return known


def _fastest(measured: Sequence[Mapping[str, autotune.Timed]], entries: Entries) -> dict[str, RuntimeConfig]:
    """Of those that were measured for every member, the one by which an image takes least; else the first."""
    views = {name: PreprocessConfig.from_dict(entry["contract"]).count for name, entry in entries.items()}
    whole = [known for known in measured if len(known) == len(entries)]
    best = min(
        whole,
        key=lambda known: sum(views[name] * timed.seconds for name, timed in known.items()),
        default=measured[0],
    )
    return {name: timed.setting for name, timed in best.items()}


def _open(plan: Callable[[str, RuntimeConfig], Planned], log: Log, job: autotune.Job, setting: RuntimeConfig) -> Runner:
    return open_member(plan(job.name, setting), log)


def open_member(member: Planned, log: Log) -> Runner:
    """Ready to run; `log` is told before minutes pass."""
    if member.setting.runtime == "tensorrt" and not engine_is_built(member.path, member.setting):
        log(f"{member.name}: building its TensorRT engine, once for this GPU; that takes minutes")
    return runner.open_runner(member.name, member.path, member.preprocess_config, member.setting)


def device_of(plan: Iterable[Planned]) -> str:
    """Where a plan's members run: cuda or cpu."""
    return "cuda" if any(member.setting.runtime in ON_GPU for member in plan) else "cpu"


def _planned(folder: Path, values: Mapping[str, Any], name: str, setting: RuntimeConfig) -> Planned:
    entry = values["members"][name]
    file = bundle.member_file(entry, setting)
    preprocess_config = PreprocessConfig.from_dict(entry["contract"])
    return Planned(name, folder / file, values["files"][file], preprocess_config, float(entry.get("gflop", 0)), setting)
