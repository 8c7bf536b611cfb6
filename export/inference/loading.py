"""Load an ensemble: a run's torch members, a bundle, or a single classifier. A bundle needs no torch."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble.cascade.fit import check_rows, fit_cascade, subsample
from ensemble.core import artifacts
from ensemble.core.errors import BackboneError, UnavailableError
from ensemble.core.log import Log, no_log
from ensemble.core.names import RESERVED
from ensemble.models import external
from ensemble.models.runner import Runner
from ensemble.stacking.stack import fingerprint, read_stacker
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle, hub_bundles
from export.bundle.heldout_rows import read_rows
from export.inference.ensemble import Ensemble
from export.inference.plan import Plan, device_of, open_member, plan_bundle
from export.runtimes import autotune
from export.runtimes.capabilities import Machine, available
from export.runtimes.devices import version
from export.runtimes.runner import require_torch
from export.runtimes.settings import TORCH_BATCH, RuntimeConfig, RuntimeOptions

if TYPE_CHECKING:
    from ensemble.models.backbone import Member

TORCH = str(RuntimeConfig("torch"))
DEFAULT_RUNTIME = RuntimeOptions()


def export_if_stale(run: Path, log: Log, adapted: bool = False) -> Path:
    """The folder of the run's bundle, exported first if it is missing or older than the members or the stack.

    adapted: the stacker must hold a shift from `adapt`; ArtifactError before anything is exported if it does not.
    """
    if not bundle.is_current(run):
        from export.bundle.export import export_run

        if adapted:
            read_stacker(run).adaptation()
        log("The bundle is missing or older than the members or the stack: exporting first.")
        export_run(run, log)
    return artifacts.bundle_path(run)


def load_run(run: Path, onnx: bool, runtime: RuntimeOptions = DEFAULT_RUNTIME, log: Log = no_log) -> Ensemble:
    """A run's ensemble, from its bundle or from its torch members. `log` gets lines on what runs them, and why."""
    if onnx:
        return load_bundle(artifacts.bundle_path(run), runtime, log)
    return load_networks(run, read_stacker(run), runtime)[0]


def load_networks(
    run: Path, stacker: Stacker, runtime: RuntimeOptions = DEFAULT_RUNTIME
) -> tuple[Ensemble, dict[str, "Member"]]:
    """A run's ensemble of the stacker's members, run by torch, and the torch members of this run by name."""
    device = _torch_device(runtime)
    from ensemble.models.members import load_member
    from ensemble.models.torch_runner import torch_runner

    externals = external.read_externals(run, stacker.members)
    trained = [name for name in stacker.members if name not in {member.name for member in externals}]
    networks = {name: load_member(run, name) for name in trained}
    runners = tuple(
        torch_runner(name, member, device, batch=runtime.batch or TORCH_BATCH) for name, member in networks.items()
    )
    identity = artifacts.json_sha256([version("torch"), device, runtime.batch, fingerprint(run, trained)["members"]])
    settings = tuple((name, TORCH) for name in trained)
    return Ensemble(runners, stacker, device, externals, identity, settings=settings), networks


def load_bundle(folder: Path, runtime: RuntimeOptions = DEFAULT_RUNTIME, log: Log = no_log) -> Ensemble:
    """A bundle's ensemble; every file's hash is checked. `log` gets lines on what runs the members."""
    machine = available()
    plan = plan_bundle(folder, runtime, log, machine)
    return build_ensemble(folder, *open_plan(folder, plan, runtime, log, machine))


def open_plan(
    folder: Path, plan: Plan, runtime: RuntimeOptions, log: Log, machine: Machine
) -> tuple[Plan, list[Runner]]:
    """A bundle's plan and its members, ready to run.

    `runtime.cascade`, the loss in AUROC to allow, fits a new cascade to this machine's speed, on the held-out logits
    that the bundle holds.
    """
    runners = [open_member(member, log) for member in plan.members]
    if runtime.cascade is not None:
        seconds = {
            member.name: autotune.seconds_per_image(opened, member.setting, member.sha256, machine)
            for member, opened in zip(plan.members, runners, strict=True)
        }
        members = plan.stacker.members
        milliseconds = {name: 1000 * seconds.get(name, 0.0) for name in members}  # those looked up by id take none
        rows = read_rows(folder, members)
        check_rows(rows)
        log(f"Fitting the cascade on {len(subsample(rows).labels):,} held-out images")
        plan = replace(plan, cascade=fit_cascade(plan.stacker, rows, milliseconds, runtime.cascade))
    return plan, runners


