"""What `evaluate` scores: a run, a bundle or a classifier, with a hash of all that decides its logits."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ensemble import artifacts, external
from ensemble.errors import ArtifactError, some
from ensemble.evaluate import Model
from ensemble.score import image_score
from ensemble.stack_run import read_stacker
from export import bundle, hub, predictor
from export.setting import Wanted

BATCH = 16  # images that are prepared together


def load_model(
    run: Path, source: str | None, onnx: bool, wanted: Wanted, say: Callable[[str], object]
) -> tuple[Model, Path | None, str]:
    """The model, the run that it is of (None for a bundle or a classifier alone), and what to call it.

    `source` takes the place of `run`, and may be a run itself. All members of a bundle are
    evaluated, whatever frontier chose for it.
    """
    wanted = replace(wanted, full=True)
    folder = run if source is None else hub.locate(source)
    of_run = source is None or _is_run(folder)
    if of_run:
        _refuse_external(folder, read_stacker(folder).members)
        if onnx:
            bundle.current_bundle(folder)
        ensemble = predictor.load_run(folder, onnx, wanted, say)
    else:
        ensemble = predictor.load_located(folder, source or folder, wanted, say=say)
    model = Model(image_score(ensemble.runners), ensemble.stacker, ensemble.identity, wanted.batch or BATCH)
    names = ensemble.stacker.members
    title = f"the stack of {len(names)} members" if of_run or len(names) > 1 else names[0]
    return model, folder if of_run else None, title


def _refuse_external(run: Path, names: Sequence[str]) -> None:
    elsewhere = [name for name in names if external.is_external(run, name)]
    if elsewhere:
        raise ArtifactError(
            f"{some(elsewhere)} was trained elsewhere and only its scores are known, so it cannot score these images; "
            f"stack without it to evaluate: python cli.py stack --run {run}"
        )


def _is_run(folder: Path) -> bool:
    return not (folder / "bundle.json").is_file() and (
        artifacts.stacker_path(folder).is_file() or artifacts.members_path(folder).is_dir()
    )
