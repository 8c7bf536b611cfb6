"""evaluate: parse, score, print."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.commands import options
from export.commands.options import runtime_options
from export.runtimes.settings import RuntimeOptions

if TYPE_CHECKING:
    import pandas as pd

    from ensemble.data.sources import LabelledImage, ReadOptions
    from ensemble.evaluation.protocol import EvaluatedModel
    from ensemble.images.robustness import Change


@click.command("evaluate")
@click.option(
    "--data",
    type=options.IMAGES_PATH,
    multiple=True,
    required=True,
    help="Folder with one folder a class, a CSV with label and id or path, or a benchmark in its own layout. "
    "Repeat it to combine several.",
)
@options.reading
@options.run
@click.option(
    "--model",
    metavar="SOURCE",
    help="Score this instead: another run, a bundle, a classifier's folder, hf://USER/REPO.",
)
@click.option(
    "--model-positive", metavar="NAME", help="With --model: its class that means AI-made, if no name says so."
)
@click.option("--onnx", is_flag=True, help="Use the run's bundle, all of it, in place of its torch members.")
@click.option(
    "--output",
    type=options.FOLDER,
    help="Folder to write; required with a --model that is no run.  [default: RUN/evaluations/NAME]",
)
@click.option("--name", metavar="NAME", help="Of this evaluation.  [default: from the data's name]")
@click.option(
    "--grid",
    type=click.Choice(["small", "full", "none"]),
    default="small",
    help="Damage to score under: 6 kinds, all 30, or none.",
)
@click.option(
    "--cells",
    metavar="NAME,...",
    callback=options.name_list,
    help="Only these degradations of the full grid, such as 'jpeg 50,blur 2'.",
)
@click.option("--limit", type=click.IntRange(min=2), metavar="N", help="Score N images at most, half of each class.")
@click.option(
    "--track",
    type=click.Choice(["inductive", "transductive"]),
    default="inductive",
    help="transductive: training images were chosen by looking at this test.",
)
@click.option(
    "--leave-out",
    type=click.Choice(["generator"]),
    help="Also refit the stacker without each generator and score it there.",
)
@click.option("--stress", is_flag=True, help="Images of one class only: how many fall on the wrong side.")
@click.option("--allow-trained", is_flag=True, help="Score images of the run's own training too; no test, and said so.")
@options.seed
@runtime_options
def evaluate(
    data: tuple[Path, ...],
    reading: "ReadOptions",
    run: Path,
    model: str | None,
    model_positive: str | None,
    onnx: bool,
    output: Path | None,
    name: str | None,
    grid: str,
    cells: tuple[str, ...],
    limit: int | None,
    track: str,
    leave_out: str | None,
    stress: bool,
    allow_trained: bool,
    seed: int,
    runtime: RuntimeOptions,
) -> int:
    """Score labelled images: as they are, and damaged as pictures are on the web.

    Prints every score with its 95 % interval over groups, the robustness grid with its worst
    degradation, and the scores by generator and by source. Accuracies are at the stacker's own
    threshold, which was chosen on other images. Writes scores.parquet and evaluation.json.

    GenImage, FakeImageDataset (MPBench) and Chameleon are recognised by their folders. The
    same command goes on where it was stopped, and degradations that are done stay done.

    \b
    Examples:
      python cli.py evaluate --data test/labels.csv --images test/images
      python cli.py evaluate --data test/labels.csv --grid full --leave-out generator
      python cli.py evaluate --data GenImage/ --grid none
      python cli.py evaluate --data phone_photos.csv --stress
      python cli.py evaluate --model hf://USER/REPO --data test/labels.csv --output evaluated
    """
    if model_positive and not model:
        raise click.UsageError("--model-positive names a class of --model")
    from tqdm import tqdm

    from ensemble.core import artifacts
    from ensemble.evaluation import evaluate, leakage, protocol
    from ensemble.evaluation.benchmarks import read_benchmarks
    from ensemble.evaluation.leave_out import known_generators, leave_out_generators
    from ensemble.images.robustness import choose_corruptions
    from ensemble.stacking.stack import fingerprint
    from export.inference.evaluation_model import evaluated_run, load_model

    items, notes, benchmarks = read_benchmarks(data, reading)
    for note in notes:
        click.echo(note)
    corruptions = choose_corruptions(grid, cells)
    items = evaluate.sample_images(items, limit, seed)
    evaluate.check_classes(items, stress)
    name = evaluate.evaluation_name(data, name, limit, track)
    own_run = evaluated_run(run, model)
    folder = evaluate.output_folder(own_run, output, name)
    scored, title = load_model(own_run, model, onnx, runtime, click.echo, model_positive)
    stacker = scored.stacker
    artifacts.ensure_writable(folder)
    if leave_out:
        known_generators(own_run, [item.generator for item in items if item.label == 1])
    sha256s, trained = leakage.check_untrained(own_run, items, track, allow_trained)
    if own_run is None:
        click.echo(f"Which images {title} was trained on is not known here, so that they are new to it is not checked.")
    key = protocol.evaluation_key(items, sha256s, scored)
    _print_estimate(items, corruptions, protocol.read_finished(folder, key, stacker.members), scored)
    with tqdm(total=len(items) * len(corruptions), desc="evaluate", unit="image", leave=False, disable=None) as bar:
        frame, errors = protocol.score_corruptions(items, sha256s, corruptions, scored, folder, bar.update)
    if frame.empty:
        click.echo(f"Error: none of {len(items)} images can be read: {next(iter(errors.values()))}", err=True)
        return 2
    evaluate.check_classes([item for item in items if item.id not in errors], stress)
    left_out = None
    if leave_out and own_run:
        left_out = leave_out_generators(own_run, frame[frame["cell"] == protocol.CLEAN], stacker, seed)
    record = {
        "name": name,
        "track": track,
        "stress": stress,
        "trained": trained,
        "benchmarks": list(benchmarks),
        "data": " + ".join(map(str, data)),
        "model": {
            "source": str(model or run),
            "onnx": onnx,
            "identity": scored.identity,
            # by these a model card knows whether the members are the present ones
            **({"members": fingerprint(own_run, stacker.members)["members"]} if own_run else {}),
        },
        "key": key,
        "rows": evaluate.count_images(frame, errors),
        "stacker": evaluate.describe_stacker(stacker),
        **protocol.summarize(frame, stacker.threshold, seed, stress),
        "leave_out": left_out,
    }
    protocol.write_evaluation(folder, frame, record)
    _print(record, title, own_run)
    return _print_errors(folder, errors)


def _print_estimate(
    items: "Sequence[LabelledImage]", cells: "Mapping[str, Change]", known: "pd.DataFrame", model: "EvaluatedModel"
) -> None:
    from ensemble.core.log import format_duration
    from ensemble.evaluation.protocol import remaining_cells, seconds_per_image
    from ensemble.images.robustness import full_grid

    total, remaining = len(items) * len(cells), sum(len(rows) for _, rows in remaining_cells(items, cells, known))
    done = f" ({total - remaining} are scored already)" if remaining < total else ""
    click.echo(f"{len(items)} images in {len(cells)} cells make {total}{done}")
    pace = seconds_per_image(items, model) if remaining else None
    if pace is not None:
        full = full_grid()
        full_remaining = sum(len(rows) for _, rows in remaining_cells(items, full, known))
        full_time = format_duration(pace * full_remaining)
        more = f"; the full grid of {len(full)} cells, {full_time}" if len(cells) < len(full) else ""
        click.echo(f"It takes about {format_duration(pace * remaining)}{more}")


def _print(record: Mapping[str, Any], title: str, run: Path | None) -> None:
    from ensemble.evaluation import leave_out, tables

    head = f"{record['name']}, {record['track']} track"
    if record["stress"]:
        head += ", stress set"
    rows, stacker = record["rows"], record["stacker"]
    click.echo()
    alone = rows["groups"] == rows["images"]
    grouped = "each a group of its own" if alone else f"in {rows['groups']} groups"
    images = f"{rows['images']} images ({rows['real']} real, {rows['ai']} ai), {grouped}"
    threshold = f"threshold {stacker['threshold']:.4g} ({stacker['threshold_rule']}), frozen before"
    click.echo(f"{head}: {images}, by {title}; {threshold}; 95 % intervals over groups.")
    if record["trained"]:
        click.echo(f"{record['trained']} of these images were in the run's own training: THIS IS NO TEST.")
    if record["stress"]:
        for line in tables.stress_lines(record):
            click.echo(line)
    else:
        options.table(tables.score_table(record))
    if len(record["cells"]) > 1:
        click.echo(f"\n{head}: the robustness grid, worst first; the worst degradation is {record['worst']['cell']!r}")
        options.table(tables.corruption_table(record))
    for column, parts in (("generator", record["by_generator"]), ("source", record["by_source"])):
        if len(parts) > 1:
            beside = ", each against all reals" if column == "generator" and rows["real"] else ""
            click.echo(f"\n{head}: by {column}{beside}, worst first")
            options.table(tables.part_table(parts, column))
    lines = record["leave_out"]
    if lines is None or run is None:
        return
    click.echo(
        f"\n{head}: leave one generator out, AT THE STACKER ONLY; the members were trained with the generators "
        "marked so, and their logits owe it to that"
    )
    options.table(tables.leave_out_table(lines))
    commands = leave_out.training_commands(run, [line["generator"] for line in lines if line["known"]])
    if commands:
        click.echo("Members that never saw a generator take training anew (... stands for the run's own options):")
        for line in commands:
            click.echo(f"  {line}")


def _print_errors(folder: Path, errors: Mapping[str, str]) -> int:
    click.echo(f"-> {folder}")
    if not errors:
        return 0
    click.echo(f"Error: {len(errors)} images could not be read and are in no score:", err=True)
    for message in list(errors.values())[:20]:
        click.echo(f"  {message}", err=True)
    if len(errors) > 20:
        click.echo(f"  and {len(errors) - 20} more, all in {folder / 'evaluation.json'}", err=True)
    return 1
