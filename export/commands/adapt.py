"""adapt: score unlabelled target images, estimate one shift, store it beside the stacker."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensemble.commands import options
from export.commands.options import runtime_options
from export.runtimes.settings import RuntimeOptions

if TYPE_CHECKING:
    from ensemble.stacking.label_shift import ShiftEstimate


@click.command("adapt")
@click.option(
    "--images",
    "source",
    type=options.IMAGES_PATH,
    required=True,
    metavar="DIR_OR_CSV",
    help="Target images, 10 or more: a folder, or a CSV as for infer. Labels are not looked at.",
)
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="The share of ai among them, where you know it.  [default: estimated]",
)
@options.seed
@options.run
@runtime_options
def adapt(source: Path, share: float | None, seed: int, run: Path, runtime: RuntimeOptions) -> None:
    """Estimate one shift of the stack's logit from unlabelled target images.

    The share of ai among them is the one under which their scores are likeliest, and the shift
    corrects target for it. That holds if only the share differs from the images that the stack
    was fitted on. Where the pictures differ too (another generator, camera or compression),
    lower scores are taken for fewer ai images and target gets worse; without labels nothing
    can tell the two apart. If you know the share, give --share: the shift then makes the mean
    target equal it, which also corrects scores that moved as a whole.

    The shift is kept in stacker.json, and goes with the next bundle. Only `infer --adapted`
    applies it; a new stack drops it.

    \b
    Examples:
      python cli.py adapt --images data/test.csv
      python cli.py adapt --images photos/ --share 0.5
      python cli.py infer --onnx --adapted
    """
    import numpy as np
    from tqdm import tqdm

    from ensemble.core import artifacts
    from ensemble.core.log import no_log
    from ensemble.core.metrics import sigmoid
    from ensemble.data.files import as_utf8
    from ensemble.data.inputs import names, read_inputs
    from ensemble.stacking import label_shift, stack
    from export.bundle import bundle
    from export.bundle.export import export_run
    from export.inference.infer import member_logits
    from export.inference.loading import load_run

    inputs = read_inputs(source)
    if inputs.note:
        click.echo(inputs.note, err=True)
    exported = bundle.is_current(run)
    ensemble = load_run(run, exported, replace(runtime, full=True), click.echo)
    stacker, fitted_prior = ensemble.stacker, stack.fitted_prior(run, ensemble.stacker)
    click.echo(f"{inputs.count} images, {len(ensemble.runners)} members on {ensemble.device}")
    with tqdm(total=inputs.count, desc="adapt", unit="image", leave=False, disable=None) as bar:
        scores, failed = member_logits(inputs, ensemble, progress=bar.update)
    logits = stacker.logit(np.delete(scores, list(failed), axis=0))
    estimate = label_shift.estimate_shift(logits, fitted_prior, share, seed=seed)
    stored = label_shift.LabelShift(
        shift=estimate.shift.value,
        prior=estimate.prior.value,
        images=len(logits),
        data=as_utf8(source),
        estimator="em" if share is None else "share",
        names=label_shift.names_sha256(names(inputs)),
    )
    stack.store_shift(run, stored)
    if exported:
        export_run(run, no_log)  # the members stay, the stacker is new
    if failed:
        click.echo(f"{len(failed)} images could not be read and were left out.")
    before, after = ((sigmoid(logits + by) >= stacker.threshold).sum() for by in (0.0, stored.shift))
    for line in _describe_estimate(estimate, fitted_prior, share):
        click.echo(line)
    click.echo(
        f"At the threshold {stacker.threshold:.3g}, {after} of {len(logits)} are ai; {before} without the shift."
    )
    click.echo(f"-> {artifacts.stacker_path(run)}; infer --adapted applies it, infer alone does not.")


def _describe_estimate(estimate: "ShiftEstimate", fitted_prior: float, share: float | None) -> list[str]:
    """The estimate and what it assumes, in lines."""
    given = "as given" if share is not None else "estimated, 95 % interval over images"
    prior = f"{share:.3g}" if share is not None else str(estimate.prior)
    lines = [
        f"Share of ai: {prior} ({given}); {fitted_prior:.4f} where the stack was fitted.",
        f"Shift of the stack's logit: {estimate.shift}",
    ]
    if estimate.at_edge:
        lines.append(
            "Warning: by these scores nearly all images are of one class. That is right only if they are; "
            "otherwise target is now useless: give --share, or do without."
        )
    if share is None:
        lines.append(
            "This assumes that only the share of ai changed. It cannot know whether the pictures did too: other "
            "generators or compression may look like another share. Check some labels, or give --share."
        )
    else:
        lines.append(
            "This assumes that the share is right, and that the scores of both classes moved by the same amount."
        )
    return lines
