"""Which rows make which optimizer step, and their tensors, loaded ahead of the network."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from ensemble.core.parallel import available_cores, ordered_map
from ensemble.loader import Rows, collate

CHANNEL = 4  # of random draws, apart from those of augmentation and of the canonical form
AHEAD = 3  # batches that wait for the network


def steps_per_epoch(rows: int, effective: int) -> int:
    """Optimizer steps that go once over all rows, at most `effective` of them a step."""
    return -(-rows // effective)


def epoch_steps(rows: int, effective: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of each optimizer step of an epoch, int64: all rows once, in an order drawn for it.

    Steps differ by one row at most, so that no epoch ends on a step of a few images.
    """
    order = np.random.default_rng([seed, epoch, CHANNEL]).permutation(rows)
    return np.array_split(order, steps_per_epoch(rows, effective))


def pieces(rows: np.ndarray, most: int) -> list[np.ndarray]:
    """The rows in parts that go through the network at once: as few as there can be, of about one size."""
    return np.array_split(rows, max(-(-len(rows) // most), 1))


def load(rows: Rows, epoch: int, wanted: Sequence[np.ndarray], device: str) -> Iterator[dict[str, torch.Tensor]]:
    """The batch of each array of row numbers, in that order.

    For a CPU on threads, which share what was decoded before; for a GPU in processes of
    their own, since Python's lock would let the GPU wait.
    """
    if device == "cpu":
        keys = [(epoch, int(row)) for batch in wanted for row in batch]
        loaded = ordered_map(rows.__getitem__, keys, ahead=AHEAD * max(map(len, wanted)))
        for batch in wanted:
            yield collate([next(loaded) for _ in batch])
        return
    yield from DataLoader(
        rows,
        batch_sampler=[[(epoch, int(row)) for row in batch] for batch in wanted],
        num_workers=_workers(),
        prefetch_factor=AHEAD,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )


def _workers() -> int:
    """Loading processes of this training process: its share of the machine's cores, at most 16."""
    together = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as launchers say
    return max(min(available_cores() // together, 16), 1)
