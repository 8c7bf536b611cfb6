"""The command `canonicalise`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.commands import options

if TYPE_CHECKING:
    from ensemble.data.sources import ReadOptions


@click.command("canonicalise")
@click.argument("data", type=options.IMAGES_PATH, nargs=-1, required=True)
@click.argument("folder", type=options.FOLDER)
@options.reading
@options.skip_unreadable
@click.option(
    "--size",
    type=click.IntRange(min=32),
    help="Side of the crop in pixels.  [default: what 95 % of each class can spare]",
)
@click.option(
    "--quality",
    type=(click.IntRange(1, 100), click.IntRange(1, 100)),
    help="Lowest and highest quality of the last JPEG.  [default: below what the classes have]",
)
@options.seed
def canonicalise(data: Sequence[Path], folder: Path, reading: "ReadOptions", **settings: Any) -> int:
    """Write labelled images anew, stored alike for both classes, into FOLDER.

    Metadata and names go, every image becomes a crop of one size at its own resolution and
    gets the same JPEG history, whatever its class. DATA as for audit; FOLDER/data.csv is
    for --data.

    \b
    Example: python cli.py canonicalise data/train data/canonical
    """
    options.require_training_packages()
    from ensemble.audit.canonicalise import canonicalise_data

    for line in canonicalise_data(data, folder, reading, **settings):
        click.echo(line)
    click.echo(f"-> {folder / 'data.csv'}; next: python cli.py audit {folder / 'data.csv'}")
    return 0
