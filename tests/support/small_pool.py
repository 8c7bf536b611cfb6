"""A small test set and a labelled pool of noisy colour patches, and a checkpoint that tells the colours apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from hub_layouts import CONVNEXT_EXTRACTOR, Layout
from pictures import encoded, write_files
from PIL import Image

TINY = Layout(
    "tiny",
    0.0,
    "convnext",
    {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": 7},
    {**CONVNEXT_EXTRACTOR, "resample": 3, "size": {"shortest_edge": 32}},
)
COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200), "grey": (128, 128, 128)}
TEST_COLOURS = ("red", "green")


def patch(colour: str, seed: int) -> Image.Image:
    """No two seeds give near-duplicates: each has a pattern of its own."""
    rng = np.random.default_rng([seed, *COLOURS[colour]])
    coarse = rng.integers(-55, 56, (5, 5, 1)).repeat(8, axis=0).repeat(8, axis=1)
    fine = rng.integers(-12, 13, (40, 40, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + coarse + fine).clip(0, 255).astype(np.uint8))


def write_test(folder: Path, each: int = 4) -> Path:
    """Red and green patches, named COLOUR_NUMBER.png."""
    for colour in TEST_COLOURS:
        for number in range(each):
            name = f"{colour}_{number}.png"
            write_files(folder, name, data=encoded(patch(colour, number)))
    return folder


def write_pool(folder: Path, each: int = 6) -> Path:
    """ai/ and real/ with `each` patches of every colour."""
    for label, name in enumerate(("real", "ai")):
        for colour in COLOURS:
            for number in range(each):
                seed = 100 + 100 * label + number
                write_files(folder, f"{name}/{colour}_{number}.png", data=encoded(patch(colour, seed)))
    return folder


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny networks gain nothing from a second thread, and lose much where other work holds the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
