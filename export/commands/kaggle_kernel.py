"""kaggle-kernel: parse, call one function, print."""

import shlex
from pathlib import Path
from typing import Any

import click

from ensemble.commands import options
from export.commands.options import bundle_option

PYTHON, PLATFORM = "3.12", "manylinux_2_28_x86_64"


def _python(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if value.count(".") != 1 or not all(part.isascii() and part.isdecimal() for part in value.split(".")):
        raise click.BadParameter(f"write it as {PYTHON}")
    return value


@click.command("kaggle-kernel")
@click.argument("folder", metavar="DIR", type=options.FOLDER)
@click.option("--user", envvar="KAGGLE_USERNAME", show_envvar=True, help="Your name on Kaggle, as in its addresses.")
@click.option("--competition", metavar="SLUG", help="The competition, as in its address.")
@click.option("--name", default="manyeyes", help="What to call the data set, as in addresses.")
@click.option("--python", callback=_python, default=PYTHON, help="Python of Kaggle's image.")
@click.option("--platform", default=PLATFORM, help="Its platform; older wheels are taken too.")
@click.option("--gpu/--cpu", default=False, help="Score on a T4: 1.5 GB more of CUDA libraries.")
@click.option("--input", default="test.csv", help="infer's --input, in the competition's folder.")
@click.option("--images", help="infer's --images, in the competition's folder.  [default: as infer finds them]")
@click.option("--sample", default="sample_submission.csv", help="The sample, in that folder.")
@click.option("--uncertified", is_flag=True, help="Take a bundle that may run below fp32 without a certificate.")
@bundle_option("A finished bundle, in place of a run's")
@options.run
def kaggle_kernel(
    folder: Path,
    user: str | None,
    competition: str | None,
    python: str,
    platform: str,
    bundle: str | None,
    run: Path,
    **settings: Any,
) -> int:
    """Make what a code competition without internet needs, in DIR.

    DIR/dataset has the bundle and wheels of manyeyes and of all it needs, for Kaggle's Python and platform,
    whatever this machine has; DIR/kernel has a short notebook that installs them from there, scores the
    competition's images by infer and writes submission.csv by submit. Two commands, printed at the end, upload
    both. Collecting wheels needs a network and pip; nothing is sent. Both folders are made anew each time.

    \b
    Examples:
      python cli.py kaggle-kernel kaggle/ --user me --competition detect-ai-images
      python cli.py kaggle-kernel kaggle/ --input sample_submission.csv --images test --gpu --python 3.11
    """
    from export.bundle import hub_bundles
    from export.bundle.bundle import current_bundle
    from export.kaggle import kernel
    from export.kaggle.wheels import WheelTarget

    kernel_options = kernel.KernelOptions(user=user or kernel.USER_PLACEHOLDER, competition=competition, **settings)
    packed = hub_bundles.locate_bundle(bundle) if bundle else current_bundle(run)
    bundle_bytes, wheel_bytes = kernel.make_kernel(folder, packed, kernel_options, WheelTarget(python, platform))
    machine = "GPU" if kernel_options.gpu else "CPU"
    click.echo(
        f"{folder}: a data set of {(bundle_bytes + wheel_bytes) / 1e6:,.0f} MB (bundle {bundle_bytes / 1e6:,.1f}, "
        f"wheels for Python {python} {wheel_bytes / 1e6:,.0f}) and a notebook, {machine}, no internet"
    )
    if kernel_options.user == kernel.USER_PLACEHOLDER:
        click.echo(f"No --user: put your name in place of {kernel.USER_PLACEHOLDER} in both metadata files first.")
    if not competition:
        click.echo("No --competition: put its slug into competition_sources in kernel-metadata.json first.")
    dataset, notebook = (shlex.quote(str(folder / part)) for part, _ in (kernel.DATASET, kernel.KERNEL))
    click.echo("Upload both, the second once the data set is ready (later: `version -m WHAT` in place of `create`):")
    click.echo(f"  kaggle datasets create -p {dataset} --dir-mode zip --keep-tabular")
    click.echo(f"  kaggle kernels push -p {notebook}")
    slug, name = competition or "COMPETITION", kernel_options.name
    version = f"{kernel_options.user}/{name}{kernel.KERNEL_SUFFIX}"
    click.echo(f"  kaggle competitions submit {slug} -f submission.csv -k {version} -v 1 -m {shlex.quote(name)}")
    return 0
