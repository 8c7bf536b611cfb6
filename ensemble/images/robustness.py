"""The robustness grid: named corruptions of an image, of which a detector is judged by the worst."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce

import numpy as np
from PIL import Image

from ensemble.core import metrics
from ensemble.core.errors import DataError, join_limited
from ensemble.images import degradations

GRID_VERSION = 1  # raised by hand when a corruption of the same name would give other pixels
Change = Callable[[Image.Image], Image.Image]  # the same image always gives the same pixels


def chain(image: Image.Image, steps: Sequence[Change]) -> Image.Image:
    """An image after several changes, in this order."""
    return reduce(lambda changed, step: step(changed), steps, image)


def full_grid() -> dict[str, Change]:
    """Every kind of damage at every strength, 31 corruptions with "clean"; the small grid is among them.

    JPEG with 4:2:0 and WebP at qualities 95 to 30; blur, sigma in pixels; both sides multiplied,
    by three filters; noise, sigma as a share of 0..1; the middle 80 % of each side; and chains of
    what happens to a picture that is passed on.
    """
    jpeg = {quality: partial(degradations.jpeg, quality=quality) for quality in (95, 90, 70, 50, 30)}
    webp = {quality: partial(degradations.webp, quality=quality) for quality in jpeg}
    blur = {sigma: partial(degradations.blur, sigma=sigma) for sigma in (0.5, 1.0, 2.0)}
    resize = {
        f"{scale} {name}".removesuffix(" bicubic"): partial(degradations.resize, scale=scale, filter_name=name)
        for scale in (0.75, 0.5, 0.25)
        for name in ("bilinear", "bicubic", "lanczos")
    }
    noise = {sigma: partial(degradations.noise, sigma=sigma, seed=0) for sigma in (0.02, 0.05, 0.1)}
    crop = partial(degradations.crop, scale=0.8, y=0.5, x=0.5)
    chains: dict[str, list[Change]] = {
        "jpeg 90 + resize 0.5 + jpeg 70": [jpeg[90], resize["0.5"], jpeg[70]],
        "crop 0.8 + resize 0.75 + webp 70": [crop, resize["0.75"], webp[70]],
        "blur 1 + noise 0.02 + jpeg 50": [blur[1.0], noise[0.02], jpeg[50]],
        "jpeg 70 + webp 50 + jpeg 30": [jpeg[70], webp[50], jpeg[30]],
    }
    return {
        "clean": partial(chain, steps=()),
        **{f"jpeg {quality}": change for quality, change in jpeg.items()},
        **{f"webp {quality}": change for quality, change in webp.items()},
        **{f"blur {sigma:g}": change for sigma, change in blur.items()},
        **{f"resize {name}": change for name, change in resize.items()},
        **{f"noise {sigma}": change for sigma, change in noise.items()},
        "crop 0.8": crop,
        **{name: partial(chain, steps=steps) for name, steps in chains.items()},
    }


# What a picture meets on the web, each once and not at its worst: few enough to score every epoch on.
SMALL_NAMES = ("clean", "jpeg 70", "jpeg 50", "webp 70", "blur 1", "resize 0.5", "noise 0.05")
SMALL_GRID = {name: full_grid()[name] for name in SMALL_NAMES}


def choose_corruptions(grid: str, names: Sequence[str] = ()) -> dict[str, Change]:
    """The corruptions of the grid "full", "small" or "none", or those of these names; "clean" is always the first.

    Raises DataError for a name that no corruption has.
    """
    every = full_grid()
    if not names:
        return {"full": every, "small": SMALL_GRID, "none": {"clean": every["clean"]}}[grid]
    for name in names:
        if name not in every:
            near = difflib.get_close_matches(name, every, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {join_limited(every, 50)}"
            raise DataError(f"no cell is called {name!r}; {hint}")
    return {name: every[name] for name in ("clean", *names)}


def worst_corruption(labels: np.ndarray, logits: Mapping[str, np.ndarray]) -> tuple[str, float]:
    """Name and AUROC of the corruption with the lowest AUROC, the first of equals.

    labels: int [N], ai = 1. logits: float [N] by corruption. NaN if a class is missing.
    """
    scores = {name: metrics.auroc(labels, values) for name, values in logits.items()}
    worst = min(scores, key=lambda name: scores[name])
    return worst, scores[worst]
