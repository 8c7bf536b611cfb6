"""Images that an export is checked on: a few at fp32, and hundreds that no member was fitted on below it. No torch."""

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

SAMPLE_COUNT = 14  # images at fp32: two batches of seven
GENERATED_PIXELS = 256  # side of a generated image
MIN_CALIBRATION, MAX_CALIBRATION, MAX_COMPARISON = 128, 256, 512  # training images for int8


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images, with a description for messages. labels: int [N], ai = 1. heldout: held-out rows of the run."""

    description: str
    heldout: bool
    ids: tuple[str, ...]
    files: tuple[Path, ...]
    labels: np.ndarray

    def subset(self, rows: Sequence[int] | np.ndarray) -> "LabelledImages":
        """The images at these positions."""
        ids, files = tuple(self.ids[row] for row in rows), tuple(self.files[row] for row in rows)
        return LabelledImages(self.description, self.heldout, ids, files, self.labels[rows])

    def external_logits(self, member: External) -> np.ndarray:
        """Logits float64 [N] of a member that was trained elsewhere; ArtifactError where it has none."""
        return member.heldout.loc[list(self.ids)].to_numpy() if self.heldout else test_column(member, self.ids)


@dataclass(frozen=True)
class SampleImages:
    """A few images to check fp32 on, with a description for messages. read: yields (name, image)."""

    description: str
    read: Callable[[], Iterator[tuple[object, Image.Image]]]

    def pixels(self, preprocess_config: PreprocessConfig) -> np.ndarray:
        """The first view of each image, uint8 [N, S, S, 3]; ArtifactError where one cannot be read."""
        views = []
        try:
            for name, image in self.read():
                with decode.errors_with_name(name):
                    views.append(preprocess.to_pixels(image, preprocess_config)[:1])
        except ImageError as error:
            raise ArtifactError(f"export needs {self.description}, and one cannot be read: {error}") from None
        return np.concatenate(views)


@dataclass(frozen=True)
class TrainingImages:
    """Images of the train split: some to calibrate int8 by, others to compare precisions on."""

    calibration: LabelledImages
    comparison: LabelledImages


def heldout_images(run: Path) -> LabelledImages:
    """A run's held-out rows."""
    return _rows(run, "heldout", "held-out images")


def training_images(run: Path) -> TrainingImages | None:
    """Rows of the train split, at most half of them to calibrate by; None where they are too few."""
    images = _rows(run, "train", "training images")
    if len(images.ids) < 2 * MIN_CALIBRATION:
        return None
    calibration = stratified_sample(images, min(MAX_CALIBRATION, len(images.ids) // 2))
    chosen = set(calibration.ids)
    others = images.subset([row for row, key in enumerate(images.ids) if key not in chosen])
    return TrainingImages(calibration, stratified_sample(others, MAX_COMPARISON))


def _rows(run: Path, split: str, description: str) -> LabelledImages:
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
    rows = frame[frame["split"] == split]
    files, labels = tuple(dataset.files(rows)), rows["label"].to_numpy()
    return LabelledImages(description, split == "heldout", tuple(rows["id"]), files, labels)


def labelled_images(items: Sequence[LabelledImage], paths: Sequence[Path]) -> LabelledImages:
    """Images that the user labelled, as read from `paths`."""
    description = f"images of {join_limited(as_utf8(path.name) for path in paths)}"
    ids, files = tuple(item.id for item in items), tuple(item.file for item in items)
    return LabelledImages(description, False, ids, files, np.array([item.label for item in items]))


def stratified_sample(images: LabelledImages, count: int) -> LabelledImages:
    """At most `count` of the images, the classes as equal in number as possible, in the order given."""
    shuffled = np.random.default_rng(0).permutation(len(images.labels))
    classes = images.labels[shuffled]
    rank = pd.Series(classes).groupby(classes).cumcount()
    return images.subset(np.sort(shuffled[np.argsort(rank, kind="stable")[:count]]))


def sample_images(images: LabelledImages) -> SampleImages:
    """SAMPLE_COUNT of the images, of both classes."""
    return all_images(stratified_sample(images, SAMPLE_COUNT))


def all_images(images: LabelledImages) -> SampleImages:
    """All of the images, read when they are needed."""
    description = f"{len(images.files)} {images.description}"
    return SampleImages(description, lambda: ((file, decode.decode(file)) for file in images.files))


def generated_images() -> SampleImages:
    """Images with the spectrum of photographs (amplitude 1 / frequency) and random phase."""

    def image(seed: int) -> Image.Image:
        noise = np.random.default_rng(seed).normal(size=(GENERATED_PIXELS, GENERATED_PIXELS, 3))
        across, down = np.meshgrid(np.fft.fftfreq(GENERATED_PIXELS), np.fft.fftfreq(GENERATED_PIXELS))
        falling = 1 / np.maximum(np.hypot(across, down), 1 / GENERATED_PIXELS)
        values = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) * falling[..., None], axes=(0, 1)).real
        return Image.fromarray(np.clip(128 + 50 * values / values.std(), 0, 255).astype(np.uint8))

    return SampleImages(
        f"{SAMPLE_COUNT} generated pictures", lambda: ((seed, image(seed)) for seed in range(SAMPLE_COUNT))
    )
