"""Index image files: each is read and decoded once, in parallel, with memory that does not grow with their number.

The record of a file is kept in the user's cache, so that a killed pass goes on where it stopped
and the next run decodes nothing again. A file counts as unchanged while its size and its times
of modification and change are the same.
"""

import builtins
import json
import sqlite3
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from pathlib import Path
from sys import intern

import numpy as np
import pandas as pd
from tqdm import tqdm

from ensemble.core import artifacts
from ensemble.core.errors import ImageError
from ensemble.core.parallel import ordered_map
from ensemble.images import decode, metadata, near_duplicates

VERSION = 3  # raised by hand when a pass would find other values in the same file
COMMIT_FILES = 500  # files between two commits of the cache
BLOCK_FILES = 4096  # files whose records are held as Python objects


@dataclass(frozen=True)
class FileRecord:
    """What is known of one image file; `thumb` is uint8 [32, 32, 3] as bytes."""

    width: int
    height: int
    format: str
    bytes: int
    sha256: str
    phash: int
    header: metadata.Header
    thumb: "builtins.bytes"


@dataclass(frozen=True)
class FileIndex:
    """Readable files in the order given.

    rows: their positions among the files. records: width, height, format, bytes, sha256,
    phash (16 hex digits), pixels (equal where the decoded pixels are). headers: one column a key of
    `metadata.read_header`. thumbs: uint8 [N, 32, 32, 3], on disk. errors: position -> why.
    """

    rows: np.ndarray
    records: pd.DataFrame
    headers: pd.DataFrame
    thumbs: np.ndarray
    errors: dict[int, str]

    @property
    def hashes(self) -> list[int]:
        """The perceptual hashes as numbers, for `near_duplicates`."""
        return [int(text, 16) for text in self.records["phash"]]

    def take(self, keep: np.ndarray) -> "FileIndex":
        """The same for the files at these positions of `rows`."""
        parts = {name: getattr(self, name).iloc[keep].reset_index(drop=True) for name in ("records", "headers")}
        return replace(self, rows=self.rows[keep], thumbs=self.thumbs[keep], **parts)


def index_files(files: Sequence[Path], workers: int | None = None, label: str = "index") -> FileIndex:
    """Read every file once, or take its record from the cache; shows progress and time left."""
    rows: list[int] = []
    thumbnail_hashes: list[bytes] = []
    errors: dict[int, str] = {}
    blocks: list[pd.DataFrame] = []
    block: list[dict[str, object]] = []
    bar = tqdm(read_all(files, workers), label, len(files), unit="image", leave=False, disable=None)
    with tempfile.TemporaryFile() as store, warnings.catch_warnings():  # once for all threads: they share the filters
        warnings.simplefilter("ignore")  # damaged metadata is what is described here
        for row, found in enumerate(bar):
            if isinstance(found, str):
                errors[row] = found
                continue
            store.write(found.thumb)
            rows.append(row)
            size = f"{found.width}x{found.height}".encode()
            thumbnail_hashes.append(blake2b(size + found.thumb, digest_size=16).digest())
            facts = {name: getattr(found, name) for name in "width height format bytes sha256".split()}
            header = {f"header.{name}": intern(v) if isinstance(v, str) else v for name, v in found.header.items()}
            block.append(facts | {"phash": f"{found.phash:016x}"} | header)
            if len(block) == BLOCK_FILES:
                blocks.append(_compact(block))
                block = []
        store.flush()
        shape = (len(rows), near_duplicates.THUMBNAIL_SIDE, near_duplicates.THUMBNAIL_SIDE, 3)
        # on disk even after the file has lost its name
        thumbs = np.memmap(store, dtype=np.uint8, mode="r", shape=shape) if rows else np.empty(shape, dtype=np.uint8)
    blocks.append(_compact(block))
    table = pd.concat(blocks, ignore_index=True)
    table = table.astype({name: "category" for name in table if name in _TEXT_COLUMNS})
    own = [name for name in table if str(name).startswith("header.")]
    if rows:
        table["pixels"] = _pixel_hashes(list(table["sha256"]), thumbnail_hashes, [files[row] for row in rows], workers)
    return FileIndex(
        rows=np.array(rows, dtype=np.int64),
        records=table.drop(columns=own),
        headers=table[own].rename(columns=lambda name: name.removeprefix("header.")),
        thumbs=thumbs,
        errors=errors,
    )


