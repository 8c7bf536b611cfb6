"""Folders and CSV files of labelled images -> (id, file, label, group, source, generator)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ensemble.errors import DataError, some
from ensemble.files import IMAGE_SUFFIXES, list_images, resolve_ids
from ensemble.labels import resolve_polarity


@dataclass(frozen=True)
class Labelled:
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


def read_labelled(
    data: Path, images: Path | None = None, positive: str | None = None, group_column: str = "group"
) -> tuple[list[Labelled], list[str]]:
    """Read a folder of two class folders, or a CSV with id or path and label.

    Returns the images and what should be said aloud about how the labels were read.
    Raises DataError if there is no such data, a class is empty, or ids repeat.
    """
    if data.is_dir():
        items, notes = _from_folder(data, positive)
    elif data.is_file():
        items, notes = _from_csv(data, images, positive, group_column)
    else:
        raise DataError(f"no data at {data}; put images in {data}/ai and {data}/real, or give --data a folder or a CSV")
    ids = pd.Series([item.id for item in items], dtype=str)
    if repeated := sorted(set(ids[ids.duplicated()])):
        raise DataError(f"{data}: ids given more than once: {some(map(repr, repeated))}")
    return items, notes


def read_table(path: Path) -> pd.DataFrame:
    """A CSV with every cell as the text it is: leading zeros, "NA" and spaces stay."""
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not a readable CSV: {' '.join(str(error).split())}") from None
    if frame.empty:
        raise DataError(f"{path} has no rows")
    if not isinstance(frame.index, pd.RangeIndex):  # pandas took the first column for row names
        raise DataError(f"{path}: its rows have more cells than its header has names")
    return frame


def locate(frame: pd.DataFrame, table: Path, images: Path | None) -> tuple[Path, list[str]]:
    """The image of each row of a CSV, as (root, paths relative to it).

    A `path` column counts from the CSV's folder, or from `images` if given. Without one,
    `id` is looked up in `images`, by default the folder `images` beside the CSV, or else
    the CSV's own folder. Raises DataError listing what is missing or ambiguous.
    """
    if images is not None and not images.is_dir():
        raise DataError(f"no such folder: {images} (--images)")
    if "path" in frame:
        root = images or table.parent
        if images is not None and not (root / frame["path"].iloc[0]).is_file():
            root = table.parent  # --images named for the ids of a CSV whose paths count from itself
        missing = [path for path in frame["path"] if not path or not (root / path).is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(frame)} paths in {table} do not exist below {root}: "
                f"{some(map(repr, missing))}; name their folder with --images"
            )
        return root, list(frame["path"])
    if "id" not in frame:
        raise DataError(f"{table} needs a column id or path; it has: {', '.join(frame.columns)}")
    folder = images or (table.parent / "images" if (table.parent / "images").is_dir() else table.parent)
    return folder, resolve_ids(list(frame["id"]), folder)


def _from_folder(data: Path, positive: str | None) -> tuple[list[Labelled], list[str]]:
    folders = sorted(p.name for p in data.iterdir() if p.is_dir() and not p.name.startswith("."))
    try:
        negative, positive = resolve_polarity(folders, positive)
    except ValueError as error:
        raise DataError(f"{data}: one folder a class, such as ai/ and real/: {error}") from None
    if stray := [p.name for p in data.iterdir() if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]:
        raise DataError(
            f"{data}: {len(stray)} images lie in no class folder ({some(sorted(stray))}); move or remove them"
        )
    items = []
    for name, label in ((negative, 0), (positive, 1)):
        paths = list_images(data / name)
        if not paths:
            raise DataError(f"{data / name} holds no images; both classes need some")
        items += [Labelled(f"{name}/{path}", str(data.resolve()), f"{name}/{path}", label) for path in paths]
    return items, [] if (negative, positive) == ("real", "ai") else [f"{positive} counts as ai, {negative} as real"]


def _from_csv(
    data: Path, images: Path | None, positive: str | None, group_column: str
) -> tuple[list[Labelled], list[str]]:
    frame = read_table(data)
    if "label" not in frame:
        raise DataError(f"{data} needs a column label; it has: {', '.join(frame.columns)}")
    if group_column != "group" and group_column not in frame:
        raise DataError(f"{data} has no column {group_column!r}; it has: {', '.join(frame.columns)}")
    labels, note = _labels(frame["label"], data, positive)
    root, paths = locate(frame, data, images)
    ids = list(frame["id"]) if "id" in frame else paths
    extra = [_optional(frame, column) for column in (group_column, "source", "generator")]
    items = [
        Labelled(key, str(root.resolve()), path, label, *rest)
        for key, path, label, *rest in zip(ids, paths, labels, *extra, strict=True)
    ]
    return items, [note]


def _optional(frame: pd.DataFrame, column: str) -> Sequence[str | None]:
    if column not in frame:
        return [None] * len(frame)
    return [value or None for value in frame[column]]


def _labels(column: pd.Series, data: Path, positive: str | None) -> tuple[list[int], str]:
    values = column.str.strip()
    counts = values.value_counts()
    numbers = pd.to_numeric(values, errors="coerce")
    if positive is None and numbers.isin([0, 1]).all() and len(set(numbers)) == 2:
        return [int(value) for value in numbers], f"label column of {data.name}: 1 counts as ai, 0 as real"
    try:
        negative, positive = resolve_polarity(list(counts.index), positive)
    except ValueError as error:
        found = some(f"{value!r} {count} times" for value, count in counts.items())
        raise DataError(f"{data}: the label column must hold two classes ({found}): {error}") from None
    return [int(value == positive) for value in values], f"{positive} counts as ai, {negative} as real"
