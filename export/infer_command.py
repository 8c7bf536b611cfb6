"""infer: parse, call one function, print."""

from pathlib import Path

import click

from ensemble import options


@click.command("infer")
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    default=Path("data/test.csv"),
    show_default=True,
    help="CSV with a column id (or path), or a folder of images.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Where the CSV's images lie.  [default: images/ beside it, or its folder]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("submission.csv"),
    show_default=True,
    help="CSV to write.",
)
@click.option("--onnx", is_flag=True, help="Use the bundle, exported first if missing or out of date.")
@click.option("--members", "with_members", is_flag=True, help="Also write each member's own probability.")
@click.option("--tta", is_flag=True, help="Average over mirrored images where stack --tta found that it helps.")
@click.option("--adapted", is_flag=True, help="Add the shift that adapt estimated to target, and say so.")
@click.option("--fill", type=click.FloatRange(0, 1), help="Target of images that cannot be read.  [default: empty]")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Images that run together.")
@options.run
@options.device
def infer(
    source: Path,
    images: Path | None,
    output: Path,
    onnx: bool,
    with_members: bool,
    tta: bool,
    adapted: bool,
    fill: float | None,
    batch_size: int,
    run: Path,
    device: str,
) -> int:
    """Score images and write a CSV with `id,target`; target is the probability of AI-made.

    Rows and order are the input's. Images that cannot be read are listed in
    NAME.errors.csv beside the output, all others are scored, and the exit code is 1.
    Members that joined by `stack --external` are not run: their scores are looked up by id.

    \b
    Examples:
      python cli.py infer --onnx
      python cli.py infer --onnx --tta
      python cli.py infer --onnx --input photos/ --members --output scores.csv
    """
    from tqdm import tqdm

    from ensemble import artifacts
    from ensemble.stack_run import read_stacker
    from export import bundle, predictor
    from export import infer as inference
    from export.export_run import export_run
    from export.inputs import read_inputs

    artifacts.ensure_writable(output.absolute().parent)
    inputs = read_inputs(source, images)
    if adapted:
        read_stacker(run).adaptation()  # told before anything is exported
    if onnx and not bundle.is_current(run):
        click.echo("The bundle is missing or older than the members or the stack: exporting first.")
        export_run(run, click.echo)
    ensemble = predictor.load_run(run, onnx, device)
    if tta:
        ensemble = inference.with_flips(ensemble, f"run: python cli.py stack --tta --run {run}")
        click.echo(
            f"Averaged over mirrored images: {', '.join(ensemble.stacker.flips or ()) or 'no member, none gained'}"
        )
    click.echo(f"{len(inputs.ids)} images, {len(ensemble.runners)} members on {ensemble.device}")
    if ensemble.externals:
        click.echo(f"Looked up by id: {', '.join(member.name for member in ensemble.externals)}")
    if unused := sorted(set(artifacts.list_members(run)) - set(ensemble.stacker.members)):
        click.echo(f"Not in the stack: {', '.join(unused)}; run stack to weigh them too.")
    if adapted:
        click.echo(inference.adaptation(inputs, ensemble))
    with tqdm(total=len(inputs.ids), desc="infer", unit="image", leave=False, disable=None) as bar:
        result, errors = inference.infer(inputs, ensemble, with_members, batch_size, bar.update, adapted)
    listing = inference.write_result(output, result, errors, fill)
    scored = len(result) - len(errors)
    click.echo(f"{scored} images scored -> {output}")
    if listing is None:
        return 0
    click.echo(f"Error: {len(errors)} images could not be read, listed in {listing}", err=True)
    return 1 if scored else 2
