"""submit: parse, call, print."""

from pathlib import Path

import click
from click.core import ParameterSource

from ensemble.commands import options
from ensemble.core.errors import ArtifactError
from export.commands.options import bundle_option, file_option


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

    if threshold is not None and not hard:
        raise click.UsageError("--threshold makes labels: add --hard")
    submission.check_paths(scores, sample_path, output, hard or positive == "real")
    sample = submission.read_sample(sample_path)
    table = submission.read_scores(scores, sample)
    targets, moved = submission.align_to_sample(table, sample, scores)
    made_by = provenance.read_provenance(scores)
    location = hub_bundles.locate_bundle(bundle) if bundle else run
    is_named = bool(bundle) or context.get_parameter_source("run") is ParameterSource.COMMANDLINE
    stack = submission.read_stack(location, is_named, made_by)
    if made_by and made_by["uncertified"] and not uncertified:
        raise ArtifactError(
            f"{scores} was scored at {', '.join(made_by['uncertified'])}, which has no passing certificate; run infer "
            "--precision fp32, certify it by export --certify-on DATA, or take it as it is with --uncertified"
        )
    if hard and threshold is None:
        if stack is None:
            raise ArtifactError(
                "--hard needs a threshold: name the run or bundle that made the scores with --run or --bundle, or give "
                "--threshold P"
            )
        threshold = stack.threshold
    values = submission.submission_values(targets, sample, threshold, positive, scores)
    for line in submission.notes(stack, made_by, moved, sample, hard, scores):
        click.echo(line)
    facts = {
        **submission.submission_record(sample, threshold, positive, moved),
        "scores_sha256": artifacts.file_sha256(scores),
        "heldout_auroc": stack.auroc.to_dict() if stack and stack.auroc else None,
        "uncertified": uncertified,
    }
    submission.write_submission(output, sample, values)
    provenance_file = provenance.write_provenance(output, made_by, facts)
    click.echo(f"{len(values)} rows as in {sample_path} -> {output}; what made it: {provenance_file.name}")
    return 0
