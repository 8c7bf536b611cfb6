"""The storage-swap test: each class is stored as the other one. Scores that move follow the files, not the pictures."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ensemble.core import metrics
from ensemble.core.parallel import ordered_map
from ensemble.images import decode, pixel_traces, preprocess
from ensemble.images.canonical import WHITE
from ensemble.images.decode import FORMATS

IMAGES_PER_CLASS = 100

ScoreFunction = Callable[[Sequence[Image.Image]], np.ndarray]  # decoded images -> logits [N]


@dataclass(frozen=True)
class StorageSwap:
    """AUROC of one scorer on the same images, stored in three ways, and how far the logits moved.

    as_is: as they are. own: each stored again as another image of its own class, the control. swapped: each stored as
    an image of the other class. shifts: mean change of the logit from own to swapped, of real and of ai images.
    """

    scorer: str
    images: int
    as_is: float
    own: float
    swapped: float
    shifts: tuple[float, float]


def swap_test(
    files: Sequence[Path],
    labels: np.ndarray,
    score: ScoreFunction,
    scorer: str,
    seed: int = 0,
    most: int = IMAGES_PER_CLASS,
) -> StorageSwap | None:
    """Store images as the other class is stored, and see whether the scores follow; None without both classes."""
    rng = np.random.default_rng(seed)
    sides = [rng.permutation(np.flatnonzero(labels == label))[:most] for label in (0, 1)]
    if not (len(sides[0]) and len(sides[1])):
        return None
    rows = np.concatenate(sides)
    donors = {
        way: [files[int(rng.choice(sides[label if way == "own" else 1 - label]))] for label in labels[rows]]
        for way in ("own", "swapped")
    }
    chosen = [files[row] for row in rows]
    logits = {"as_is": score([decode.decode(file) for file in chosen])}
    for way, likes in donors.items():
        pairs = zip(chosen, likes, strict=True)
        logits[way] = score(list(ordered_map(lambda pair: stored_as(decode.decode(pair[0]), pair[1]), pairs)))
    moved = logits["swapped"] - logits["own"]
    scores = {way: metrics.auroc(labels[rows], values) for way, values in logits.items()}
    shifts = tuple(float(moved[labels[rows] == label].mean()) for label in (0, 1))
    return StorageSwap(scorer, len(rows), **scores, shifts=(shifts[0], shifts[1]))


def stored_as(image: Image.Image, donor: Path) -> Image.Image:
    """An image after it was stored as `donor` is: cut to its size where larger, in its format and tables.

    Nothing is enlarged.
    """
    rgb = preprocess.flatten(image, WHITE)
    with Image.open(donor, formats=FORMATS) as like:
        width, height = (min(own, other) for own, other in zip(rgb.size, like.size, strict=True))
        left, top = (rgb.width - width) // 2, (rgb.height - height) // 2
        rgb = rgb.crop((left, top, left + width, top + height))
        options: dict[str, Any] = {"format": like.format, "quality": 80}
        if isinstance(like, JpegImagePlugin.JpegImageFile):
            sampling = max(JpegImagePlugin.get_sampling(like), 0)
            options = {"format": "JPEG", "qtables": like.quantization, "subsampling": sampling}
        elif like.format not in ("WEBP", "AVIF"):  # lossless
            return rgb
    buffer = io.BytesIO()
    rgb.save(buffer, **options)
    return decode.decode(buffer.getvalue())


def fit_small_classifier(
    labels: np.ndarray, traces: np.ndarray, groups: np.ndarray
) -> tuple[ScoreFunction, np.ndarray] | None:
    """A small detector, where there is no trained member: logistic regression on pixel traces of half of the groups.

    labels: int [N]. traces: float [N, D]. groups: [N]. Returns it with the rows of the other half, to test it on; None
    where a half has one class only.
    """
    names = groups.astype(str)
    half = np.isin(names, np.random.default_rng(0).permutation(np.unique(names))[::2])
    if len(set(labels[half])) < 2 or len(set(labels[~half])) < 2:
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    model.fit(traces[half], labels[half])

    def score(pictures: Sequence[Image.Image]) -> np.ndarray:
        values = np.stack(list(ordered_map(pixel_traces.measure, pictures)))
        return np.asarray(model.decision_function(np.nan_to_num(values)))

    return score, np.flatnonzero(~half)


def member_score_function(run: Path, names: Sequence[str]) -> ScoreFunction:
    """The mean logit of a run's members. Needs torch."""
    from ensemble.models.runner import image_scorer
    from ensemble.models.torch_runner import member_runners

    score = image_scorer([*member_runners(run, names)])
    # one image at a time, so that a logit does not depend on the others in its batch
    return lambda pictures: np.array([float(score([picture]).mean()) for picture in pictures])
