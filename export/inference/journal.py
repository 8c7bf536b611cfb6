"""What makes scoring resumable: a folder beside the output that holds a journal and shards of logits.

NAME.csv.partial/
  lock             held by the process that scores
  journal.json     what decides the output; written before the first shard
  rows.arrow       the list of what is scored (rows.py), written anew by each start
  prepared.json    of a job on a cluster: what runs its members (cluster_kept.py)
  00000.parquet    ROWS rows: id, and a logit a member, or the path and why it cannot be read
"""

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.data.image_list import os_file
from ensemble.models.runner import MOST_ROWS
from export.inference.outputs import Failure

# Fixed, so that the list alone decides which rows share a shard: a minute's work at 2 images per
# second, and at 2,000 no more than 16 small files per second. Chunks divide it.
ROWS = MOST_ROWS
LOCK, JOURNAL = "lock", "journal.json"
SHARD = re.compile(r"\d{5,}\.parquet")


@dataclass(frozen=True)
class ScoredBatch:
    """Scored rows in order: logits float32 [N, members], NaN where `failures` says, by row, why."""

    ids: list[str]
    logits: np.ndarray
    failures: dict[int, Failure]


@dataclass(frozen=True)
class Journal:
    """An open journal of `count` rows. key: hash of all that decides the output; each shard carries it."""

    folder: Path
    members: tuple[str, ...]
    count: int
    key: str

    @property
    def shards(self) -> int:
        """How many there are once all rows are scored."""
        return -(-self.count // ROWS)

    def span(self, shard: int) -> tuple[int, int]:
        """The rows [start, stop) of a shard."""
        return shard * ROWS, min((shard + 1) * ROWS, self.count)

    def path(self, shard: int) -> Path:
        """Its file."""
        return self.folder / f"{shard:05}.parquet"


@contextmanager
def held(output: Path) -> Iterator[Path]:
    """The journal's folder for `output`, for this process alone; it goes at the end unless it holds a journal."""
    folder = output.with_name(f"{output.name}.partial")
    if os.path.isdir(folder) and not (folder / LOCK).exists() and any(folder.iterdir()):
        raise ArtifactError(f"{folder} is in the way and no journal of infer; move it, or choose another --output")
    artifacts.ensure_folder(folder)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ArtifactError(f"another infer is writing {output}; wait for it, or choose another --output") from None
    except OSError as error:
        raise ArtifactError(f"cannot lock {folder / LOCK}: {error.strerror}; choose another --output") from None
    try:
        for left in folder.glob("*.tmp"):  # of killed writers: nobody else writes here now
            left.unlink(missing_ok=True)
        yield folder
    finally:
        if not (folder / JOURNAL).exists():
            _clear(folder)
        lock.release()
        with suppress(OSError):  # the journal is kept, or another process has come
            folder.rmdir()


def open_journal(folder: Path, key: Mapping[str, Any], members: Sequence[str], count: int) -> tuple[Journal, list[str]]:
    """The journal of `count` rows in a held folder, and which parts of the key changed since it was begun.

    `key` is by what a user calls its parts. Shards of another key are removed.
    """
    path = folder / JOURNAL
    before: dict[str, Any] = {}
    with suppress(ArtifactError):  # none yet, or damaged: shards carry the key too
        found = artifacts.read_json(path, "").get("key")
        before = found if isinstance(found, dict) else {}
    changed = [name for name in dict(before) | dict(key) if before.get(name) != key.get(name)] if before else []
    if changed:
        for shard in _shards(folder):
            shard.unlink()
    if before != key:
        artifacts.write_json(path, {"key": dict(key)})
    return Journal(folder, tuple(members), count, artifacts.json_sha256(dict(key))), changed


def missing(journal: Journal) -> list[int]:
    """Shards still to be scored: absent, damaged, or of another key."""
    return [shard for shard in range(journal.shards) if read_shard(journal, shard) is None]


def write_shard(journal: Journal, shard: int, rows: ScoredBatch) -> None:
    """Write one shard; it is whole and on the disk, or not there."""
    store(journal, shard, encoded(journal, shard, rows))


def encoded(journal: Journal, shard: int, rows: ScoredBatch) -> bytes:
    """A shard's file, wherever its rows were scored."""
    found = [rows.failures.get(row) for row in range(len(rows.ids))]
    columns = [
        pa.array([_text(key) for key in rows.ids], pa.string()),
        pa.array([failure and _text(failure.path) for failure in found], pa.string()),
        pa.array([failure and _text(failure.error) for failure in found], pa.string()),
        *(pa.array(rows.logits[:, member], pa.float32()) for member in range(len(journal.members))),
    ]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=_schema(journal, shard)), file, write_page_checksum=True)
    return file.getvalue()


def store(journal: Journal, shard: int, data: bytes) -> None:
    """Write one encoded shard; it is whole and on the disk, or not there."""
    path = journal.path(shard)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror or error}; once it can be written, the same command goes on"
        ) from None


def read_shard(journal: Journal, shard: int) -> ScoredBatch | None:
    """A shard's rows; None if it is absent, damaged, or of another key."""
    start, stop = journal.span(shard)
    try:
        with os_file(journal.path(shard)) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
            table = file.read()
    except (OSError, ValueError, pa.ArrowException):
        return None
    if not table.schema.equals(_schema(journal, shard), check_metadata=True) or table.num_rows != stop - start:
        return None
    ids, paths, errors = (table.column(name).to_pylist() for name in ("id", "path", "error"))
    logits = [table.column(name).to_numpy() for name in table.column_names[3:]]
    failures = {
        row: Failure(key, path, error)
        for row, (key, path, error) in enumerate(zip(ids, paths, errors, strict=True))
        if error is not None
    }
    return ScoredBatch(ids, np.column_stack(logits) if logits else np.empty((len(ids), 0), np.float32), failures)


def close(journal: Journal) -> None:
    """The output is written: nothing is left to go on from, and the folder goes when it is let go."""
    (journal.folder / JOURNAL).unlink(missing_ok=True)


def _schema(journal: Journal, shard: int) -> pa.Schema:
    texts = [pa.field(name, pa.string()) for name in ("id", "path", "error")]
    logits = [pa.field(f"logit {name}", pa.float32()) for name in journal.members]
    return pa.schema([*texts, *logits], {"journal": journal.key, "shard": str(shard)})


def _text(text: str) -> str:
    """Text that UTF-8 can hold; a path may have bytes that it cannot."""
    return text.encode("utf-8", "replace").decode()


def _shards(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if SHARD.fullmatch(path.name)]


def _clear(folder: Path) -> None:
    """Remove the folder's files, the lock last: it marks the folder as ours."""
    with suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK):
            path.unlink()
