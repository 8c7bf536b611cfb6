"""infer: parse, call one function, print."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensemble.commands import options
from export.cluster.placement import ClusterOptions
from export.commands.options import cascade_option, cluster_options, full, refuse_run_with, runtime_options
from export.runtimes.settings import RuntimeOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ensemble.cluster.connect import Node
    from ensemble.data.storage import Location
    from export.inference.ensemble import Ensemble


def _parse_place(context: click.Context, parameter: click.Parameter, value: str | None) -> "Location | None":
    from ensemble.data.storage import parse_location

    return None if value is None else parse_location(value)


@click.command("infer")
@click.option(
    "--input",
    "source",
    metavar="PATH",
    default="data/test.csv",
    show_default=True,
    callback=_parse_place,
    help="A folder of images; a CSV or Parquet file with a column id or path; Parquet files with images in them, in a "
    "column image; tars in webdataset's layout. Several by their folder or a quoted pattern, such as "
    "'train-{000..099}.tar' or 'data/*.parquet'. Also s3://, gs://.",
)
@click.option(
    "--images",
    metavar="PATH",
    callback=_parse_place,
    help="Where the images of a CSV or Parquet file lie, also s3://, gs://.  [default: images/ beside it, or its "
    "folder]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("submission.csv"),
    show_default=True,
    help="What to write: CSV, or Parquet if it ends in .parquet.",
)
@click.option("--onnx", is_flag=True, help="Use the run's bundle, exported first if missing or out of date.")
@click.option(
    "--bundle",
    metavar="BUNDLE",
    help="Use this bundle alone in place of a run: a folder, or hf://USER/REPO[@REVISION] on the Hub.",
)
@click.option(
    "--model",
    metavar="MODEL",
    help="Use a two-class image classifier of transformers or timm in place of a run: its folder, or hf://USER/REPO.",
)
@click.option("--positive", metavar="NAME", help="With --model: its class that means AI-made, if no name says so.")
@click.option(
    "--members",
    is_flag=True,
    help="Also write each member's own probability; under --cascade empty where a member did not run.",
)
@click.option("--tta", is_flag=True, help="Average over mirrored images where stack --tta found that it helps.")
@cascade_option(
    "Run members from cheap to dear, and let an image go once the rest could hardly change its score: faster, for "
    "a loss in AUROC of at most TOLERANCE (0.001 where none is given), measured on held-out images and printed; "
    "refused where its 95 % interval lies beyond. Needs --onnx or --bundle."
)
@full
@click.option(
    "--adapted", is_flag=True, help="Add the shift that adapt estimated to target, and say so. All members run."
)
@click.option("--fill", type=click.FloatRange(0, 1), help="Target of images that cannot be read.  [default: empty]")
@cluster_options
@options.run
@runtime_options
@click.pass_context
def infer(
    context: click.Context,
    source: "Location",
    images: "Location | None",
    output: Path,
    onnx: bool,
    bundle: str | None,
    model: str | None,
    positive: str | None,
    members: bool,
    tta: bool,
    cascade: float | None,
    full: bool,
    adapted: bool,
    fill: float | None,
    run: Path,
    runtime: RuntimeOptions,
    cluster: ClusterOptions | None,
) -> int:
    """Score images and write `id,target`; target is the probability of AI-made.

    Rows and order are the input's. Images that cannot be read are listed in
    NAME.errors.csv beside the output, all others are scored, and the exit code is 1.
    Members that joined by `stack --external` are not run: their scores are looked up by id.
    NAME.csv.json beside the output says what made it, for submit.

    Stopped or killed at any moment, the same command goes on from what was scored, kept in
    NAME.csv.partial beside the output until the end, and the same file results. Changed members,
    images or options start anew.

    A bundle for which `frontier --budget` chose some of its members runs those, and says so; --full
    runs all. --cascade then fits a cascade of those members anew, in place of the chosen one.

    \b
    Examples:
      python cli.py infer --onnx
      python cli.py infer --onnx --tta
      python cli.py infer --onnx --input photos/ --members --output scores.parquet
      python cli.py infer --onnx --input 's3://bucket/shards/train-{000..099}.tar'
      python cli.py infer --bundle copied/bundle --input photos/ --cascade
      python cli.py infer --bundle hf://USER/REPO --input photos/
      python cli.py infer --model hf://USER/REPO --positive fake --input photos/
      python cli.py infer --onnx --input photos/ --engine ray --address auto
    """
    if cascade is not None and not (onnx or bundle):
        raise click.UsageError("--cascade runs a bundle: add --onnx, or name one with --bundle")
    if cascade is not None and tta:
        raise click.UsageError("--cascade and --tta exclude each other: the cascade is fitted on images as they are")
    if cluster and not (onnx or bundle):
        raise click.UsageError("--engine ray runs a bundle: add --onnx, or name one with --bundle")
    if cluster and any(str(place).startswith("memory://") for place in (source, images)):
        raise click.UsageError("memory:// is of one process alone, and a cluster has several: leave out --engine ray")
    from ensemble.core import artifacts
    from ensemble.data.inputs import read_inputs
    from ensemble.images.decode import silence_decoder_warnings
    from export.bundle import hub_bundles
    from export.bundle.bundle import contents
    from export.inference import infer as inference
    from export.inference import journal, provenance
    from export.inference import predictor as cascades

    _check_source(context, onnx, bundle, model, positive, adapted or tta)
    context.with_resource(silence_decoder_warnings())
    _check_output(output, (source,))
    artifacts.ensure_writable(output.absolute().parent)
    nodes = _nodes(context, cluster)
    with journal.held(output) as partial:
        inputs = read_inputs(source, images, partial)
        _check_output(output, inputs.needs)
        if inputs.note:
            click.echo(inputs.note, err=True)
        folder = hub_bundles.locate_bundle(bundle) if bundle else None
        runtime = replace(runtime, cascade=cascade, full=full or adapted)
        ready = None
        if cluster:
            from export.cluster import driver as clusters

            folder = folder or export_bundle(run, adapted)
            ready = clusters.plan(folder, runtime, cluster, nodes, inputs, partial, click.echo)
            ensemble = ready.ensemble
        else:
            ensemble = open_ensemble(run, onnx, Source(folder, model, positive), adapted, runtime)
        used = folder or (artifacts.bundle_path(run) if onnx else None)
        # now: another export may replace it while images are scored
        listed = ready.job.bundle.listed if ready else contents(used) if used else None
        if tta and ensemble.cascade:
            raise click.UsageError("--tta excludes the cascade that frontier chose for this bundle: add --full")
        if tta:
            remedy = f"run: python cli.py stack --tta --run {run}"
            if bundle:
                remedy = "leave out --tta, or use a bundle whose run had: python cli.py stack --tta"
            ensemble = inference.with_flips(ensemble, remedy)
            gained = ", ".join(ensemble.stacker.tta_members or ()) or "no member, none gained"
            click.echo(f"Averaged over mirrored images: {gained}")
        click.echo(f"{inputs.count} images, {len(ensemble.runners)} members on {ensemble.device}")
        if ensemble.externals:
            click.echo(f"Looked up by id: {', '.join(member.name for member in ensemble.externals)}")
        if not (bundle or model) and (unused := _outside(run)):
            click.echo(f"Not in the stack: {', '.join(unused)}; run stack to weigh them too.")
        if adapted:
            click.echo(inference.adaptation(inputs, ensemble))
        if ensemble.cascade:
            click.echo("\n".join(cascades.told(ensemble.cascade)))
        chosen = inference.InferOptions(members, tta, adapted, fill)
        scoring = clusters.scoring(ready, inputs, tta) if ready else None
        done = inference.infer_to_file(inputs, ensemble, output, partial, chosen, click.echo, scoring)
        kind = provenance.MODEL if model else "bundle" if bundle else "run"
        libraries = ready.prepared.libraries if ready else None
        made = provenance.made_by(ensemble, kind, listed, chosen, source, done, libraries)
        provenance.write_fingerprint(output, made)
    speed = f", {done.images_per_second:,.1f} images per second" if done.images_per_second else ""
    click.echo(f"{done.scored} images scored -> {click.format_filename(output)}{speed}")
    if ensemble.cascade:
        click.echo(cascades.seen(ensemble.cascade, done.left))
    if done.listing is None:
        return 0
    listing = click.format_filename(done.listing)
    click.echo(f"Error: {done.failed} images could not be read, listed in {listing}", err=True)
    return 1 if done.scored else 2


def _outside(run: Path) -> list[str]:
    """The run's members that its stack leaves out."""
    from ensemble.core.artifacts import list_members
    from ensemble.stacking.stack import read_stacker

    return sorted(set(list_members(run)) - set(read_stacker(run).members))


