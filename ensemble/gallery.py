"""The images that a stack gets most wrong, with what every member said of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL.Image import Image
from tqdm import tqdm

from ensemble.core.errors import ImageError
from ensemble.images import html
from ensemble.images.canonical import WHITE
from ensemble.images.decode import flatten
from ensemble.report_rows import Rows

COUNT = 12  # images of each kind
TITLES = ("False positives: reals called ai", "False negatives: ai called real")  # by label

Look = Callable[[Image], Image]  # an RGB image -> the same with its heat map laid on


@dataclass(frozen=True)
class Card:
    """One image of the gallery. wrong: it lies beyond the threshold; else it fills up as one of the nearest.

    target: the stack's P(ai). members: each member's. picture, heat: data URIs, None where there is none.
    missing: why the image cannot be shown.
    """

    id: str
    source: str
    generator: str
    target: float
    wrong: bool
    members: tuple[tuple[str, float], ...]
    picture: str | None
    heat: str | None
    missing: str


def worst(labels: np.ndarray, logits: np.ndarray, label: int, count: int = COUNT) -> np.ndarray:
    """Rows of a class, int [up to count], those that lie furthest on the other class's side first."""
    rows = np.flatnonzero(labels == label)
    return rows[np.argsort(logits[rows] if label else -logits[rows], kind="stable")[:count]]


def cards(rows: Rows, threshold: float, label: int, look: Look | None = None, count: int = COUNT) -> list[Card]:
    """The most confident errors among images of a class; then, if too few are wrong, the nearest to the threshold."""
    chosen = worst(rows.labels, rows.stack, label, count)
    bar = tqdm(chosen, "pictures", unit="image", leave=False, disable=None)
    return [_card(rows, int(row), threshold, look) for row in bar]


def _card(rows: Rows, row: int, threshold: float, look: Look | None) -> Card:
    told, p = rows.frame.iloc[row], rows.p
    picture = heat = None
    missing = ""
    try:
        image = flatten(rows.read(row), WHITE)
        picture = html.picture(image)
        heat = html.picture(look(image)) if look is not None else None
    except ImageError as error:
        missing = str(error)
    target = float(p["stack"][row])
    return Card(
        str(told["id"]),
        str(told["source"]),
        str(told["generator"]),
        target,
        bool((target >= threshold) != bool(told["label"])),
        tuple((name, float(p[name][row])) for name in rows.names),
        picture,
        heat,
        missing,
    )
