"""submit: parse, call, print."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble.commands import options
from ensemble.core.errors import ArtifactError
from export.commands.options import bundle_option, file_option, refuse_run_with, run_is_given

if TYPE_CHECKING:
    from ensemble.core.metrics import Interval
    from ensemble.stacking.stacker import Stacker
    from export.kaggle.submission import SampleSubmission, SubmissionOptions


@click.command("submit")
@file_option("--scores", default="submission.csv", help="What infer wrote, CSV or Parquet.")
@file_option(
    "--sample",
    "sample_path",
    default="data/sample_submission.csv",
    help="The competition's sample: its columns, ids and their order.",
)
@file_option("--output", default="submission.csv", help="The CSV to upload.")
@click.option("--hard", is_flag=True, help="Write 0 and 1 by the stack's threshold, where labels are scored.")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), metavar="P", help="With --hard, in place of the stack's threshold."
)
@click.option(
    "--positive",
    type=click.Choice(["ai", "real"]),
    help="What the competition's 1 means; for real, 1 - target is written.  [default: ai]",
)
@click.option("--uncertified", is_flag=True, help="Take scores of a precision that has no passing certificate.")
@bundle_option("The bundle that made the scores, in place of a run")
@options.run
@click.pass_context
def submit(
    context: click.Context,
    scores: Path,
    sample_path: Path,
    output: Path,
    hard: bool,
    threshold: float | None,
    positive: str | None,
    uncertified: bool,
    bundle: str | None,
    run: Path,
) -> int:
    """Check infer's scores against a competition's sample and write what to upload.

    Refused: other ids, ids twice, an empty target or one outside [0, 1], the same target everywhere, 0 and 1
    where probabilities are meant or --hard where the sample holds probabilities, scores of another stack than
    the run's, a stack that ranks its held-out images backwards, and a submission that holds labels or
    1 - target already. Rows are put into the sample's order, and
    columns get its names.

    NAME.csv.json beside the output says what made it: bundle, stack, precisions, options, versions, and the
    SHA-256 of the CSV.

    \b
    Examples:
      python cli.py infer --onnx && python cli.py submit
      python cli.py submit --scores scores.csv --sample data/sample_submission.csv --hard
      kaggle competitions submit COMPETITION -f submission.csv -m "manyeyes"
    """
    from ensemble.core import artifacts
    from export.bundle import hub_bundles
    from export.inference import provenance
    from export.kaggle import submission

    refuse_run_with(context, "--bundle", bundle)
    if threshold is not None and not hard:
        raise click.UsageError("--threshold makes labels: add --hard")
    _check_paths(scores, sample_path, output, hard or positive == "real")
    sample = submission.read_sample(sample_path)
    table = submission.read_scores(scores, sample)
    targets, moved = submission.align_to_sample(table, sample, scores)
    made_by = provenance.read_provenance(scores)
    location = hub_bundles.locate_bundle(bundle) if bundle else run
    stack = _stack_facts(location, bool(bundle) or run_is_given(context), made_by)
    _check_certified(made_by, uncertified, scores)
    submission_options = submission.SubmissionOptions(_threshold(stack, threshold) if hard else None, positive)
    values = submission.submission_values(targets, sample, submission_options, scores)
    for line in _notes(stack, made_by, moved, sample, submission_options, scores):
        click.echo(line)
    facts = {
        **submission.submission_record(sample, submission_options, moved),
        "scores_sha256": artifacts.file_sha256(scores),
        "heldout_auroc": stack["auroc"].to_dict() if stack and stack["auroc"] else None,
        "uncertified": uncertified,
    }
    submission.write_submission(output, sample, values)
    provenance_file = provenance.write_provenance(output, made_by, facts)
    click.echo(f"{len(values)} rows as in {sample_path} -> {output}; what made it: {provenance_file.name}")
    return 0


def _check_paths(scores: Path, sample: Path, output: Path, changes: bool) -> None:
    """ArtifactError for an output that is no CSV, would replace the sample, or the scores by something else."""
    from export.inference.provenance import provenance_path

    if output.suffix.lower() != ".csv":
        raise ArtifactError(f"cannot write {output}; a submission's name ends in .csv")
    provenance_file = provenance_path(output)
    if provenance_file.is_dir():
        raise ArtifactError(f"{provenance_file} is a folder, and says what made {output}; choose another --output")
    for path, what in ((sample, "the sample"), (scores, "the scores")):
        if provenance_file.exists() and path.exists() and provenance_file.samefile(path):
            raise ArtifactError(f"{provenance_file} has {what} and would be overwritten; choose another --output")
    if output.exists() and sample.exists() and output.samefile(sample):
        raise ArtifactError(f"{output} is the sample and would be overwritten; choose another --output")
    if changes and output.exists() and scores.exists() and output.samefile(scores):
        raise ArtifactError(
            f"{output} has the scores, which would be lost; choose another --output, or let infer write scores.csv"
        )


def _stack_facts(location: Path, required: bool, made_by: dict[str, Any] | None) -> dict[str, Any] | None:
    """Threshold and held-out AUROC of the stack in a run or bundle; None where there is none, unless it is required.

    None too where a single classifier made the scores. ArtifactError where another stack did.
    """
    from ensemble.core import artifacts
    from ensemble.stacking.stacker import Stacker
    from export.inference.provenance import MODEL, stacker_sha256

    path = artifacts.stacker_path(location)
    single = made_by is not None and made_by["source"] == MODEL
    if not required and (single or not path.is_file()):
        return None
    if single:
        raise ArtifactError(f"these scores were made by infer --model, not by {path}; leave out --run and --bundle")
    values = artifacts.read_json(path, "name the run or bundle that made the scores with --run or --bundle")
    stacker = Stacker.from_dict(values)
    if made_by and made_by["stack"] != stacker_sha256(stacker, bool(made_by["options"]["adapted"])):
        chosen = _operating_point_stacker(location, path)
        if chosen is None or made_by["stack"] != stacker_sha256(chosen, False):
            raise ArtifactError(
                f"these scores were made by another stack than {path}; run infer again, or name theirs with --run or "
                "--bundle"
            )
        return {"path": path, "threshold": chosen.threshold, "auroc": None}
    return {"path": path, "threshold": stacker.threshold, "auroc": _heldout_auroc(values, path)}


def _heldout_auroc(values: dict[str, Any], path: Path) -> "Interval | None":
    """What stacker.json says of its stack's held-out images; None where it says nothing."""
    from ensemble.core.metrics import Interval

    try:
        auroc = ((values.get("scores") or {}).get("stack") or {}).get("auroc")
        if auroc is None:
            return None
        ends = [auroc[key] for key in ("value", "low", "high")]
        if all(end is None or 0 <= end <= 1 for end in ends):
            return Interval(*(float("nan") if end is None else end for end in ends))
    except (AttributeError, KeyError, TypeError):
        pass
    raise ArtifactError(f"{path} is damaged (its scores); run stack again")


