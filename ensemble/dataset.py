"""Labelled images -> rows -> groups -> splits: the run's dataset.parquet."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ensemble import artifacts, groups, images, sources
from ensemble.errors import DataError, ImageError, some
from ensemble.parallel import ordered_map

COLUMNS = ("id root path label source generator group split fold width height format bytes sha256 phash").split()
# What decides a training run: where the files lie does not.
HASHED_COLUMNS = ["id", "label", "group", "split", "fold", "sha256"]
SPLITS = ("train", "tune", "heldout")


@dataclass(frozen=True)
class Fractions:
    """Shares of the groups that go to tune and heldout; the rest is for training."""

    tune: float = 0.10
    heldout: float = 0.15

    def __post_init__(self) -> None:
        if min(self.tune, self.heldout) <= 0 or self.tune + self.heldout >= 1:
            raise DataError(
                f"--tune {self.tune} and --heldout {self.heldout}: both must be above 0 and their sum below 1"
            )


@dataclass(frozen=True)
class _Seen:
    """What one pass over a file learns of it."""

    width: int
    height: int
    format: str
    bytes: int
    sha256: str
    pixels: str
    phash: int
    thumb: np.ndarray


def build_dataset(
    data: Sequence[sources.Labelled],
    fractions: Fractions,
    seed: int,
    skip_unreadable: bool = False,
    workers: int | None = None,
) -> tuple[pd.DataFrame, list[str]]:
    """Index labelled files: one row an image with the columns of `COLUMNS`.

    Returns the rows, sorted by id, and the messages of files left out by `skip_unreadable`.
    Raises DataError for unreadable files, identical pixels in both classes, or a split
    that lacks a class.
    """
    data = sorted(data, key=lambda item: item.id)
    read, bad = _read_all([item.file for item in data], workers)
    if bad and not skip_unreadable:
        raise DataError(
            f"{len(bad)} of {len(data)} images cannot be read: {some(bad.values(), 3)}; "
            "repair or remove them, or leave them out with --skip-unreadable"
        )
    kept = [(item, seen) for item, seen in zip(data, read, strict=True) if seen is not None]
    items, found = [item for item, _ in kept], [seen for _, seen in kept]
    if not items:
        raise DataError(f"no image of {len(data)} can be read: {some(bad.values(), 3) or 'none was given'}")
    _refuse_conflicts(items, found)
    names = _group_names(items, found)
    frame = pd.DataFrame(
        {
            "id": [item.id for item in items],
            "root": [item.root for item in items],
            "path": [item.path for item in items],
            "label": np.array([item.label for item in items], dtype=np.int8),
            "source": [item.source for item in items],
            "generator": [item.generator for item in items],
            "group": names,
            "split": [assign_split(name, seed, fractions) for name in names],
            "fold": pd.array([None] * len(items), dtype="Int16"),
            "width": np.array([seen.width for seen in found], dtype=np.int32),
            "height": np.array([seen.height for seen in found], dtype=np.int32),
            "format": [seen.format for seen in found],
            "bytes": np.array([seen.bytes for seen in found], dtype=np.int64),
            "sha256": [seen.sha256 for seen in found],
            "phash": [f"{seen.phash:016x}" for seen in found],
        },
        columns=COLUMNS,
    )
    _require_both_classes(frame)
    return frame, list(bad.values())


def assign_split(group: str, seed: int, fractions: Fractions) -> str:
    """train, tune or heldout, by the seed and the group's own hash alone.

    So more images move none of those already there, on any machine and in any order.
    """
    digest = sha256(json.dumps([seed, group]).encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < fractions.heldout:
        return "heldout"
    return "tune" if share < fractions.heldout + fractions.tune else "train"


def dataset_sha256(frame: pd.DataFrame) -> str:
    """Hash of the rows that decide a training run."""
    return artifacts.frame_sha256(frame, HASHED_COLUMNS)


def files(frame: pd.DataFrame) -> list[Path]:
    """The image file of each row."""
    return [Path(root) / path for root, path in zip(frame["root"], frame["path"], strict=True)]


def describe(frame: pd.DataFrame) -> str:
    """Counts by class, suffix and split, one line each, for people."""
    suffixes = frame["path"].str.extract(r"(\.[^./]+)$", expand=False).fillna("none").str.lower()
    lines = []
    for label, name in ((1, "ai"), (0, "real")):
        kinds = Counter(suffixes[frame["label"] == label])
        lines.append(f"  {name:5}{sum(kinds.values()):>7} images ({some(f'{n} {s}' for s, n in kinds.most_common())})")
    for split in SPLITS:
        part = frame[frame["split"] == split]
        lines.append(
            f"  {split:8}{len(part):>4} images, {int(part['label'].sum())} ai, in {part['group'].nunique()} groups"
        )
    return "\n".join(lines)


def _read_all(paths: Sequence[Path], workers: int | None) -> tuple[list[_Seen | None], dict[Path, str]]:
    seen: list[_Seen | None] = []
    bad: dict[Path, str] = {}
    results = ordered_map(_read, paths, workers)
    for path, result in zip(
        paths, tqdm(results, "index", len(paths), unit="image", leave=False, disable=None), strict=True
    ):
        if isinstance(result, str):
            bad[path] = result
        seen.append(None if isinstance(result, str) else result)
    return seen, bad


def _read(path: Path) -> _Seen | str:
    try:
        data = path.read_bytes()
        image = images.decode(data, name=str(path))
    except OSError as error:
        return f"{path}: {error.strerror}"
    except ImageError as error:
        return str(error)
    thumb = groups.thumbnail(image)
    pixels = sha256(str(image.size).encode())
    pixels.update(image.convert("RGBA").tobytes())  # an alpha channel that hides nothing is no difference
    return _Seen(
        width=image.width,
        height=image.height,
        format=images.format_name(data),
        bytes=len(data),
        sha256=sha256(data).hexdigest(),
        pixels=pixels.hexdigest(),
        phash=groups.perceptual_hash(thumb),
        thumb=thumb,
    )


def _refuse_conflicts(items: Sequence[sources.Labelled], found: Sequence[_Seen]) -> None:
    first: dict[str, sources.Labelled] = {}
    conflicts = []
    for item, seen in zip(items, found, strict=True):
        twin = first.setdefault(seen.pixels, item)
        if twin.label != item.label:
            conflicts.append(f"{twin.file} and {item.file}")
    if conflicts:
        raise DataError(f"identical pixels are labelled both ai and real: {some(conflicts, 3)}; remove one of each")


def _group_names(items: Sequence[sources.Labelled], found: Sequence[_Seen]) -> list[str]:
    """One name a row. Equal names, identical pixels and near-duplicates are joined."""
    pairs = _equal(item.group for item in items) + _equal(seen.pixels for seen in found)
    pairs += groups.near_duplicates([seen.phash for seen in found], np.stack([seen.thumb for seen in found]))
    roots = groups.connected(len(items), pairs)
    # Named after what it holds, not where that lies: the user's group, or else the smallest hash.
    best: dict[int, tuple[bool, str]] = {}
    for root, item, seen in zip(roots, items, found, strict=True):
        candidate = (item.group is None, item.group if item.group is not None else seen.sha256)
        best[root] = min(best.get(root, candidate), candidate)
    return [best[root][1] for root in roots]


def _equal(values: Iterable[str | None]) -> list[tuple[int, int]]:
    first: dict[str, int] = {}
    return [(first.setdefault(value, i), i) for i, value in enumerate(values) if value is not None]


def _require_both_classes(frame: pd.DataFrame) -> None:
    for split in SPLITS:
        labels = set(frame.loc[frame["split"] == split, "label"])
        if labels != {0, 1}:
            lacking = "images" if not labels else "ai images" if 1 not in labels else "real images"
            raise DataError(
                f"the {split} split has no {lacking}: {frame['group'].nunique()} groups are too few for these "
                "shares; add images, raise --tune and --heldout, or try another --seed"
            )
