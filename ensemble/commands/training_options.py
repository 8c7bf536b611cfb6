"""The options that train and train-all share."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.commands import options

if TYPE_CHECKING:
    from ensemble.audit.prepare_dataset import DatasetOptions
    from ensemble.data.sources import ReadOptions


@dataclass(frozen=True)
class TrainOptions:
    """What the user asks of train or train-all; each field is an option, whose help describes it."""

    data: tuple[Path, ...]
    reading: "ReadOptions"
    tune: float
    heldout: float
    skip_unreadable: bool
    hold_out: tuple[str, ...]
    against: Path | None
    exclude_overlap: bool
    accept_shortcuts: bool
    canonical: bool
    overrides: tuple[str, ...]
    folds: int | None
    fresh: bool
    save_every: float
    report_to: tuple[str, ...]
    dry_run: bool
    engine: str
    address: str | None
    cpus_per_member: int | None
    seed: int
    run: Path
    device: str

    def dataset_options(self, notes: list[str]) -> "DatasetOptions":
        """What is asked of the run's data; notes: on how its labels were read."""
        from ensemble.audit.prepare_dataset import DatasetOptions
        from ensemble.data.splits import Fractions

        names = {field.name for field in fields(DatasetOptions)}
        same = {name: value for name, value in vars(self).items() if name in names}
        fractions = Fractions(self.tune, self.heldout)
        return DatasetOptions(fractions, images=self.reading.images, notes=tuple(notes), **same)

    def check_engine(self) -> None:
        """UsageError for options that exclude each other."""
        from os import environ

        if self.engine == "ray" and self.dry_run:
            raise click.UsageError("--dry-run times steps on this machine; leave --engine ray out")
        if self.engine == "ray" and "WORLD_SIZE" in environ:
            raise click.UsageError("--engine ray starts the processes itself; start this command without a launcher")


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of train and train-all; their values are the fields of `TrainOptions`."""
    decorators: list[Callable[..., Any]] = [
        options.data,
        options.reading,
        click.option("--tune", type=float, default=0.10, help="Share of groups to choose epochs on."),
        click.option("--heldout", type=float, default=0.15, help="Share of groups kept for the stacker."),
        options.skip_unreadable,
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
            metavar="MINUTES",
            help="How often the state of a long epoch is saved; it is after every epoch too.",
        ),
        click.option(
            "--report-to",
            default="tensorboard",
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
            help="ray trains members side by side on a Ray cluster, each with the GPUs of its recipe's train.gpus.",
        ),
        click.option(
            "--address",
            cls=options.ClusterOption,
            metavar="HOST:PORT",
            help="Of the Ray cluster's head, or auto for one on this machine.  [default: RAY_ADDRESS, or else a Ray on "
            "this machine for this job]",
        ),
        click.option(
            "--cpus-per-member",
            cls=options.ClusterOption,
            type=click.IntRange(min=1),
            metavar="N",
            help="More let fewer members train at once, with more memory each.  [default: so few that all do]",
        ),
        options.seed,
        options.run,
        options.device,
    ]
    return options.decorated(command, decorators)
