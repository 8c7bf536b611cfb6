"""Predictor: a run, a bundle or a single classifier, as one object for notebooks.

A bundle's cascade: fitted on the rows that the bundle holds, for what its members cost on this machine.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import BackboneError, DataError, UnavailableError
from ensemble.core.log import Log
from ensemble.core.names import RESERVED
from ensemble.data import storage
from ensemble.data.inputs import inputs_from_table
from ensemble.images.decode import silence_decoder_warnings
from ensemble.models import external
from ensemble.models.runner import Runner
from ensemble.stacking.cascade import Cascade
from ensemble.stacking.cascade_fit import check_rows, fit_cascade, subsample
from ensemble.stacking.stack import fingerprint, read_stacker
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle, hub_bundles
from export.bundle.heldout_rows import read_rows
from export.inference.ensemble import Ensemble
from export.inference.infer import average, infer
from export.inference.plan import Plan, device_of, open_member, plan_bundle
from export.runtimes import autotune
from export.runtimes import runner as runtime
from export.runtimes.capabilities import Machine, available
from export.runtimes.devices import version
from export.runtimes.settings import RuntimeConfig, RuntimeOptions

if TYPE_CHECKING:
    from ensemble.models.backbone import Member


def fit_bundle(folder: Path, stacker: Stacker, seconds: Mapping[str, float], tolerance: float, log: Log) -> Cascade:
    """The cascade for members that take these seconds an image; those that are not named are looked up, for nothing."""
    milliseconds = {name: 1000 * seconds.get(name, 0.0) for name in stacker.members}
    rows = read_rows(folder, stacker.members)
    check_rows(rows)
    log(f"Fitting the cascade on {len(subsample(rows).labels):,} held-out images")
    return fit_cascade(stacker, rows, milliseconds, tolerance)


def told(cascade: Cascade) -> list[str]:
    """What to expect of it, in lines."""
    report = cascade.report
    full, less = report.milliseconds
    steps = [
        f"  {name}: {cost:.2f} ms an image, {share:.1%} leave"
        for name, cost, share in zip(cascade.order, cascade.milliseconds, report.shares, strict=True)
    ]
    lines = [
        f"Cascade, from cheap to dear, to lose at most {cascade.tolerance:g} of AUROC:",
        *steps,
        f"  Expected: members take {less:.2f} ms an image in place of {full:.2f}, {full / less:.1f} times as fast"
        if less
        else "  Expected: no member has to run",
        f"  On {report.rows:,} images of {report.groups:,} groups, by limits fitted on other groups: AUROC "
        f"{report.auroc[1]:.4f} in place of {report.auroc[0]:.4f}, lost {report.loss}; "
        f"{report.decision_changes:.1%} change sides at the threshold",
    ]
    if report.loss.value > cascade.tolerance:
        lines.append("  It lost more than allowed on these images, which are too few to be sure.")
    elif report.loss.high > cascade.tolerance:
        lines.append(f"  These images are too few to show that no more than {cascade.tolerance:g} is lost.")
    return lines


def seen(cascade: Cascade, counts: Sequence[int] | np.ndarray) -> str:
    """How many of the images that were scored left after each member, in one line."""
    total = max(int(np.sum(counts)), 1)
    shares = ", ".join(f"{count / total:.1%} after {name}" for name, count in zip(cascade.order, counts, strict=True))
    return f"Left the cascade: {shares}"


TORCH = str(RuntimeConfig("torch"))
ANY = RuntimeOptions()


def silent(line: str) -> None:
    """Say nothing."""


def load_run(run: Path, onnx: bool, wanted: RuntimeOptions = ANY, log: Log = silent) -> Ensemble:
    """A run's ensemble from its bundle, or from its torch members; `log` is told what was chosen and why."""
    if onnx:
        return load_bundle(artifacts.bundle_path(run), wanted, log)
    return load_networks(run, read_stacker(run), wanted)[0]


