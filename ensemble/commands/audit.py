"""The command `audit`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensemble.commands import options

if TYPE_CHECKING:
    from ensemble.data.sources import ReadOptions


@click.command("audit")
@click.argument("data", type=options.IMAGES_PATH, nargs=-1, required=True)
@options.reading
@options.against
@options.accept_shortcuts
@click.option("--html", type=options.FILE, help="Also write a page to look at.")
@click.option("--json", "as_json", type=options.FILE, help="Also write the findings.")
@click.option(
    "--run",
    type=options.FOLDER,
    help="For the page's swap test: score with this run's members instead of a small probe.",
)
def audit(
    data: Sequence[Path],
    reading: "ReadOptions",
    against: Path | None,
    accept_shortcuts: bool,
    html: Path | None,
    as_json: Path | None,
    run: Path | None,
) -> int:
    """What could a detector cheat with? Look for shortcuts in labelled images, before training.

    DATA: folders of ai/ and real/, or CSVs, as for --data of train-all. The zero-pixel null
    asks how well metadata alone (format, size, JPEG tables, EXIF, file names, ...) tells the
    classes apart on groups it has not seen; above 0.60 balanced accuracy it blocks training.

    \b
    Exit code 1 if it blocks, and --accept-shortcuts is not given.
    Examples:
      python cli.py audit data/train --html audit.html
      python cli.py audit data/train --against data/test.csv
    """
    options.require_training_packages()
    from ensemble.audit import audit as auditing
    from ensemble.audit import page as audit_page
    from ensemble.audit.audit import audit_data
    from ensemble.core import artifacts
    from ensemble.data import sources

    for path in filter(None, (html, as_json)):
        artifacts.ensure_writable(path.resolve().parent)
    if run is not None:
        if html is None:
            raise click.UsageError("--run scores the swap test of the page; name that with --html")
        artifacts.list_members(run)
    skipped: sources.Skipped = Counter()
    items, notes = sources.read_data(data, replace(reading, skipped=skipped))
    audited, test = audit_data(items, notes, skipped, against, reading.images)
    findings = audited.to_dict()
    click.echo(f"{findings['images']} images, {findings['ai']} ai, in {findings['groups']} groups")
    for line in auditing.lines(findings):
        click.echo(line)
    if as_json is not None:
        artifacts.write_json(as_json, findings)
    if html is not None:
        page = audit_page.render(audited, test, [str(path) for path in data], run)
        with artifacts.replacing(html) as temporary:
            temporary.write_text(page, encoding="utf-8")
        click.echo(f"-> {html}")
    if findings["blocked"] and not accept_shortcuts:
        click.echo("Blocked: train-all refuses this data. Try canonicalise, or --accept-shortcuts.")
        return 1
    return 0
