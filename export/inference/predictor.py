"""Predictor: scores tables of images in a notebook, by a run, a bundle or a single classifier."""

from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from ensemble.core.errors import DataError
from ensemble.data import storage
from ensemble.data.inputs import inputs_from_table
from ensemble.images.decode import silence_decoder_warnings
from export.bundle import hub_bundles
from export.inference.infer import infer
from export.inference.loading import load_folder
from export.runtimes.settings import RuntimeOptions


class Predictor:
    """Scores tables of images: `Predictor.load("runs/default").predict(frame, images="data/test")`.

    errors: after `predict`, the images that could not be read (id, path, error).
    device: cpu or cuda.
    notes: lines that say what runs the members, and why.
    """

    def __init__(self, source: str | Path, runtime: RuntimeOptions, positive: str | None) -> None:
        self.errors = _no_errors()
        self._source, self._folder, self._positive = source, hub_bundles.locate(source), positive
        self._load(runtime)

    @classmethod
    def load(
        cls,
        source: str | Path,
        device: str = "auto",
        positive: str | None = None,
        runtime: str = "auto",
        precision: str = "auto",
        cascade: float | None = None,
        full: bool = False,
    ) -> Self:
        """Load a run, a bundle, a two-class classifier's folder, or hf://USER/REPO.

        positive: the class that means AI-made, where label names do not say. runtime and
        precision: as the options of `infer`; so are cascade, the loss in AUROC to allow, and
        full, all members of a bundle for which `frontier --budget` chose some.
        """
        return cls(source, RuntimeOptions(runtime, precision, device, cascade=cascade, full=full), positive)

    def to(self, device: str) -> Self:
        """Move to cpu or cuda; UnavailableError if the machine does not have it."""
        self._load(replace(self._runtime, device=device))
        return self

    def _load(self, runtime: RuntimeOptions) -> None:
        notes: list[str] = []
        self._ensemble = load_folder(self._folder, self._source, runtime, self._positive, notes.append)
        self._runtime, self.device, self.notes = runtime, self._ensemble.device, tuple(notes)

    @silence_decoder_warnings()
    def predict(self, frame: pd.DataFrame, images: str | Path | None = None) -> pd.DataFrame:
        """The same rows, order and index with `target`, P(ai) in [0, 1]; NaN for the images in `errors`.

        frame: `path`, or `id` naming files in the folder `images` with or without suffix.
        """
        if frame.empty:
            self.errors = _no_errors()
            return frame.assign(target=np.empty(0))
        columns = [column for column in ("id", "path") if column in frame]
        if not columns:
            raise DataError("the frame needs a column id or path")
        location = None if images is None else storage.parse_location(str(images))
        inputs = inputs_from_table(frame[columns].astype(str), Path("frame"), location)
        result, self.errors = infer(inputs, self._ensemble)
        return frame.assign(target=result["target"].to_numpy())


def _no_errors() -> pd.DataFrame:
    return pd.DataFrame(columns=["id", "path", "error"])
