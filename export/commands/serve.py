"""serve: parse, call one function, print."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ensemble.commands import options
from export.commands.options import bundle_option, cascade_option, full, runtime_options
from export.runtimes.settings import RuntimeOptions
from export.web.limits import MAX_UPLOAD_IMAGES, MAX_UPLOAD_MB, UploadLimits

if TYPE_CHECKING:
    from ensemble.stacking.stacker import Stacker
    from export.inference.ensemble import Ensemble
    from export.web.server import Explain


@click.command("serve")
@options.run
@bundle_option("Use this bundle in place of a run's")
@click.option(
    "--host",
    default="127.0.0.1",
    help="Address to listen on; any but this machine's own lets others use the page, without a password.",
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="Another name that the page is reached by, such as a proxy's; repeatable. Requests to unknown names are "
    "refused. Known: localhost, --host, and for 0.0.0.0 or :: this machine's name and any IP address.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=7860, help="0 takes a free one.")
@click.option("--max-images", type=click.IntRange(1), default=MAX_UPLOAD_IMAGES, help="In one request.")
@click.option(
    "--max-mb", type=click.IntRange(1), default=MAX_UPLOAD_MB, help="MB in one request, all its images together."
)
@click.option(
    "--explain",
    is_flag=True,
    help="Offer heat maps, as explain makes them, of the run's PyTorch members; these are loaded beside the bundle. "
    "With --runtime torch they are there anyway.",
)
@cascade_option(
    "As in infer: members run from cheap to expensive, and stop for an image once the rest could hardly change its "
    "score."
)
@full
@runtime_options
def serve(
    run: Path,
    bundle: str | None,
    host: str,
    allow_host: tuple[str, ...],
    port: int,
    max_images: int,
    max_mb: int,
    explain: bool,
    cascade: float | None,
    full: bool,
    runtime: RuntimeOptions,
) -> int:
    """A page to drop images on, which shows P(ai) and what each member says.

    Several images at once, with a CSV to take away. Images stay on this machine and are not
    kept. The run's bundle is exported first if missing or out of date; with --runtime torch
    the run's PyTorch members score instead. The page's HTTP API is in the README.

    \b
    Examples:
      python cli.py serve
      python cli.py serve --bundle hf://USER/REPO --port 8000
      curl -F images=@photo.jpg http://127.0.0.1:7860/api/score
    """
    torch = runtime.runtime == "torch"
    if torch and (cascade is not None or runtime.tune or runtime.precision not in ("auto", "fp32")):
        raise click.UsageError("--cascade, --tune and --precision are for bundles: leave out --runtime torch")
    if bundle and (explain or torch):
        raise click.UsageError("a bundle has no PyTorch members: leave out --explain and --runtime torch")
    # Pillow reads it when it is imported: blocks that malloc gives back, not keeps in the arena of each thread
    os.environ.setdefault("PILLOW_BLOCK_SIZE", "64m")
    from ensemble.core.errors import UnavailableError
    from ensemble.images.decode import silence_decoder_warnings
    from ensemble.stacking.stack import read_stacker
    from export.bundle import hub_bundles
    from export.inference.loading import export_if_stale, load_bundle

    try:
        import python_multipart  # noqa: F401  # starlette would miss it at the first upload only

        from export.web import request_guard, server
    except ImportError:
        raise UnavailableError("the page needs more packages; run: pip install 'manyeyes[serve]'") from None

    with server.listen(host, port) as socket, silence_decoder_warnings():
        runtime = replace(runtime, cascade=cascade, full=full)
        heatmaps = None
        if torch:
            ensemble, heatmaps = _networks(run, read_stacker(run), runtime)
        else:
            folder = hub_bundles.locate_bundle(bundle) if bundle else export_if_stale(run, click.echo)
            ensemble = load_bundle(folder, runtime, click.echo)
        if explain and not torch:
            _, heatmaps = _networks(run, ensemble.stacker, RuntimeOptions("torch", device=runtime.device))
        hosts = request_guard.allowed_hosts(socket.getsockname()[0], (host, *allow_host))
        app = server.make_app(ensemble, UploadLimits(max_images, max_mb), hosts, heatmaps)
        click.echo(f"{len(ensemble.runners)} members on {ensemble.device}")
        click.echo(f"Open {server.url_of(socket)} in a browser; Ctrl-C stops.")
        server.serve_forever(app, socket)
    return 0


def _networks(run: Path, stacker: "Stacker", runtime: RuntimeOptions) -> "tuple[Ensemble, Explain]":
    """The run's PyTorch members, and what makes heat maps of the same."""
    from export.inference import explain
    from export.inference.loading import load_networks

    explain.require_captum()
    ensemble, networks = load_networks(run, stacker, runtime)
    return ensemble, partial(explain.explain_image, ensemble, networks)
