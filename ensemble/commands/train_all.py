"""train-all: a member for every recipe of a folder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.commands import options as shared
from ensemble.commands.training_options import TrainOptions, training_options

if TYPE_CHECKING:
    from ensemble.core.recipe import Recipe
    from ensemble.training.distributed import ProcessGroup
    from ensemble.training.train_all import Engine
    from ensemble.training.train_member import Outcome, TrainContext


@click.command("train-all")
@click.argument("recipes", type=click.Path(path_type=Path), default=Path("recipes"))
@training_options
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
    return run_training(recipes, TrainOptions(**settings))


def run_training(source: Path, options: TrainOptions) -> int:
    """Train the recipes of a file or folder as the options say, and print the result; returns the exit code."""
    options.check_engine()
    shared.require_training_packages()
    from ensemble.core.recipe import find_recipes, load_recipes

    recipes = load_recipes(find_recipes(source), options.overrides, str(source))
    from ensemble.core import artifacts
    from ensemble.training import distributed
    from ensemble.training.train_all import train_all
    from ensemble.training.train_member import TrainContext

    with _engine(options, recipes) as (engine, processes):
        context = TrainContext(options.seed, processes, options.report_to, options.save_every)
        if options.dry_run:
            return _dry_run(recipes, context, options)
        try:
            distributed.run_on_main(processes, lambda: _prepare(options.run, recipes, processes.device, options))
            frame = artifacts.read_parquet(artifacts.dataset_path(options.run), "run train-all again")
            outcomes = train_all(recipes, frame, options.run, context, click.echo, options.fresh, engine)
        finally:
            distributed.destroy_process_group()
    return report(options.run, outcomes) if processes.is_main else 0


@contextmanager
def _engine(options: TrainOptions, recipes: "Sequence[Recipe]") -> "Iterator[tuple[Engine, ProcessGroup]]":
    """Where members are trained, and the processes of this command; on a cluster with the device of its members."""
    from ensemble.training import distributed

    if options.engine == "ray":
        from ensemble.cluster.train_driver import open_engine

        with open_engine(options.address, recipes, options.device, options.cpus_per_member) as engine:
            yield engine, distributed.ProcessGroup(device=engine.device)
        return
    from ensemble.training.train_all import LocalEngine

    yield LocalEngine(), distributed.init_process_group(options.device)


def _prepare(run: Path, recipes: "Sequence[Recipe]", device: str, options: TrainOptions) -> None:
    """Read and audit the images, and write the run's data set."""
    from ensemble.audit import prepare_dataset
    from ensemble.core import artifacts
    from ensemble.data import sources
    from ensemble.training.train_all import check_ready

    labelled, notes = sources.read_data(options.data, options.reading)
    for note in notes:
        click.echo(note)
    dataset_options, remote = options.dataset_options(notes), options.engine == "ray"
    check_ready(recipes, device if remote else options.device, options.report_to, remote=remote)
    prepare_dataset.prepare_dataset(run, labelled, dataset_options, click.echo)
    if not options.dry_run:
        click.echo(f"-> {artifacts.dataset_path(run)}")


def _dry_run(recipes: "Sequence[Recipe]", context: "TrainContext", options: TrainOptions) -> int:
    """Print what training would take; the data is prepared in a folder that is thrown away."""
    from tempfile import TemporaryDirectory

    from ensemble.core import artifacts
    from ensemble.training.dry_run import estimate_table
    from ensemble.training.train_all import dry_run

    with TemporaryDirectory(prefix="manyeyes-") as folder:
        data_run = Path(folder)
        _prepare(data_run, recipes, context.processes.device, options)
        frame = artifacts.read_parquet(artifacts.dataset_path(data_run), "try again")
        estimates = dry_run(recipes, frame, options.run, data_run, context)
    click.echo()
    shared.table(estimate_table(estimates))
    click.echo(f"About, on {context.processes.device}, from a few timed steps; nothing was trained or written.")
    return 0


def report(run: Path, outcomes: "Sequence[Outcome]") -> int:
    """Print the table of members; exit code 0, or 1 if some failed, or 2 if all did."""
    from ensemble.audit.headline import audit_headline
    from ensemble.training.train_all import summary

    click.echo()
    shared.table(summary(run, outcomes))
    click.echo(audit_headline(run))
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        click.echo(f"Error: {outcome.name}: {outcome.error}", err=True)
    if len(failed) == len(outcomes):
        return 2
    return 1 if failed else 0
