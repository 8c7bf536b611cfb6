"""Which runtime and precision run each member on this machine, and why."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ensemble.core.errors import UnavailableError, join_limited
from export.runtimes.capabilities import Machine
from export.runtimes.settings import ON_CPU, ON_GPU, PRECISIONS, RuntimeConfig, RuntimeOptions

# The first that may run. ONNX Runtime's int8 is slower than its fp32 for convolutions, so only tuning takes it.
LOWER = {
    "openvino": ("bf16", "fp16", "int8"),
    "cuda": ("fp16",),
    "tensorrt": ("fp16", "bf16", "int8"),
}
CERTIFY = "python cli.py export --certify-on DATA"
QUANTIZE = "python cli.py export --int8"
# TensorRT builds an engine for each, in minutes
BATCHES = {"openvino": (1, 4, 8, 16), "onnxruntime": (1, 8, 16), "cuda": (16, 64, 128), "tensorrt": (64,)}
# A large member fills all cores; small ones do better side by side, each on its share of them.
LARGE_GFLOP, MOST_STREAMS = 50, 4

Allowed = Mapping[tuple[str, str], frozenset[str]]  # members, by (runtime, precision) below fp32


def choose(
    entries: Mapping[str, Mapping[str, Any]], allowed: Allowed, wanted: RuntimeOptions, machine: Machine
) -> tuple[dict[str, RuntimeConfig], list[str]]:
    """A setting for each member of a bundle, and lines that say what was chosen and why.

    entries: of bundle.json. allowed: as `bundle.may_run` says. Raises UnavailableError, saying
    what to do, for what was asked for and is not here, or is not certified.
    """
    runtime, why = _runtime(wanted, machine)
    precisions, more = _precisions(runtime, list(entries), allowed, wanted, machine)
    settings = {
        name: _start(RuntimeConfig(runtime, precisions[name]), float(entry.get("gflop", 0)), machine)
        for name, entry in entries.items()
    }
    if wanted.batch:
        settings = {name: replace(setting, batch=wanted.batch) for name, setting in settings.items()}
    used = list(dict.fromkeys(precisions.values()))
    head = f"{runtime} {' and '.join(used)} on {machine.where(runtime)}"
    reasons = [reason for reason in (why, more) if reason]
    lines = [f"{head}: {'; '.join(reasons)}" if reasons else head]
    if len(used) > 1:
        lines.append(
            f"fp32, for want of a certificate: {join_limited(n for n, p in precisions.items() if p == 'fp32')}"
        )
    return settings, lines


def _runtime(wanted: RuntimeOptions, machine: Machine) -> tuple[str, str]:
    """The runtime, and why it and not a faster one."""
    if wanted.runtime == "torch":
        raise UnavailableError(
            "--runtime torch runs a run's own members, not a bundle; leave out --onnx or --bundle, "
            "or choose another --runtime"
        )
    if wanted.runtime != "auto":
        if reason := machine.unsupported.get((wanted.runtime, "fp32")):
            raise UnavailableError(f"{wanted.runtime} cannot run here: {reason}")
        return wanted.runtime, "as asked"
    on_gpu = wanted.device == "cuda" or (machine.gpu != "" and wanted.device == "auto")
    kinds = ON_GPU[::-1] if on_gpu else ON_CPU[::-1]
    lacks = {kind: machine.unsupported.get((kind, "fp32"), "") for kind in kinds}
    found = next((kind for kind in kinds if not lacks[kind]), None)
    if found is None:
        raise UnavailableError(f"{kinds[-1]} cannot run here: {lacks[kinds[-1]]}")
    return found, lacks[kinds[0]].partition(";")[0]


def _precisions(
    runtime: str, names: list[str], allowed: Allowed, wanted: RuntimeOptions, machine: Machine
) -> tuple[dict[str, str], str]:
    """Each member's precision, and what should be said of it."""
    if wanted.precision == "fp32":
        return dict.fromkeys(names, "fp32"), ""
    if wanted.precision != "auto":
        _check_precision(runtime, names, allowed, wanted.precision, machine)
        return dict.fromkeys(names, wanted.precision), ""
    able = [lower for lower in LOWER.get(runtime, ()) if (runtime, lower) not in machine.unsupported]
    if not able:
        first = LOWER.get(runtime, ("",))[0]
        return dict.fromkeys(names, "fp32"), machine.unsupported.get((runtime, first), "").partition(";")[0]
    # the precision that most members may have, so that one certificate covers the stack
    lower = max(able, key=lambda each: len(allowed.get((runtime, each), frozenset()) & set(names)))
    may = allowed.get((runtime, lower), frozenset())
    if not may & set(names):
        where = "GPU" if runtime in ON_GPU else "CPU"
        return dict.fromkeys(names, "fp32"), (
            f"this {where} also computes in {able[0]}, which is faster, but the bundle has no certificate "
            f"for it; get one: {_remedy(able[0])}"
        )
    return {name: lower if name in may else "fp32" for name in names}, "certified"


