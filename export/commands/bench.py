"""bench: how fast a bundle is on this machine, and what auto would choose and why."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from ensemble.commands import options
from export.commands.options import bundle_option, full, runtime_options, timed_images
from export.runtimes.settings import RuntimeOptions


@click.command("bench")
@options.run
@bundle_option("Measure this bundle instead of the run's")
@timed_images("Images to score")
@click.option("--json", "output", type=options.FILE, help="Also write the figures there.")
@full
@runtime_options
def bench(
    run: Path, bundle: str | None, source: Path | None, output: Path | None, full: bool, runtime: RuntimeOptions
) -> None:
    """Measure how fast a bundle is on this machine.

    Says what auto chooses here and why, then measures each member alone on random pixels,
    preparing pixels alone, and everything end to end on real images, beside ONNX Runtime
    sessions run one after another, which is what one would write without this tool. Times are
    medians of 5 rounds in which all take turns. The roof is a large matrix product in the same
    precision on the same cores. Where `frontier --budget` chose some members for the bundle, it is
    those that are measured, each for every image, whatever cascade they run in.

    \b
    Examples:
      python cli.py bench
      python cli.py bench --tune
      python cli.py bench --bundle copied/bundle --images photos/ --json speed.json
      python cli.py bench --runtime onnxruntime
    """
    from tqdm import tqdm

    from ensemble.core import artifacts
    from ensemble.images.decode import silence_decoder_warnings
    from export.bundle.bundle import current_bundle
    from export.bundle.hub_bundles import locate_bundle
    from export.inference import benchmark
    from export.inference.plan import device_of, plan_bundle

    click.get_current_context().with_resource(silence_decoder_warnings())
    notes: list[str] = []

    def log(line: str) -> None:
        notes.append(line)
        click.echo(line)

    folder = locate_bundle(bundle) if bundle else current_bundle(run)
    plan = plan_bundle(folder, replace(runtime, full=full), log).members
    with (
        TemporaryDirectory() as temporary,
        tqdm(total=(len(plan) + 3) * benchmark.ROUNDS, desc="bench", leave=False, disable=None) as bar,
    ):
        sources, description = benchmark.benchmark_images(source, run if bundle is None else None, Path(temporary))
        runners, rows = benchmark.measure_members(plan, log, bar.update)
        speeds = benchmark.end_to_end(folder, device_of(plan), full, runners, sources, bar.update)
    _print(rows, speeds, description)
    if output:
        artifacts.write_json(output, {"chosen": notes, "members": rows, "images": description, "end_to_end": speeds})
        click.echo(f"-> {output}")


def _print(rows: Sequence[Mapping[str, Any]], speeds: Mapping[str, Any], description: str) -> None:
    import pandas as pd

    def line(row: Mapping[str, Any]) -> dict[str, object]:
        share, gflop = row["share_of_roof"], row["gflop"]
        return {
            **{key: row[key] for key in ("member", "runtime", "precision", "batch", "streams")},
            "ms an image": f"{row['ms']:.2f}",
            "images/s": f"{row['images_per_second']:.1f}",
            "GFLOP": "-" if gflop is None else f"{gflop:.3g}",
            "of roof": "-" if share is None else f"{share:.0%}",
        }

    click.echo()
    options.table(pd.DataFrame([line(row) for row in rows]))
    roofs = {f"{row['roof_gflops']:,.0f} GFLOP/s at {row['precision']}" for row in rows if row["roof_gflops"]}
    if roofs:
        click.echo(f"Roof: a large matrix product makes {' and '.join(sorted(roofs))} here.")
    click.echo(f"\n{speeds['images']} of {description}, all members, images a second:")
    what = {
        "preparing": "preparing pixels alone",
        "bundle": "end to end",
        "onnxruntime_in_turn": "ONNX Runtime fp32 in turn",
    }
    lines = [{"what": text, "images/s": f"{speeds[name]:.1f}"} for name, text in what.items()]
    options.table(pd.DataFrame(lines))
    click.echo(f"End to end is {speeds['ratio']:.2f} times as fast as ONNX Runtime's sessions run in turn.")
