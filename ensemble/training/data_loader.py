"""The data loader of training: the order of rows, augmentation, and batches that are loaded ahead."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ensemble.core.parallel import available_cores, ordered_map
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.core.recipe import Augment
from ensemble.images import decode, degradations, preprocess
from ensemble.images.canonical import CanonicalPlan, read_canonical

Key = tuple[int, int]  # epoch, row


class TrainDataset(Dataset[dict[str, Any]]):
    """Preprocessed images and labels: pixels uint8 [K, S, S, 3], label float.

    With `augment`, each image is one random view (K = 1), which depends on seed, epoch and row alone: a run repeats
    whatever the number of worker processes. With `plan`, images are brought to their canonical form first.
    cache_bytes: of decoded images that stay in memory, so that later epochs need not decode them again.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: np.ndarray,
        preprocess_config: PreprocessConfig,
        augment: Augment | None = None,
        seed: int = 0,
        plan: CanonicalPlan | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.plan = plan
        self.files, self.labels, self.preprocess_config = list(files), labels, preprocess_config
        self.augment, self.seed = augment, seed
        self._cache_bytes_left, self._cache = cache_bytes, dict[int, Image.Image]()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, row = key
        draw = [self.seed, epoch if self.augment else 0, row]
        image = self._decoded(row) if self.plan is None else read_canonical(self.files[row], self.plan, draw)
        if self.augment is None:
            pixels = preprocess.to_pixels(image, self.preprocess_config)
        else:
            rng = np.random.default_rng(draw)
            changes = degradations.draw_degradations(self.augment, rng)
            offset = (float(rng.random()), float(rng.random()))
            if changes and self.preprocess_config.geometry == "native_crops":
                image = crop_region(image, self.preprocess_config.size, offset, changes)
            for change in changes:
                image = change.apply(image)
            pixels = degradations.random_flip(
                preprocess.to_pixels(image, self.preprocess_config, [offset]), self.augment, rng
            )
        return {"pixels": pixels, "labels": float(self.labels[row])}

    def _decoded(self, row: int) -> Image.Image:
        if row in self._cache:
            return self._cache[row]
        image = decode.decode(self.files[row])
        size = image.width * image.height * len(image.getbands())
        if size <= self._cache_bytes_left:
            self._cache_bytes_left -= size
            self._cache[row] = image
        return image


def crop_region(
    image: Image.Image, size: int, offset: tuple[float, float], changes: Sequence[degradations.Degradation]
) -> Image.Image:
    """The part of an image that is enough for a crop of `size` pixels at `offset` after the changes.

    offset: (x, y) in 0..1 of the free space. The part is twice as long as what the crop shows, since blurs and codecs
    reach into the crop from beyond its edges. It is cut at the same offset, so that the crop shows what it would
    show of the whole image (unless `crop` is among the changes: then it is moved less).
    """
    side = math.ceil(2 * size / math.prod(change.scale for change in changes))
    return degradations.crop_at(image, side, side, *offset)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: pixels uint8 [N, K, S, S, 3], labels float32 [N]."""
    return {
        "pixels": torch.from_numpy(np.stack([row["pixels"] for row in rows])),
        "labels": torch.tensor([row["labels"] for row in rows], dtype=torch.float32),
    }


SEED_STREAM = 4  # of the row order, apart from the random numbers of augmentation and of the canonical form
MAX_WORKERS = 16  # loading processes of one training process
PREFETCH_BATCHES = 3  # loaded ahead of the network


def steps_per_epoch(rows: int, effective: int) -> int:
    """Optimizer steps of one epoch. effective: most rows of a step (batch size times accumulation)."""
    return -(-rows // effective)


def epoch_steps(rows: int, effective: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of each optimizer step of an epoch, int64: all rows once, in an order drawn for this epoch.

    Steps differ by one row at most, so that no epoch ends on a step of a few images.
    """
    order = np.random.default_rng([seed, epoch, SEED_STREAM]).permutation(rows)
    return np.array_split(order, steps_per_epoch(rows, effective))


def micro_batches(rows: np.ndarray, most: int) -> list[np.ndarray]:
    """A step's rows in as few batches of at most `most` rows as possible, of about equal size."""
    return np.array_split(rows, max(-(-len(rows) // most), 1))


def load_batches(
    data: TrainDataset, epoch: int, batches: Sequence[np.ndarray], device: str
) -> Iterator[dict[str, torch.Tensor]]:
    """The batch of each array of row numbers, in that order.

    For a CPU on threads, which share the decoded images; for a GPU in separate processes, since the GPU would wait
    for Python's global lock.
    """
    if device == "cpu":
        keys = [(epoch, int(row)) for batch in batches for row in batch]
        loaded = ordered_map(data.__getitem__, keys, ahead=PREFETCH_BATCHES * max(map(len, batches)))
        for batch in batches:
            yield collate([next(loaded) for _ in batch])
        return
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of training, on this machine; set by launchers
    yield from DataLoader(
        data,
        batch_sampler=[[(epoch, int(row)) for row in batch] for batch in batches],
        num_workers=max(min(available_cores() // local_processes, MAX_WORKERS), 1),
        prefetch_factor=PREFETCH_BATCHES,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )
