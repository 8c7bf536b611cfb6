"""Command-line options that several commands share."""

from pathlib import Path

import click

run = click.option(
    "--run",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/default"),
    show_default=True,
    help="Folder of the run: data set, members, stacker, bundle.",
)
members = click.option(
    "--members",
    default="",
    metavar="A,B,...",
    callback=lambda ctx, param, value: tuple(name.strip() for name in value.split(",") if name.strip()),
    help="Only these members.  [default: every member of the run]",
)
device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto takes a GPU where there is one.",
)


def table(frame: object) -> None:
    """Print a data frame as an aligned table without its index."""
    click.echo(frame.to_string(index=False))  # type: ignore[attr-defined]
