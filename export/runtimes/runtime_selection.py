"""Choose the runtime, precision, batch and streams of each member on this machine, and say why."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ensemble.core.errors import UnavailableError, join_limited
from export.runtimes.capabilities import Machine
from export.runtimes.settings import ON_CPU, ON_GPU, PRECISIONS, RuntimeConfig, RuntimeOptions

# In order of preference. ONNX Runtime's int8 convolutions are slower than fp32, so only --tune chooses its int8.
LOWER_PRECISIONS = {
    "openvino": ("bf16", "fp16", "int8"),
    "cuda": ("fp16",),
    "tensorrt": ("fp16", "bf16", "int8"),
}
# Candidates for --tune. TensorRT builds an engine for each batch size, which takes minutes.
BATCHES = {"openvino": (1, 4, 8, 16), "onnxruntime": (1, 8, 16), "cuda": (16, 64, 128), "tensorrt": (64,)}
# A member from this size on uses all cores for one batch; smaller ones run batches in parallel streams.
LARGE_GFLOP, MAX_STREAMS = 50, 4

Allowed = Mapping[tuple[str, str], frozenset[str]]  # members, by (runtime, precision) below fp32


def choose_configs(
    entries: Mapping[str, Mapping[str, Any]], allowed: Allowed, options: RuntimeOptions, machine: Machine
) -> tuple[dict[str, RuntimeConfig], list[str]]:
    """The config of each member of a bundle, and lines of text that say what was chosen and why.

    entries: of bundle.json. allowed: as `bundle.certified_precisions` gives it. Raises UnavailableError, saying
    what to do, where the options ask for what this machine cannot run or what is not certified.
    """
    runtime, why = _runtime(options, machine)
    precisions, more = _precisions(runtime, list(entries), allowed, options, machine)
    configs = {
        name: _untuned_config(runtime, precisions[name], float(entry.get("gflop", 0)), options.batch, machine)
        for name, entry in entries.items()
    }
    used = list(dict.fromkeys(precisions.values()))
    head = f"{runtime} {' and '.join(used)} on {machine.where(runtime)}"
    reasons = [reason for reason in (why, more) if reason]
    lines = [f"{head}: {'; '.join(reasons)}" if reasons else head]
    if len(used) > 1:
        lines.append(
            f"fp32, for want of a certificate: {join_limited(n for n, p in precisions.items() if p == 'fp32')}"
        )
    return configs, lines


def _runtime(options: RuntimeOptions, machine: Machine) -> tuple[str, str]:
    """The runtime, and the reason why no faster one was chosen."""
    if options.runtime == "torch":
        raise UnavailableError(
            "--runtime torch runs a run's own members, not a bundle; leave out --onnx or --bundle, "
            "or choose another --runtime"
        )
    if options.runtime != "auto":
        if reason := machine.unsupported.get((options.runtime, "fp32")):
            raise UnavailableError(f"{options.runtime} cannot run here: {reason}")
        return options.runtime, "as chosen"
    on_gpu = options.device == "cuda" or (machine.gpu != "" and options.device == "auto")
    fastest_first = ON_GPU[::-1] if on_gpu else ON_CPU[::-1]
    reasons = [machine.unsupported.get((runtime, "fp32"), "") for runtime in fastest_first]
    if "" not in reasons:
        raise UnavailableError(f"{fastest_first[-1]} cannot run here: {reasons[-1]}")
    return fastest_first[reasons.index("")], reasons[0].partition(";")[0]


def _precisions(
    runtime: str, names: list[str], allowed: Allowed, options: RuntimeOptions, machine: Machine
) -> tuple[dict[str, str], str]:
    """Each member's precision, and the reason for it ("" for none)."""
    if options.precision == "fp32":
        return dict.fromkeys(names, "fp32"), ""
    if options.precision != "auto":
        precision = options.precision
        if reason := machine.unsupported.get((runtime, precision)):
            raise UnavailableError(f"{runtime} cannot run {precision} here: {reason}")
        if missing := sorted(set(names) - allowed.get((runtime, precision), frozenset())):
            raise UnavailableError(
                f"{join_limited(missing)} may not run at {runtime} {precision}: the bundle has no certificate for it; "
                f"get one: {_remedy(precision)}, or take the risk: "
                f"python cli.py export {'--int8 ' if precision == 'int8' else ''}--uncertified"
            )
        return dict.fromkeys(names, precision), ""
    supported = [lower for lower in LOWER_PRECISIONS.get(runtime, ()) if (runtime, lower) not in machine.unsupported]
    if not supported:
        first = LOWER_PRECISIONS.get(runtime, ("",))[0]
        return dict.fromkeys(names, "fp32"), machine.unsupported.get((runtime, first), "").partition(";")[0]
    # the precision that most members are certified for: one certificate covers a whole stack at one precision
    lower = max(supported, key=lambda each: len(allowed.get((runtime, each), frozenset()) & set(names)))
    certified = allowed.get((runtime, lower), frozenset())
    if not certified & set(names):
        where = "GPU" if runtime in ON_GPU else "CPU"
        return dict.fromkeys(names, "fp32"), (
            f"this {where} also computes in {supported[0]}, which is faster, but the bundle has no certificate "
            f"for it; get one: {_remedy(supported[0])}"
        )
    return {name: lower if name in certified else "fp32" for name in names}, "certified"


