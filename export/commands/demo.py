"""demo: the whole job on small real data, by the same commands a user would type."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ensemble.commands import options

# recipes/quick made smaller and shorter, for minutes on two cores; nine photographs: 4 train, 1 tunes, 4 are held out.
TRAINING = (
    "--tune 0.15 --heldout 0.4 --seed 4 "
    "--set image.size=96 --set image.count=1 --set train.batch_size=16 --set train.epochs=4"
).split()


@click.command("demo")
@click.option(
    "--run", type=options.FOLDER, default=Path("runs/demo"), help="Folder for the data, the run and the submission."
)
def demo(run: Path) -> int:
    """The whole job on small real data, offline: train-all, stack, export, infer, submit, scores.

    Photographs come from installed packages; the AI class is made from them by a small
    neural network trained on the spot. Minutes on two cores. Run again, it goes on from
    what is finished.
    """
    from ensemble.commands.stack import stack
    from ensemble.commands.train_all import train_all
    from export.commands.export import export
    from export.commands.infer import infer
    from export.commands.submit import submit

    started = time.monotonic()
    options.require_training_packages()
    from ensemble.core.recipe import recipes_folder
    from ensemble.fetch.demo_data import make_demo_data

    data, output = run / "data", run / "submission.csv"
    make_demo_data(data, click.echo)
    common = ["--run", str(run)]
    train_arguments = [str(recipes_folder() / "quick"), "--data", str(data / "train.csv"), *TRAINING]
    code = _call(train_all, [*train_arguments, *common])
    _call(stack, common)
    _call(export, common)
    infer_arguments = ["--onnx", "--members", "--input", str(data / "test.csv"), "--output", str(run / "scores.csv")]
    code = max(code, _call(infer, [*infer_arguments, *common]))
    sample = str(data / "sample_submission.csv")
    _call(submit, ["--scores", str(run / "scores.csv"), "--sample", sample, "--output", str(output), *common])
    _finish(run, data, output)
    click.echo(f"Done in {(time.monotonic() - started) / 60:.1f} minutes.")
    return code


def _call(command: click.Command, arguments: Sequence[str]) -> int:
    """Run a command as if typed, its line printed first; returns its exit code."""
    click.echo()
    click.secho(f"$ python cli.py {command.name} {shlex.join(arguments)}", bold=True)
    return int(command.main(list(arguments), standalone_mode=False) or 0)


def _finish(run: Path, data: Path, output: Path) -> None:
    """Scores on the test photographs, and where to look."""
    import pandas as pd

    from ensemble.audit.headline import audit_headline
    from ensemble.core import artifacts
    from ensemble.stacking.scores import format_scores, score_frames, verdict

    scores = pd.read_csv(run / "scores.csv", dtype={"id": str})
    labels = pd.read_csv(data / "labels.csv", dtype={"id": str})
    scored = score_frames(scores, labels)
    click.echo()
    click.echo(f"On {len(scores)} test tiles of {labels['group'].nunique()} photographs that no network saw:")
    options.table(format_scores(scored))
    click.echo(verdict(scored))
    click.echo(audit_headline(run))
    click.echo()
    outputs: list[tuple[str, Any]] = [
        ("submission", output),
        ("each member's probability", run / "scores.csv"),
        ("members, open with from_pretrained", artifacts.members_path(run)),
        ("ONNX bundle", artifacts.bundle_path(run)),
        ("tiles to look at", data / "test"),
    ]
    for what, path in outputs:
        click.echo(f"  {what:36}{path}")
