"""A robustness grid: named changes of an image, of which a detector is judged by the worst."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
from PIL import Image

from ensemble.core import metrics
from ensemble.core.errors import DataError, join_limited
from ensemble.images import degradations

GRID_VERSION = 1  # raised by hand when a cell of the same name would give other pixels


@dataclass(frozen=True)
class Corruption:
    """One change of a decoded image; the same image always gives the same pixels."""

    name: str
    apply: Callable[[Image.Image], Image.Image]


def identity(image: Image.Image) -> Image.Image:
    """The image itself."""
    return image


# What a picture meets on the web, each once and not at its worst: few enough to score every epoch on.
SMALL_GRID = (
    Corruption("clean", identity),
    Corruption("jpeg 70", partial(degradations.jpeg, quality=70)),
    Corruption("jpeg 50", partial(degradations.jpeg, quality=50)),
    Corruption("webp 70", partial(degradations.webp, quality=70)),
    Corruption("blur 1", partial(degradations.blur, sigma=1.0)),
    Corruption("resize 0.5", partial(degradations.resize, scale=0.5, filter_name="bicubic")),
    Corruption("noise 0.05", partial(degradations.noise, sigma=0.05, seed=0)),
)


def chain(image: Image.Image, steps: Sequence[Callable[[Image.Image], Image.Image]]) -> Image.Image:
    """An image after several changes, in this order."""
    return reduce(lambda changed, step: step(changed), steps, image)


def full_grid() -> tuple[Corruption, ...]:
    """Every kind of damage at every strength, 31 cells with "clean"; the small grid is among them.

    JPEG with 4:2:0 and WebP at qualities 95 to 30; blur, sigma in pixels; both sides multiplied,
    by three filters; noise, sigma as a share of 0..1; the middle 80 % of each side; and chains of
    what happens to a picture that is passed on.
    """
    qualities, scales, filters = (95, 90, 70, 50, 30), (0.75, 0.5, 0.25), ("bilinear", "bicubic", "lanczos")
    half = partial(degradations.resize, scale=0.5, filter_name="bicubic")
    cells = [
        Corruption("clean", identity),
        *(Corruption(f"jpeg {quality}", partial(degradations.jpeg, quality=quality)) for quality in qualities),
        *(Corruption(f"webp {quality}", partial(degradations.webp, quality=quality)) for quality in qualities),
        *(Corruption(f"blur {sigma:g}", partial(degradations.blur, sigma=sigma)) for sigma in (0.5, 1.0, 2.0)),
        *(
            Corruption(
                f"resize {scale}" + ("" if name == "bicubic" else f" {name}"),
                partial(degradations.resize, scale=scale, filter_name=name),
            )
            for scale in scales
            for name in filters
        ),
        *(
            Corruption(f"noise {sigma}", partial(degradations.noise, sigma=sigma, seed=0))
            for sigma in (0.02, 0.05, 0.1)
        ),
        Corruption("crop 0.8", partial(degradations.crop, scale=0.8, y=0.5, x=0.5)),
    ]
    chains: dict[str, list[Callable[[Image.Image], Image.Image]]] = {
        "jpeg 90 + resize 0.5 + jpeg 70": [
            partial(degradations.jpeg, quality=90),
            half,
            partial(degradations.jpeg, quality=70),
        ],
        "crop 0.8 + resize 0.75 + webp 70": [
            partial(degradations.crop, scale=0.8, y=0.5, x=0.5),
            partial(degradations.resize, scale=0.75, filter_name="bicubic"),
            partial(degradations.webp, quality=70),
        ],
        "blur 1 + noise 0.02 + jpeg 50": [
            partial(degradations.blur, sigma=1.0),
            partial(degradations.noise, sigma=0.02, seed=0),
            partial(degradations.jpeg, quality=50),
        ],
        "jpeg 70 + webp 50 + jpeg 30": [
            partial(degradations.jpeg, quality=70),
            partial(degradations.webp, quality=50),
            partial(degradations.jpeg, quality=30),
        ],
    }
    return (*cells, *(Corruption(name, partial(chain, steps=steps)) for name, steps in chains.items()))


def choose_corruptions(grid: str, names: Sequence[str] = ()) -> tuple[Corruption, ...]:
    """The cells of the grid "full", "small" or "none", or those of these names; "clean" is always the first.

    Raises DataError for a name that no cell has.
    """
    every = {cell.name: cell for cell in full_grid()}
    if not names:
        return {"full": tuple(every.values()), "small": SMALL_GRID, "none": SMALL_GRID[:1]}[grid]
    for name in names:
        if name not in every:
            near = difflib.get_close_matches(name, every, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {join_limited(every, 50)}"
            raise DataError(f"no cell is called {name!r}; {hint}")
    return tuple(every[name] for name in dict.fromkeys(["clean", *names]))


def worst_corruption(labels: np.ndarray, logits_by_cell: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """Name and AUROC of the cell that is told apart worst, the first of equals.

    labels: int [N], ai = 1. logits_by_cell: float [N] for each cell. NaN if a class is missing.
    """
    scores = {name: metrics.auroc(labels, logits) for name, logits in logits_by_cell.items()}
    worst = min(scores, key=lambda name: scores[name])
    return worst, scores[worst]
