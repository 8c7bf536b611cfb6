"""The command `fetch`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.commands import options
from ensemble.core.errors import DataError

if TYPE_CHECKING:
    from ensemble.fetch.catalogue import ImageSource
    from ensemble.fetch.fetch import FetchResult


@click.command("fetch")
@click.argument("name", required=False)
@click.option("--list", "show_list", is_flag=True, help="Print the catalogue.")
@click.option("--limit", type=click.IntRange(min=0), default=5000, help="How many images; 0 for all.")
@click.option("--output", type=options.FOLDER, help="[default: data/fetched/NAME]")
@click.option(
    "--keep-archive", is_flag=True, help="Keep what was downloaded, so that a larger --limit reads on from it."
)
@click.option("--image-column", metavar="NAME", help="hf://: the column of images.  [default: image]")
@click.option("--label-column", metavar="NAME", help="hf://: the column that tells what an image is.")
@click.option("--class", "label", type=click.Choice(["ai", "real"]), help="hf://: what all of its images are.")
@options.classes("hf://: what the label column's values mean, for example fake=ai,human=real; others are passed over.")
@click.option("--generator", metavar="NAME", help="hf://: what made its ai images.")
@click.option("--split", metavar="NAME", help="hf://: split to read.  [default: train]")
@click.option("--config", metavar="NAME", help="hf://: configuration (subset) to read.")
def fetch(
    name: str | None,
    show_list: bool,
    limit: int,
    output: Path | None,
    keep_archive: bool,
    **hub_options: Any,
) -> int:
    """Fetch images of a catalogue source, or of any data set on the Hub, for --data.

    Takes the first images in the source's own order, half of each class where it has two, and
    keeps their bytes as they are. Archives are read while they arrive: the rest is not
    downloaded. The same command goes on after an interruption, and a larger --limit goes on
    from what is there.

    \b
    Examples:
      python cli.py fetch                                   what there is
      python cli.py fetch midjourney-v5 --limit 2000
      python cli.py fetch hf://datasets/OWNER/NAME --label-column label --classes fake=ai,human=real
    """
    from ensemble.fetch import catalogue

    entries = catalogue.load_catalogue()
    if show_list or name is None:
        click.echo(catalogue_table(list(entries.values())))
        return 0
    given = {option: value for option, value in hub_options.items() if value}
    if name.startswith("hf:"):
        source = catalogue.hub_source(name, **given)
    elif given:
        option = {"label": "class"}.get(next(iter(given)), next(iter(given))).replace("_", "-")
        raise DataError(f"--{option} is for {catalogue.HUB_PREFIX}OWNER/NAME; the catalogue knows it for {name}")
    else:
        source = catalogue.find_source(name, entries)
    folder = output or Path("data/fetched") / source.name.replace("/", "--")
    from ensemble.fetch import fetch as fetching

    result = fetching.fetch(source, folder, limit, keep_archive)
    for line in summary(source, folder, limit, result, keep_archive):
        click.echo(line)
    for refusal in result.tally.refusals():
        click.echo(f"Error: refused {refusal}", err=True)
    return 1 if result.tally.refused else 0


def catalogue_table(sources: "list[ImageSource]") -> str:
    """The catalogue as aligned text, with what is not verified below it."""
    rows = [("name", "class", "generator", "images", "download", "where", "licence")]
    for source in sources:
        size = f"{source.bytes / 1e9:.1f} GB" if source.bytes else "?"
        count = f"{source.images:,}" if source.images else "?"
        where = f"Hub {source.hub}" if source.hub else f"Kaggle {source.kaggle}"
        classes = "+".join({0: "real", 1: "ai"}[label] for label in reversed(source.labels))
        rows.append((source.name, classes, source.generator or "-", count, size, where, source.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"  {source.name}: {source.unverified}" for source in sources if source.unverified]
    return "\n".join([*lines, "", "Not verified:", *notes])


def summary(source: "ImageSource", folder: Path, limit: int, result: "FetchResult", keep_archive: bool) -> list[str]:
    """The lines to print after a fetch: counts, what was skipped, licence, and the next command."""
    from ensemble.core.names import LABELS

    counts = ", ".join(f"{count:,} {LABELS[label]}" for label, count in sorted(result.counts.items(), reverse=True))
    total, megabytes = sum(result.counts.values()), result.downloaded_bytes / 1e6
    news = f"{result.new or 'none'} new" + (f", {megabytes:,.1f} MB downloaded" if result.downloaded_bytes else "")
    lines = [f"{source.name}: {total:,} images ({counts}) in {folder}; {news}."]
    passed = [f"{count:,} {reason}" for reason, count in sorted(result.tally.passed.items())]
    if passed:
        lines.append(f"Skipped: {', '.join(passed)}.")
    if result.exhausted and limit and total < limit:
        lines.append(f"The source has no more images (--limit was {limit:,}).")
    if not result.exhausted and not keep_archive and source.unpack == "tar.gz" and result.downloaded_bytes:
        lines.append(f"A larger --limit downloads these {megabytes:,.1f} MB again; --keep-archive avoids that.")
    lines.append(f"Licence: {result.licence or 'not known'}; read {source.url} before you pass images on.")
    if source.unverified:
        lines.append(f"Not verified: {source.unverified}.")
    other = "" if len(result.counts) == 2 else " --data FOLDER_OR_CSV_OF_THE_OTHER_CLASS"
    lines.append(f"Use them: python cli.py train-all recipes/ --data {folder / 'data.csv'}{other}")
    return lines
