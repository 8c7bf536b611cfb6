"""The `infer` job: read the inputs, load an ensemble, score every image, write the output and its provenance."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ensemble.cascade.cascade import Cascade
from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, UnavailableError
from ensemble.core.log import Log
from ensemble.data.inputs import Inputs, names, read_inputs
from ensemble.data.storage import Location
from ensemble.stacking.label_shift import names_sha256
from ensemble.stacking.stack import read_stacker
from export.bundle import hub_bundles
from export.bundle.bundle import read_contents
from export.inference import provenance
from export.inference.ensemble import Ensemble
from export.inference.infer import (
    InferResult,
    PreparedEnsemble,
    ScoreOptions,
    infer_to_file,
    with_flips,
)
from export.inference.journal import locked_workdir
from export.inference.loading import export_if_stale, load_bundle, load_folder, load_run
from export.inference.outputs import failures_path, output_format
from export.runtimes.devices import version
from export.runtimes.settings import RuntimeOptions, parse_config


@dataclass(frozen=True)
class ModelSource:
    """What scores the images: the run's torch members, or its bundle with `onnx`, or a bundle or classifier alone.

    bundle: a bundle's folder or hf:// name. model: a classifier's folder or hf:// name. positive: the class of
    `model` that means AI-made, where its label names do not say.
    """

    run: Path
    onnx: bool = False
    bundle: str | None = None
    model: str | None = None
    positive: str | None = None

    def locate_bundle(self, log: Log, adapted: bool = False) -> Path | None:
        """The folder of the bundle to run, downloaded or exported first if needed; None where no bundle runs.

        adapted: as for `export_if_stale`.
        """
        if self.bundle:
            return hub_bundles.locate_bundle(self.bundle)
        return export_if_stale(self.run, log, adapted) if self.onnx else None


@dataclass(frozen=True)
class InferOptions:
    """What `infer` was asked for.

    input: a list or folder of images. images: the folder of the images that a list names. output: CSV or Parquet.
    """

    input: Location
    images: Location | None
    output: Path
    source: ModelSource
    runtime: RuntimeOptions
    scores: ScoreOptions


# Makes the ensemble ready to score the inputs. The path is of the journal's folder.
Prepare = Callable[[InferOptions, Inputs, Path, Log], PreparedEnsemble]


def prepare_locally(options: InferOptions, inputs: Inputs, workdir: Path, log: Log) -> PreparedEnsemble:
    """Load the bundle, the run's torch members, or the classifier, to run in this process."""
    source, runtime = options.source, options.runtime
    folder = source.locate_bundle(log, options.scores.adapted)
    if folder:
        ensemble = load_bundle(folder, runtime, log)
    elif source.model:
        ensemble = load_folder(hub_bundles.locate(source.model), source.model, runtime, source.positive, log)
    else:
        ensemble = load_run(source.run, False, runtime, log)
    listed = read_contents(folder) if folder else None  # now: another export may replace it while images are scored
    ensemble = with_tta(ensemble, options)
    runtimes = {parse_config(setting).runtime for _, setting in ensemble.settings}
    libraries = {runtime: version(runtime) for runtime in runtimes}
    return PreparedEnsemble(ensemble, listed, libraries)


def with_tta(ensemble: Ensemble, options: InferOptions) -> Ensemble:
    """The ensemble, with mirrored images for the members that gain by them if `options.scores.tta`."""
    if not options.scores.tta:
        return ensemble
    if ensemble.cascade:
        raise UnavailableError("--tta excludes the cascade that frontier chose for this bundle: add --full")
    remedy = f"run: python cli.py stack --tta --run {options.source.run}"
    if options.source.bundle:
        remedy = "leave out --tta, or use a bundle whose run had: python cli.py stack --tta"
    return with_flips(ensemble, remedy)


def run(options: InferOptions, prepare: Prepare, log: Log, warn: Log) -> InferResult:
    """Score the images of `options.input`; writes the output, the list of failures and the provenance beside it.

    A job that was stopped goes on from the shards that it had scored. warn: gets a line if something is odd about
    the input.
    """
    output = options.output
    check_output(output, (options.input,))
    artifacts.ensure_writable(output.absolute().parent)
    with locked_workdir(output) as workdir:
        inputs = read_inputs(options.input, options.images, workdir)
        check_output(output, inputs.files)
        if inputs.note:
            warn(inputs.note)
        prepared = prepare(options, inputs, workdir, log)
        for line in _describe(options, prepared.ensemble, inputs):
            log(line)
        result = infer_to_file(inputs, prepared.ensemble, output, workdir, options.scores, log, prepared.scorer)
        kind = provenance.MODEL if options.source.model else "bundle" if options.source.bundle else "run"
        made_by = provenance.describe_scoring(prepared, kind, options.scores, options.input, result)
        provenance.write_provenance(output, made_by)
    return result


def describe_cascade(cascade: Cascade) -> list[str]:
    """What to expect of a cascade, in lines."""
    report = cascade.report
    full, less = report.milliseconds
    steps = [
        f"  {name}: {cost:.2f} ms an image, {share:.1%} leave"
        for name, cost, share in zip(cascade.order, cascade.milliseconds, report.shares, strict=True)
    ]
    lines = [
        f"Cascade, from cheap to expensive, to lose at most {cascade.tolerance:g} of AUROC:",
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


def check_output(output: Path, inputs: Iterable[Location]) -> None:
    """ArtifactError for an output that cannot be written, or that would overwrite one of the inputs."""
    output_format(output)
    existing = {}
    for written in (output, failures_path(output), provenance.provenance_path(output)):
        with suppress(OSError):  # it does not exist, or its name is one that no file can have
            existing[_file_identity(written)] = written
    for path in inputs if existing else ():  # without a file to overwrite a million tars need no look
        with suppress(OSError):
            if isinstance(path, Path) and (overwritten := existing.get(_file_identity(path))):
                raise ArtifactError(f"{overwritten} is the input and would be overwritten; choose another --output")


def _file_identity(path: Path) -> tuple[int, int]:
    """Device and inode: the same for all links of a file."""
    status = path.stat()
    return status.st_dev, status.st_ino


def _describe(options: InferOptions, ensemble: Ensemble, inputs: Inputs) -> list[str]:
    """What will run, in lines."""
    source, lines = options.source, []
    if options.scores.tta:
        gained = ", ".join(ensemble.stacker.tta_members or ()) or "no member, none gained"
        lines.append(f"Averaged over mirrored images: {gained}")
    lines.append(f"{inputs.count} images, {len(ensemble.runners)} members on {ensemble.device}")
    if ensemble.externals:
        lines.append(f"Looked up by id: {', '.join(member.name for member in ensemble.externals)}")
    if not (source.bundle or source.model):
        unused = sorted(set(artifacts.list_members(source.run)) - set(read_stacker(source.run).members))
        lines += [f"Not in the stack: {', '.join(unused)}; run stack to weigh them too."] if unused else []
    if options.scores.adapted:
        shift = ensemble.stacker.adaptation()
        share = f"share of ai {shift.prior:.2f}{', as given' if shift.estimator == 'share' else ''}"
        others = "" if shift.names == names_sha256(names(inputs)) else "; the images scored now are others"
        lines.append(
            f"Adapted: {shift.shift:+.2f} on the stack's logit, from {shift.images} images of {shift.data} "
            f"({share}){others}."
        )
    if ensemble.cascade:
        lines.extend(describe_cascade(ensemble.cascade))
    return lines
