"""The list of rows to score, in an Arrow file on disk or in memory: its length costs little."""

import os
from collections import Counter
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

BATCH = 4096  # rows of every batch but the last
TEXT = pa.large_binary()  # names may be no UTF-8
SCHEMA = pa.schema(
    [("id", TEXT), ("path", TEXT), ("size", pa.int64()), ("changed", pa.int64()), ("offset", pa.int64())]
)


class Row(NamedTuple):
    """An id, the path that it means, and that file's bytes and time of change in ns; -1 where there is no file.

    offset: of an image inside a file, where its bytes begin; -1 for a file of its own.
    """

    id: str
    path: str
    size: int = -1
    changed: int = -1
    offset: int = -1


@dataclass(frozen=True)
class Rows:
    """An Arrow file of rows, or a buffer of its bytes. returns: whether an id holds a carriage return."""

    count: int
    sha256: str
    returns: bool
    place: Path | pa.Buffer


def keep(rows: Iterable[Row], place: Path | None) -> Rows:
    """Write rows to `place`, atomically, or to memory."""
    if place is None:
        memory = pa.BufferOutputStream()
        return Rows(*_write(rows, memory), memory.getvalue())
    with artifacts.replacing(place) as temporary, os_file(temporary, "wb") as file:
        told = _write(rows, file)
    pa.default_memory_pool().release_unused()  # what looking up ids took would stay with the process
    return Rows(*told, place)


def _write(rows: Iterable[Row], file: pa.NativeFile) -> tuple[int, str, bool]:
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


def read(rows: Rows, start: int, stop: int) -> Iterator[Row]:
    """Rows [start, stop), a batch in memory at a time."""
    for first in range(start - start % BATCH, min(stop, rows.count), BATCH):
        columns = _batch(rows, first // BATCH)[max(start - first, 0) : stop - first].columns
        for key, path, *rest in zip(*(column.to_pylist() for column in columns), strict=True):
            yield Row(_text(key), _text(path), *rest)


def repeated_ids(rows: Rows) -> list[str]:
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


def _batch(rows: Rows, number: int) -> pa.RecordBatch:
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
