"""train, train-all: parse, call one function, print."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.commands import options
from ensemble.commands.options import require_training_packages

if TYPE_CHECKING:
    from ensemble.cluster.train_driver import Cluster
    from ensemble.core.recipe import Recipe
    from ensemble.training.train_all import Outcome
    from ensemble.training.train_member import TrainContext


def _training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    decorators: list[Callable[..., Any]] = [
        options.data,
        options.reading,
        click.option(
            "--tune", type=float, default=0.10, show_default=True, help="Share of groups to choose epochs on."
        ),
        click.option(
            "--heldout", type=float, default=0.15, show_default=True, help="Share of groups kept for the stacker."
        ),
        click.option("--skip-unreadable", is_flag=True, help="Leave out broken images instead of stopping."),
        click.option(
            "--hold-out",
            multiple=True,
            metavar="generator=NAME|source=NAME",
            help="Keep a whole generator or source out of everything that is fitted; may be repeated.",
        ),
        options.against,
        click.option("--exclude-overlap", is_flag=True, help="Leave out training images that --against shows too."),
        options.accept_shortcuts,
        click.option("--canonical", is_flag=True, help="Bring images to their canonical form as they are read."),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a recipe's value, for example --set train.lr=1e-5; may be repeated.",
        ),
        click.option(
            "--folds",
            type=click.IntRange(min=2),
            metavar="K",
            help="Train each member K times on K - 1 parts of the training rows, for logits of the part left out, and "
            "once more on all; the stack is fitted on those, held-out rows only score it. About K times as long.",
        ),
        click.option(
            "--fresh",
            is_flag=True,
            help="Throw interrupted trainings away instead of going on from them; finished members stay.",
        ),
        click.option(
            "--save-every",
            type=click.FloatRange(min=0),
            default=10.0,
            show_default=True,
            metavar="MINUTES",
            help="How often the state of a long epoch is saved; it is after every epoch too.",
        ),
        click.option(
            "--report-to",
            default="tensorboard",
            show_default=True,
            metavar="NAME,...",
            callback=lambda ctx, param, value: tuple(
                n for n in value.replace(" ", "").split(",") if n not in ("", "none")
            ),
            help="Where losses and scores are logged: tensorboard (in the run's logs/), wandb, mlflow, ... or none.",
        ),
        click.option(
            "--dry-run", is_flag=True, help="Train and write nothing; say what it would take, from a few timed steps."
        ),
        click.option(
            "--engine",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="ray trains members side by side on a Ray cluster, each with the GPUs of its recipe's train.gpus.",
        ),
        click.option(
            "--address",
            metavar="HOST:PORT",
            help="Of the Ray cluster's head, or auto for one on this machine.  [default: RAY_ADDRESS, or else a Ray on "
            "this machine for this job]",
        ),
        click.option(
            "--cpus-per-member",
            type=click.IntRange(min=1),
            metavar="N",
            help="More let fewer members train at once, with more memory each.  [default: so few that all do]",
        ),
        options.seed,
        options.run,
        options.device,
    ]
    return options.decorated(command, decorators)


@click.command("train")
@click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False))
@_training_options
def train(recipe: Path, **settings: Any) -> int:
    """Train one member from its RECIPE, a YAML file.

    As train-all does, whose help says more; other members of the run stay as they are.

    \b
    Examples:
      python cli.py train recipes/swin_tiny.yaml --set train.epochs=2
      python cli.py train recipes/swin_tiny.yaml --set adapt.mode=lora --set train.layer_decay=null
    """
    return _train(recipe, **settings)


@click.command("train-all")
@click.argument("recipes", type=click.Path(path_type=Path), default=Path("recipes"))
@_training_options
def train_all(recipes: Path, **settings: Any) -> int:
    """Train a member for every YAML file directly in the folder RECIPES.

    All recipes are checked before anything is downloaded. Then the data is audited (where
    metadata alone gives the class away, see canonicalise) and every network tried, before the
    first is trained. A finished member lies in members/NAME of the run, with its weights,
    held-out logits and curves.png; tensorboard --logdir RUN/logs shows how it goes.

    The same command may be repeated after a failure, a kill or an interruption: it goes on
    from the last saved state, and members whose recipe, data and seed are unchanged are not
    trained again. With several GPUs, start it by a launcher, or with --engine ray, which needs
    RUN and the images on storage that all nodes share; the effective batch stays the recipe's.

    \b
    Examples:
      python cli.py train-all recipes/
      python cli.py train-all recipes/ --dry-run
      python cli.py train-all recipes/quick --data photos.csv --run runs/quick --folds 5
      torchrun --nproc-per-node 4 -- cli.py train-all recipes/
      python cli.py train-all recipes/ --engine ray --address head:6379 --run /shared/run
    """
    return _train(recipes, **settings)


def _train(
    source: Path,
    data: Sequence[Path],
    images: Path | None,
    classes: dict[str, str],
    positive: str | None,
    group_column: str,
    overrides: Sequence[str],
    tune: float,
    heldout: float,
    folds: int | None,
    fresh: bool,
    save_every: float,
    report_to: tuple[str, ...],
    dry_run: bool,
    run: Path,
    seed: int,
    device: str,
    engine: str,
    address: str | None,
    cpus_per_member: int | None,
    **settings: Any,
) -> int:
    _check_engine(engine, address, cpus_per_member, dry_run)
    require_training_packages()
    from ensemble.core.recipe_files import find_recipes, load_recipes

    recipes = load_recipes(find_recipes(source), overrides, str(source))
    from ensemble.audit import prepare_dataset as preparing
    from ensemble.core import artifacts
    from ensemble.data import sources
    from ensemble.data.splits import Fractions
    from ensemble.training import distributed
    from ensemble.training import train_all as runs
    from ensemble.training.train_member import TrainContext

    with _joined(engine, address, recipes, device, cpus_per_member) as cluster:
        trained_on = device if cluster is None else cluster.device
        processes = (
            distributed.init_process_group(device) if cluster is None else distributed.ProcessGroup(device=trained_on)
        )

        def prepared(folder: Path) -> None:
            labelled, notes = sources.read_data(data, images, classes, positive, group_column)
            for note in notes:
                click.echo(note)
            fractions, told = Fractions(tune, heldout), tuple(notes)
            wanted = preparing.DatasetOptions(
                fractions, seed, folds=folds, notes=told, images=images, data=tuple(data), **settings
            )
            runs.check_ready(recipes, trained_on, report_to, elsewhere=cluster is not None)
            preparing.prepare(folder, labelled, wanted, click.echo)
            if not dry_run:
                click.echo(f"-> {artifacts.dataset_path(folder)}")

        setup = TrainContext(seed, processes, report_to, save_every)
        if dry_run:
            return _dry_run(recipes, run, setup, prepared)
        try:
            distributed.run_on_main(processes, lambda: prepared(run))
            frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all again")
            outcomes = runs.train_all(recipes, frame, run, setup, click.echo, fresh, cluster)
        finally:
            distributed.destroy_process_group()
    return report(run, outcomes) if processes.is_main else 0


def _check_engine(engine: str, address: str | None, cpus: int | None, dry_run: bool) -> None:
    """UsageError for options that do not go together."""
    from os import environ

    given = [f"--{name}" for name, value in (("address", address), ("cpus-per-member", cpus)) if value is not None]
    if engine == "local" and given:
        raise click.UsageError(f"{given[0]} is of a cluster: add --engine ray")
    if engine == "ray" and dry_run:
        raise click.UsageError("--dry-run times steps on this machine; leave --engine ray out")
    if engine == "ray" and "WORLD_SIZE" in environ:
        raise click.UsageError("--engine ray starts the processes itself; start this command without a launcher")


def _joined(
    engine: str, address: str | None, recipes: "Sequence[Recipe]", device: str, cpus: int | None
) -> "AbstractContextManager[Cluster | None]":
    """The cluster to train on; none to train here."""
    if engine == "local":
        return nullcontext()
    from ensemble.cluster import train_driver

    return train_driver.joined(address, recipes, device, cpus)


def _dry_run(recipes: "Sequence[Recipe]", run: Path, setup: "TrainContext", prepare: Callable[[Path], None]) -> int:
    """Print what training would take; the data is prepared in a folder that is thrown away."""
    from tempfile import TemporaryDirectory

    from ensemble.core import artifacts
    from ensemble.training import dry_run as estimate
    from ensemble.training import train_all as runs

    with TemporaryDirectory(prefix="manyeyes-") as folder:
        prepare(Path(folder))
        frame = artifacts.read_parquet(artifacts.dataset_path(Path(folder)), "try again")
        found = runs.dry_run(recipes, frame, run, Path(folder), setup)
    click.echo()
    options.table(estimate.estimate_table(found))
    click.echo(f"About, on {setup.processes.device}, from a few timed steps; nothing was trained or written.")
    return 0


def report(run: Path, outcomes: "Sequence[Outcome]") -> int:
    """Print the table of members; exit code 0, or 1 if some failed, or 2 if all did."""
    from ensemble.training import train_all as runs

    click.echo()
    options.table(runs.summary(run, outcomes))
    click.echo(audit_headline(run))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        click.echo(f"Error: {outcome.name}: {outcome.error}", err=True)
    if len(failed) == len(outcomes):
        return 2
    return 1 if failed else 0


def audit_headline(run: Path) -> str:
    """What the audit said of the data that these scores were made on."""
    from ensemble.core import artifacts
    from ensemble.core.errors import ArtifactError

    levelled = " Images were read in their canonical form." if artifacts.canonical_path(run).exists() else ""
    try:
        return str(artifacts.read_json(artifacts.audit_path(run), "run train-all again")["headline"]) + levelled
    except ArtifactError:
        return "The data of this run was not audited."
