"""stack: parse, call one function, print."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensemble.commands import options

if TYPE_CHECKING:
    from ensemble.stacking.stack import StackOptions, StackResult


def _threshold(ctx: click.Context, param: click.Parameter, value: str) -> str | float:
    from ensemble.stacking.threshold import parse_rule

    try:
        return parse_rule(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither balanced, fpr=SHARE nor a number in 0..1") from None


def _externals(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, Path, Path]]:
    from ensemble.models.external import parse_external

    try:
        return [parse_external(value) for value in values]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command("stack")
@options.run
@options.members("Only these members.  [default: every member of the run]")
@click.option(
    "--kind",
    type=click.Choice(["logistic", "nonnegative", "mean", "best"]),
    default="logistic",
    help="Logistic regression; the same without negative weights; the mean of the logits; the best member alone.",
)
@click.option(
    "--calibration",
    type=click.Choice(["auto", "none", "temperature", "shift"]),
    default="auto",
    help="Scale or shift the stack's logit; auto does only where the log-loss falls beyond noise.",
)
@click.option(
    "--threshold",
    default="balanced",
    metavar="balanced|fpr=SHARE|NUMBER",
    callback=_threshold,
    help="Target at or above it means ai: by balanced accuracy, by the share of reals called ai, or as given.",
)
@click.option("--drop-one", is_flag=True, help="Also say what each member adds and costs.")
@click.option("--tta", is_flag=True, help="Also measure for which members mirrored images help; see infer --tta.")
@click.option(
    "--external",
    "externals",
    multiple=True,
    metavar="NAME=heldout.csv,test.csv",
    callback=_externals,
    help="A model trained elsewhere, by its scores of the held-out rows and of the images to infer: "
    "id, and logit, or p, target or score in 0..1. May be repeated.",
)
def stack(
    run: Path,
    members: tuple[str, ...],
    kind: str,
    calibration: str,
    threshold: str | float,
    drop_one: bool,
    tta: bool,
    externals: list[tuple[str, Path, Path]],
) -> None:
    """Fit the stacker on the members' held-out logits: weights, calibration and threshold.

    Prints every member, the mean of their logits and the stack on the same held-out rows, each
    with its 95 % interval: the stack by cross-validation over groups, or, after `train-all
    --folds`, fitted on out-of-fold logits of the training rows alone. Then the other kinds of
    stack, made in the same way; logistic regression stays unless --kind asks for another. What
    adapt stored belonged to the former stacker and is dropped.

    An --external model must not have seen the held-out rows either: their ids are those with
    split heldout in RUN/dataset.parquet. `infer` looks its scores up by id.

    \b
    Examples:
      python cli.py stack
      python cli.py stack --drop-one --threshold fpr=0.05
      python cli.py stack --kind nonnegative --members swin_small,vit_small
      python cli.py stack --external clip=clip_heldout.csv,clip_test.csv
    """
    options.require_training_packages()
    from ensemble.audit.headline import audit_headline
    from ensemble.core import artifacts
    from ensemble.models import external
    from ensemble.stacking import scores
    from ensemble.stacking.stack import StackOptions, describe_stack, has_shift, stack_run

    loaded = tuple(external.read_external_csv(*value) for value in externals)
    stack_options = StackOptions(kind, calibration, threshold, loaded, tta)
    adapted = has_shift(run)
    done = stack_run(run, members, stack_options)
    options.print_scores(done)
    click.echo("\nKinds of stack, each chosen, calibrated and scored alike:")
    options.table(scores.format_differences(done.kinds, done.stacker.method, "kind"))
    for line in describe_stack(done):
        click.echo(line)
    if drop_one:
        _print_drop_one(run, done, stack_options)
    click.echo(audit_headline(run))
    if adapted:
        click.echo("The adaptation of the former stacker was dropped; run adapt again where you use infer --adapted.")
    click.echo(f"-> {artifacts.stacker_path(run)}")


def _print_drop_one(run: Path, done: "StackResult", stack_options: "StackOptions") -> None:
    from ensemble.stacking import diagnostics

    stacker, data = done.stacker, done.data
    elsewhere = [member.name for member in stack_options.externals]
    trained = [name for name in data.members if name not in elsewhere]
    costs, device = diagnostics.measure_costs(run, trained, data.ids)
    costs |= dict.fromkeys(elsewhere, 0.0)
    lines = diagnostics.drop_each_member(data, stacker.method, stack_options.calibration, done.stack_logits)
    click.echo(f"\nThe stack without one member (ms: its network on {device}, decoding left out):")
    options.table(diagnostics.drop_one_table(lines, costs))
    if elsewhere:
        click.echo(f"Looked up, so without a time: {', '.join(elsewhere)}.")
