"""The images that an export is checked on: a few for fp32, hundreds that no member was fitted on below it. No torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, ImageError, join_limited
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.data import dataset
from ensemble.data.files import as_utf8
from ensemble.data.sources import LabelledImage
from ensemble.images import decode, preprocess
from ensemble.models.external import External, test_column

FEW = 14  # for fp32: two batches of seven
SIDE = 256  # of generated pictures, in pixels
CALIBRATION, COMPARISON = 256, 512  # training images for int8, at most
LEAST_CALIBRATION = 128


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images that no member was fitted on; `what` calls them so. labels: int [N], ai = 1.

    heldout: whether they are rows of the run.
    """

    what: str
    heldout: bool
    ids: tuple[str, ...]
    files: tuple[Path, ...]
    labels: np.ndarray

    def rows(self, chosen: Sequence[int] | np.ndarray) -> "LabelledImages":
        """Those at these positions."""
        ids, files = tuple(self.ids[row] for row in chosen), tuple(self.files[row] for row in chosen)
        return LabelledImages(self.what, self.heldout, ids, files, self.labels[chosen])

    def scores(self, member: External) -> np.ndarray:
        """Logits float64 [N] of a member that was trained elsewhere; ArtifactError where it has none."""
        return member.heldout.loc[list(self.ids)].to_numpy() if self.heldout else test_column(member, self.ids)


@dataclass(frozen=True)
class SampleImages:
    """A few pictures and their names to check fp32 on, read when they are needed; `what` says what they are."""

    what: str
    pictures: Callable[[], Iterator[tuple[object, Image.Image]]]

    def pixels(self, preprocess_config: PreprocessConfig) -> np.ndarray:
        """The first view of each, uint8 [N, S, S, 3]; ArtifactError where one cannot be read."""
        views = []
        try:
            for name, picture in self.pictures():
                with decode.errors_with_name(name):
                    views.append(preprocess.to_pixels(picture, preprocess_config)[:1])
        except ImageError as error:
            raise ArtifactError(f"export needs {self.what}, and one cannot be read: {error}") from None
        return np.concatenate(views)


@dataclass(frozen=True)
class Training:
    """Images of a run that members may know: some to calibrate int8 by, others to compare precisions on."""

    calibration: LabelledImages
    comparison: LabelledImages


def heldout(run: Path) -> LabelledImages:
    """A run's held-out rows."""
    held = _rows(run, "heldout")
    return LabelledImages(
        "held-out images", True, tuple(held["id"]), tuple(dataset.files(held)), held["label"].to_numpy()
    )


def training(run: Path) -> Training | None:
    """Rows of its train split, half of them at most to calibrate by; None where they are too few."""
    rows = _rows(run, "train")
    every = LabelledImages(
        "training images", False, tuple(rows["id"]), tuple(dataset.files(rows)), rows["label"].to_numpy()
    )
    if len(rows) < 2 * LEAST_CALIBRATION:
        return None
    calibration = stratified_sample(every, min(CALIBRATION, len(rows) // 2))
    chosen = set(calibration.ids)
    others = every.rows([row for row, key in enumerate(every.ids) if key not in chosen])
    return Training(calibration, stratified_sample(others, COMPARISON))


def _rows(run: Path, split: str) -> pd.DataFrame:
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
    return frame[frame["split"] == split]


def labelled(items: Sequence[LabelledImage], paths: Sequence[Path]) -> LabelledImages:
    """Images that the user labelled, as read from `paths`."""
    what = f"images of {join_limited(as_utf8(path.name) for path in paths)}"
    ids, files = tuple(item.id for item in items), tuple(item.file for item in items)
    return LabelledImages(what, False, ids, files, np.array([item.label for item in items]))


def stratified_sample(evidence: LabelledImages, most: int, seed: int = 0) -> LabelledImages:
    """At most `most` of them, as many of each class as there are, in the order given."""
    shuffled = np.random.default_rng(seed).permutation(len(evidence.labels))
    classes = evidence.labels[shuffled]
    turn = pd.Series(classes).groupby(classes).cumcount()
    return evidence.rows(np.sort(shuffled[np.argsort(turn, kind="stable")[:most]]))


def samples(evidence: LabelledImages) -> SampleImages:
    """A few of them, of both classes."""
    return samples_of(stratified_sample(evidence, FEW))


def samples_of(evidence: LabelledImages) -> SampleImages:
    """All of them."""
    what = f"{len(evidence.files)} {evidence.what}"
    return SampleImages(what, lambda: ((file, decode.decode(file)) for file in evidence.files))


def generated() -> SampleImages:
    """Pictures with the spectrum of photographs (amplitude 1 / frequency) and random phase."""

    def picture(seed: int) -> Image.Image:
        noise = np.random.default_rng(seed).normal(size=(SIDE, SIDE, 3))
        across, down = np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE))
        falling = 1 / np.maximum(np.hypot(across, down), 1 / SIDE)
        values = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) * falling[..., None], axes=(0, 1)).real
        return Image.fromarray(np.clip(128 + 50 * values / values.std(), 0, 255).astype(np.uint8))

    return SampleImages(f"{FEW} generated pictures", lambda: ((seed, picture(seed)) for seed in range(FEW)))
