"""frontier: accuracy against speed on this machine, and which point of it a bundle runs at."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensemble.commands import options
from export.commands.options import bundle_option, file_option, runtime_options, timed_images
from export.runtimes.settings import RuntimeOptions

if TYPE_CHECKING:
    from ensemble.cascade.pareto import Point, PointScores
    from export.inference.frontier import Frontier


MAX_IMAGES_PER_SECOND = 1e6  # beyond any machine


def _budget(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not 0 < value <= MAX_IMAGES_PER_SECOND:  # NaN neither
        raise click.BadParameter(
            f"{value:g} is no speed: give images a second, above 0 and at most {MAX_IMAGES_PER_SECOND:,.0f}"
        )
    return value


@click.command("frontier")
@options.run
@bundle_option("Look at this bundle alone, in place of the run's")
@click.option(
    "--budget",
    type=float,
    callback=_budget,
    metavar="IMAGES_PER_SECOND",
    help="Write the most accurate point that is predicted to reach this speed into the bundle: what runs the bundle "
    "from then on runs that.",
)
@click.option("--reset", is_flag=True, help="Take a point that was chosen out of the bundle: all members run again.")
@timed_images("Images to time decoding on")
@file_option("--output", default="frontier.png", help="The picture to write.")
@runtime_options
@click.pass_context
def frontier(
    context: click.Context,
    run: Path,
    bundle: str | None,
    budget: float | None,
    reset: bool,
    source: Path | None,
    output: Path,
    runtime: RuntimeOptions,
) -> None:
    """What accuracy costs: stacks of some of the members, on this machine.

    Every subset of up to eight members (of more, those found by adding one at a time), at fp32 and
    at the certified precision that auto takes, and the best of them with cascades that may lose
    0.0005 to 0.01 of AUROC. A stack of some members is certified again before it may run below
    fp32. images/s are predicted for this machine: measured times of decoding, of preparing
    pixels and of each member, added up.

    The best of hundreds looks better than it is where it was chosen. So points are chosen on one
    half of the groups of held-out images, and the table says how they do on the other half: AUROC,
    and what is lost against the stack of all members, with 95 % intervals. After train-all --folds
    the training images serve too, each scored by networks that did not see its group. The table
    lists the points that no other beats in both accuracy and speed, where a slower one has to be
    better in 90 % of the draws of groups, not by a few lucky pairs of images. The picture shows all.

    --budget writes one into the bundle, refitted on both halves, and infer, bench and Predictor
    run it from then on, in the --runtime given here unless they are given another. With --full they
    run all members. export keeps the point as long as members and stack stay the same. Copied to
    another machine, it is as accurate there, but maybe not as fast.

    \b
    Examples:
      python cli.py frontier
      python cli.py frontier --budget 50
      python cli.py frontier --bundle copied/bundle --budget 200 --tune
      python cli.py frontier --reset
    """
    if reset and budget is not None:
        raise click.UsageError("--reset takes a chosen point away and --budget chooses one: give one of them")
    if runtime.runtime == "torch":
        raise click.UsageError("frontier is about bundles, which torch does not run; choose another --runtime")
    from ensemble.core.artifacts import bundle_path, ensure_writable
    from ensemble.images.decode import silence_decoder_warnings
    from export.bundle import hub_bundles, operating_point
    from export.bundle.bundle import POINT_FILE, current_bundle

    context.with_resource(silence_decoder_warnings())
    if bundle and hub_bundles.is_remote(bundle) and (reset or budget is not None):
        raise click.UsageError("a bundle on the Hub is not changed there; get a folder of it first: pull USER/REPO")
    located = hub_bundles.locate_bundle(bundle) if bundle else None
    if reset:
        removed = operating_point.remove(located or bundle_path(run))
        click.echo("All members run again." if removed else "No point was chosen for this bundle: all members run.")
        return
    options.require_training_packages()
    from tempfile import TemporaryDirectory

    from ensemble.cascade.pareto import drop_equal_speeds
    from export.inference.benchmark import benchmark_images
    from export.inference.frontier import choose_point, compute_frontier, plot_frontier, write_operating_point

    folder, of_run = located or current_bundle(run), None if located else run
    for target in (output.absolute().parent, *([folder] if budget else [])):
        ensure_writable(target)
    with TemporaryDirectory() as temporary:
        sources, description = benchmark_images(source, of_run, Path(temporary))
        result = compute_frontier(folder, of_run, runtime, sources, click.echo)
    listed = {point: result.best[point][0] for point in drop_equal_speeds(list(result.best))}
    _print(result, listed, description)
    fast = [point for point in result.best if budget and point.images_per_second >= budget]
    plot_frontier(result.tried, listed, result.full[0], budget, fast[-1] if fast else None, output)
    click.echo(f"-> {output}")
    if budget is not None:
        point = choose_point(result, budget)
        chosen = write_operating_point(folder, result, point, budget)
        click.echo(f"Chosen: {' + '.join(point.members)} at {point.precision}")
        click.echo(operating_point.describe(chosen, len(result.full[0].members)))
        click.echo(f"-> {folder / POINT_FILE}; to take it away: frontier --reset")


def _print(result: "Frontier", listed: Mapping["Point", "PointScores"], description: str) -> None:
    import pandas as pd

    from ensemble.core.errors import join_limited

    full, measured = result.full
    marked = {precision: f"{precision} (uncertified)" for precision in result.uncertified}
    click.echo(
        f"\nAll {len(full.members)} members at {marked.get(full.precision, full.precision)}: "
        f"{full.images_per_second:.1f} images/s, AUROC {measured.auroc}"
    )
    click.echo(
        f"Scores are of {result.rows:,} images of {result.groups:,} groups, on which no stack or limit of the table "
        "was fitted."
    )
    click.echo(f"images/s are predicted, for {description}. No point tried beats these in both:")
    lines = [
        {
            "": number,
            "members": " + ".join(point.members),
            "precision": point.precision if result.proven else marked.get(point.precision, point.precision),
            "cascade": f"{point.cascade.tolerance:g}" if point.cascade else "-",
            "images/s": f"{point.images_per_second:.1f}",
            "AUROC": str(how.auroc),
            "lost against all": str(how.loss),
        }
        for number, (point, how) in enumerate(listed.items(), start=1)
    ]
    options.table(pd.DataFrame(lines))
    if result.left_out:
        click.echo(f"Left out: {join_limited(result.left_out, 3)}")
