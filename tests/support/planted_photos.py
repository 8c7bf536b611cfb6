"""Photographs from packages, and unlike tiles cut from them, for planted.py."""

import csv
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

# No drawings, no pages of text, and of a stereo pair only one.
PACKAGED = {
    "skimage/data": (
        "astronaut brick camera chelsea clock_motion coffee coins grass gravel hubble_deep_field ihc moon "
        "motorcycle_left retina rocket"
    ).split(),
    "sklearn/datasets/images": ["china", "flower"],
}
INSIDE = {"retina": (220, 220, 1190, 1190)}  # of its black rim, all tiles are alike
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
MIN_SIDE = 200  # pixels; smaller photos hold no two unlike tiles
MIN_DETAIL = 10.0  # standard deviation of a tile's grey values, in 0..255: blank sky and paper are all alike
MAX_LIKENESS = 0.85  # correlation of two tiles' thumbnails, however turned
ATTEMPTS = 200
MAX_OVERLAP = 0.5  # of two tiles' boxes, intersection over union, when a photo is nearly used up


@dataclass(frozen=True)
class Wanted:
    """A tile to cut: size (width, height) in pixels, scale as tile pixels per photo pixel, indices of the photos."""

    size: tuple[int, int]
    scale: tuple[float, float]
    filter: Image.Resampling
    photos: Sequence[int]


@dataclass(frozen=True)
class _Taken:
    """Boxes cut from a photo, and the tiles' thumbnails as unit vectors."""

    boxes: list[np.ndarray] = field(default_factory=list)
    looks: list[np.ndarray] = field(default_factory=list)


def photos() -> list[tuple[str, Image.Image]]:
    """(name, RGB image) of 17 photos in scikit-image and scikit-learn.

    MANYEYES_PHOTOS may name folders with more, joined as in PATH: all images below them, or where a
    train.csv (path, label, group) lies in one, the first real image of each group.
    """
    found = [(file.stem, file) for file in _packaged()]
    for folder in filter(None, os.environ.get("MANYEYES_PHOTOS", "").split(os.pathsep)):
        found += _below(Path(folder))
    images = [(name, Image.open(file).convert("RGB").crop(INSIDE.get(name))) for name, file in found]
    return [(name, image) for name, image in images if min(image.size) >= MIN_SIDE]


def _packaged() -> list[Path]:
    files = []
    for place, names in PACKAGED.items():
        package, _, inner = place.partition("/")
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        folder = Path(spec.submodule_search_locations[0]) / inner
        files += [next(folder.glob(f"{name}.*")) for name in names]
    return files


def _below(folder: Path) -> list[tuple[str, Path]]:
    tables = sorted(folder.rglob("train.csv"))
    if not tables:
        return [(file.stem, file) for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES]
    first: dict[str, Path] = {}
    for table in tables:
        with table.open(encoding="utf-8", newline="") as rows:
            for row in csv.DictReader(rows):
                if row["label"] in {"0", "real"}:
                    first.setdefault(row["group"], table.parent / row["path"])
    return list(first.items())


def cut(
    photos: Sequence[Image.Image], wanted: Sequence[Wanted], rng: np.random.Generator
) -> list[tuple[int, Image.Image]]:
    """(index of the photo, RGB tile) for each of `wanted`, all of them unlike and from boxes that hardly overlap.

    They are cut in random order, so that those asked for first are no luckier.
    """
    taken: dict[int, _Taken] = {}
    tiles: dict[int, tuple[int, Image.Image]] = {}
    for place in rng.permutation(len(wanted)):
        tiles[place] = _cut_one(photos, wanted[place], taken, rng)
    return [tiles[place] for place in range(len(wanted))]


def _cut_one(
    photos: Sequence[Image.Image], wanted: Wanted, taken: dict[int, _Taken], rng: np.random.Generator
) -> tuple[int, Image.Image]:
    areas = np.array([photos[index].width * photos[index].height for index in wanted.photos], dtype=float)
    weights = np.sqrt(areas) / np.sqrt(areas).sum()
    for attempt in range(ATTEMPTS):
        index = wanted.photos[int(rng.choice(len(areas), p=weights))]
        box = _box(photos[index].size, wanted, rng)
        others = taken.setdefault(index, _Taken())
        if _overlap(box, others.boxes) > min(MAX_OVERLAP, 0.05 + 0.01 * attempt):
            continue
        tile = photos[index].resize(wanted.size, wanted.filter, box=tuple(box))
        if np.asarray(tile.convert("L")).std() < MIN_DETAIL or likeness(tile, others.looks) > MAX_LIKENESS:
            continue
        others.boxes.append(box)
        others.looks.append(look(tile))
        return index, tile
    raise AssertionError(f"the photos are used up: no new tile of {wanted.size} in {ATTEMPTS} attempts")


def _box(photo: tuple[int, int], wanted: Wanted, rng: np.random.Generator) -> np.ndarray:
    scale = float(np.exp(rng.uniform(*np.log(wanted.scale))))
    scale = max(scale, *(side / whole for side, whole in zip(wanted.size, photo, strict=True)))
    corner, extent = [], []
    for side, whole in zip(wanted.size, photo, strict=True):
        length = min(side / scale, whole)
        corner.append(int(rng.integers(0, int(whole - length) + 1)))
        extent.append(length)
    return np.array([*corner, corner[0] + extent[0], corner[1] + extent[1]])


def _overlap(box: np.ndarray, boxes: Sequence[np.ndarray]) -> float:
    """The largest intersection over union of `box` with any of `boxes`, each (left, top, right, bottom)."""
    if not boxes:
        return 0.0
    others = np.stack(boxes)
    shared = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    common = np.clip(shared, 0, None).prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - common
    return float((common / union).max())


def look(tile: Image.Image) -> np.ndarray:
    """Unit vector [256] of a thumbnail's grey values about their mean."""
    grey = np.asarray(tile.convert("L").resize((16, 16), Image.Resampling.BOX), dtype=float)
    return ((grey - grey.mean()) / (np.linalg.norm(grey - grey.mean()) + 1e-9)).ravel()


def likeness(tile: Image.Image, looks: Sequence[np.ndarray]) -> float:
    """The highest correlation of a tile, in its eight mirrorings and quarter turns, with any of `looks`."""
    if not looks:
        return 0.0
    grey = look(tile).reshape(16, 16)
    turned = [np.rot90(side, quarter).ravel() for side in (grey, grey.T) for quarter in range(4)]
    return float((np.stack(looks) @ np.stack(turned).T).max())