def _operating_point_stacker(location: Path, path: Path) -> "Stacker | None":
    """The stack of the members that frontier chose in a bundle of this stack; None where it chose none."""
    from ensemble.core import artifacts
    from export.bundle import bundle, operating_point

    folder = location if (location / "bundle.json").is_file() else artifacts.bundle_path(location)
    if not (folder / operating_point.FILE).is_file():
        return None
    values = bundle.read_contents(folder)
    if values["files"]["stacker.json"] != artifacts.file_sha256(path):
        return None
    point = operating_point.read(folder, values)
    return point.stacker if point else None


def _check_certified(made_by: dict[str, Any] | None, uncertified: bool, scores: Path) -> None:
    if made_by and made_by["uncertified"] and not uncertified:
        raise ArtifactError(
            f"{scores} was scored at {', '.join(made_by['uncertified'])}, which has no passing certificate; run infer "
            "--precision fp32, certify it by export --certify-on DATA, or take it as it is with --uncertified"
        )


def _threshold(stack: dict[str, Any] | None, given: float | None) -> float:
    if given is not None:
        return given
    if stack is None:
        raise ArtifactError(
            "--hard needs a threshold: name the run or bundle that made the scores with --run or --bundle, or give "
            "--threshold P"
        )
    return float(stack["threshold"])


def _notes(
    stack: dict[str, Any] | None,
    made_by: dict[str, Any] | None,
    moved: bool,
    sample: "SampleSubmission",
    submission_options: "SubmissionOptions",
    scores: Path,
) -> list[str]:
    """What a competitor should know; ArtifactError where the held-out scores say that the stack is reversed."""
    from export.inference.provenance import MODEL

    notes = []
    if made_by and made_by["source"] == MODEL:
        notes.append("No held-out scores of a single classifier: a reversed one would not be noticed.")
    elif stack is None or stack["auroc"] is None:
        notes.append("No held-out scores of the stack here (--run or --bundle): a reversed one would not be noticed.")
    else:
        auroc = stack["auroc"]
        if auroc.high < 0.5:
            raise ArtifactError(
                f"the stack ranks its held-out images backwards (AUROC {auroc}, {stack['path']}): ai and real are "
                "probably swapped in the training labels; set --classes, train and stack again"
            )
        doubt = ": perhaps no better than chance" if auroc.low <= 0.5 else ""
        notes.append(f"AUROC of the stack on held-out images: {auroc}{doubt}.")
    if made_by is None:
        notes.append(f"Nothing beside {scores} says what made it; its fingerprint will not either.")
    elif made_by["images"]["failed"]:
        notes.append(f"{made_by['images']['failed']} images could not be read and have the score of --fill.")
    if moved:
        notes.append("Rows were put into the sample's order.")
    if sample.suggests == "labels" and submission_options.threshold is None:
        notes.append("The sample holds only 0 and 1: if labels are scored (accuracy, F1), add --hard.")
    return notes