def load_networks(run: Path, stacker: Stacker, wanted: RuntimeOptions = ANY) -> tuple[Ensemble, dict[str, "Member"]]:
    """A run's ensemble of the stacker's members, run by torch, and those that were trained here, by name."""
    device = _torch_device(wanted)
    from ensemble.models.members import load_member

    externals = external.externals_of(run, stacker.members)
    trained = [name for name in stacker.members if name not in {member.name for member in externals}]
    networks = {name: load_member(run, name) for name in trained}
    runners = tuple(runtime.torch_runner(name, member, device, wanted.batch) for name, member in networks.items())
    identity = artifacts.json_sha256([version("torch"), device, wanted.batch, fingerprint(run, trained)["members"]])
    settings = tuple((name, TORCH) for name in trained)
    return Ensemble(runners, stacker, device, externals, identity, settings=settings), networks


def load_bundle(folder: Path, wanted: RuntimeOptions = ANY, log: Log = silent) -> Ensemble:
    """A bundle's ensemble, every file checked; `log` is told what was chosen and why."""
    machine = available()
    plan = plan_bundle(folder, wanted, log, machine)
    return assemble(folder, *open_plan(folder, plan, wanted, log, machine))


def open_plan(
    folder: Path, plan: Plan, wanted: RuntimeOptions, log: Log, machine: Machine
) -> tuple[Plan, list[Runner]]:
    """A bundle's plan, with the cascade that is wanted, fitted to this machine, and its members ready to run."""
    runners = [open_member(member, log) for member in plan.members]
    if wanted.cascade is not None:
        costs = {
            m.name: autotune.image_seconds(r, m.setting, m.sha256, machine)
            for m, r in zip(plan.members, runners, strict=True)
        }
        plan = replace(plan, cascade=fit_bundle(folder, plan.stacker, costs, wanted.cascade, log))
    return plan, runners


def assemble(folder: Path, plan: Plan, runners: Iterable[Runner]) -> Ensemble:
    """The ensemble of a bundle's plan and its members, in the order of the plan."""
    ordered = list(runners)
    if plan.cascade:
        order = plan.cascade.order
        ordered.sort(key=lambda runner: order.index(runner.name))
    used = [
        [m.preprocess_config.to_dict(), m.sha256, asdict(m.setting), version(m.setting.runtime)] for m in plan.members
    ]
    externals = external.externals_of(folder, plan.stacker.members)
    identity, settings = artifacts.json_sha256(used), tuple((m.name, str(m.setting)) for m in plan.members)
    device = device_of(plan.members)
    return Ensemble(tuple(ordered), plan.stacker, device, externals, identity, plan.cascade, settings)


def load_classifier(
    folder: Path, wanted: RuntimeOptions = ANY, positive: str | None = None, name: str | None = None
) -> Ensemble:
    """Any two-class image classifier in transformers' layout; `target` is P(its AI-made class).

    name: what to call it, where the folder's name does not say.
    """
    device = _torch_device(wanted)
    from ensemble.models.classifier import read_classifiers

    called = name or folder.resolve().name
    (one,) = read_classifiers({f"model_{called}" if called in RESERVED else called: folder}, positive)
    identity = artifacts.json_sha256([version("torch"), device, wanted.batch, one.sha256])
    runner = runtime.torch_runner(one.name, one.load(), device, wanted.batch)
    return Ensemble((runner,), average(one.name), device, identity=identity, settings=((one.name, TORCH),))


def load(source: str | Path, wanted: RuntimeOptions = ANY, positive: str | None = None, log: Log = silent) -> Ensemble:
    """The ensemble at `source`: a run, a bundle, a classifier's folder, or hf://USER/REPO of the last two.

    Only hf:// reaches the network. A run's current bundle is preferred to its torch members.
    """
    return load_located(hub_bundles.locate(source), source, wanted, positive, log)


