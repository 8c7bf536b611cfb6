"""Rows of files: those of a folder, or those that a table names; in a store too."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import pandas as pd

from ensemble.core.errors import DataError, Sample, some
from ensemble.core.parallel import ordered_map
from ensemble.files import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, compact, find_files, texts, walk_images
from ensemble.sources import images_root, refuse_missing, require_key
from export import places
from export.places import Place, is_url, join
from export.rows import Row


class Named(NamedTuple):
    """Rows whose paths count from `root`; given: whether they have ids."""

    rows: Iterator[Row]
    given: bool
    root: Place


def of_table(parts: Iterator[pd.DataFrame], table: Place, images: Place | None) -> Named:
    """The rows of a table with `id` or `path`, from which relative paths count unless `images` is given."""
    first = next(parts)
    root = _root(first, table, images)
    choose = _by_path if "path" in first else _by_id
    return Named(choose(chain([first], parts), table, root), "id" in first, root)


def of_folder(folder: Place, passed: Callable[[str], object] = lambda path: None) -> Iterator[Row]:
    """All images below a folder, their ids relative paths; DataError, at the end, for kinds that cannot be read.

    `passed` is called with the path of each other file.
    """
    if isinstance(folder, Path):
        yield from (row(path, folder, path) for path in walk_images(folder, passed=passed))
        return
    unknown = Counter[str]()
    for found in places.walk(folder):
        suffix = os.path.splitext(found.path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            yield Row(found.path, *found)
        elif suffix in OTHER_IMAGE_SUFFIXES:
            unknown[suffix] += 1
        else:
            passed(found.path)
    if kinds := [f"{count} {suffix}" for suffix, count in sorted(unknown.items())]:
        raise DataError(f"{folder}: images that cannot be read would be skipped ({some(kinds)}); convert or move them")


def _root(frame: pd.DataFrame, table: Place, images: Place | None) -> Place:
    """`images_root`, also where one of both is a URL."""
    if isinstance(table, Path) and not isinstance(images, str):
        return images_root(frame, table, images)
    require_key(frame, table)
    if images or "path" in frame:
        return images or places.parent(table)
    beside = join(places.parent(table), "images")
    return beside if isinstance(beside, str) and places.is_folder(beside) else places.parent(table)


def _rows(pairs: Iterable[tuple[str, str]], root: Place, remote: bool) -> Iterator[Row]:
    """A row for each (id, path); a store is asked about many at the same time."""
    if remote:
        return ordered_map(lambda pair: row(pair[0], root, pair[1]), pairs, places.AHEAD)
    return (row(key, root, path) for key, path in pairs)


def _by_path(parts: Iterator[pd.DataFrame], table: Place, root: Place) -> Iterator[Row]:
    missing, count = Sample(), 0
    for found in chain.from_iterable(_named(part, root) for part in parts):
        count += 1
        if found.size < 0:
            missing.add(repr(found.path))
        yield found  # also of what is missing, so that rows keep their numbers
    refuse_missing(missing, count, table, root)


def _named(part: pd.DataFrame, root: Place) -> Iterator[Row]:
    keys, paths = part["id" if "id" in part else "path"].tolist(), part["path"].tolist()
    return _rows(zip(keys, paths, strict=True), root, isinstance(root, str) or any(map(is_url, paths)))


def _by_id(parts: Iterator[pd.DataFrame], table: Place, root: Place) -> Iterator[Row]:
    remote = isinstance(root, str)
    names = compact(key for part in parts for key in part["id"].tolist())
    images = (found.path for found in of_folder(root)) if remote else None
    return _rows(zip(texts(names), find_files(names, root, images), strict=True), root, remote)


def row(key: str, root: Place, path: str) -> Row:
    """A row with what is known of its file: no size where it is none, or is gone."""
    try:
        if isinstance(root, str) or is_url(path):
            return Row(key, path, *places.facts(join(root, path)))
        found = os.stat(os.path.join(root, path))
    except (OSError, ValueError):  # a name with a null byte is a ValueError
        return Row(key, path)
    return Row(key, path, found.st_size, found.st_mtime_ns) if S_ISREG(found.st_mode) else Row(key, path)
