"""report: parse, call one function, print."""

from pathlib import Path

import click

from ensemble.commands import options


@click.command("report")
@options.run
@click.option("--evaluation", metavar="NAME", help="Which of the run's evaluations to show.  [default: the latest]")
@click.option("--output", type=options.FILE, help="HTML file to write.  [default: report.html in the run]")
@click.option("--no-heatmaps", is_flag=True, help="Leave out where a member finds its evidence, which takes longest.")
def report(run: Path, evaluation: str | None, output: Path | None, no_heatmaps: bool) -> None:
    """Write one page that shows whether to trust the stack, and where not to.

    It shows the run's held-out images, and those of an evaluation if there is one: scores with
    95 % intervals beside what metadata alone reaches, curves, calls by generator and source,
    the members' disagreement, the worst errors with heat maps, and mean spectra. The file
    needs nothing else: send it, print it, read it on a phone.

    \b
    Examples:
      python cli.py report
      python cli.py report --run runs/quick --evaluation chameleon --output quick.html
      python cli.py report --no-heatmaps
    """
    options.require_training_packages()
    from ensemble.core import artifacts
    from ensemble.evaluation.report import heatmap_overlay, largest_weight_member, write_report
    from ensemble.stacking.stack import read_stacker

    target = output or run / "report.html"
    name = largest_weight_member(run, read_stacker(run))
    artifacts.ensure_writable(target.resolve().parent)
    click.echo(write_report(run, target, evaluation, None if no_heatmaps else heatmap_overlay(run, name)))
    click.echo(f"-> {target}")
