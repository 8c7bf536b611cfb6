"""Folders and tables of labelled images -> (id, file, label, group, source, generator).

Training, audit, selection and evaluation read through the readers that inference has, but only images that are files
on disk: a run's dataset.parquet says where each lies.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from ensemble.core.errors import DataError, join_limited
from ensemble.core.names import LABELS, class_labels
from ensemble.data.files import IMAGE_SUFFIXES, list_images
from ensemble.data.readers import find_format
from ensemble.data.storage import is_url, not_on_disk
from ensemble.data.tables import KEY_COLUMNS, read_batches, read_table, require_unique, resolve_entries

UNLABELLED = -1  # label of an image whose class is not known
OPTIONAL_COLUMNS = ("group", "source", "generator")


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
    """How labels, groups and image folders are read; the same for every source.

    images: where those of a table lie. classes: what class names mean ({"fake": "ai"}). positive: the class name that
    means ai. skipped: counts unreadable kinds of images, which are refused without it. one_class: one is enough.
    """

    images: Path | None = None
    classes: Mapping[str, str] | None = None
    positive: str | None = None
    group_column: str = "group"
    skipped: Skipped | None = None
    one_class: bool = False


def read_data(paths: Sequence[Path], options: ReadOptions | None = None) -> tuple[list[LabelledImage], list[str]]:
    """Read labelled images from folders of class folders and from tables with id or path and label.

    With several, ids of folders are prefixed by the folder's name, and each may hold one
    class alone. Images that name no source take the name of what they were read from.
    Returns the images, and what the user should be told of how the labels were read. Raises DataError
    if there is no such data, a class is empty, or ids repeat.
    """
    options = options or ReadOptions()
    several = len(paths) > 1
    given = Counter(path.resolve() for path in paths)
    if repeated := sorted({str(path) for path in paths if given[path.resolve()] > 1}):
        raise DataError(f"{join_limited(repeated)} is given more than once")
    each = replace(options, one_class=several or options.one_class)
    items: list[LabelledImage] = []
    notes: list[str] = []
    for path, name in zip(paths, _names(paths), strict=True):
        if not path.exists():
            raise DataError(
                f"no data at {path}; put images in {path}/ai and {path}/real, or name another folder or a CSV"
            )
        read = _from_folder if _files_format(path) == "folder" else _from_table
        found, its_notes = read(path, each, f"{name}/" if several else "")
        items += [item if item.source else replace(item, source=name) for item in found]
        notes += [f"{path}: {note}" for note in its_notes] if several else its_notes
    where = join_limited(paths) if several else str(paths[0])
    require_unique((item.id for item in items), where)
    for label, name in enumerate(LABELS):
        if not options.one_class and not any(item.label == label for item in items):
            raise DataError(f"{where} holds no {name} images; both classes need some")
    return items, notes


def read_unlabelled(path: Path, images: Path | None = None, prefix: str = "") -> list[LabelledImage]:
    """The images of a folder or a table without their labels, which are UNLABELLED; ids begin with `prefix`."""
    if _files_format(path) == "folder":
        return [LabelledImage(prefix + name, str(path.resolve()), name, UNLABELLED) for name in list_images(path)]
    table = read_table(path, (*KEY_COLUMNS, *OPTIONAL_COLUMNS))
    return _images_of(table, path, images, [UNLABELLED] * len(table), "group", prefix)


def has_labels(table: Path) -> bool:
    """Whether a table has a column label."""
    return _files_format(table) == "table" and "label" in next(read_batches(table, ["label"]))


def _files_format(path: Path) -> str:
    """ "folder" or "table"; DataError where images lie inside of files, which training cannot open."""
    if (found := find_format(path).name) in ("folder", "table"):
        return found
    raise DataError(
        f"{path}: only infer reads images inside of tars and Parquet files; unpack them into folders first, such as "
        "ai/ and real/"
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """A short name for each source: its own, with as many folders before it as tell it from the others."""
    full = [path.resolve() for path in paths]
    bare = [path.with_suffix("") if path.is_file() else path for path in full]
    parts = [path.parts for path in (bare if len(set(bare)) == len(bare) else full)]
    names = ["/".join(p[-1:]) for p in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        counts = Counter(names)
        names = ["/".join(p[-depth:]) if counts[name] > 1 else name for p, name in zip(parts, names, strict=True)]
    return names


def _from_folder(data: Path, options: ReadOptions, prefix: str) -> tuple[list[LabelledImage], list[str]]:
    folders = sorted(p.name for p in data.iterdir() if p.is_dir() and not p.name.startswith("."))
    try:
        labels = class_labels(folders, options.classes, options.positive, options.one_class)
    except ValueError as error:
        raise DataError(f"{data}: one folder a class, such as ai/ and real/: {error}") from None
    if stray := [p.name for p in data.iterdir() if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]:
        raise DataError(
            f"{data}: {len(stray)} images lie in no class folder ({join_limited(sorted(stray))}); move or remove them"
        )
    items = []
    for name, label in sorted(labels.items(), key=lambda item: item[1]):
        unknown = Counter[str]()
        paths = list_images(data / name, None if options.skipped is None else unknown)
        if options.skipped is not None:
            options.skipped.update({(name, suffix): count for suffix, count in unknown.items()})
        if not paths:
            raise DataError(f"{data / name} holds no images; both classes need some")
        ids = [f"{name}/{path}" for path in paths]
        items += [LabelledImage(prefix + path, str(data.resolve()), path, label) for path in ids]
    return items, _describe_labels(labels)


def _describe_labels(labels: Mapping[str, int]) -> list[str]:
    """How class names were read, unless they are just what we call them."""
    if all(LABELS[label] == name for name, label in labels.items()):
        return []
    by_label = [[name for name, label in labels.items() if label == wanted] for wanted in (1, 0)]
    parts = [
        f"{', '.join(names)} {verb}" for names, verb in zip(by_label, ("counts as ai", "as real"), strict=True) if names
    ]
    return [", ".join(parts)]


def _from_table(data: Path, options: ReadOptions, prefix: str) -> tuple[list[LabelledImage], list[str]]:
    group_column = options.group_column
    table = read_table(data, (*KEY_COLUMNS, "label", group_column, *OPTIONAL_COLUMNS))
    if "label" not in table:
        raise DataError(f"{data} needs a column label; it has: {', '.join(table.columns)}")
    if group_column != "group" and group_column not in table and not prefix:
        raise DataError(f"{data} has no column {group_column!r}; it has: {', '.join(table.columns)}")
    labels, notes = read_labels(table["label"], data, options)
    return _images_of(table, data, options.images, labels, group_column, "" if "id" in table else prefix), notes


def _images_of(
    table: pd.DataFrame, path: Path, images: Path | None, labels: Sequence[int], group_column: str, prefix: str
) -> list[LabelledImage]:
    """The rows of a table; without ids, paths are the ids."""
    if url := next(filter(is_url, table.get("path", ())), None):
        raise not_on_disk(url)
    entries, root, _ = resolve_entries(iter([table]), path, images)
    root = str(Path(root).resolve())
    empty = [""] * len(table)
    optional = [table.get(column, empty) for column in (group_column, *OPTIONAL_COLUMNS[1:])]
    return [
        LabelledImage(prefix + entry.id, root, entry.path, label, *(value or None for value in rest))
        for entry, label, *rest in zip(entries, labels, *optional, strict=True)
    ]


def read_labels(column: pd.Series, data: Path, options: ReadOptions) -> tuple[list[int], list[str]]:
    """Labels, 1 = ai and 0 = real, of a column of text: numbers 0 and 1 or class names; and how they were read."""
    values = column.str.strip()
    counts = values.value_counts()
    numbers = pd.to_numeric(values, errors="coerce")
    numeric = numbers.isin([0, 1]).all() and (options.one_class or len(set(numbers)) == 2)
    if options.positive is None and not options.classes and numeric:
        return [int(value) for value in numbers], [f"label column of {data.name}: 1 counts as ai, 0 as real"]
    try:
        labels = class_labels(list(counts.index), options.classes, options.positive, options.one_class)
    except ValueError as error:
        found = join_limited(f"{value!r} {count} times" for value, count in counts.items())
        raise DataError(f"{data}: the label column must hold two classes ({found}): {error}") from None
    return [labels[value] for value in values], _describe_labels(labels)
