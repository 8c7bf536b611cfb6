"""Build a run's dataset.parquet: one row an image, with its group, split and what the index knows."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import DataError, join_limited
from ensemble.data import sources, splits
from ensemble.data.index import FileIndex, index_files
from ensemble.data.splits import FITTED, SPLITS, Fractions
from ensemble.images import canonical, near_duplicates

COLUMNS = ("id root path label source generator group split fold width height format bytes sha256 phash").split()
# What decides a training run: where the files lie does not.
HASHED_COLUMNS = ["id", "label", "group", "split", "fold", "sha256"]


def index_items(
    data: Sequence[sources.LabelledImage], skip_unreadable: bool = False
) -> tuple[list[sources.LabelledImage], FileIndex]:
    """The readable ones of the labelled files, sorted by id, and their index.

    Raises DataError for unreadable files, unless they are to be skipped.
    """
    data = sorted(data, key=lambda item: item.id)
    indexed = index_files([item.file for item in data])
    bad = indexed.errors
    if bad and not skip_unreadable:
        raise DataError(
            f"{len(bad)} of {len(data)} images cannot be read: {join_limited(bad.values(), 3)}; "
            "repair or remove them, or leave them out with --skip-unreadable"
        )
    if not len(indexed.rows):
        raise DataError(f"no image of {len(data)} can be read: {join_limited(bad.values(), 3) or 'none was given'}")
    return [data[row] for row in indexed.rows], indexed


def assemble(
    items: Sequence[sources.LabelledImage],
    indexed: FileIndex,
    near: Sequence[tuple[int, int]],
    fractions: Fractions,
    seed: int,
    hold_out: Sequence[str] = (),
    check: bool = True,
) -> pd.DataFrame:
    """The rows of a data set, with the columns of `COLUMNS`: groups, then splits, for files that were indexed.

    near: their near-duplicates, from `near_pairs`. Raises DataError for identical pixels in
    both classes, or, with `check`, a split that lacks a class.
    """
    records = indexed.records
    if conflicts := conflicting(items, records["pixels"]):
        pairs = join_limited((f"{items[a].file} and {items[b].file}" for a, b in conflicts), 3)
        raise DataError(f"identical pixels are labelled both ai and real: {pairs}; remove one of each")
    frame = pd.DataFrame(
        {
            "id": [item.id for item in items],
            "root": [item.root for item in items],
            "path": [item.path for item in items],
            "label": np.array([item.label for item in items], dtype=np.int8),
            "source": [item.source for item in items],
            "generator": [item.generator for item in items],
            "group": group_names(items, indexed, near),
            "split": "",
            "fold": pd.array([None] * len(items), dtype="Int16"),
            **{name: records[name].to_numpy() for name in "width height bytes sha256 phash".split()},
            "format": records["format"].astype(object).to_numpy(),
        },
        columns=COLUMNS,
    )
    frame["split"] = splits.assign_splits(frame, fractions, seed, hold_out)
    if check:
        _require_both_classes(frame)
    return frame


def dataset_sha256(frame: pd.DataFrame) -> str:
    """Hash of the rows that decide a training run."""
    return artifacts.frame_sha256(frame, HASHED_COLUMNS)


def run_sha256(frame: pd.DataFrame, run: Path) -> str:
    """Hash of what the members of a run are trained on: the rows, and how their images are read."""
    rows, plan = dataset_sha256(frame), canonical.read_plan(artifacts.canonical_path(run))
    return rows if plan is None else artifacts.json_sha256([rows, plan.to_dict()])


def files(frame: pd.DataFrame) -> list[Path]:
    """The image file of each row."""
    return [Path(root) / path for root, path in zip(frame["root"], frame["path"], strict=True)]


def describe(frame: pd.DataFrame) -> str:
    """Counts by class, suffix and split, one line each, for people."""
    suffixes = frame["path"].str.extract(r"(\.[^./]+)$", expand=False).fillna("none").str.lower()
    lines = []
    for label, name in ((1, "ai"), (0, "real")):
        kinds = Counter(suffixes[frame["label"] == label])
        lines.append(
            f"  {name:5}{sum(kinds.values()):>7} images ({join_limited(f'{n} {s}' for s, n in kinds.most_common())})"
        )
    for split in SPLITS:
        part = frame[frame["split"] == split]
        if len(part) or split in FITTED:
            lines.append(
                f"  {split:8}{len(part):>4} images, {int(part['label'].sum())} ai, in {part['group'].nunique()} groups"
            )
    for column in ("source", "generator"):
        counts = frame[column].value_counts()
        if len(counts) > 1:
            lines.append(f"  {column}s: {join_limited((f'{name} {count}' for name, count in counts.items()), 8)}")
    return "\n".join(lines)


def conflicting(items: Sequence[sources.LabelledImage], pixels: Iterable[str]) -> list[tuple[int, int]]:
    """Positions (first, other) of images whose pixels are equal and whose labels differ."""
    return [(a, b) for a, b in equal_pairs(pixels) if items[a].label != items[b].label]


def near_pairs(indexed: FileIndex) -> list[tuple[int, int]]:
    """Positions of images that show the same picture, though their pixels are not equal."""
    return near_duplicates.near_duplicates(indexed.hashes, indexed.thumbs)


def group_names(
    items: Sequence[sources.LabelledImage], indexed: FileIndex, near: Sequence[tuple[int, int]]
) -> list[str]:
    """One name a row. Equal names, identical pixels and near-duplicates are joined."""
    records = indexed.records
    pairs = equal_pairs(item.group for item in items) + equal_pairs(records["pixels"]) + list(near)
    roots = near_duplicates.connected_components(len(items), pairs)
    # Named after what it holds, not where that lies: the user's group, or else the smallest hash.
    best: dict[int, tuple[bool, str]] = {}
    for root, item, digest in zip(roots, items, records["sha256"], strict=True):
        candidate = (item.group is None, item.group if item.group is not None else digest)
        best[root] = min(best.get(root, candidate), candidate)
    return [best[root][1] for root in roots]


def equal_pairs(values: Iterable[Hashable]) -> list[tuple[int, int]]:
    """Positions (first, other) of equal values; None equals nothing."""
    first: dict[Hashable, int] = {}
    pairs = [(first.setdefault(value, i), i) for i, value in enumerate(values) if value is not None]
    return [(a, b) for a, b in pairs if a != b]


def _require_both_classes(frame: pd.DataFrame) -> None:
    for split in FITTED:
        labels = set(frame.loc[frame["split"] == split, "label"])
        if labels != {0, 1}:
            lacking = "images" if not labels else "ai images" if 1 not in labels else "real images"
            raise DataError(
                f"the {split} split has no {lacking}: {frame['group'].nunique()} groups are too few for these "
                "shares; add images, raise --tune and --heldout, or try another --seed"
            )
