"""Command-line options that several commands of export share: runtime, cascade, cluster. Light: no Ray."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from ensemble.commands import options
from export.cluster.placement import ClusterOptions
from export.runtimes.settings import PRECISIONS, RUNTIMES, RuntimeOptions

full = click.option(
    "--full", is_flag=True, help="Run all members of a bundle, whatever `frontier --budget` chose for it."
)


def file_option(*names: str, default: str, help: str) -> Callable[..., Any]:
    """An option for the path of a file, which need not exist. names: as for click.option."""
    return click.option(*names, type=options.FILE, default=Path(default), help=help)


class InsteadOfRun(click.Option):
    """An option that names what to use instead of a run: UsageError where --run is typed too."""

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        """The value and the rest of the arguments, or UsageError."""
        if self.name in opts and "run" in opts:
            raise click.UsageError(f"give either {self.opts[0]} or --run, not both")
        return super().handle_parse_result(ctx, opts, args)


def bundle_option(what: str) -> Callable[..., Any]:
    """--bundle. what: the first words of its help."""
    help = f"{what}: a folder, or hf://USER/REPO[@REVISION] on the Hub."
    return click.option("--bundle", cls=InsteadOfRun, metavar="BUNDLE", help=help)


def timed_images(what: str) -> Callable[..., Any]:
    """--images of a command that measures, handed to it as `source`. what: the first words of its help."""
    help = f"{what}, a folder or a CSV.  [default: the run's held-out images, else generated ones]"
    return click.option("--images", "source", type=options.IMAGES_PATH, help=help)


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--engine, --address, --workers and what each may use, handed to the command as `cluster`; None for local."""

    @functools.wraps(command)
    def call(
        *,
        engine: str,
        address: str | None,
        workers: int | None,
        cpus_per_worker: int | None,
        gpus_per_worker: float | None,
        **others: Any,
    ) -> object:
        cluster = ClusterOptions(address, workers, cpus_per_worker, gpus_per_worker)
        return command(cluster=cluster if engine == "ray" else None, **others)

    decorators = [
        click.option(
            "--engine",
            type=click.Choice(["local", "ray"]),
            default="local",
            help="ray scores a bundle on all machines of a Ray cluster: the same file results. Needs --onnx or "
            "--bundle, and pip install 'manyeyes[cluster]' on every machine.",
        ),
        click.option(
            "--address",
            cls=options.ClusterOption,
            metavar="HOST:PORT",
            help="With --engine ray: the cluster's head, or auto for one on this machine.  [default: RAY_ADDRESS, "
            "or else Ray is started on this machine for the job]",
        ),
        click.option(
            "--workers",
            cls=options.ClusterOption,
            type=click.IntRange(1),
            metavar="N",
            help="With --engine ray: processes that score.  [default: one for each GPU, or each machine; with "
            "--cpus-per-worker as many as have room]",
        ),
        click.option(
            "--cpus-per-worker",
            cls=options.ClusterOption,
            type=click.IntRange(1),
            metavar="N",
            help="With --engine ray: cores of each.  [default: an equal share; going on, as it was begun]",
        ),
        click.option(
            "--gpus-per-worker",
            cls=options.ClusterOption,
            type=click.FloatRange(0),
            metavar="X",
            help="With --engine ray: GPUs of each, 0.5 for two that share one.  [default: 1, if there are any]",
        ),
    ]
    return options.decorated(call, decorators)


def cascade_option(text: str) -> Callable[..., Any]:
    """--cascade [TOLERANCE], handed to the command as `cascade`; `text` is its help."""
    return click.option(
        "--cascade",
        type=click.FloatRange(0, 0.5, min_open=True, max_open=True),
        is_flag=False,
        flag_value=0.001,
        metavar="[TOLERANCE]",
        help=text,
    )


def runtime_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--runtime, --precision, --batch-size, --tune and --device, handed to the command as one `runtime`."""

    @functools.wraps(command)
    def call(*, runtime: str, precision: str, batch_size: int | None, tune: bool, device: str, **others: Any) -> object:
        return command(runtime=RuntimeOptions(runtime, precision, device, batch_size, tune), **others)

    decorators = [
        click.option(
            "--runtime",
            type=click.Choice(["auto", *RUNTIMES]),
            default="auto",
            help="What runs the members. auto takes what is fastest on this machine, and says what and why.",
        ),
        click.option(
            "--precision",
            type=click.Choice(["auto", *PRECISIONS]),
            default="auto",
            help="auto goes below fp32 only where the bundle's certificate allows it.",
        ),
        click.option(
            "--batch-size",
            type=click.IntRange(1),
            metavar="N",
            help="Images that run together.  [default: what suits the runtime]",
        ),
        click.option(
            "--tune",
            is_flag=True,
            help="First measure which setting is fastest here, and remember it. What was measured is kept: "
            "it is not measured again.",
        ),
        options.device,
    ]
    return options.decorated(call, decorators)
