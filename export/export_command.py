"""export: parse, call one function, print."""

from pathlib import Path

import click

from ensemble import options


@click.command("export")
@options.run
@click.option("--force", is_flag=True, help="Convert every member anew, whatever the bundle holds.")
def export(run: Path, force: bool) -> None:
    """Convert the stack's members to ONNX and put them into the run's bundle.

    Each file takes uint8 pixels [N, size, size, 3] and gives float32 logits [N]. It is kept
    only if its logits agree with its torch member within 0.001 on real held-out images.
    """
    from ensemble.artifacts import bundle_path
    from export.export_run import export_run

    export_run(run, click.echo, force)
    click.echo(f"-> {bundle_path(run)}")