def _remedy(precision: str) -> str:
    return f"python cli.py export {'--int8' if precision == 'int8' else '--certify-on DATA'}"


def _untuned_config(runtime: str, precision: str, gflop: float, batch: int | None, machine: Machine) -> RuntimeConfig:
    """Batch, if none is given, and streams that suit most members of that size, before anything is measured."""
    if runtime in ON_GPU:
        return RuntimeConfig(runtime, precision, batch or 64)
    if runtime == "openvino" and gflop < LARGE_GFLOP:
        return RuntimeConfig(runtime, precision, batch or 4, min(machine.cores, MAX_STREAMS), machine.cores)
    return RuntimeConfig(runtime, precision, batch or 8, threads=machine.cores)


def certified_alternatives(
    entries: Mapping[str, Mapping[str, Any]], allowed: Allowed, options: RuntimeOptions, machine: Machine
) -> list[dict[str, RuntimeConfig]]:
    """Configs that all members may run at together: the chosen ones, then those of each other certified precision.

    On a GPU there are no others, since TensorRT would build engines for minutes to have them measured.
    """
    first, _ = choose_configs(entries, allowed, options, machine)
    used = {config.precision for config in first.values()}
    runtime = next((config.runtime for config in first.values()), "")
    return [first] + [
        {name: replace(config, precision=lower if name in certified else "fp32") for name, config in first.items()}
        for lower in (PRECISIONS[1:] if options.precision == "auto" and runtime in ON_CPU else ())
        if lower not in used and (runtime, lower) not in machine.unsupported
        if (certified := allowed.get((runtime, lower), frozenset())) & set(entries)
    ]


def tuning_candidates(chosen: RuntimeConfig, options: RuntimeOptions, machine: Machine) -> list[RuntimeConfig]:
    """Configs worth measuring for a member: fp32 in every runtime that the options allow, and `chosen`'s precision.

    Below fp32 only the runtime and precision that were chosen for the bundle: a certificate holds for a stack whose
    members all run at them. fp32 is always allowed.
    """
    on_gpu = chosen.runtime in ON_GPU
    runtimes = [options.runtime] if options.runtime != "auto" else (ON_GPU if on_gpu else ON_CPU)[::-1]
    pairs = [
        (runtime, precision)
        for runtime in runtimes
        for precision in PRECISIONS
        if (runtime, precision) not in machine.unsupported
        and options.precision in ("auto", precision)
        and (precision == "fp32" or (runtime, precision) == (chosen.runtime, chosen.precision))
    ]
    threads = 0 if on_gpu else machine.cores
    streams = {"openvino": sorted({1, min(machine.cores, MAX_STREAMS)})}
    return [
        RuntimeConfig(runtime, precision, batch, count, threads)
        for runtime, precision in pairs
        for batch in ([options.batch] if options.batch else BATCHES[runtime])
        for count in streams.get(runtime, [1])
    ]
