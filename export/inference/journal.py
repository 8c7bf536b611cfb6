"""The journal that makes scoring resumable: a folder beside the output with the logits of finished shards.

NAME.csv.partial/
  lock             held by the process that scores
  journal.json     what decides the output; written before the first shard
  rows.arrow       the list of images (data/image_list.py), written again by each start
  prepared.json    of a job on a cluster: what runs its members (cluster/saved_plan.py)
  00000.parquet    SHARD_ROWS rows: id, and a logit for each member, or the path and why it cannot be read
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

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.data.image_list import os_file
from ensemble.models.runner import MAX_CHUNK_ROWS
from export.inference.outputs import Failure

# Fixed, so that the list alone decides which rows share a shard: a minute's work at 2 images per
# second, and at 2,000 no more than 16 small files per second. Chunks divide it.
SHARD_ROWS = MAX_CHUNK_ROWS
LOCK, JOURNAL = "lock", "journal.json"
SHARD_NAME = re.compile(r"\d{5,}\.parquet")


@dataclass(frozen=True)
class ScoredBatch:
    """Scored rows in order: logits float32 [N, runners], NaN in the rows of `failures`, which are by row."""

    ids: list[str]
    logits: np.ndarray
    failures: dict[int, Failure]


@dataclass(frozen=True)
class Journal:
    """An open journal of `count` rows. key: hash of all that decides the output; each shard carries it.

    members: the runners' names, the columns of a shard's logits. folder: not used by `encode`, which may run on
    another machine.
    """

    folder: Path
    members: tuple[str, ...]
    count: int
    key: str

    @property
    def shard_count(self) -> int:
        """How many shards there are once all rows are scored."""
        return -(-self.count // SHARD_ROWS)

    def row_range(self, shard: int) -> tuple[int, int]:
        """The rows [start, stop) of a shard."""
        return shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, self.count)

    def path(self, shard: int) -> Path:
        """A shard's file."""
        return self.folder / f"{shard:05}.parquet"

    def missing_shards(self) -> list[int]:
        """Shards that are still to be scored: absent, damaged, or of another key."""
        return [shard for shard in range(self.shard_count) if self.read(shard) is None]

    def encode(self, shard: int, batch: ScoredBatch) -> bytes:
        """The content of a shard's file."""
        failures = [batch.failures.get(row) for row in range(len(batch.ids))]
        columns = [
            pa.array([_utf8(key) for key in batch.ids], pa.string()),
            pa.array([failure and _utf8(failure.path) for failure in failures], pa.string()),
            pa.array([failure and _utf8(failure.error) for failure in failures], pa.string()),
            *(pa.array(batch.logits[:, member], pa.float32()) for member in range(len(self.members))),
        ]
        file = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(columns, schema=self._schema(shard)), file, write_page_checksum=True)
        return file.getvalue()

    def write(self, shard: int, data: bytes) -> None:
        """Write an encoded shard atomically, and flush it to the disk."""
        path = self.path(shard)
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

    def read(self, shard: int) -> ScoredBatch | None:
        """A shard's rows; None if it is absent, damaged, or of another key."""
        start, stop = self.row_range(shard)
        try:
            with os_file(self.path(shard)) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
                table = file.read()
        except (OSError, ValueError, pa.ArrowException):
            return None
        if not table.schema.equals(self._schema(shard), check_metadata=True) or table.num_rows != stop - start:
            return None
        ids, paths, errors = (table.column(name).to_pylist() for name in ("id", "path", "error"))
        logits = [table.column(name).to_numpy() for name in table.column_names[3:]]
        failures = {
            row: Failure(key, path, error)
            for row, (key, path, error) in enumerate(zip(ids, paths, errors, strict=True))
            if error is not None
        }
        return ScoredBatch(ids, np.column_stack(logits) if logits else np.empty((len(ids), 0), np.float32), failures)

    def close(self) -> None:
        """The output is written: `locked_workdir` then removes the folder."""
        (self.folder / JOURNAL).unlink(missing_ok=True)

    def _schema(self, shard: int) -> pa.Schema:
        texts = [pa.field(name, pa.string()) for name in ("id", "path", "error")]
        logits = [pa.field(f"logit {name}", pa.float32()) for name in self.members]
        return pa.schema([*texts, *logits], {"journal": self.key, "shard": str(shard)})


@contextmanager
def locked_workdir(output: Path) -> Iterator[Path]:
    """The journal's folder for `output`, locked for this process; removed at the end unless it holds a journal."""
    folder = output.with_name(f"{output.name}.partial")
    if os.path.isdir(folder) and not (folder / LOCK).exists() and any(folder.iterdir()):
        raise ArtifactError(f"{folder} is in the way and no journal of infer; move it, or choose another --output")
    artifacts.ensure_folder(folder)
    held = f"another infer is writing {output}; wait for it, or choose another --output"
    try:
        with artifacts.file_lock(folder / LOCK, held, "choose another --output"):
            for temporary in folder.glob("*.tmp"):  # of killed writers: no other process writes here now
                temporary.unlink(missing_ok=True)
            try:
                yield folder
            finally:
                if not (folder / JOURNAL).exists():
                    with suppress(OSError):
                        for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK):
                            path.unlink()  # the lock last: it marks the folder as a journal's
    finally:
        with suppress(OSError):  # not empty: the journal stays, or another process has locked the folder
            folder.rmdir()


def open_journal(
    workdir: Path, key: Mapping[str, Any], members: Sequence[str], count: int
) -> tuple[Journal, list[str]]:
    """The journal of `count` rows in a locked folder, and which parts of the key changed since it was begun.

    key: what decides the output, by names that a user knows. Shards of another key are removed.
    """
    path = workdir / JOURNAL
    before: dict[str, Any] = {}
    with suppress(ArtifactError):  # none yet, or damaged: shards carry the key too
        stored = artifacts.read_json(path, "").get("key")
        before = stored if isinstance(stored, dict) else {}
    changed = [name for name in dict(before) | dict(key) if before.get(name) != key.get(name)] if before else []
    if changed:
        for shard in list(workdir.iterdir()):
            if SHARD_NAME.fullmatch(shard.name):
                shard.unlink()
    if before != key:
        artifacts.write_json(path, {"key": dict(key)})
    return Journal(workdir, tuple(members), count, artifacts.json_sha256(dict(key))), changed


def _utf8(text: str) -> str:
    """Text that UTF-8 can hold; a path may have bytes that it cannot."""
    return text.encode("utf-8", "replace").decode()
