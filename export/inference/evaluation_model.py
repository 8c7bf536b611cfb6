"""The model that `evaluate` scores: of a run, a bundle or a classifier."""

from dataclasses import replace
from pathlib import Path

from ensemble.core.errors import ArtifactError, BackboneError, join_limited
from ensemble.core.log import Log
from ensemble.evaluation.protocol import EvaluatedModel
from ensemble.models import external
from ensemble.models.runner import image_scorer
from ensemble.stacking.stack import read_stacker
from export.bundle import bundle, hub_bundles
from export.inference.loading import is_run, load_folder, load_run
from export.runtimes.settings import RuntimeOptions

BATCH_SIZE = 16  # images that are prepared together


def evaluated_run(run: Path, source: str | None) -> Path | None:
    """The run that is evaluated; None for a bundle or a classifier alone.

    source: takes the place of `run`, and may be a run itself. Nothing is downloaded: the Hub has no runs.
    """
    if source is None:
        return run
    if hub_bundles.is_remote(source):
        return None
    folder = hub_bundles.locate(source)
    return folder if is_run(folder) else None


def load_model(
    run: Path | None,
    source: str | None,
    onnx: bool,
    options: RuntimeOptions,
    log: Log,
    positive: str | None = None,
) -> tuple[EvaluatedModel, str]:
    """The model, and a title for it. run: of `evaluated_run`; if it is None, `source` is a bundle or a classifier.

    All members of a bundle are evaluated, whatever frontier chose for it. positive: the class of a
    classifier that means AI-made, where its label names do not say.
    """
    options, folder = replace(options, full=True), run or hub_bundles.locate(str(source))
    if positive and (run is not None or (folder / "bundle.json").is_file()):
        raise ArtifactError(
            f"{source} is no single classifier, and knows what AI-made means: leave out --model-positive"
        )
    if run is not None:
        externals = [name for name in read_stacker(run).members if external.is_external(run, name)]
        if externals:
            raise ArtifactError(
                f"{join_limited(externals)} was trained elsewhere and only its scores are known, so it cannot "
                f"score these images; stack without it to evaluate: python cli.py stack --run {run}"
            )
        if onnx:
            bundle.current_bundle(run)
        ensemble = load_run(run, onnx, options, log)
    else:
        try:
            ensemble = load_folder(folder, str(source), options, positive, log)
        except BackboneError as error:  # in `evaluate`, --positive is about the data
            text = str(error).replace("name it with --positive", "name it with --model-positive")
            raise BackboneError(text) from None
    model = EvaluatedModel(
        image_scorer(ensemble.runners), ensemble.stacker, ensemble.identity, options.batch or BATCH_SIZE
    )
    names = ensemble.stacker.members
    title = f"the stack of {len(names)} members" if run is not None or len(names) > 1 else names[0]
    return model, title
