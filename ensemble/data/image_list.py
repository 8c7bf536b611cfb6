"""The list of rows to score, in an Arrow file on disk or in memory: its length costs little.

Rows of files: those of a folder, or those that a table names; in a store too.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from ensemble.core import artifacts
from ensemble.core.errors import DataError, LimitedList, join_limited
from ensemble.core.parallel import ordered_map
from ensemble.data import storage
from ensemble.data.files import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, compact, find_files, texts, walk_images
from ensemble.data.sources import images_root, refuse_missing, require_key
from ensemble.data.storage import Location, is_url, join

BATCH = 4096  # rows of every batch but the last
TEXT = pa.large_binary()  # names may be no UTF-8
SCHEMA = pa.schema(
    [("id", TEXT), ("path", TEXT), ("size", pa.int64()), ("changed", pa.int64()), ("offset", pa.int64())]
)


class ImageEntry(NamedTuple):
    """An id, the path that it means, and that file's bytes and time of change in ns; -1 where there is no file.

    offset: of an image inside a file, where its bytes begin; -1 for a file of its own.
    """

    id: str
    path: str
    size: int = -1
    changed: int = -1
    offset: int = -1


@dataclass(frozen=True)
class ImageList:
    """An Arrow file of rows, or a buffer of its bytes. returns: whether an id holds a carriage return."""

    count: int
    sha256: str
    returns: bool
    place: Path | pa.Buffer


def write_list(rows: Iterable[ImageEntry], place: Path | None) -> ImageList:
    """Write rows to `place`, atomically, or to memory."""
    if place is None:
        memory = pa.BufferOutputStream()
        return ImageList(*_write(rows, memory), memory.getvalue())
    with artifacts.replacing(place) as temporary, os_file(temporary, "wb") as file:
        told = _write(rows, file)
    pa.default_memory_pool().release_unused()  # what looking up ids took would stay with the process
    return ImageList(*told, place)


def _write(rows: Iterable[ImageEntry], file: pa.NativeFile) -> tuple[int, str, bool]:
    rows, count, digest, returns = iter(rows), 0, sha256(), False
    with pa.ipc.new_file(file, SCHEMA) as writer:
        while batch := [(_bytes(row.id), _bytes(row.path), *row[2:]) for row in islice(rows, BATCH)]:
            for key, path, size, changed, offset in batch:
                inside = b",%d" % offset if offset >= 0 else b""
                digest.update(b"%d,%d,%d,%d%b\n%b%b" % (len(key), len(path), size, changed, inside, key, path))
                returns = returns or b"\r" in key
            writer.write_batch(pa.record_batch(list(zip(*batch, strict=True)), schema=SCHEMA))
            count += len(batch)
    return count, digest.hexdigest(), returns


def read_list(rows: ImageList, start: int, stop: int) -> Iterator[ImageEntry]:
    """Rows [start, stop), a batch in memory at a time."""
    for first in range(start - start % BATCH, min(stop, rows.count), BATCH):
        columns = _batch(rows, first // BATCH)[max(start - first, 0) : stop - first].columns
        for key, path, *rest in zip(*(column.to_pylist() for column in columns), strict=True):
            yield ImageEntry(_text(key), _text(path), *rest)


def repeated_ids(rows: ImageList) -> list[str]:
    """Ids that several rows have, sorted."""
    hashes = np.empty(rows.count, dtype=np.uint64)
    for first in range(0, rows.count, BATCH):
        hashes[first : first + BATCH] = _hashes(_batch(rows, first // BATCH))
    hashes.sort()
    suspects = hashes[1:][hashes[1:] == hashes[:-1]]
    if not len(suspects):
        return []
    counts = Counter[bytes]()
    for first in range(0, rows.count, BATCH):
        batch = _batch(rows, first // BATCH)
        counts.update(batch["id"].filter(pa.array(np.isin(_hashes(batch), suspects))).to_pylist())
    return sorted(_text(key) for key, count in counts.items() if count > 1)


def _hashes(batch: pa.RecordBatch) -> np.ndarray:
    """uint64 [N] of the ids."""
    return pd.util.hash_array(np.array(batch["id"].to_pylist(), dtype=object), categorize=False)


def _batch(rows: ImageList, number: int) -> pa.RecordBatch:
    # read, not mapped: the pages of a mapped file would count as this process's memory
    source = os_file(rows.place) if isinstance(rows.place, Path) else pa.BufferReader(rows.place)
    with source as file:
        return pa.ipc.open_file(file).get_batch(number)


def os_file(path: Path, mode: str = "rb") -> pa.NativeFile:
    """A file for pyarrow, to which a path as text would have to be UTF-8."""
    return pa.OSFile(os.fsencode(path), mode)


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _text(data: bytes) -> str:
    return data.decode(errors="surrogatepass")


class Named(NamedTuple):
    """Rows whose paths count from `root`; given: whether they have ids."""

    rows: Iterator[ImageEntry]
    given: bool
    root: Location


def of_table(parts: Iterator[pd.DataFrame], table: Location, images: Location | None) -> Named:
    """The rows of a table with `id` or `path`, from which relative paths count unless `images` is given."""
    first = next(parts)
    root = _root(first, table, images)
    choose = _by_path if "path" in first else _by_id
    return Named(choose(chain([first], parts), table, root), "id" in first, root)


def of_folder(folder: Location, passed: Callable[[str], object] = lambda path: None) -> Iterator[ImageEntry]:
    """All images below a folder, their ids relative paths; DataError, at the end, for kinds that cannot be read.

    `passed` is called with the path of each other file.
    """
    if isinstance(folder, Path):
        yield from (row(path, folder, path) for path in walk_images(folder, passed=passed))
        return
    unknown = Counter[str]()
    for found in storage.walk(folder):
        suffix = os.path.splitext(found.path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            yield ImageEntry(found.path, *found)
        elif suffix in OTHER_IMAGE_SUFFIXES:
            unknown[suffix] += 1
        else:
            passed(found.path)
    if kinds := [f"{count} {suffix}" for suffix, count in sorted(unknown.items())]:
        raise DataError(
            f"{folder}: images that cannot be read would be skipped ({join_limited(kinds)}); convert or move them"
        )


def _root(frame: pd.DataFrame, table: Location, images: Location | None) -> Location:
    """`images_root`, also where one of both is a URL."""
    if isinstance(table, Path) and not isinstance(images, str):
        return images_root(frame, table, images)
    require_key(frame, table)
    if images or "path" in frame:
        return images or storage.parent(table)
    beside = join(storage.parent(table), "images")
    return beside if isinstance(beside, str) and storage.is_folder(beside) else storage.parent(table)


def _rows(pairs: Iterable[tuple[str, str]], root: Location, remote: bool) -> Iterator[ImageEntry]:
    """A row for each (id, path); a store is asked about many at the same time."""
    if remote:
        return ordered_map(lambda pair: row(pair[0], root, pair[1]), pairs, storage.AHEAD)
    return (row(key, root, path) for key, path in pairs)


def _by_path(parts: Iterator[pd.DataFrame], table: Location, root: Location) -> Iterator[ImageEntry]:
    missing, count = LimitedList(), 0
    for found in chain.from_iterable(_named(part, root) for part in parts):
        count += 1
        if found.size < 0:
            missing.add(repr(found.path))
        yield found  # also of what is missing, so that rows keep their numbers
    refuse_missing(missing, count, table, root)


def _named(part: pd.DataFrame, root: Location) -> Iterator[ImageEntry]:
    keys, paths = part["id" if "id" in part else "path"].tolist(), part["path"].tolist()
    return _rows(zip(keys, paths, strict=True), root, isinstance(root, str) or any(map(is_url, paths)))


def _by_id(parts: Iterator[pd.DataFrame], table: Location, root: Location) -> Iterator[ImageEntry]:
    remote = isinstance(root, str)
    names = compact(key for part in parts for key in part["id"].tolist())
    images = (found.path for found in of_folder(root)) if remote else None
    return _rows(zip(texts(names), find_files(names, root, images), strict=True), root, remote)


def row(key: str, root: Location, path: str) -> ImageEntry:
    """A row with what is known of its file: no size where it is none, or is gone."""
    try:
        if isinstance(root, str) or is_url(path):
            return ImageEntry(key, path, *storage.facts(join(root, path)))
        found = os.stat(os.path.join(root, path))
    except (OSError, ValueError):  # a name with a null byte is a ValueError
        return ImageEntry(key, path)
    return ImageEntry(key, path, found.st_size, found.st_mtime_ns) if S_ISREG(found.st_mode) else ImageEntry(key, path)