def load_located(
    folder: Path, source: str | Path, wanted: RuntimeOptions = ANY, positive: str | None = None, log: Log = silent
) -> Ensemble:
    """As `load`, from the folder that `source` was found to be: what it names on the Hub may change meanwhile."""
    if (folder / "bundle.json").is_file():
        return load_bundle(folder, wanted, log)
    if artifacts.stacker_path(folder).is_file() or artifacts.members_path(folder).is_dir():
        onnx = wanted.runtime != "torch" and bundle.is_current(folder)
        return load_run(folder, onnx, wanted, log)
    if (folder / "config.json").is_file():
        name = hub_bundles.parse(str(source))[0] if hub_bundles.is_remote(source) else None
        try:
            return load_classifier(folder, wanted, positive, name)
        except BackboneError as error:  # the cache's folders have names that nobody gave
            raise BackboneError(str(error).replace(str(folder), str(source))) from None
    raise BackboneError(
        f"{source} is neither a run, a bundle nor a classifier (no bundle.json, members or config.json)"
    )


class Predictor:
    """Scores tables of images: `Predictor.load("runs/default").predict(frame, images="data/test")`.

    errors: after `predict`, the images that could not be read (id, path, error).
    device: cpu or cuda.
    notes: what runs, and why, in lines.
    """

    def __init__(self, source: str | Path, wanted: RuntimeOptions, positive: str | None) -> None:
        self.errors = _no_errors()
        self._source, self._folder, self._positive = source, hub_bundles.locate(source), positive
        self._load(wanted)

    @classmethod
    def load(
        cls,
        source: str | Path,
        device: str = "auto",
        positive: str | None = None,
        runtime: str = "auto",
        precision: str = "auto",
        cascade: float | None = None,
        full: bool = False,
    ) -> Self:
        """Load a run, a bundle, a two-class classifier's folder, or hf://USER/REPO.

        positive: the class that means AI-made, where label names do not say. runtime and
        precision: as the options of `infer`; so are cascade, the loss in AUROC to allow, and
        full, all members of a bundle for which `frontier --budget` chose some.
        """
        wanted = RuntimeOptions(runtime, precision, device, cascade=cascade, full=full)
        return cls(source, wanted, positive)

    def to(self, device: str) -> Self:
        """Move to cpu or cuda; UnavailableError if it is not here."""
        self._load(replace(self._wanted, device=device))
        return self

    def _load(self, wanted: RuntimeOptions) -> None:
        notes: list[str] = []
        self._ensemble = load_located(self._folder, self._source, wanted, self._positive, notes.append)
        self._wanted, self.device, self.notes = wanted, self._ensemble.device, tuple(notes)

    @silence_decoder_warnings()
    def predict(self, frame: pd.DataFrame, images: str | Path | None = None) -> pd.DataFrame:
        """The same rows, order and index with `target`, P(ai) in [0, 1]; NaN where `errors` says why.

        frame: `path`, or `id` naming files in the folder `images` with or without suffix.
        """
        if frame.empty:
            self.errors = _no_errors()
            return frame.assign(target=np.empty(0))
        keys = [column for column in ("id", "path") if column in frame]
        if not keys:
            raise DataError("the frame needs a column id or path")
        inputs = inputs_from_table(
            frame[keys].astype(str), Path("frame"), None if images is None else storage.parse_location(str(images))
        )
        result, self.errors = infer(inputs, self._ensemble)
        return frame.assign(target=result["target"].to_numpy())


def _no_errors() -> pd.DataFrame:
    return pd.DataFrame(columns=["id", "path", "error"])


def _torch_device(wanted: RuntimeOptions) -> str:
    """Where torch members run: fp32, without a bundle."""
    if wanted.runtime not in ("auto", "torch"):
        raise UnavailableError(f"{wanted.runtime} runs a run's bundle, not its torch members; add --onnx")
    if wanted.precision not in ("auto", "fp32"):
        raise UnavailableError(f"torch members are run at fp32; for {wanted.precision} run the bundle: add --onnx")
    if wanted.cascade is not None:
        raise UnavailableError("a cascade is fitted on what a bundle holds, not on torch members; add --onnx")
    if wanted.tune:
        raise UnavailableError("--tune measures what runs a bundle, not torch members; add --onnx")
    runtime.require_torch()
    return runtime.choose_device(wanted.device)
