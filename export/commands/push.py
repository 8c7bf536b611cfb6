"""push: parse, call one function, print."""

from pathlib import Path

import click

from ensemble.commands import options
from export.commands.options import InsteadOfRun


@click.command("push")
@click.argument("repo", metavar="USER/REPO")
@options.run
@click.option(
    "--bundle",
    "folder",
    cls=InsteadOfRun,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Push this bundle in place of the run's; its card then says nothing of the training data.",
)
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@click.option(
    "--members", is_flag=True, help="Also the run's members, each for from_pretrained(..., subfolder='members/NAME')."
)
@click.option("--uncertified", is_flag=True, help="Push a bundle that may run without a certificate; its card says so.")
@click.option(
    "--license", "licence", metavar="NAME", help="As the Hub names it, such as apache-2.0.  [default: unknown]"
)
@click.option("--revision", metavar="BRANCH", help="Branch to push to, made if it is missing.  [default: main]")
@click.option("--message", metavar="TEXT", help="Of the commit.  [default: the bundle's digest]")
def push(
    repo: str,
    run: Path,
    folder: Path | None,
    private: bool,
    members: bool,
    uncertified: bool,
    licence: str | None,
    revision: str | None,
    message: str | None,
) -> None:
    """Put the run's bundle on the Hugging Face Hub, with a model card made from the run.

    A bundle that is missing or older than its members is exported first. Everything arrives in
    one commit. Files that the Hub has are not sent again, files of an earlier push that are
    gone here are deleted, and what you wrote in README.md outside of our two marks stays.
    Stopped at any moment, the same command goes on with the files that are missing.

    The card holds counts, names of generators and scores; no paths, no ids. Log in first with:
    hf auth login, with a token that may write.

    \b
    Examples:
      python cli.py push USER/REPO --private
      python cli.py push USER/REPO --members --license apache-2.0
      python cli.py push USER/REPO --bundle bundles/two --revision two
    """
    own = folder is None
    if folder and members:
        raise click.UsageError("--members are those of a run: leave out --bundle")
    from ensemble.core import artifacts
    from ensemble.stacking.stack import read_stacker
    from export.bundle import bundle, hub_bundles
    from export.hub import model_card
    from export.hub import push as hub_push
    from export.inference.loading import export_if_stale

    name, at = hub_bundles.parse(repo)
    if at:
        raise click.UsageError(f"name the branch with --revision {at}")
    hub_push.check_login(name, licence)
    if folder is None:
        folder = export_if_stale(run, click.echo)
    files = hub_push.bundle_files(folder, uncertified)
    if looked_up := [path for path in files if path.startswith("externals/")]:
        click.echo(f"{', '.join(looked_up)}: ids and scores of images, which whoever may read the repository will see")
    bases = [model_card.base_checkpoint(run, name) for name in bundle.read_contents(folder)["members"]] if own else []
    if members:
        files |= hub_push.member_files(run, read_stacker(run))
    card = model_card.render_card(name, folder, run if own else None, hub_push.look_up_licences(bases), licence)
    digest = artifacts.file_sha256(folder / "bundle.json")[:12]
    result = hub_push.push(name, files, card, click.echo, private, revision, message or f"manyeyes bundle {digest}")
    if not result.sent and not result.deleted:
        click.echo(f"{name} has all of it already -> {result.url}")
        return
    gone = f", {len(result.deleted)} of an earlier push deleted" if result.deleted else ""
    click.echo(f"{len(result.sent)} of {len(files) + 1} files were new or changed{gone} -> {result.url}")
