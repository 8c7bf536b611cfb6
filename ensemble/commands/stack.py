"""stack: parse, call one function, print."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.commands import options

if TYPE_CHECKING:
    from ensemble.stacking.leave_out import LeftOut
    from ensemble.stacking.stack import StackOptions, StackResult

RUN_ONLY = ("run", "tta", "externals")  # options that need a run's images or rows
APPLY_IGNORES = ("kind", "calibration", "threshold", "members", "drop_one", "leave_out")


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
@options.members("Only these members.  [default: every member of the run, every column of numbers of --scores]")
@click.option(
    "--kind",
    type=click.Choice(["logistic", "logit", "nonnegative", "mean", "best"]),
    default="logistic",
    help="logistic: logistic regression on the members' calibrated probabilities, with weights drawn towards each "
    "other. nonnegative: the same, no weight below 0. mean: all weights equal. best: the best member alone. logit: "
    "logistic regression on the logits.",
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
@click.option("--drop-one", is_flag=True, help="Also show what each member adds and costs.")
@click.option(
    "--leave-out",
    type=click.Choice(["generator", "source"]),
    help="Also refit the stacker without each generator, or source, and score it there.",
)
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
@click.option("--scores", type=options.FILE, help="Fit on this table of anybody's scores; no run is needed.")
@click.option("--logits", is_flag=True, help="The table of --scores holds logits, not probabilities.")
@click.option("--apply", "apply_path", type=options.FILE, help="Apply this stacker.json to the table of --scores.")
@click.option("--output", type=options.FILE, help="With --scores.  [default: stacker.json, or target.csv with --apply]")
@click.pass_context
def stack(ctx: click.Context, /, **given: Any) -> None:
    """Fit the stacker on the members' held-out scores: weights, calibration and threshold.

    Prints every member, the mean of their calibrated probabilities and the stack on the same
    held-out rows, each with its 95 % interval: the stack by cross-validation over groups, or,
    after `train-all --folds`, fitted on out-of-fold scores of the training rows alone. Then the
    other kinds of stack, made in the same way; the default stays unless --kind names another.
    What adapt stored belonged to the former stacker and is dropped.

    --scores TABLE fits on a CSV or Parquet file with a column label (1 = ai, 0 = real, or class
    names) and a column of probabilities for each detector. Columns id, group, generator and
    source may be there: rows of one group stay together. An empty cell is an answer that a
    detector did not give. --apply scores such a table, without labels, and writes id,target.

    An --external model must not have seen the held-out rows either: their ids are those with
    split heldout in RUN/dataset.parquet. `infer` looks its scores up by id.

    \b
    Examples:
      python cli.py stack
      python cli.py stack --drop-one --threshold fpr=0.05
      python cli.py stack --kind nonnegative --members swin_small,vit_small
      python cli.py stack --external clip=clip_heldout.csv,clip_test.csv
      python cli.py stack --scores scores.csv --leave-out generator --output stacker.json
      python cli.py stack --scores new.csv --apply stacker.json --output target.csv
    """
    _refuse_combinations(ctx, given)
    if given["apply_path"]:
        _apply(given)
    elif given["scores"]:
        _stack_table(given)
    else:
        _stack_run(given)


def _refuse_combinations(ctx: click.Context, given: dict[str, Any]) -> None:
    """Options that do not go together, before anything is read."""
    names = {param.name: param.opts[0] for param in ctx.command.params}
    chosen = [name for name in given if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE]
    if not given["scores"]:
        reason = "needs --scores"
        refused: tuple[str, ...] = ("logits", "apply_path", "output")
    elif given["apply_path"]:
        refused, reason = (*RUN_ONLY, *APPLY_IGNORES), "does not go with --apply, which takes stacker.json as it is"
    else:
        refused, reason = RUN_ONLY, "does not go with --scores, which needs no run"
    for name in refused:
        if name in chosen:
            raise click.UsageError(f"{names[name]} {reason}")


def _stack_run(given: dict[str, Any]) -> None:
    options.require_training_packages()
    from ensemble.audit.headline import audit_headline
    from ensemble.core import artifacts
    from ensemble.models import external
    from ensemble.stacking.leave_out import run_parts
    from ensemble.stacking.stack import has_shift, stack_run

    run: Path = given["run"]
    loaded = tuple(external.read_external_csv(*value) for value in given["externals"])
    stack_options = _stack_options(given, loaded)
    adapted = has_shift(run)
    done = stack_run(run, given["members"], stack_options)
    options.print_scores(done)
    _print_kinds(done)
    if given["drop_one"]:
        _print_drop_one(run, done, stack_options)
    if column := given["leave_out"]:
        _print_left_out(done, column, run_parts(run, done.data, column))
        click.echo("The members stay as they are; those that were trained on a generator know it.")
    click.echo(audit_headline(run))
    if adapted:
        click.echo("The adaptation of the former stacker was dropped; run adapt again where you use infer --adapted.")
    click.echo(f"-> {artifacts.stacker_path(run)}")


def _stack_table(given: dict[str, Any]) -> None:
    options.require_packages(("sklearn", "threadpoolctl"), "stack --scores", "scikit-learn threadpoolctl")
    from ensemble.stacking.stacker import INPUTS
    from ensemble.stacking.table_stack import fit_table

    output = given["output"] or Path("stacker.json")
    column, inputs = given["leave_out"], INPUTS[0 if given["logits"] else 1]
    done, described, notes = fit_table(
        given["scores"], output, given["members"], inputs, _stack_options(given), [column] if column else []
    )
    for line in notes:
        click.echo(line)
    options.print_scores(done, "rows")
    _print_kinds(done)
    if given["drop_one"]:
        _print_drop_one(None, done, _stack_options(given))
    if column:
        parts = described[column].to_numpy(dtype=object)
        _print_left_out(done, column, (parts, parts))
    click.echo(f"-> {output}")


def _apply(given: dict[str, Any]) -> None:
    from ensemble.stacking.table_stack import apply_to_table

    output = given["output"] or Path("target.csv")
    done = apply_to_table(given["scores"], given["apply_path"], output, given["logits"])
    for line in done.notes:
        click.echo(line)
    click.echo(f"{done.rows} rows, {done.called_ai} at or above the threshold of {done.threshold:.4f} -> {output}")
    if done.empty:
        click.echo(f"{done.empty} rows have no score by any member, so their target is empty.", err=True)
        sys.exit(1)


def _stack_options(given: dict[str, Any], externals: tuple[Any, ...] = ()) -> "StackOptions":
    from ensemble.stacking.stack import StackOptions

    return StackOptions(given["kind"], given["calibration"], given["threshold"], externals, given["tta"])


def _print_kinds(done: "StackResult") -> None:
    from ensemble.stacking import scores
    from ensemble.stacking.stack import describe_stack

    click.echo("\nKinds of stack, each chosen, calibrated and scored alike:")
    options.table(scores.format_differences(done.kinds, done.stacker.method, "kind"))
    for line in describe_stack(done):
        click.echo(line)


def _print_drop_one(run: Path | None, done: "StackResult", stack_options: "StackOptions") -> None:
    from ensemble.stacking import diagnostics

    stacker, data = done.stacker, done.data
    elsewhere = [member.name for member in stack_options.externals] if run else list(data.members)
    costs, note = dict.fromkeys(elsewhere, 0.0), ""
    if run:
        trained = [name for name in data.members if name not in elsewhere]
        measured, device = diagnostics.measure_costs(run, trained, data.ids)
        costs, note = measured | costs, f" (ms: its network on {device}, decoding left out)"
    lines = diagnostics.drop_each_member(data, stacker.method, stack_options.calibration, done.stack_logits)
    click.echo(f"\nThe stack without one member{note}:")
    table = diagnostics.drop_one_table(lines, costs)
    options.table(table if run else table.drop(columns="ms per image"))
    if run and elsewhere:
        click.echo(f"Looked up, so without a time: {', '.join(elsewhere)}.")


def _print_left_out(done: "StackResult", column: str, parts: Any) -> None:
    from ensemble.stacking import leave_out

    lines: list[LeftOut]
    lines, refused = leave_out.leave_each_out(done.data, parts, done.stacker.refit_method, done.strength)
    click.echo(f"\nThe stack refitted without each {column}, scored on it:")
    if lines:
        options.table(leave_out.leave_out_table(lines, column))
    for line in leave_out.describe_left_out(lines, refused, column):
        click.echo(line)
