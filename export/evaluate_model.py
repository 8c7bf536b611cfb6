"""What `evaluate` scores: a run, a bundle or a classifier, with a hash of all that decides its logits."""

from collections.abc import Sequence
from pathlib import Path

from ensemble import artifacts, external
from ensemble.errors import ArtifactError, some
from ensemble.evaluate import Model
from ensemble.score import image_score
from ensemble.stack_run import fingerprint, read_stacker
from export import bundle, predictor
from export.infer import Ensemble


def load_model(
    run: Path, source: str | None, onnx: bool, device: str, batch_size: int
) -> tuple[Model, Path | None, str]:
    """The model, the run that it is of (None for a bundle or a classifier alone), and what to call it.

    `source` takes the place of `run`, and may be a run itself.
    """
    folder = run if source is None else predictor.locate(source)
    of_run = source is None or _is_run(folder)
    if of_run:
        _refuse_external(folder, read_stacker(folder).members)
        if onnx and not bundle.is_current(folder):
            raise ArtifactError(
                f"the bundle of {folder} is missing or older than its members; export it first: "
                f"python cli.py export --run {folder}"
            )
        ensemble = predictor.load_run(folder, onnx, device)
    else:
        ensemble = predictor.load(folder, device)
    found = artifacts.json_sha256(_identity(folder, of_run, onnx, ensemble))
    model = Model(image_score(ensemble.runners), ensemble.stacker, found, batch_size)
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


def _identity(folder: Path, of_run: bool, onnx: bool, ensemble: Ensemble) -> list[object]:
    """Hashes of the weights and contracts; the stacker does not enter."""
    if of_run and not onnx:
        return ["torch", fingerprint(folder, ensemble.stacker.members)["members"]]
    if of_run or (folder / "bundle.json").is_file():
        values = bundle.open_bundle(artifacts.bundle_path(folder) if of_run else folder)
        return ["onnx", values["members"], {name: file for name, file in values["files"].items() if "/" in name}]
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    return ["classifier", {path.name: artifacts.file_sha256(path) for path in files}]
