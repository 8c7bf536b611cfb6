"""Rows of the data set as tensors for training: decode, degrade, crop, turn.

Which rows make which optimizer step, and their tensors, loaded ahead of the network.
"""

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
from ensemble.images.canonical import Plan, read_canonical

Key = tuple[int, int]  # epoch, row


class TrainDataset(Dataset[dict[str, Any]]):
    """Images and labels under a contract: pixels uint8 [K, S, S, 3], label float.

    With `augment`, each image is one random view; the draw depends on seed, epoch and row
    alone, so a run repeats whatever the number of worker processes. With `plan`, images are
    brought to their canonical form first. `keep` bytes of decoded images stay in memory,
    so that later epochs need not decode them again.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: np.ndarray,
        preprocess_config: PreprocessConfig,
        augment: Augment | None = None,
        seed: int = 0,
        plan: Plan | None = None,
        keep: int = 0,
    ) -> None:
        self.plan = plan
        self.files, self.labels, self.preprocess_config = list(files), labels, preprocess_config
        self.augment, self.seed = augment, seed
        self.room, self.kept = keep, dict[int, Image.Image]()

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
            changes = degradations.draw(self.augment, rng)
            place = (float(rng.random()), float(rng.random()))
            if changes and self.preprocess_config.geometry == "native_crops":
                image = crop_region(image, self.preprocess_config.size, place, changes)
            for change in changes:
                image = change.apply(image)
            pixels = degradations.turn(preprocess.to_pixels(image, self.preprocess_config, [place]), self.augment, rng)
        return {"pixels": pixels, "labels": float(self.labels[row])}

    def _decoded(self, row: int) -> Image.Image:
        if row in self.kept:
            return self.kept[row]
        image = decode.decode(self.files[row])
        size = image.width * image.height * len(image.getbands())
        if size <= self.room:
            self.room -= size
            self.kept[row] = image
        return image


def crop_region(
    image: Image.Image, size: int, place: tuple[float, float], changes: Sequence[degradations.Change]
) -> Image.Image:
    """The part of an image that suffices for a crop of `size` pixels at `place` after the changes.

    Twice the length of what the crop shows, for what reaches into it from beyond its edges.
    Cut at the same share of the free space, it holds the crop where the whole image has it
    (unless `crop` is among the changes, which then moves it less far).
    """
    side = math.ceil(2 * size / math.prod(change.scale for change in changes))
    return degradations.cut(image, side, side, *place)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: pixels uint8 [N, K, S, S, 3], labels float32 [N]."""
    return {
        "pixels": torch.from_numpy(np.stack([row["pixels"] for row in rows])),
        "labels": torch.tensor([row["labels"] for row in rows], dtype=torch.float32),
    }


SEED_STREAM = 4  # of random draws, apart from those of augmentation and of the canonical form
PREFETCH_BATCHES = 3  # batches that wait for the network


def steps_per_epoch(rows: int, effective: int) -> int:
    """Optimizer steps that go once over all rows, at most `effective` of them a step."""
    return -(-rows // effective)


def epoch_steps(rows: int, effective: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of each optimizer step of an epoch, int64: all rows once, in an order drawn for it.

    Steps differ by one row at most, so that no epoch ends on a step of a few images.
    """
    order = np.random.default_rng([seed, epoch, SEED_STREAM]).permutation(rows)
    return np.array_split(order, steps_per_epoch(rows, effective))


def micro_batches(rows: np.ndarray, most: int) -> list[np.ndarray]:
    """The rows in parts that go through the network at once: as few as there can be, of about one size."""
    return np.array_split(rows, max(-(-len(rows) // most), 1))


def load_batches(
    rows: TrainDataset, epoch: int, wanted: Sequence[np.ndarray], device: str
) -> Iterator[dict[str, torch.Tensor]]:
    """The batch of each array of row numbers, in that order.

    For a CPU on threads, which share what was decoded before; for a GPU in processes of
    their own, since Python's lock would let the GPU wait.
    """
    if device == "cpu":
        keys = [(epoch, int(row)) for batch in wanted for row in batch]
        loaded = ordered_map(rows.__getitem__, keys, ahead=PREFETCH_BATCHES * max(map(len, wanted)))
        for batch in wanted:
            yield collate([next(loaded) for _ in batch])
        return
    yield from DataLoader(
        rows,
        batch_sampler=[[(epoch, int(row)) for row in batch] for batch in wanted],
        num_workers=_workers(),
        prefetch_factor=PREFETCH_BATCHES,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )


def _workers() -> int:
    """Loading processes of this training process: its share of the machine's cores, at most 16."""
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as launchers say
    return max(min(available_cores() // together, 16), 1)
