"""Command-line options that several commands share."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.core.errors import UnavailableError

if TYPE_CHECKING:
    from ensemble.stacking.stack import StackResult

TRAINING_PACKAGES = (
    "torch torchvision transformers timm accelerate sklearn pydantic yaml peft rich tensorboard matplotlib psutil"
).split()


def decorated(command: Callable[..., Any], decorators: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """The command with these options, which --help lists in this order."""
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


class ClusterOption(click.Option):
    """An option for a Ray cluster: UsageError without --engine ray."""

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        """The value and the rest of the arguments, or UsageError."""
        if self.name in opts and opts.get("engine") != "ray":
            raise click.UsageError(f"{self.opts[0]} is for a Ray cluster: add --engine ray")
        return super().handle_parse_result(ctx, opts, args)


def name_list(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """A click callback: names that are separated by commas."""
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())


class _ImagesPath(click.Path):
    """A path to images, or to a table of them, on disk; the refusal of an object store's URL says how to copy it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ensemble.data.storage import not_on_disk, parse_location

        location = parse_location(value) if isinstance(value, str) else value
        if isinstance(location, str):
            raise not_on_disk(location)
        return super().convert(location, param, ctx)


IMAGES_PATH = _ImagesPath(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)

run = click.option(
    "--run", type=FOLDER, default=Path("runs/default"), help="Folder of the run: data set, members, stacker, bundle."
)


def members(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--members A,B,... as a tuple of names."""
    return click.option("--members", metavar="A,B,...", callback=name_list, help=help)


device = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="auto takes a GPU where there is one."
)

seed = click.option("--seed", type=click.IntRange(min=0), default=0, help="Of whatever is drawn at random.")
data = click.option(
    "--data",
    type=IMAGES_PATH,
    multiple=True,
    default=[Path("data/train")],
    show_default="data/train",
    help="Folder with one folder a class (ai/ and real/), or a CSV or Parquet table of id or path, label, "
    "and perhaps group, source, generator. Repeat it to combine several.",
)
against = click.option(
    "--against",
    type=IMAGES_PATH,
    metavar="TEST",
    help="Test images, a folder or a CSV: report what tells them from the training images, and pictures in both.",
)
skip_unreadable = click.option("--skip-unreadable", is_flag=True, help="Leave out broken images instead of stopping.")
accept_shortcuts = click.option(
    "--accept-shortcuts", is_flag=True, help="Go on though metadata alone tells the classes apart."
)


def _classes(ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, str]:
    from ensemble.core.names import parse_classes

    try:
        return parse_classes(value or "")
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def classes(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--classes as a dict of class names to "ai" or "real"."""
    metavar = "NAME=ai,NAME=real,..."
    return click.option("--classes", metavar=metavar, callback=_classes, help=help)


def reading(command: Callable[..., Any]) -> Callable[..., Any]:
    """How labelled images are read, handed to the command as one `reading`: a `ReadOptions`."""

    @functools.wraps(command)
    def call(
        *, images: Path | None, classes: dict[str, str], positive: str | None, group_column: str, **others: Any
    ) -> object:
        from ensemble.data.sources import ReadOptions

        return command(reading=ReadOptions(images, classes, positive, group_column), **others)

    decorators: list[Callable[..., Any]] = [
        click.option("--images", type=IMAGES_PATH, help="Where a CSV's images lie."),
        classes("What class folders or label texts mean, for example fake=ai,human=real; several may mean one."),
        click.option("--positive", metavar="NAME", help="The class that means AI-made, if its name does not say."),
        click.option("--group-column", default="group", help="CSV column whose equal values stay together."),
    ]
    return decorated(call, decorators)


def table(frame: object) -> None:
    """Print a data frame as an aligned table without its index."""
    click.echo(frame.to_string(index=False))  # type: ignore[attr-defined]


def require_packages(modules: Sequence[str], purpose: str, packages: str) -> None:
    """UnavailableError, with the command that installs the packages, where a module is absent."""
    from importlib.util import find_spec

    if missing := [name for name in modules if find_spec(name) is None]:
        raise UnavailableError(f"{purpose} needs {', '.join(missing)}; run: pip install {packages}")


def require_training_packages() -> None:
    """UnavailableError where torch and friends are absent."""
    require_packages(TRAINING_PACKAGES, "training", "'manyeyes[train]'")


def print_scores(result: "StackResult", rows_name: str = "held-out images") -> None:
    """Print the scores of every member, of their mean and of the stack on the same rows."""
    from ensemble.stacking import scores, stack

    rows = result.data.scored
    click.echo(
        f"On {len(rows.labels)} {rows_name} in {rows.group_count} groups; "
        f"the stack {result.data.basis}, 95 % intervals over groups."
    )
    table(scores.format_scores(result.scored, stack.format_weights(result)))
    click.echo(scores.verdict(result.scored))
