"""What to score: a folder, a CSV or a Parquet file -> rows of an id as given and the image that it means."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

import pandas as pd

from ensemble import artifacts
from ensemble.errors import DataError, Sample, some
from ensemble.files import compact, find_files, texts, walk_images
from ensemble.sources import images_root, read_parts, refuse_missing
from export import parquet_input
from export.rows import Row, Rows, keep, read, repeated_ids


@dataclass(frozen=True)
class Item:
    """One image to score. path: what a list of errors calls it. source: its file, or its encoded bytes."""

    id: str
    path: str
    source: Path | bytes


@dataclass(frozen=True)
class Inputs:
    """Images to score, in the order of the input: their rows, and the images themselves.

    sha256: of ids, paths, sizes and times of change, in order; where a Parquet file holds the
    images, of ids and that file's size, time of change and rows, not of the images' bytes.
    reader: the rows [start, stop), start, stop -> their images, streamed. That of files can be
    pickled, for other machines to read by.
    """

    rows: Rows
    sha256: str
    reader: Callable[[Iterable[Row], int, int], Iterator[Item]]

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """The images of the rows [start, stop), streamed."""
        return self.reader(read(self.rows, start, stop), start, stop)

    @property
    def count(self) -> int:
        """How many images there are."""
        return self.rows.count


def ids(inputs: Inputs) -> list[str]:
    """All ids in order; for callers with few images. No image is read."""
    return [row.id for row in read(inputs.rows, 0, inputs.count)]


def names(inputs: Inputs) -> Iterator[str]:
    """What each image is called, in order, without its folder; no image is read."""
    return (Path(row.path).name for row in read(inputs.rows, 0, inputs.count))


def read_inputs(source: Path, images: Path | None = None, spill: Path | None = None) -> Inputs:
    """Read a folder (ids are relative POSIX paths), or a CSV or Parquet file with `id` or `path`.

    A Parquet file may hold the images themselves in `image`, as bytes or as {bytes, path}.
    With `spill`, a folder, the list of rows is kept in a file there instead of in memory.
    Raises DataError for a missing input, no images, or ids missing, doubled or ambiguous.
    """
    place = spill / "rows.arrow" if spill else None
    if source.is_dir():
        _refuse_images(images, source)
        rows = keep((_row(path, source, path) for path in walk_images(source)), place)
        if not rows.count:
            raise DataError(f"{source} holds no images")
        return _of_files(rows, source)
    if not source.is_file():
        raise DataError(f"no input at {source}; give a CSV with a column id, or a folder of images")
    if source.suffix.lower() != ".parquet":
        return _of_table(read_parts(source), source, images, place)
    if not parquet_input.holds_images(source):
        return _of_table(parquet_input.read_parts(source), source, images, place)
    _refuse_images(images, source)
    facts = parquet_input.facts(source)
    rows = _distinct(keep(_named(parquet_input.image_rows(source), source), place), source)
    return Inputs(rows, artifacts.json_sha256([rows.sha256, facts]), partial(_in_parquet, source, facts))


def resolve_table(frame: pd.DataFrame, table: Path, images: Path | None) -> Inputs:
    """Ids and files of a table's rows, in memory; `table` is where relative paths count from."""
    return _of_table(iter([frame]), table, images, None)


def of_files(names: Sequence[str], paths: Sequence[Path]) -> Inputs:
    """Ids and the file of each, in memory."""
    here = Path()
    return _of_files(keep((_row(key, here, str(path)) for key, path in zip(names, paths, strict=True)), None), here)


def of_open_files(files: Sequence[tuple[str, BinaryIO]]) -> Inputs:
    """Images by name, each read when its turn comes. Names may repeat; sha256 is of them alone."""
    rows = keep((Row(name, name) for name, _ in files), None)

    def reader(_: Iterable[Row], start: int, stop: int) -> Iterator[Item]:
        for name, file in files[start:stop]:
            yield Item(name, name, file.read())

    return Inputs(rows, rows.sha256, reader)


def _of_files(rows: Rows, root: Path) -> Inputs:
    return Inputs(rows, artifacts.json_sha256([ascii(root), rows.sha256]), partial(_in_folder, root))


def _in_folder(root: Path, rows: Iterable[Row], start: int, stop: int) -> Iterator[Item]:
    for row in rows:
        file = root / row.path
        yield Item(row.id, str(file), file)


def _in_parquet(source: Path, facts: list[Any], rows: Iterable[Row], start: int, stop: int) -> Iterator[Item]:
    if parquet_input.facts(source) != facts:
        raise DataError(f"{source} was changed meanwhile; run the same command again")
    for row, data in zip(rows, parquet_input.image_bytes(source, start, stop), strict=True):
        yield Item(row.id, row.path, data)


def _of_table(parts: Iterator[pd.DataFrame], table: Path, images: Path | None, place: Path | None) -> Inputs:
    first = next(parts)
    root = images_root(first, table, images)
    choose = _by_path if "path" in first else _by_id
    rows = choose(chain([first], parts), table, root)
    kept = keep(_named(rows, table) if "id" in first else rows, place)
    return _of_files(_distinct(kept, table), root)


def _by_path(parts: Iterator[pd.DataFrame], table: Path, root: Path) -> Iterator[Row]:
    missing, count = Sample(), 0
    for part in parts:
        paths = part["path"].tolist()
        for key, path in zip(part["id"].tolist() if "id" in part else paths, paths, strict=True):
            count += 1
            row = _row(key, root, path)
            if row.size < 0:
                missing.add(repr(path))
            yield row  # also of what is missing, so that rows keep their numbers
    refuse_missing(missing, count, table, root)


def _by_id(parts: Iterator[pd.DataFrame], table: Path, root: Path) -> Iterator[Row]:
    names = compact(key for part in parts for key in part["id"].tolist())
    for key, path in zip(texts(names), find_files(names, root), strict=True):
        yield _row(key, root, path)


def _row(key: str, root: Path, path: str) -> Row:
    """A row with what is known of its file: no size where it is none, or is gone."""
    try:
        found = os.stat(os.path.join(root, path))
    except (OSError, ValueError):  # a name with a null byte is a ValueError
        return Row(key, path)
    return Row(key, path, found.st_size, found.st_mtime_ns) if S_ISREG(found.st_mode) else Row(key, path)


def _refuse_images(images: Path | None, source: Path) -> None:
    if images is not None:
        raise DataError(f"{source} has the images itself, none are looked for in {images}; leave out --images")


def _named(rows: Iterator[Row], table: Path) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        if not row.id:
            raise DataError(f"{table}: row {number} has no id; give every image one")
        yield row


def _distinct(rows: Rows, table: Path) -> Rows:
    if repeated := repeated_ids(rows):
        raise DataError(f"{table}: ids given more than once: {some(map(repr, repeated))}; each image is scored once")
    return rows
