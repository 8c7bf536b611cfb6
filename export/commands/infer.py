"""infer: parse, call one function, print."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensemble.commands import options
from export.cluster.placement import ClusterOptions
from export.commands.options import (
    InsteadOfRun,
    bundle_option,
    cascade_option,
    cluster_options,
    file_option,
    full,
    runtime_options,
)
from export.runtimes.settings import RuntimeOptions

if TYPE_CHECKING:
    from ensemble.data.storage import Location


def _parse_location(context: click.Context, parameter: click.Parameter, value: str | None) -> "Location | None":
    from ensemble.data.storage import parse_location

    return None if value is None else parse_location(value)


@click.command("infer")
@click.option(
    "--input",
    "source",
    metavar="PATH",
    default="data/test.csv",
    callback=_parse_location,
    help="A folder of images; a CSV or Parquet file with a column id or path; Parquet files with images in them, in a "
    "column image; tars in webdataset's layout. Several by their folder or a quoted pattern, such as "
    "'train-{000..099}.tar' or 'data/*.parquet'. Also s3://, gs://.",
)
@click.option(
    "--images",
    metavar="PATH",
    callback=_parse_location,
    help="Where the images of a CSV or Parquet file lie, also s3://, gs://.  [default: images/ beside it, or its "
    "folder]",
)
@file_option("--output", default="submission.csv", help="What to write: CSV, or Parquet if it ends in .parquet.")
@click.option("--onnx", is_flag=True, help="Use the run's bundle, exported first if missing or out of date.")
@bundle_option("Use this bundle alone in place of a run")
@click.option(
    "--model",
    cls=InsteadOfRun,
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
    "Run members from cheap to expensive, and stop for an image once the rest could hardly change its score: faster, "
    "for a loss in AUROC of at most TOLERANCE (0.001 where none is given), measured on held-out images and printed; "
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
    if bundle and model:
        raise click.UsageError("--bundle and --model exclude each other")
    if model and (onnx or tta or adapted):
        raise click.UsageError("--model runs a classifier as it is: leave out --onnx, --tta and --adapted")
    if positive and not model:
        raise click.UsageError("--positive names a class of --model")
    if cluster and not (onnx or bundle):
        raise click.UsageError("--engine ray runs a bundle: add --onnx, or name one with --bundle")
    if cluster and any(str(location).startswith("memory://") for location in (source, images)):
        raise click.UsageError("memory:// is of one process alone, and a cluster has several: leave out --engine ray")
    from ensemble.images.decode import silence_decoder_warnings
    from export.inference import pipeline
    from export.inference.infer import ScoreOptions

    context.with_resource(silence_decoder_warnings())
    chosen = pipeline.InferOptions(
        source,
        images,
        output,
        pipeline.ModelSource(run, onnx, bundle, model, positive),
        replace(runtime, cascade=cascade, full=full or adapted),
        ScoreOptions(members, tta, adapted, fill),
    )
    prepare = pipeline.prepare_locally
    if cluster:
        from export.cluster.driver import prepare_on_cluster

        prepare = partial(prepare_on_cluster, cluster, context.with_resource(ExitStack()))
    result = pipeline.run(chosen, prepare, click.echo, lambda line: click.echo(line, err=True))
    speed = f", {result.images_per_second:,.1f} images per second" if result.images_per_second else ""
    click.echo(f"{result.scored} images scored -> {click.format_filename(output)}{speed}")
    if result.exits:
        total = max(sum(result.exits.values()), 1)
        shares = (f"{count / total:.1%} after {name}" for name, count in result.exits.items())
        click.echo(f"Left the cascade: {', '.join(shares)}")
    if result.listing is None:
        return 0
    listing = click.format_filename(result.listing)
    click.echo(f"Error: {result.failed} images could not be read, listed in {listing}", err=True)
    return 1 if result.scored else 2
