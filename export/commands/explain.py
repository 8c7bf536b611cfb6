"""explain: one image's target, each member's part in it, and where its evidence lies."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.commands import options
from ensemble.core.errors import ArtifactError
from export.commands.options import file_option

if TYPE_CHECKING:
    import numpy as np

CELLS = 16  # of a heat map in JSON, along its longer side


@click.command("explain")
@click.argument("image", type=click.Path(path_type=Path))
@options.run
@options.members("Heat maps of these members only.  [default: every member of the stack]")
@file_option("--output", default="explain.png", help="Picture to write.")
@click.option(
    "--json",
    "values_file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Also write the numbers, and the heat maps on a coarse grid, as JSON; - writes them to standard output.",
)
@options.device
def explain(
    image: Path, run: Path, members: tuple[str, ...], output: Path, values_file: Path | None, device: str
) -> None:
    """Show where in one IMAGE each member's evidence lies.

    Prints P(ai), the threshold, and each member's logit, p and what it adds to the stack's logit
    (its weight times its calibrated probability), and draws the image beside a heat map of every
    member: where it found what speaks for its own answer, ai where its logit is above 0 and else
    real. Heat maps show a member's attention, not proof.

    \b
    Examples:
      python cli.py explain photo.jpg
      python cli.py explain photo.jpg --members swin_tiny --output swin.png --json -
    """
    from tqdm import tqdm

    from ensemble.core import artifacts
    from ensemble.data.inputs import inputs_from_files
    from ensemble.images.decode import decode
    from ensemble.models import external
    from ensemble.stacking.stack import read_stacker
    from export.inference import explain
    from export.inference.loading import load_networks
    from export.runtimes import runner
    from export.runtimes.settings import RuntimeOptions

    stacker = read_stacker(run)
    externals = external.read_externals(run, stacker.members)
    trained = [name for name in stacker.members if name not in {member.name for member in externals}]
    if unknown := [name for name in members if name not in trained]:
        raise ArtifactError(f"no network {unknown[0]!r} in the stack of {run}; it has: {', '.join(trained)}")
    runner.require_torch()
    explain.require_captum()
    artifacts.ensure_writable(output.absolute().parent)
    from ensemble.evaluation.heatmaps import heatmaps

    decoded = decode(image)
    ensemble, networks = load_networks(run, stacker, RuntimeOptions("torch", device=device))
    ids = (key for key in (image.name, image.stem) if all(key in member.test.index for member in externals))
    values = explain.explain_scores(ensemble, inputs_from_files([next(ids, image.name)], [image]))
    bar = tqdm(members or trained, desc="explain", unit="member", leave=False, disable=None)
    heats = {name: heatmaps(networks[name], decoded) for name in bar}
    _draw(image, decoded, values, heats, output)
    json_to_stdout = values_file == Path("-")
    _print(values, err=json_to_stdout)
    click.echo(f"{explain.HEATMAP_NOTE}\n-> {output}", err=json_to_stdout)
    if values_file is not None:
        _write(values_file, image, values, heats)


def _draw(image: Path, decoded: Any, values: dict[str, Any], heats: "dict[str, np.ndarray]", output: Path) -> None:
    from ensemble.evaluation.heatmaps import Panel, overlay, shrink, write_figure
    from export.inference.explain import HEATMAP_NOTE, predicted_class

    verdict = f"P(ai) {values['target']:.3f}, threshold {values['threshold']:.3g}: {values['verdict']}"
    panels = [Panel(shrink(decoded), "the image", f"{decoded.width} x {decoded.height} pixels")]
    for name, heat in heats.items():
        own = values["members"][name]
        line = (
            f"{predicted_class(own)}   logit {own['logit']:+.2f}   p {own['p']:.2f}   in the stack {own['share']:+.2f}"
        )
        panels.append(Panel(overlay(decoded, heat), name, line))
    write_figure(panels, f"{image.name}   {verdict}", HEATMAP_NOTE, output)


def _print(values: dict[str, Any], err: bool) -> None:
    import pandas as pd

    from export.inference.explain import predicted_class

    rows = [
        {
            "member": name,
            "says": predicted_class(own),
            "logit": f"{own['logit']:+.3f}",
            "p": f"{own['p']:.3f}",
            "in the stack": f"{own['share']:+.3f}",
        }
        for name, own in values["members"].items()
    ]
    click.echo(f"P(ai) {values['target']:.4f}, threshold {values['threshold']:.4g}: {values['verdict']}", err=err)
    click.echo(pd.DataFrame(rows).to_string(index=False), err=err)


def _write(file: Path, image: Path, values: dict[str, Any], heats: "dict[str, np.ndarray]") -> None:
    """The numbers and coarse heat maps, rows from the top, as JSON."""
    from ensemble.core import artifacts
    from ensemble.data.files import as_utf8
    from ensemble.evaluation.heatmaps import downsample
    from export.inference.explain import HEATMAP_NOTE

    cells = {name: downsample(heat, CELLS).round(3).tolist() for name, heat in heats.items()}
    members = {name: own | ({"heat": cells[name]} if name in cells else {}) for name, own in values["members"].items()}
    image_name = as_utf8(image)
    result = {"image": image_name, **values, "members": members, "note": HEATMAP_NOTE}
    if file == Path("-"):
        click.echo(json.dumps({"format_version": artifacts.FORMAT_VERSION, **result}, indent=1, ensure_ascii=False))
    else:
        artifacts.write_json(file, result)
