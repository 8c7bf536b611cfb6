"""Tables that name images: CSV and Parquet files with a column id or path, every cell read as text, in batches."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from stat import S_ISREG
from typing import Any

import pandas as pd

from ensemble.core.errors import DataError, LimitedList, join_limited
from ensemble.core.parallel import ordered_map
from ensemble.data import parquet, storage
from ensemble.data.files import compact, find_files, texts
from ensemble.data.image_list import ImageEntry
from ensemble.data.storage import Location, is_url, join

BATCH_ROWS = 4096  # of a CSV in memory
KEY_COLUMNS = ("id", "path")


def read_table(path: Path, columns: Collection[str] | None = None) -> pd.DataFrame:
    """A table with every cell as the text it is: leading zeros, "NA" and spaces stay. columns: see `read_batches`."""
    return pd.concat(read_batches(path, columns), ignore_index=True)


def read_batches(table: Location, columns: Collection[str] | None = KEY_COLUMNS) -> Iterator[pd.DataFrame]:
    """`read_table`, some thousand rows at a time; of a Parquet file only these `columns` are read, by default all."""
    if storage.name(table).lower().endswith(".parquet"):
        yield from parquet.read_text(table, columns)
        return
    try:
        # pandas opens a path itself, and unpacks .csv.gz by its name
        opened = nullcontext(table) if isinstance(table, Path) else storage.open_file(table)
        options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
        with opened as file, pd.read_csv(file, chunksize=BATCH_ROWS, **options) as batches:
            for batch in batches:
                if batch.empty:
                    raise DataError(f"{table} has no rows")
                if not isinstance(batch.index, pd.RangeIndex):  # pandas took the first column for row names
                    raise DataError(f"{table}: its rows have more cells than its header has names")
                yield batch
    except FileNotFoundError:
        raise DataError(f"no such file: {table}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{table} is not a readable CSV: {' '.join(str(error).split())}") from None


def require_unique(ids: Iterable[str], source: object = None, remedy: str = "") -> None:
    """DataError, which names their source, where an id is given more than once."""
    if repeated := sorted(key for key, count in Counter(ids).items() if count > 1):
        where = "" if source is None else f"{source}: "
        raise DataError(f"{where}ids given more than once: {join_limited(map(repr, repeated))}{remedy}")


def resolve_entries(
    batches: Iterator[pd.DataFrame], table: Location, images: Location | None
) -> tuple[Iterator[ImageEntry], Location, bool]:
    """The image of each row of a table, the root that its paths count from, and whether it has a column id.

    A `path` column counts from the table's folder, or from `images` if given. Without one, `id` is looked up in
    `images`, by default the folder `images` beside the table, or else the table's own folder. Raises DataError,
    at the end, listing what is missing or ambiguous.
    """
    first = next(batches)
    root = _images_root(first, table, images)
    resolve = _entries_by_path if "path" in first else _entries_by_id
    return resolve(chain([first], batches), table, root), root, "id" in first


def _images_root(frame: pd.DataFrame, table: Location, images: Location | None) -> Location:
    """Where paths or ids count from, by a table's columns and its first row."""
    if isinstance(images, Path) and not os.path.isdir(images):
        raise DataError(f"no such folder: {images} (--images)")
    if not any(column in frame for column in KEY_COLUMNS):
        raise DataError(f"{table} needs a column id or path; it has: {', '.join(frame.columns)}")
    folder = storage.parent(table)
    if "path" in frame:
        # --images may be named for the ids of a CSV whose paths count from itself
        if isinstance(images, Path) and isinstance(folder, Path) and not os.path.isfile(images / frame["path"].iloc[0]):
            return folder
        return images or folder
    beside = join(folder, "images")
    return images or (beside if storage.is_dir(beside) else folder)


def _entries_by_path(batches: Iterator[pd.DataFrame], table: Location, root: Location) -> Iterator[ImageEntry]:
    def batch_entries(batch: pd.DataFrame) -> Iterator[ImageEntry]:
        ids, paths = batch["id" if "id" in batch else "path"].tolist(), batch["path"].tolist()
        return _stat_entries(zip(ids, paths, strict=True), root, isinstance(root, str) or any(map(is_url, paths)))

    missing, count = LimitedList(), 0
    for count, entry in enumerate(chain.from_iterable(map(batch_entries, batches)), 1):  # noqa: B007  # counts what was given out
        if entry.size < 0:
            missing.add(repr(entry.path))
        yield entry  # also of what is missing, so that rows keep their numbers
    if missing.count:
        raise DataError(
            f"{missing.count} of {count} paths in {table} do not exist below {root}: {missing}; "
            "name their folder with --images"
        )


def _entries_by_id(batches: Iterator[pd.DataFrame], table: Location, root: Location) -> Iterator[ImageEntry]:
    ids = compact(key for batch in batches for key in batch["id"].tolist())
    return _stat_entries(zip(texts(ids), find_files(ids, root), strict=True), root, isinstance(root, str))


def _stat_entries(pairs: Iterator[tuple[str, str]], root: Location, remote: bool) -> Iterator[ImageEntry]:
    """An entry for each (id, path); a store is asked about many at the same time."""
    if remote:
        return ordered_map(lambda pair: stat_entry(pair[0], root, pair[1]), pairs, storage.CONCURRENT_REQUESTS)
    return (stat_entry(key, root, path) for key, path in pairs)


def stat_entry(key: str, root: Location, path: str) -> ImageEntry:
    """An entry with the size and version of its file: -1 where there is no file."""
    try:
        if isinstance(root, str) or is_url(path):
            return ImageEntry(key, path, *storage.stat(join(root, path)))
        found = os.stat(os.path.join(root, path))  # for many files quicker than Path.stat
    except (OSError, ValueError):  # a name with a null byte is a ValueError
        return ImageEntry(key, path)
    return ImageEntry(key, path, found.st_size, found.st_mtime_ns) if S_ISREG(found.st_mode) else ImageEntry(key, path)
