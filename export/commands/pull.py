"""pull: parse, call one function, print."""

from pathlib import Path

import click

from ensemble.commands import options


@click.command("pull")
@click.argument("repo", metavar="USER/REPO[@REVISION]")
@click.argument("folder", metavar="[DIR]", required=False, type=options.FOLDER)
@click.option("--revision", metavar="NAME", help="A branch, a tag or a commit.  [default: main]")
@click.option("--force", is_flag=True, help="Replace another bundle in DIR.")
def pull(repo: str, folder: Path | None, revision: str | None, force: bool) -> None:
    """Get a bundle from the Hugging Face Hub into DIR, by default bundles/REPO.

    Every file is of one commit and is checked against the bundle's own list. What has arrived
    is kept in huggingface_hub's cache, so the same command goes on where it was stopped. Where
    DIR holds the same bundle already, only damaged files are replaced, and what else lies there
    stays. To score without a folder of your own, name the bundle itself: --bundle hf://USER/REPO.

    \b
    Examples:
      python cli.py pull USER/REPO
      python cli.py pull USER/REPO copied/bundle --revision v1
      python cli.py infer --bundle hf://USER/REPO --input photos/
    """
    from export.bundle import hub_bundles

    name, at = hub_bundles.parse(repo)
    if at and revision:
        raise click.UsageError("the revision is given twice")
    target = folder or Path("bundles") / name.rpartition("/")[2]
    commit, changed = hub_bundles.pull(name, at or revision, target, force)
    click.echo(f"{name} at {commit[:12]} {'->' if changed else 'is what is in'} {target}")
    if changed:
        click.echo(f"Score with it: python cli.py infer --bundle {target} --input IMAGES")
