"""fetch: parse, call one function, print."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensemble.commands import options
from ensemble.core.errors import DataError

if TYPE_CHECKING:
    from ensemble.fetch.catalogue import Source
    from ensemble.fetch.fetch import Outcome

_HUB_ONLY = ("image_column", "label_column", "label", "generator", "split", "config")


@click.command("fetch")
@click.argument("name", required=False)
@click.option("--list", "show_list", is_flag=True, help="Print the catalogue.")
@click.option(
    "--limit", type=click.IntRange(min=0), default=5000, show_default=True, help="How many images; 0 for all."
)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), help="[default: data/fetched/NAME]")
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
    classes: dict[str, str],
    **hub: str | None,
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
        click.echo(table(list(entries.values())))
        return 0
    source = _source(name, hub, classes, entries)
    folder = output or Path("data/fetched") / source.name.replace("/", "--")
    from ensemble.fetch.fetch import fetch as run

    outcome = run(source, folder, limit, keep_archive)
    for line in report(source, folder, limit, outcome, keep_archive):
        click.echo(line)
    for refusal in outcome.tally.refusals():
        click.echo(f"Error: refused {refusal}", err=True)
    return 1 if outcome.tally.refused else 0


def _source(name: str, hub: dict[str, str | None], classes: dict[str, str], entries: "dict[str, Source]") -> "Source":
    from ensemble.fetch import catalogue

    if not name.startswith("hf:"):
        if given := [option for option in _HUB_ONLY if hub[option] is not None] + ["classes"] * bool(classes):
            option = {"label": "class"}.get(given[0], given[0]).replace("_", "-")
            raise DataError(f"--{option} is for {catalogue.HUB_PREFIX}OWNER/NAME; the catalogue knows it for {name}")
        return catalogue.find_source(name, entries)
    return catalogue.hub_source(
        name,
        image_column=hub["image_column"] or "image",
        label_column=hub["label_column"] or "",
        label=hub["label"],
        classes=classes,
        generator=hub["generator"] or "",
        split=hub["split"] or "train",
        config=hub["config"],
    )


def table(sources: "list[Source]") -> str:
    """The catalogue as aligned text, with what is not verified below it."""
    rows = [("name", "class", "generator", "images", "download", "where", "licence")]
    for source in sources:
        size = f"{source.bytes / 1e9:.1f} GB" if source.bytes else "?"
        count = f"{source.images:,}" if source.images else "?"
        where = f"Hub {source.hub}" if source.hub else f"Kaggle {source.kaggle}"
        rows.append((source.name, _classes(source), source.generator or "-", count, size, where, source.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"  {source.name}: {source.unverified}" for source in sources if source.unverified]
    return "\n".join([*lines, "", "Not verified:", *notes])


def _classes(source: "Source") -> str:
    return "+".join({0: "real", 1: "ai"}[label] for label in reversed(source.labels))


def report(source: "Source", folder: Path, limit: int, outcome: "Outcome", keep_archive: bool) -> list[str]:
    """What to tell after a fetch: counts, what was left, licence, and the next command."""
    from ensemble.core.names import LABELS

    counts = ", ".join(f"{count:,} {LABELS[label]}" for label, count in sorted(outcome.counts.items(), reverse=True))
    total, megabytes = sum(outcome.counts.values()), outcome.downloaded / 1e6
    news = f"{outcome.new or 'none'} new" + (f", {megabytes:,.1f} MB downloaded" if outcome.downloaded else "")
    lines = [f"{source.name}: {total:,} images ({counts}) in {folder}; {news}."]
    passed = [f"{count:,} {reason}" for reason, count in sorted(outcome.tally.passed.items())]
    if passed:
        lines.append(f"Passed over: {', '.join(passed)}.")
    if outcome.ended and limit and total < limit:
        lines.append(f"The source has no more of them than this (--limit was {limit:,}).")
    if not outcome.ended and not keep_archive and source.unpack == "tar.gz" and outcome.downloaded:
        lines.append(f"A larger --limit downloads these {megabytes:,.1f} MB again; --keep-archive avoids that.")
    lines.append(f"Licence: {outcome.licence or 'not known'}; read {source.url} before you pass images on.")
    if source.unverified:
        lines.append(f"Not verified: {source.unverified}.")
    other = "" if len(outcome.counts) == 2 else " --data FOLDER_OR_CSV_OF_THE_OTHER_CLASS"
    lines.append(f"Use them: python cli.py train-all recipes/ --data {folder / 'data.csv'}{other}")
    return lines
