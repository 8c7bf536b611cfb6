"""Rows of the data set as tensors for training: decode, degrade, crop, turn."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ensemble.core.preprocess_config import ImageContract
from ensemble.core.recipe import Augment
from ensemble.images import decode, degradations
from ensemble.images.canonical import Plan, read_canonical

Key = tuple[int, int]  # epoch, row


class Rows(Dataset[dict[str, Any]]):
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
        contract: ImageContract,
        augment: Augment | None = None,
        seed: int = 0,
        plan: Plan | None = None,
        keep: int = 0,
    ) -> None:
        self.plan = plan
        self.files, self.labels, self.contract = list(files), labels, contract
        self.augment, self.seed = augment, seed
        self.room, self.kept = keep, dict[int, Image.Image]()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, row = key
        draw = [self.seed, epoch if self.augment else 0, row]
        image = self._decoded(row) if self.plan is None else read_canonical(self.files[row], self.plan, draw)
        if self.augment is None:
            pixels = decode.to_pixels(image, self.contract)
        else:
            rng = np.random.default_rng(draw)
            changes = degradations.draw(self.augment, rng)
            place = (float(rng.random()), float(rng.random()))
            if changes and self.contract.geometry == "native_crops":
                image = around(image, self.contract.size, place, changes)
            for change in changes:
                image = change.apply(image)
            pixels = degradations.turn(decode.to_pixels(image, self.contract, [place]), self.augment, rng)
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


def around(
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
