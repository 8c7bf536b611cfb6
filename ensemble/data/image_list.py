"""The list of images to score, in an Arrow file on disk or in memory: its length costs little."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from ensemble.core import artifacts

BATCH_ROWS = 4096  # rows of every batch but the last
TEXT = pa.large_binary()  # names may be no UTF-8
SCHEMA = pa.schema(
    [("id", TEXT), ("path", TEXT), ("size", pa.int64()), ("changed", pa.int64()), ("offset", pa.int64())]
)


class ImageEntry(NamedTuple):
    """One image: its id, the path of its file, that file's bytes and version; -1 where there is no file.

    changed: the time of change in ns, or of an object in a store what `FileStat.version` is.
    offset: of an image inside a file, where its bytes begin; -1 for a file of its own.
    """

    id: str
    path: str
    size: int = -1
    changed: int = -1
    offset: int = -1


@dataclass(frozen=True)
class ImageList:
    """An Arrow file of entries, or a buffer of its bytes; sha256 is of all of them, in order."""

    count: int
    sha256: str
    has_carriage_returns: bool  # in an id
    data: Path | pa.Buffer


def write_list(entries: Iterable[ImageEntry], path: Path | None) -> ImageList:
    """Write entries to `path`, atomically, or to memory."""
    if path is None:
        memory = pa.BufferOutputStream()
        return ImageList(*_write(entries, memory), memory.getvalue())
    with artifacts.replacing(path) as temporary, os_file(temporary, "wb") as file:
        written = _write(entries, file)
    pa.default_memory_pool().release_unused()  # what looking up ids took would stay with the process
    return ImageList(*written, path)


def _write(entries: Iterable[ImageEntry], file: pa.NativeFile) -> tuple[int, str, bool]:
    entries, count, digest, carriage_returns = iter(entries), 0, sha256(), False
    with pa.ipc.new_file(file, SCHEMA) as writer:
        while batch := [(as_bytes(row.id), as_bytes(row.path), *row[2:]) for row in islice(entries, BATCH_ROWS)]:
            for key, path, size, changed, offset in batch:
                inside = b",%d" % offset if offset >= 0 else b""
                digest.update(b"%d,%d,%d,%d%b\n%b%b" % (len(key), len(path), size, changed, inside, key, path))
                carriage_returns = carriage_returns or b"\r" in key
            writer.write_batch(pa.record_batch(list(zip(*batch, strict=True)), schema=SCHEMA))
            count += len(batch)
    return count, digest.hexdigest(), carriage_returns


def read_list(rows: ImageList, start: int, stop: int) -> Iterator[ImageEntry]:
    """Rows [start, stop), a batch in memory at a time."""
    for first in range(start - start % BATCH_ROWS, min(stop, rows.count), BATCH_ROWS):
        columns = _batch(rows, first // BATCH_ROWS)[max(start - first, 0) : stop - first].columns
        for key, path, *rest in zip(*(column.to_pylist() for column in columns), strict=True):
            yield ImageEntry(as_text(key), as_text(path), *rest)


def ids_that_may_repeat(rows: ImageList) -> Iterator[str]:
    """The ids of rows whose id has the hash of another row's: few, and all that several rows have are among them."""
    hashes = np.empty(rows.count, dtype=np.uint64)
    for first in range(0, rows.count, BATCH_ROWS):
        hashes[first : first + BATCH_ROWS] = _hashes(_batch(rows, first // BATCH_ROWS))
    hashes.sort()
    suspects = hashes[1:][hashes[1:] == hashes[:-1]]
    for first in range(0, rows.count if len(suspects) else 0, BATCH_ROWS):
        batch = _batch(rows, first // BATCH_ROWS)
        yield from map(as_text, batch["id"].filter(pa.array(np.isin(_hashes(batch), suspects))).to_pylist())


def _hashes(batch: pa.RecordBatch) -> np.ndarray:
    """uint64 [N] of the ids."""
    return pd.util.hash_array(np.array(batch["id"].to_pylist(), dtype=object), categorize=False)


def _batch(rows: ImageList, number: int) -> pa.RecordBatch:
    # read, not mapped: the pages of a mapped file would count as this process's memory
    source = os_file(rows.data) if isinstance(rows.data, Path) else pa.BufferReader(rows.data)
    with source as file:
        return pa.ipc.open_file(file).get_batch(number)


def os_file(path: Path, mode: str = "rb") -> pa.NativeFile:
    """A file for pyarrow, to which a path as text would have to be UTF-8."""
    return pa.OSFile(os.fsencode(path), mode)


def as_bytes(text: str) -> bytes:
    """A name as UTF-8, also of one that is no valid text."""
    return text.encode(errors="surrogatepass")


def as_text(data: bytes) -> str:
    """The name that `as_bytes` was given."""
    return data.decode(errors="surrogatepass")
