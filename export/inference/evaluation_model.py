"""What `evaluate` scores: a run, a bundle or a classifier, with a hash of all that decides its logits."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, BackboneError, join_limited
from ensemble.core.log import Log
from ensemble.evaluation.protocol import EvaluatedModel
from ensemble.models import external
from ensemble.models.runner import image_score
from ensemble.stacking.stack import read_stacker
from export.bundle import bundle, hub_bundles
from export.inference.ensemble import Ensemble
from export.inference.loading import load_folder, load_run
from export.runtimes.settings import RuntimeOptions

BATCH = 16  # images that are prepared together


def run_of(run: Path, source: str | None) -> Path | None:
    """The run that is evaluated; None for a bundle or a classifier alone. Nothing is downloaded: the Hub has no runs.

    `source` takes the place of `run`, and may be a run itself.
    """
    if source is None:
        return run
    if hub_bundles.is_remote(source):
        return None
    folder = hub_bundles.locate(source)
    return folder if _is_run(folder) else None


def load_model(
    run: Path | None,
    source: str | None,
    onnx: bool,
    wanted: RuntimeOptions,
    log: Log,
    positive: str | None = None,
) -> tuple[EvaluatedModel, str]:
    """The model, and what to call it. run: of `run_of`; where it is None, `source` is a bundle or a classifier.

    All members of a bundle are evaluated, whatever frontier chose for it. positive: the class of a
    classifier that means AI-made, where its names do not say.
    """
    wanted = replace(wanted, full=True)
    if run is not None:
        if positive:
            raise _no_classifier(source)
        _refuse_external(run, read_stacker(run).members)
        if onnx:
            bundle.current_bundle(run)
        ensemble = load_run(run, onnx, wanted, log)
    else:
        ensemble = _load_alone(str(source), wanted, log, positive)
    model = EvaluatedModel(image_score(ensemble.runners), ensemble.stacker, ensemble.identity, wanted.batch or BATCH)
    names = ensemble.stacker.members
    title = f"the stack of {len(names)} members" if run is not None or len(names) > 1 else names[0]
    return model, title


def _load_alone(source: str, wanted: RuntimeOptions, log: Log, positive: str | None) -> Ensemble:
    folder = hub_bundles.locate(source)
    if positive and (folder / "bundle.json").is_file():
        raise _no_classifier(source)
    try:
        return load_folder(folder, source, wanted, positive, log)
    except BackboneError as error:  # --positive is of the data here
        raise BackboneError(str(error).replace("name it with --positive", "name it with --model-positive")) from None


def _no_classifier(source: str | None) -> ArtifactError:
    return ArtifactError(f"{source} is no single classifier, and knows what AI-made means: leave out --model-positive")


def _refuse_external(run: Path, names: Sequence[str]) -> None:
    elsewhere = [name for name in names if external.is_external(run, name)]
    if elsewhere:
        raise ArtifactError(
            f"{join_limited(elsewhere)} was trained elsewhere and only its scores are known, so it cannot "
            "score these images; "
            f"stack without it to evaluate: python cli.py stack --run {run}"
        )


def _is_run(folder: Path) -> bool:
    return not (folder / "bundle.json").is_file() and (
        artifacts.stacker_path(folder).is_file() or artifacts.members_path(folder).is_dir()
    )
