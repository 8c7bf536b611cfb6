"""Folders and CSV files of labelled images -> (id, file, label, group, source, generator)."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import pandas as pd

from ensemble.core.errors import DataError, LimitedList, error_line, join_limited
from ensemble.core.names import LABELS, class_labels
from ensemble.data.files import IMAGE_SUFFIXES, list_images, resolve_ids

PART = 4096  # rows of a table in memory


@dataclass(frozen=True)
class LabelledImage:
    """One labelled image as the user gave it: label 1 = ai, 0 = real."""

    id: str
    root: str
    path: str
    label: int
    group: str | None = None
    source: str | None = None
    generator: str | None = None

    @property
    def file(self) -> Path:
        """Where the image lies."""
        return Path(self.root) / self.path


Skipped = Counter[tuple[str, str]]  # (class folder, suffix) -> images of a kind that cannot be read


@dataclass(frozen=True)
class ReadOptions:
    """How labels, groups and image folders are read; the same for every source."""

    images: Path | None = None
    classes: Mapping[str, str] | None = None
    positive: str | None = None
    group_column: str = "group"
    skipped: Skipped | None = None
    one_class: bool = False


def read_data(
    paths: Sequence[Path],
    images: Path | None = None,
    classes: Mapping[str, str] | None = None,
    positive: str | None = None,
    group_column: str = "group",
    skipped: Skipped | None = None,
    one_class: bool = False,
) -> tuple[list[LabelledImage], list[str]]:
    """Read labelled images from folders of class folders and from CSVs with id or path and label.

    With several, ids of folders are prefixed by the folder's name, and each may hold one
    class alone. Images that name no source take the name of what they were read from.
    `classes` says what class names mean ({"fake": "ai"}). Unreadable kinds of images are
    refused, or counted in `skipped` if given. `one_class`: a single class is enough. Returns
    the images and what should be said aloud about how the labels were read. Raises DataError
    if there is no such data, a class is empty, or ids repeat.
    """
    several = len(paths) > 1
    places = Counter(path.resolve() for path in paths)
    if repeated := sorted({str(path) for path in paths if places[path.resolve()] > 1}):
        raise DataError(f"{join_limited(repeated)} is given more than once")
    reading = ReadOptions(images, classes, positive, group_column, skipped, several or one_class)
    items: list[LabelledImage] = []
    notes: list[str] = []
    for path, name in zip(paths, _names(paths), strict=True):
        found, said = _read_one(path, reading, name if several else None)
        items += [item if item.source else replace(item, source=name) for item in found]
        notes += [f"{path}: {note}" for note in said] if several else said
    where = join_limited(paths) if several else str(paths[0])
    ids = Counter(item.id for item in items)
    if repeated := sorted(key for key, count in ids.items() if count > 1):
        raise DataError(f"{where}: ids given more than once: {join_limited(map(repr, repeated))}")
    for label, name in enumerate(LABELS):
        if not one_class and not any(item.label == label for item in items):
            raise DataError(f"{where} holds no {name} images; both classes need some")
    return items, notes


def _read_one(data: Path, reading: ReadOptions, prefix: str | None) -> tuple[list[LabelledImage], list[str]]:
    if data.is_dir():
        return _from_folder(data, reading, prefix)
    if data.is_file():
        return _from_csv(data, reading, prefix)
    raise DataError(f"no data at {data}; put images in {data}/ai and {data}/real, or name another folder or a CSV")


def _names(paths: Sequence[Path]) -> list[str]:
    """A short name for each source: its own, with as many folders before it as tell it from the others."""
    places = [path.resolve() for path in paths]
    bare = [place.with_suffix("") if place.is_file() else place for place in places]
    parts = [place.parts for place in (bare if len(set(bare)) == len(bare) else places)]
    names = ["/".join(p[-1:]) for p in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        counts = Counter(names)
        names = ["/".join(p[-depth:]) if counts[name] > 1 else name for p, name in zip(parts, names, strict=True)]
    return names


def read_table(path: Path) -> pd.DataFrame:
    """A CSV with every cell as the text it is: leading zeros, "NA" and spaces stay."""
    return pd.concat(read_parts(path))


def read_parts(path: Path | str, file: IO[bytes] | None = None) -> Iterator[pd.DataFrame]:
    """`read_table`, PART rows at a time; of an open `file`, `path` is what errors call it."""
    try:
        with pd.read_csv(file or path, dtype=str, keep_default_na=False, encoding="utf-8-sig", chunksize=PART) as parts:
            for part in parts:
                if part.empty:
                    raise DataError(f"{path} has no rows")
                if not isinstance(part.index, pd.RangeIndex):  # pandas took the first column for row names
                    raise DataError(f"{path}: its rows have more cells than its header has names")
                yield part
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not a readable CSV: {error_line(error)}") from None


def locate(frame: pd.DataFrame, table: Path, images: Path | None) -> tuple[Path, list[str]]:
    """The image of each row of a CSV, as (root, paths relative to it).

    A `path` column counts from the CSV's folder, or from `images` if given. Without one,
    `id` is looked up in `images`, by default the folder `images` beside the CSV, or else
    the CSV's own folder. Raises DataError listing what is missing or ambiguous.
    """
    root = images_root(frame, table, images)
    if "path" not in frame:
        return root, resolve_ids(list(frame["id"]), root)
    missing = LimitedList()
    for path in frame["path"]:
        if not path or not os.path.isfile(root / path):  # unlike Path's own, False where a name is too long
            missing.add(repr(path))
    refuse_missing(missing, len(frame), table, root)
    return root, list(frame["path"])


def images_root(frame: pd.DataFrame, table: Path, images: Path | None) -> Path:
    """Where `locate` looks for the images of a CSV, by its columns and its first row."""
    if images is not None and not os.path.isdir(images):
        raise DataError(f"no such folder: {images} (--images)")
    if "path" in frame:
        root = images or table.parent
        # --images may be named for the ids of a CSV whose paths count from itself
        return root if images is None or os.path.isfile(root / frame["path"].iloc[0]) else table.parent
    require_key(frame, table)
    return images or (table.parent / "images" if (table.parent / "images").is_dir() else table.parent)


def require_key(frame: pd.DataFrame, table: Path | str) -> None:
    """DataError for a table whose columns do not say which images it means."""
    if "id" not in frame and "path" not in frame:
        raise DataError(f"{table} needs a column id or path; it has: {', '.join(frame.columns)}")


def refuse_missing(missing: LimitedList, rows: int, table: Path | str, root: Path | str) -> None:
    """DataError for paths of a CSV that do not exist, if there are any."""
    if missing.count:
        raise DataError(
            f"{missing.count} of {rows} paths in {table} do not exist below {root}: {missing}; "
            "name their folder with --images"
        )


def _from_folder(data: Path, reading: ReadOptions, prefix: str | None) -> tuple[list[LabelledImage], list[str]]:
    folders = sorted(p.name for p in data.iterdir() if p.is_dir() and not p.name.startswith("."))
    try:
        labels = class_labels(folders, reading.classes, reading.positive, reading.one_class)
    except ValueError as error:
        raise DataError(f"{data}: one folder a class, such as ai/ and real/: {error}") from None
    if stray := [p.name for p in data.iterdir() if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]:
        raise DataError(
            f"{data}: {len(stray)} images lie in no class folder ({join_limited(sorted(stray))}); move or remove them"
        )
    items = []
    for name, label in sorted(labels.items(), key=lambda item: item[1]):
        unknown = Counter[str]()
        paths = list_images(data / name, None if reading.skipped is None else unknown)
        if reading.skipped is not None:
            reading.skipped.update({(name, suffix): count for suffix, count in unknown.items()})
        if not paths:
            raise DataError(f"{data / name} holds no images; both classes need some")
        ids = [f"{name}/{path}" for path in paths]
        start = f"{prefix}/" if prefix else ""
        items += [LabelledImage(start + path, str(data.resolve()), path, label) for path in ids]
    return items, _said(labels)


def _said(labels: Mapping[str, int]) -> list[str]:
    """How class names were read, unless they are just what we call them."""
    if set(labels) <= set(LABELS) and all(LABELS[label] == name for name, label in labels.items()):
        return []
    by_label = [[name for name, label in labels.items() if label == wanted] for wanted in (1, 0)]
    parts = [
        f"{', '.join(names)} {verb}" for names, verb in zip(by_label, ("counts as ai", "as real"), strict=True) if names
    ]
    return [", ".join(parts)]


def _from_csv(data: Path, reading: ReadOptions, prefix: str | None) -> tuple[list[LabelledImage], list[str]]:
    frame = read_table(data)
    if "label" not in frame:
        raise DataError(f"{data} needs a column label; it has: {', '.join(frame.columns)}")
    if reading.group_column != "group" and reading.group_column not in frame and prefix is None:
        raise DataError(f"{data} has no column {reading.group_column!r}; it has: {', '.join(frame.columns)}")
    labels, notes = _labels(frame["label"], data, reading)
    root, paths = locate(frame, data, reading.images)
    start = f"{prefix}/" if prefix else ""
    ids = list(frame["id"]) if "id" in frame else [start + path for path in paths]
    extra = [_optional(frame, column) for column in (reading.group_column, "source", "generator")]
    items = [
        LabelledImage(key, str(root.resolve()), path, label, *rest)
        for key, path, label, *rest in zip(ids, paths, labels, *extra, strict=True)
    ]
    return items, notes


def _optional(frame: pd.DataFrame, column: str) -> Sequence[str | None]:
    if column not in frame:
        return [None] * len(frame)
    return [value or None for value in frame[column]]


def _labels(column: pd.Series, data: Path, reading: ReadOptions) -> tuple[list[int], list[str]]:
    values = column.str.strip()
    counts = values.value_counts()
    numbers = pd.to_numeric(values, errors="coerce")
    numeric = numbers.isin([0, 1]).all() and (reading.one_class or len(set(numbers)) == 2)
    if reading.positive is None and not reading.classes and numeric:
        return [int(value) for value in numbers], [f"label column of {data.name}: 1 counts as ai, 0 as real"]
    try:
        labels = class_labels(list(counts.index), reading.classes, reading.positive, reading.one_class)
    except ValueError as error:
        found = join_limited(f"{value!r} {count} times" for value, count in counts.items())
        raise DataError(f"{data}: the label column must hold two classes ({found}): {error}") from None
    return [labels[value] for value in values], _said(labels)
