"""A robustness grid: named changes of an image, of which a detector is judged by the worst."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from ensemble import degrade, metrics


@dataclass(frozen=True)
class Cell:
    """One change of a decoded image; the same image always gives the same pixels."""

    name: str
    apply: Callable[[Image.Image], Image.Image]


def unchanged(image: Image.Image) -> Image.Image:
    """The image itself."""
    return image


# What a picture meets on the web, each once and not at its worst: few enough to score every epoch on.
SMALL_GRID = (
    Cell("clean", unchanged),
    Cell("jpeg 70", partial(degrade.jpeg, quality=70)),
    Cell("jpeg 50", partial(degrade.jpeg, quality=50)),
    Cell("webp 70", partial(degrade.webp, quality=70)),
    Cell("blur 1", partial(degrade.blur, sigma=1.0)),
    Cell("resize 0.5", partial(degrade.resize, scale=0.5, filter_name="bicubic")),
    Cell("noise 0.05", partial(degrade.noise, sigma=0.05, seed=0)),
)


def worst_cell(labels: np.ndarray, logits_by_cell: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """Name and AUROC of the cell that is told apart worst, the first of equals.

    labels: int [N], ai = 1. logits_by_cell: float [N] for each cell. NaN if a class is missing.
    """
    scores = {name: metrics.auroc(labels, logits) for name, logits in logits_by_cell.items()}
    worst = min(scores, key=lambda name: scores[name])
    return worst, scores[worst]
