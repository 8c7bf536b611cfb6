"""Predictor: a run, a bundle or a single classifier, as one object for notebooks."""

from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from ensemble import artifacts, external
from ensemble.errors import BackboneError, DataError
from ensemble.labels import resolve_polarity
from ensemble.stack_run import read_stacker
from export import bundle, runtime
from export.infer import Ensemble, average, infer
from export.inputs import resolve_table

HUB_PREFIX = "hf://"


def load_run(run: Path, onnx: bool, device: str) -> Ensemble:
    """A run's ensemble from its bundle, or from its torch members."""
    if onnx:
        return load_bundle(artifacts.bundle_path(run), device)
    runtime.require_torch()
    chosen = runtime.choose_device(device, onnx=False)
    from ensemble.members import load_member

    stacker = read_stacker(run)
    externals = external.externals_of(run, stacker.members)
    trained = [name for name in stacker.members if name not in {member.name for member in externals}]
    members = [runtime.torch_runner(name, load_member(run, name), chosen) for name in trained]
    return Ensemble(tuple(members), stacker, chosen, externals)


def load_bundle(folder: Path, device: str) -> Ensemble:
    """A bundle's ensemble, every file checked, in ONNX Runtime."""
    chosen = runtime.choose_device(device, onnx=True)
    runners, stacker = bundle.load_bundle(folder, chosen)
    return Ensemble(tuple(runners), stacker, chosen, external.externals_of(folder, stacker.members))


def load_classifier(folder: Path, device: str, positive: str | None = None) -> Ensemble:
    """Any two-class image classifier in transformers' layout; `target` is P(its AI-made class)."""
    runtime.require_torch()
    from ensemble import backbone, contracts
    from ensemble.members import stored_contract

    network, config = backbone.load_classifier(folder)
    names = {int(index): str(name) for index, name in config.id2label.items()}
    try:
        _, chosen = resolve_polarity([names[index] for index in sorted(names)], positive)
    except ValueError as error:
        raise BackboneError(f"{folder}: {error}") from None
    index = next(index for index, name in names.items() if name == chosen)
    contract = stored_contract(folder) or contracts.from_checkpoint(folder, config)
    member = backbone.Member(network, contract, positive=index)
    name = folder.name or "classifier"
    chosen_device = runtime.choose_device(device, onnx=False)
    return Ensemble((runtime.torch_runner(name, member, chosen_device),), average(name), chosen_device)


def load(source: str | Path, device: str = "auto", positive: str | None = None) -> Ensemble:
    """The ensemble at `source`: a run, a bundle, a classifier's folder, or hf://USER/REPO of the last two.

    Only hf:// reaches the network. A run's current bundle is preferred to its torch members.
    """
    folder = locate(source)
    if (folder / "bundle.json").is_file():
        return load_bundle(folder, device)
    if artifacts.stacker_path(folder).is_file() or artifacts.members_path(folder).is_dir():
        return load_run(folder, bundle.is_current(folder), device)
    if (folder / "config.json").is_file():
        return load_classifier(folder, device, positive)
    raise BackboneError(
        f"{source} is neither a run, a bundle nor a classifier (no bundle.json, members or config.json)"
    )


def locate(source: str | Path) -> Path:
    """The folder that `load` reads; what hf:// names is downloaded first."""
    text = str(source)
    if text.startswith(HUB_PREFIX):
        return _from_hub(text.removeprefix(HUB_PREFIX))
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise BackboneError(f"{text} is not a folder; for a model on the Hub write {HUB_PREFIX}USER/REPO")
    return folder


class Predictor:
    """Scores tables of images: `Predictor.load("runs/default").predict(frame, images="data/test")`.

    errors: after `predict`, the images that could not be read (id, path, error).
    device: cpu or cuda.
    """

    def __init__(self, source: str | Path, ensemble: Ensemble, device: str, positive: str | None) -> None:
        self.device = device
        self.errors = pd.DataFrame(columns=["id", "path", "error"])
        self._source, self._ensemble, self._positive = source, ensemble, positive

    @classmethod
    def load(cls, source: str | Path, device: str = "auto", positive: str | None = None) -> Self:
        """Load a run, a bundle, a two-class classifier's folder, or hf://USER/REPO.

        positive: the class that means AI-made, where label names do not say.
        """
        ensemble = load(source, device, positive)
        return cls(source, ensemble, ensemble.device, positive)

    def to(self, device: str) -> Self:
        """Move to cpu or cuda; UnavailableError if it is not here."""
        self._ensemble = load(self._source, device, self._positive)
        self.device = self._ensemble.device
        return self

    def predict(self, frame: pd.DataFrame, images: str | Path | None = None) -> pd.DataFrame:
        """The same rows, order and index with `target`, P(ai) in [0, 1]; NaN where `errors` says why.

        frame: `path`, or `id` naming files in the folder `images` with or without suffix.
        """
        if frame.empty:
            return frame.assign(target=np.empty(0))
        keys = [column for column in ("id", "path") if column in frame]
        if not keys:
            raise DataError("the frame needs a column id or path")
        inputs = resolve_table(frame[keys].astype(str), Path("frame"), Path(images) if images is not None else None)
        result, self.errors = infer(inputs, self._ensemble)
        return frame.assign(target=result["target"].to_numpy())


def _from_hub(name: str) -> Path:
    from ensemble.download import download, download_classifier

    repo, _, revision = name.partition("@")
    folder = download(repo, ("bundle.json", "config.json"), revision or None)
    if (folder / "bundle.json").is_file():
        files = ("bundle.json", "stacker.json", "certificate.json", "members/*.onnx", "externals/*.parquet")
        return download(repo, files, revision or None)
    return download_classifier(repo, revision or None)
