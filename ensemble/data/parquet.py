"""Parquet files whose rows name images, or hold them as bytes."""

from bisect import bisect_right
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from itertools import accumulate, count
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ensemble.core.errors import DataError
from ensemble.data import storage
from ensemble.data.image_list import BATCH_ROWS, ImageEntry, os_file
from ensemble.data.storage import Location

IMAGE = "image"  # the column
IMAGES_AT_ONCE = 16  # in memory
BUFFER_BYTES = 1 << 20  # read at a time; without a buffer a column is read for a whole row group


class ParquetVersion(NamedTuple):
    """What tells one version of a file from another: its `FileStat`, and the rows of its groups."""

    size: int
    version: int
    group_rows: list[int]


@contextmanager
def _opened(file: Location) -> Iterator[pq.ParquetFile]:
    try:
        size = storage.stat(file).size
        source = os_file(file) if isinstance(file, Path) else storage.open_file(file, size)
        options = {"buffer_size": BUFFER_BYTES, "pre_buffer": False}
        with closing(source) as readable, pq.ParquetFile(readable, **options) as opened:
            yield opened
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not a readable Parquet file: {' '.join(str(error).split())}") from None


def _batches(parquet: pq.ParquetFile, rows: int, columns: list[str], first: int = 0) -> Iterator[pa.RecordBatch]:
    for group in range(first, parquet.num_row_groups):  # one reader for all keeps what it read before
        yield from parquet.iter_batches(rows, [group], columns)


def holds_images(file: Location) -> bool:
    """Whether there is a column `image`; DataError if it does not hold bytes, or if there are no rows."""
    with _opened(file) as parquet:
        if not parquet.metadata.num_rows:
            raise DataError(f"{file} has no rows")
        schema = parquet.schema_arrow
        if IMAGE not in schema.names:
            return False
        kind = schema.field(IMAGE).type
        if not _is_bytes(_fields(kind).get("bytes", kind)):
            raise DataError(
                f"{file}: column {IMAGE} is {kind}; it must hold encoded images, or structs of bytes and path"
            )
        return True


def read_text(file: Location, columns: Collection[str] | None = None) -> Iterator[pd.DataFrame]:
    """Some or all columns as text, some thousand rows at a time; DataError for one that is neither text nor integer."""
    with _opened(file) as parquet:
        names = parquet.schema_arrow.names
        if not (chosen := [name for name in names if columns is None or name in columns]):
            yield pd.DataFrame(columns=names)
        for batch in _batches(parquet, BATCH_ROWS, chosen):
            yield pd.DataFrame({name: _texts(batch[name], name, file) for name in chosen})


def image_entries(file: Location) -> Iterator[ImageEntry]:
    """The images of a file that holds them; without `id` the struct's path is the id, or else file name and row."""
    with _opened(file) as parquet:
        schema = parquet.schema_arrow
        own = "id" in schema.names
        named = "path" in _fields(schema.field(IMAGE).type)
        rows = count()
        for batch in _batches(parquet, BATCH_ROWS, ["id"] if own else [f"{IMAGE}.path"] if named else []):
            keys = [""] * len(batch)
            if own:
                keys = _texts(batch["id"], "id", file)
            elif named:
                keys = _texts(pc.struct_field(batch[IMAGE], "path"), f"{IMAGE}.path", file)
            for key, row in zip(keys, rows, strict=False):
                yield ImageEntry(key if key or own else f"{storage.name(file)}:{row}", f"{file}:{row}")


def image_bytes(file: Location, start: int, stop: int) -> Iterator[bytes]:
    """Encoded images of the rows [start, stop), empty for a null; what lies in the row group before is read over."""
    with _opened(file) as parquet:
        structs = bool(_fields(parquet.schema_arrow.field(IMAGE).type))
        ends = list(accumulate(_group_rows(parquet)))
        group = bisect_right(ends, start)
        at = ends[group - 1] if group else 0
        for batch in _batches(parquet, IMAGES_AT_ONCE, [f"{IMAGE}.bytes" if structs else IMAGE], group):
            images = pc.struct_field(batch[IMAGE], "bytes") if structs else batch[IMAGE]
            for image in images[max(start - at, 0) : stop - at]:
                yield image.as_py() or b""
            at += len(batch)
            if at >= stop:
                return


def read_version(file: Location) -> ParquetVersion:
    """The file's version now."""
    with _opened(file) as parquet:
        return ParquetVersion(*storage.stat(file), _group_rows(parquet))


def _group_rows(parquet: pq.ParquetFile) -> list[int]:
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]


def _fields(kind: pa.DataType) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}


def _is_bytes(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _texts(column: pa.Array, name: str, file: Location) -> list[str]:
    """Text or whole numbers as text, empty for a null; DataError for another kind."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    known = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer)
    if not any(is_kind(kind) for is_kind in known):
        raise DataError(f"{file}: column {name} is {kind}; it must hold text")
    return column.cast(pa.string()).fill_null("").to_pylist()