def _check_output(output: Path, read: "Iterable[Location]") -> None:
    """ArtifactError for an output that cannot be written, or that would take the place of what is read."""
    from ensemble.core.errors import ArtifactError
    from export.inference.outputs import failures_path, output_format
    from export.inference.provenance import fingerprint_path

    output_format(output)
    there = {}
    for written in (output, failures_path(output), fingerprint_path(output)):
        with suppress(OSError):  # not there, or a name that no file can have
            there[_identity(written)] = written
    for place in read if there else ():  # a million tars need no look where nothing is overwritten
        with suppress(OSError):
            if isinstance(place, Path) and (taken := there.get(_identity(place))):
                raise ArtifactError(f"{taken} is the input and would be overwritten; choose another --output")


def _identity(path: Path) -> tuple[int, int]:
    """What a file has in common with its links alone."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _check_source(
    context: click.Context, onnx: bool, bundle: str | None, model: str | None, positive: str | None, stacked: bool
) -> None:
    """UsageError for options that name two things to score by, or that do not go together."""
    if bundle and model:
        raise click.UsageError("--bundle and --model exclude each other")
    refuse_run_with(context, "--bundle", bundle)
    refuse_run_with(context, "--model", model)
    if model and (onnx or stacked):
        raise click.UsageError("--model runs a classifier as it is: leave out --onnx, --tta and --adapted")
    if positive and not model:
        raise click.UsageError("--positive names a class of --model")


@dataclass(frozen=True)
class Source:
    """What takes the place of a run, as options of these names say."""

    bundle: Path | None
    model: str | None
    positive: str | None


def open_ensemble(run: Path, onnx: bool, source: Source, adapted: bool, runtime: RuntimeOptions) -> "Ensemble":
    """The bundle or model, or the run's members or bundle, exported first where it is out of date."""
    from export.inference import predictor

    if source.bundle:
        return predictor.load_bundle(source.bundle, runtime, click.echo)
    if source.model:
        return predictor.load(source.model, runtime, source.positive, click.echo)
    if onnx:
        export_bundle(run, adapted)
    return predictor.load_run(run, onnx, runtime, click.echo)


def export_bundle(run: Path, adapted: bool) -> Path:
    """The run's bundle, exported first where it is out of date."""
    from ensemble.core import artifacts
    from ensemble.stacking.stack import read_stacker
    from export.bundle import bundle
    from export.bundle.export import export_run

    if not bundle.is_current(run):
        if adapted:
            read_stacker(run).adaptation()  # told before anything is exported
        click.echo("The bundle is missing or older than the members or the stack: exporting first.")
        export_run(run, click.echo)
    return artifacts.bundle_path(run)


def _nodes(context: click.Context, cluster: ClusterOptions | None) -> "list[Node]":
    """Machines of the cluster, connected until the command ends."""
    if not cluster:
        return []
    from ensemble.cluster.connect import connected, nodes

    return nodes(context.with_resource(connected(cluster.address)))