def build_ensemble(folder: Path, plan: Plan, runners: Iterable[Runner]) -> Ensemble:
    """The ensemble of a bundle's plan. runners: of its members, in the order of the plan."""
    ordered = list(runners)
    if plan.cascade:
        order = plan.cascade.order
        ordered.sort(key=lambda runner: order.index(runner.name))
    used = [
        [m.preprocess_config.to_dict(), m.sha256, asdict(m.setting), version(m.setting.runtime)] for m in plan.members
    ]
    externals = external.read_externals(folder, plan.stacker.members)
    identity, settings = artifacts.json_sha256(used), tuple((m.name, str(m.setting)) for m in plan.members)
    device = device_of(plan.members)
    return Ensemble(tuple(ordered), plan.stacker, device, externals, identity, plan.cascade, settings)


def _load_classifier(folder: Path, name: str, runtime: RuntimeOptions, positive: str | None) -> Ensemble:
    """Any two-class image classifier in transformers' layout as a member; `target` is P(its AI-made class)."""
    device = _torch_device(runtime)
    from ensemble.models.classifier import read_classifiers
    from ensemble.models.torch_runner import torch_runner

    (one,) = read_classifiers({f"model_{name}" if name in RESERVED else name: folder}, positive)
    identity = artifacts.json_sha256([version("torch"), device, runtime.batch, one.sha256])
    opened = torch_runner(one.name, one.load(), device, batch=runtime.batch or TORCH_BATCH)
    stacker = Stacker(members=(one.name,), coef=(1.0,), intercept=0.0)
    return Ensemble((opened,), stacker, device, identity=identity, settings=((one.name, TORCH),))


def load_folder(
    folder: Path,
    source: str | Path,
    runtime: RuntimeOptions = DEFAULT_RUNTIME,
    positive: str | None = None,
    log: Log = no_log,
) -> Ensemble:
    """The ensemble in `folder`: of a run, a bundle or a classifier. A run's current bundle goes before torch members.

    folder: of `hub_bundles.locate(source)`; it is located once, since what a source on the Hub names may change.
    """
    if (folder / "bundle.json").is_file():
        return load_bundle(folder, runtime, log)
    if is_run(folder):
        onnx = runtime.runtime != "torch" and bundle.is_current(folder)
        return load_run(folder, onnx, runtime, log)
    if (folder / "config.json").is_file():
        name = hub_bundles.parse(str(source))[0] if hub_bundles.is_remote(source) else folder.resolve().name
        try:
            return _load_classifier(folder, name, runtime, positive)
        except BackboneError as error:  # name what the user named, not a folder of the Hub's cache
            raise BackboneError(str(error).replace(str(folder), str(source))) from None
    raise BackboneError(
        f"{source} is neither a run, a bundle nor a classifier (no bundle.json, members or config.json)"
    )


def is_run(folder: Path) -> bool:
    """Whether the folder is a run, and no bundle."""
    return not (folder / "bundle.json").is_file() and (
        artifacts.stacker_path(folder).is_file() or artifacts.members_path(folder).is_dir()
    )


def _torch_device(runtime: RuntimeOptions) -> str:
    """cpu or cuda for torch members; UnavailableError for options that only a bundle has."""
    if runtime.runtime not in ("auto", "torch"):
        raise UnavailableError(f"{runtime.runtime} runs a run's bundle, not its torch members; add --onnx")
    if runtime.precision not in ("auto", "fp32"):
        raise UnavailableError(f"torch members are run at fp32; for {runtime.precision} run the bundle: add --onnx")
    if runtime.cascade is not None:
        raise UnavailableError("a cascade is fitted on what a bundle holds, not on torch members; add --onnx")
    if runtime.tune:
        raise UnavailableError("--tune measures what runs a bundle, not torch members; add --onnx")
    require_torch()
    from ensemble.models.torch_runner import choose_device

    return choose_device(runtime.device)
