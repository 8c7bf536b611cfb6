"""The command `select`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.commands import options
from ensemble.core.errors import join_limited

if TYPE_CHECKING:
    from ensemble.selection.run import SelectionResult

PATH = click.Path(path_type=Path)


@click.command("select")
@click.option(
    "--test", type=options.IMAGES_PATH, required=True, help="Folder of test images, or a CSV with id or path."
)
@click.option(
    "--pool",
    "pools",
    type=options.IMAGES_PATH,
    required=True,
    multiple=True,
    help="Folder or CSV to choose from; may be repeated. Labelled by class folders (ai/, real/) or a column label.",
)
@click.argument("more", type=options.IMAGES_PATH, nargs=-1, metavar="[POOL]...")
@click.option("--count", type=click.IntRange(min=1), required=True, help="How many images to choose.")
@click.option("--output", type=PATH, required=True, help="Folder to fill; an older selection there is replaced.")
@click.option(
    "--embedder",
    metavar="NAME",
    help="What says which images are alike: RUN:MEMBER, a recipe's YAML file, a checkpoint's folder or its Hub id.  "
    "[default: recipes/quick/efficientnet_lite0.yaml]",
)
@click.option(
    "--balance",
    type=click.FloatRange(0, 1),
    help="Share of ai images, of a labelled pool.  [default: 0.5, or what a pool of one class has]",
)
@click.option("--clusters", type=click.IntRange(min=1), help="Of the test.  [default: sqrt(images / 2), at most 256]")
@click.option("--copy", is_flag=True, help="Copy the images instead of linking to them.")
@options.reading
@click.option("--skip-unreadable", is_flag=True, help="Leave out broken test images instead of stopping.")
@click.option("--cache/--no-cache", default=True, help="Keep embeddings for the next time.")
@click.option(
    "--ablate", "recipe", type=PATH, metavar="RECIPE", help="Train RECIPE on a selection and on a random draw."
)
@click.option("--test-labels", type=options.IMAGES_PATH, help="For --ablate: CSV with id, label and optionally group.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="For --ablate: how often.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="For --ablate: change a recipe's value.")
@options.seed
@options.device
def select(more: tuple[Path, ...], pools: tuple[Path, ...], **settings: Any) -> None:
    """Choose the pool images that are most like the test's, for training.

    The test's images draw in turn, each its nearest pool image that is left. Near-duplicates of
    test images, and of images chosen before within the class, are dropped. Writes links into
    OUTPUT/ai and OUTPUT/real, selection.csv, which --data takes, and selection.jpg.

    \b
    Examples:
      python cli.py select --test data/images --pool pool/ --count 5000 --output data/selected
      python cli.py train-all recipes/ --data data/selected/selection.csv
    """
    options.require_training_packages()
    from ensemble.selection import run
    from ensemble.selection.data import SelectOptions

    select_options = SelectOptions(pools=(*pools, *more), **settings)  # `--pool A B` names two pools
    result = run.select_images(select_options, click.echo)
    _print(select_options.output, result)
    if select_options.recipe is not None:
        from ensemble.selection import ablation

        report = run.ablate_selection(select_options, result, click.echo)
        click.echo(
            f"\nOn {report['half_b']} test images of half B in {report['half_b_groups']} groups, mean of "
            f"{select_options.seeds} seeds, 95 % intervals over groups; {report['images']} images to train on in "
            "either case:"
        )
        options.table(ablation.as_table(report))
        click.echo(ablation.verdict(report))


def _print(output: Path, result: "SelectionResult") -> None:
    import pandas as pd

    frame = result.frame
    click.echo(
        f"dropped: {result.dropped_test} near-duplicates of test images, {result.chosen.duplicates} of other chosen "
        "images"
    )
    click.echo(f"{len(frame)} images -> {output}")
    for column in ("label", "source", "generator"):
        values = frame[column].map({0: "real", 1: "ai", -1: ""}) if column == "label" else frame[column]
        counts = values[values != ""].value_counts()
        if len(counts):
            click.echo(f"  {column}: {join_limited([f'{name} {count}' for name, count in counts.items()], 12)}")
    click.echo()
    quartiles = pd.DataFrame(result.quartiles).T.map("{:.3f}".format)
    options.table(quartiles.rename_axis("distance (1 - cosine)").reset_index())
    used = frame["test_id"].value_counts()
    click.echo(f"{len(used)} of {len(result.data.test_items)} test images drew something, {used.max()} at most")
