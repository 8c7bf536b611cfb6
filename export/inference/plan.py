"""Plan what runs a bundle's members, before any of them is opened: the runtime, precision and batch of each.

The choice is by rule, by what was measured before, or by the operating point that `frontier` chose for the bundle.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensemble.cascade.cascade import Cascade
from ensemble.core.errors import UnavailableError, join_limited
from ensemble.core.log import Log
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.models import external
from ensemble.models.runner import Runner
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle, operating_point
from export.bundle.operating_point import OperatingPoint
from export.runtimes import autotune, runner, runtime_selection
from export.runtimes.capabilities import Machine, available
from export.runtimes.onnx_session import engine_is_built
from export.runtimes.settings import ON_GPU, PRECISIONS, RuntimeConfig, RuntimeOptions

Entries = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class PlannedMember:
    """A member, the file that is run and its hash, and the setting; gflop of one view, 0 if it was not counted."""

    name: str
    path: Path
    sha256: str
    preprocess_config: PreprocessConfig
    gflop: float
    setting: RuntimeConfig


@dataclass(frozen=True)
class Plan:
    """What a bundle runs: its stacker, the members that run, in the stacker's order, and a cascade if one was chosen.

    Members of the stacker that are looked up by id are not among `members`.
    """

    stacker: Stacker
    members: tuple[PlannedMember, ...]
    cascade: Cascade | None


def plan_bundle(
    folder: Path,
    options: RuntimeOptions,
    log: Log,
    machine: Machine | None = None,
    listed: Mapping[str, Any] | None = None,
) -> Plan:
    """What a bundle runs: the members that frontier chose for it, or with `options.full` all.

    `log` gets lines on what was chosen and why. Settings that were measured before are used; with `options.tune` the
    others are measured first. machine: what may be used, if not all of this machine. listed: of `open_bundle`, if
    the bundle was opened already; by default it is opened, which checks every file.
    """
    values = listed or bundle.open_bundle(folder)
    machine = machine or available()
    point = None if options.full else operating_point.read(folder, values)
    stacker, allowed, cascade = bundle.bundle_stacker(folder), bundle.certified_precisions(values), None
    if point:
        log(operating_point.describe(point, len(stacker.members)))
        stacker, cascade = point.stacker, point.cascade
    # a member without an entry was trained elsewhere: its scores are looked up
    entries = {name: values["members"][name] for name in stacker.members if not external.is_external(folder, name)}
    if point:
        options, allowed = _options_at(point, values, entries, options, machine, log)
    settings, lines = runtime_selection.choose_configs(entries, allowed, options, machine)
    for line in lines:
        log(line)
    candidates = runtime_selection.certified_alternatives(entries, allowed, options, machine)
    if point and candidates[-1] != settings:  # ONNX Runtime's int8, which is not taken unasked
        settings, candidates = candidates[-1], candidates[-1:]
        log(f"as frontier chose: {autotune.describe_configs(settings)}")

    def plan_member(name: str, setting: RuntimeConfig) -> PlannedMember:
        entry = values["members"][name]
        file = bundle.model_file(entry, setting)
        config, gflop = PreprocessConfig.from_dict(entry["contract"]), float(entry.get("gflop", 0))
        return PlannedMember(name, folder / file, values["files"][file], config, gflop, setting)

    def opened(job: autotune.TuneRequest, setting: RuntimeConfig) -> Runner:
        return open_member(plan_member(job.name, setting), log)

    measured = [_timed(values["files"], entries, each, options, machine, opened) for each in candidates]
    fastest = _fastest(measured, entries)
    if fastest:
        log(f"as tuned: {autotune.describe_configs(fastest)}")
    members = tuple(plan_member(name, setting) for name, setting in (settings | fastest).items())
    return Plan(stacker, members, cascade)


def _options_at(
    point: OperatingPoint,
    values: Mapping[str, Any],
    entries: Entries,
    options: RuntimeOptions,
    machine: Machine,
    log: Log,
) -> tuple[RuntimeOptions, dict[tuple[str, str], frozenset[str]]]:
    """The options for an operating point's members, and the precisions that are certified for its stack.

    UnavailableError for options that the point does not allow. The bundle's certificates are not certificates of the
    point's stack: a member without one of the point's own runs at fp32.
    """
    if options.cascade is not None and len(point.stacker.members) < 2:
        raise UnavailableError(
            f"--cascade needs two members or more, and frontier chose {point.stacker.members[0]} alone for this "
            "bundle: add --full for a cascade of all members"
        )
    same_device = "auto" in (point.runtime, options.device) or (options.device == "cuda") == (point.runtime in ON_GPU)
    if options.runtime == "auto" and same_device and (point.runtime, "fp32") not in machine.unsupported:
        options = replace(options, runtime=point.runtime)
    settings, _ = runtime_selection.choose_configs(entries, {}, replace(options, precision="fp32"), machine)
    runtime = next((setting.runtime for setting in settings.values()), "")
    lower = {(runtime, precision) for precision in PRECISIONS if options.precision in ("auto", precision)}
    allowed = operating_point.certified_precisions(point, values, lower - set(machine.unsupported), log)
    if options.precision == "auto" and not allowed:
        return replace(options, precision="fp32"), allowed
    key = (runtime, options.precision)
    uncertified = set(entries) - allowed.get(key, frozenset())
    if uncertified and options.precision not in ("auto", "fp32") and key not in machine.unsupported:
        raise UnavailableError(
            f"{join_limited(sorted(uncertified))} may not run at {runtime} {options.precision} in the stack that "
            f"frontier chose: add --full to run all members, or {operating_point.RECHOOSE_HINT}"
        )
    return options, allowed


def _timed(
    files: Mapping[str, str],
    entries: Entries,
    settings: Mapping[str, RuntimeConfig],
    options: RuntimeOptions,
    machine: Machine,
    opened: autotune.OpenRunner,
) -> dict[str, autotune.TimedConfig]:
    """The members' fastest variants of `settings`, with `options.tune` measured now, or else measured before."""
    jobs = [
        autotune.TuneRequest(
            name,
            files[bundle.model_file(entry, settings[name])],
            tuple(runtime_selection.tuning_candidates(settings[name], options, machine)),
        )
        for name, entry in entries.items()
    ]
    timed = autotune.cached_configs(jobs, machine)
    unknown = [job for job in jobs if job.name not in timed]
    if options.tune and unknown:  # measured again, another setting might win, and what was scored would not count
        timed |= autotune.tune(unknown, machine, opened)
    return timed


def _fastest(measured: Sequence[Mapping[str, autotune.TimedConfig]], entries: Entries) -> dict[str, RuntimeConfig]:
    """The settings by which an image takes least time, of those measured for every member; by default the first."""
    views = {name: PreprocessConfig.from_dict(entry["contract"]).count for name, entry in entries.items()}
    complete = [timed for timed in measured if len(timed) == len(entries)]
    best = min(
        complete,
        key=lambda timed: sum(views[name] * each.seconds for name, each in timed.items()),
        default=measured[0],
    )
    return {name: each.config for name, each in best.items()}


def open_member(member: PlannedMember, log: Log) -> Runner:
    """The member, ready to run. `log` gets a line before TensorRT builds an engine, which takes minutes."""
    if member.setting.runtime == "tensorrt" and not engine_is_built(member.path, member.setting):
        log(f"{member.name}: building its TensorRT engine, once for this GPU; that takes minutes")
    return runner.open_runner(member.name, member.path, member.preprocess_config, member.setting)


def device_of(members: Iterable[PlannedMember]) -> str:
    """Where the members run: cuda or cpu."""
    return "cuda" if any(member.setting.runtime in ON_GPU for member in members) else "cpu"
