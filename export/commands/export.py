"""export: convert a run's stack or single classifiers into a bundle, or certify a bundle again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.commands import options
from ensemble.core.names import is_member_name
from export.commands.options import InsteadOfRun

if TYPE_CHECKING:
    from ensemble.data.sources import LabelledImage, ReadOptions


def _members(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    sources: dict[str, str] = {}
    for value in values:
        name, equals, source = value.partition("=")
        if not equals or not source:
            raise click.BadParameter(f"{value!r}: write NAME=FOLDER or NAME=USER/REPO")
        if not is_member_name(name):
            raise click.BadParameter(f"{name!r} cannot be a member's name; use letters, digits, - and _")
        if name in sources:
            raise click.BadParameter(f"{name!r} is given more than once; every member needs a name of its own")
        sources[name] = source
    return sources


def _labelled(option: str, help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(option, type=options.IMAGES_PATH, multiple=True, metavar="DATA", help=help)


@click.command("export")
@options.run
@click.option("--force", is_flag=True, help="Convert every member anew, whatever the bundle holds.")
@_labelled(
    "--certify-on",
    "Labelled images to certify lower precisions on, in place of the held-out ones: a folder with one folder a "
    "class, or a CSV with id or path, and label. No member may have been fitted on them. May be repeated.",
)
@click.option(
    "--uncertified", is_flag=True, help="Let members run below fp32 without a passing certificate; bundle.json says so."
)
@click.option(
    "--int8",
    is_flag=True,
    help="Also make int8 files, calibrated on the run's training images, for CPUs with VNNI or AMX, and for TensorRT "
    "where that is here. Takes seconds for a small member, minutes for a full-size one, and ten times as long where "
    "layers must be found that stay in fp32.",
)
@click.option(
    "--bundle",
    cls=InsteadOfRun,
    type=options.FOLDER,
    metavar="DIR",
    help="A bundle of its own, in place of the run's: to make with --member, or to certify anew.",
)
@click.option(
    "--member",
    "sources",
    multiple=True,
    metavar="NAME=MODEL",
    callback=_members,
    help="A two-class image classifier fine-tuned elsewhere: a folder, or USER/REPO on the Hub. May be repeated.",
)
@_labelled("--stack-on", "With --member: labelled images to fit the members' weights on, and to certify on.")
@options.reading
@click.pass_context
def export(
    context: click.Context,
    run: Path,
    force: bool,
    certify_on: tuple[Path, ...],
    uncertified: bool,
    int8: bool,
    bundle: Path | None,
    sources: dict[str, str],
    stack_on: tuple[Path, ...],
    reading: "ReadOptions",
) -> None:
    """Convert the stack's members to ONNX and put them into the run's bundle.

    Each file takes uint8 pixels [N, size, size, 3] and gives float32 logits [N]. It is kept
    only if its logits agree with its torch member within 0.001 on real images, in every
    runtime that this machine has.

    Then every precision below fp32 that this machine computes is certified on 256 held-out
    images or more: at most 0.5 % of them may change sides, and AUROC may move by 0.001, for
    each member (one that fails stays fp32) and for the stack. The table shows it. `infer`
    goes below fp32 of its own accord only with a certificate, so export or certify on a
    machine like the one that will score. Certifying an existing bundle converts nothing.

    --int8 adds files in 8 bits. Where a member changes too much on training images that it was
    not calibrated by, the fewest layers that bring it back stay in fp32, and they are named. NNCF
    quantizes (`pip install 'manyeyes[int8]'`), or where it is not installed ONNX Runtime, which
    is less exact for convolutions. To score needs nothing more. Where TensorRT is, members get
    files for it, too: there fp16 and bf16 go first, and `infer --precision int8` runs them.

    --member makes a bundle of classifiers from anywhere, without a run. They count alike, or
    as --stack-on says. With --member, --positive is one of their class names; say what the
    images' classes mean with --classes.

    \b
    Examples:
      python cli.py export
      python cli.py export --int8
      python cli.py export --certify-on data/labelled.csv
      python cli.py export --bundle DIR --certify-on data/labelled/
      python cli.py export --member swin=checkpoints/swin --member vit=USER/REPO \\
        --bundle bundles/two --stack-on data/labelled.csv
    """
    if int8 and bundle is not None:
        raise click.UsageError("--int8 is calibrated on a run's training images: leave out --bundle and --member")
    if sources and bundle is None:
        raise click.UsageError("--member makes a bundle of its own; say where with --bundle DIR")
    if stack_on and not sources:
        raise click.UsageError("--stack-on is for --member; a run's members are weighed by: python cli.py stack")
    if bundle is not None and not (sources or certify_on or uncertified):
        raise click.UsageError("--bundle needs --member to make one, or --certify-on or --uncertified to change one")
    if bundle is not None and bundle.parts[:1] == ("hf:",):
        raise click.UsageError("a bundle on the Hub is not changed there; get a folder of it first: pull USER/REPO")
    if bundle is not None and force and not sources:
        raise click.UsageError("--force converts members anew: name them with --member, or leave it out")
    from ensemble.core.artifacts import bundle_path
    from ensemble.data.sources import read_data
    from ensemble.images.decode import silence_decoder_warnings
    from export.bundle import certificate, check_images
    from export.bundle.allowed_precisions import CertifyOptions
    from export.bundle.export import certify_bundle, export_run

    context.with_resource(silence_decoder_warnings())

    def read(paths: tuple[Path, ...]) -> "list[LabelledImage]":
        items, notes = read_data(paths, replace(reading, positive=None) if sources else reading)
        for note in notes:
            click.echo(note)
        return items

    stack_items = read(stack_on) if stack_on else []
    certify_items, paths = (read(certify_on), certify_on) if certify_on else (stack_items, stack_on)
    labelled = check_images.labelled_images(certify_items, paths) if paths else None
    certify_options = CertifyOptions(labelled, bool(labelled), uncertified, int8)
    if sources and bundle:
        from export.bundle.export import export_classifiers

        certificates, result = export_classifiers(
            sources, bundle, click.echo, reading.positive, force, stack_items, certify_options
        )
        if result:
            options.print_scores(result)
    elif bundle:
        certificates = certify_bundle(bundle, click.echo, certify_options)
    else:
        certificates = export_run(run, click.echo, force, certify_options)
    if certificates["precisions"]:
        options.table(certificate.table(certificates["precisions"]))
    click.echo(f"-> {bundle or bundle_path(run)}")