def read_all(files: Sequence[Path], workers: int | None = None) -> Iterator[FileRecord | str]:
    """The record of each file, or why it cannot be read, in order; from the cache where it is there."""
    with _cache() as cache:

        def cached() -> Iterator[tuple[Path, str, FileRecord | None]]:
            for file in files:
                try:
                    stat = file.stat()
                    stamp = f"{VERSION}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
                except OSError:
                    stamp = ""
                yield file, stamp, _cache_get(cache, str(file.absolute()), stamp)

        def read(item: tuple[Path, str, FileRecord | None]) -> tuple[Path, str, FileRecord | str, bool]:
            file, stamp, found = item
            return file, stamp, found or read_record(file), found is None

        pending = 0
        for file, stamp, found, new in ordered_map(read, cached(), workers):
            if new and isinstance(found, FileRecord):
                _cache_put(cache, str(file.absolute()), stamp, found)
                pending += 1
                if pending % COMMIT_FILES == 0:
                    with suppress(sqlite3.Error):  # a full disk: no harm
                        cache.commit()
            yield found


def read_record(file: Path) -> FileRecord | str:
    """The record of one image file, or why it cannot be read."""
    try:
        data = file.read_bytes()
        image = decode.decode(data, name=str(file))
    except OSError as error:
        return f"{file}: {error.strerror}"
    except ImageError as error:
        return str(error)
    thumb = near_duplicates.thumbnail(image)
    header = metadata.read_header(data, *image.size)
    return FileRecord(
        width=image.width,
        height=image.height,
        format=str(header["format"]),
        bytes=len(data),
        sha256=sha256(data).hexdigest(),
        phash=near_duplicates.perceptual_hash(thumb),
        header=header,
        thumb=thumb.tobytes(),
    )


def _pixel_hashes(
    digests: Sequence[str], thumbnail_hashes: Sequence[bytes], files: Sequence[Path], workers: int | None
) -> list[str]:
    """The files' own hashes, but where different files have one size and thumbnail: those of their pixels."""
    ambiguous = pd.Series(digests).groupby(list(thumbnail_hashes)).transform("nunique").to_numpy() > 1
    rows: list[int] = np.flatnonzero(ambiguous).tolist()
    hashes = list(digests)
    for row, value in zip(rows, ordered_map(_pixel_hash, [files[row] for row in rows], workers), strict=True):
        hashes[row] = value
    return hashes


def _pixel_hash(file: Path) -> str:
    image = decode.decode(file)
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert("RGB")  # an alpha channel that hides nothing is no difference
    return sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


_TEXT_COLUMNS = {"format"} | {
    f"header.{name}" for name in "format mode tables sampling software icc density text_keys segments".split()
}


def _compact(rows: Iterable[dict[str, object]]) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows))
    kinds: dict[str, str] = dict.fromkeys(map(str, frame.select_dtypes("float64")), "float32")
    return frame.astype(kinds | {name: "int32" for name in ("width", "height") if name in frame})


# ---- the cache


@contextmanager
def _cache() -> Iterator[sqlite3.Connection]:
    """The user's cache; one in a temporary file where that cannot be written."""
    file = artifacts.cache_path() / "index.sqlite"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        connection = _open(str(file))
    except (sqlite3.Error, OSError) as error:
        if getattr(error, "sqlite_errorname", None) == "SQLITE_NOTADB":
            with suppress(OSError):
                file.unlink()  # damaged; the next pass makes a new one
        connection = _open("")  # SQLite's name for a private file that goes away
    with closing(connection):
        try:
            yield connection
        finally:
            with suppress(sqlite3.Error):
                connection.commit()


def _open(name: str) -> sqlite3.Connection:
    connection = sqlite3.connect(name, timeout=60)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS facts (path TEXT PRIMARY KEY, stamp TEXT, facts TEXT, thumb BLOB)"
        )
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _cache_get(cache: sqlite3.Connection, path: str, stamp: str) -> FileRecord | None:
    with suppress(sqlite3.Error, ValueError, TypeError):  # a damaged cache knows nothing
        row = cache.execute("SELECT facts, thumb FROM facts WHERE path = ? AND stamp = ?", (path, stamp))
        if (found := row.fetchone()) is not None and len(found[1]) == 3 * near_duplicates.THUMBNAIL_SIDE**2:
            return FileRecord(**json.loads(found[0]), thumb=found[1])
    return None


def _cache_put(cache: sqlite3.Connection, path: str, stamp: str, found: FileRecord) -> None:
    values = {name: value for name, value in vars(found).items() if name != "thumb"}
    row = (path, stamp, json.dumps(values), found.thumb)
    with suppress(sqlite3.Error, ValueError):  # a full disk, a name that is not UTF-8: no harm
        cache.execute("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)", row)