def _check_precision(runtime: str, names: list[str], allowed: Allowed, precision: str, machine: Machine) -> None:
    if reason := machine.unsupported.get((runtime, precision)):
        raise UnavailableError(f"{runtime} cannot run {precision} here: {reason}")
    if missing := sorted(set(names) - allowed.get((runtime, precision), frozenset())):
        raise UnavailableError(
            f"{join_limited(missing)} may not run at {runtime} {precision}: the bundle has no certificate for it; "
            f"get one: {_remedy(precision)}, or take the risk: "
            f"python cli.py export {'--int8 ' if precision == 'int8' else ''}--uncertified"
        )


def _remedy(precision: str) -> str:
    return QUANTIZE if precision == "int8" else CERTIFY


def _start(setting: RuntimeConfig, gflop: float, machine: Machine) -> RuntimeConfig:
    """What suits most members of that size, before anything is measured."""
    if setting.runtime in ON_GPU:
        return replace(setting, batch=64)
    if setting.runtime == "openvino" and gflop < LARGE_GFLOP:
        return replace(setting, batch=4, streams=min(machine.cores, MOST_STREAMS), threads=machine.cores)
    return replace(setting, batch=8, threads=machine.cores)


def choices(
    entries: Mapping[str, Mapping[str, Any]], allowed: Allowed, wanted: RuntimeOptions, machine: Machine
) -> list[dict[str, RuntimeConfig]]:
    """What the bundle's members may run at together: what `choose` says, then each other certified precision.

    On a GPU there are no others, since TensorRT would build engines for minutes to have them measured.
    """
    first, _ = choose(entries, allowed, wanted, machine)
    used = {setting.precision for setting in first.values()}
    runtime = next((setting.runtime for setting in first.values()), "")
    others = [
        precision
        for precision in (PRECISIONS[1:] if wanted.precision == "auto" and runtime in ON_CPU else ())
        if precision not in used and (runtime, precision) not in machine.unsupported
        if allowed.get((runtime, precision), frozenset()) & set(entries)
    ]
    lower = [
        {
            name: replace(setting, precision=other)
            if name in allowed[runtime, other]
            else replace(setting, precision="fp32")
            for name, setting in first.items()
        }
        for other in others
    ]
    return [first, *lower]


def candidates(chosen: RuntimeConfig, wanted: RuntimeOptions, machine: Machine) -> list[RuntimeConfig]:
    """Settings worth measuring for a member: fp32 in every runtime that was asked for, and the pair of `chosen`.

    Below fp32 only what `choose` settled for the bundle: a certificate holds for a stack whose members all run at
    one runtime and precision. fp32, what it is compared with, is always allowed.
    """
    on_gpu = chosen.runtime in ON_GPU
    runtimes = [wanted.runtime] if wanted.runtime != "auto" else (ON_GPU if on_gpu else ON_CPU)[::-1]
    pairs = [
        (runtime, precision)
        for runtime in runtimes
        for precision in PRECISIONS
        if (runtime, precision) not in machine.unsupported
        and wanted.precision in ("auto", precision)
        and (precision == "fp32" or (runtime, precision) == (chosen.runtime, chosen.precision))
    ]
    threads = 0 if on_gpu else machine.cores
    streams = {"openvino": sorted({1, min(machine.cores, MOST_STREAMS)})}
    return [
        RuntimeConfig(runtime, precision, batch, count, threads)
        for runtime, precision in pairs
        for batch in ([wanted.batch] if wanted.batch else BATCHES[runtime])
        for count in streams.get(runtime, [1])
    ]
