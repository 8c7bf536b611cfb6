"""What to score: a folder, a table, Parquet files or tars -> rows of an id as given and the image that it means."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import DataError, join_limited
from ensemble.data import byte_ranges, image_list, parquet, shards, storage
from ensemble.data.byte_ranges import ByteRange
from ensemble.data.image_list import ImageEntry, ImageList, read_list, repeated_ids, write_list
from ensemble.data.sources import read_parts
from ensemble.data.storage import Location, join
from ensemble.images.decode import ImageSource


@dataclass(frozen=True)
class Item:
    """One image to score. path: what a list of errors calls it. source: its file, its bytes, or where they lie."""

    id: str
    path: str
    source: ImageSource


@dataclass(frozen=True)
class Inputs:
    """Images to score, in the order of the input: their rows, and the images themselves.

    sha256: of ids, paths, sizes and times of change (of objects in a store, their ETags), in order;
    where Parquet files or tars hold the images, of ids and those files' sizes, times of change
    and rows, not of the images' bytes.
    reader: the rows [start, stop), start, stop -> their images, streamed. That of files can be
    pickled, for other machines to read by.
    needs: the folder or the files that are read from, without which no image can be; none for a
    table, whose images may lie anywhere, and for a store.
    note: what a user should be told, if anything: of tars or Parquet files among a folder's images.
    """

    rows: ImageList
    sha256: str
    reader: Callable[[Iterable[ImageEntry], int, int], Iterator[Item]]
    needs: tuple[Path, ...] = ()
    note: str = ""

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """The images of the rows [start, stop), streamed."""
        return self.reader(read_list(self.rows, start, stop), start, stop)

    @property
    def count(self) -> int:
        """How many images there are."""
        return self.rows.count


def ids(inputs: Inputs) -> list[str]:
    """All ids in order; for callers with few images. No image is read."""
    return [row.id for row in read_list(inputs.rows, 0, inputs.count)]


def names(inputs: Inputs) -> Iterator[str]:
    """What each image is called, in order, without its folder; no image is read."""
    return (Path(row.path).name for row in read_list(inputs.rows, 0, inputs.count))


def read_inputs(source: Location, images: Location | None = None, spill: Path | None = None) -> Inputs:
    """Read images from a folder, a CSV or Parquet file with `id` or `path`, Parquet files with images, or tars.

    Of a folder ids are relative POSIX paths. Parquet files may hold the images in `image`, as
    bytes or as {bytes, path}; a folder or a pattern may name several of them, or several tars.
    Each place may be a URL that `places.parse` gave. With `spill`, a folder, the list of rows is
    kept in a file there instead of in memory. Raises DataError for a missing input, no images, or
    ids missing, doubled or ambiguous.
    """
    place = spill / "rows.arrow" if spill else None
    if files := shards.find(source):
        _refuse_images(images, source)
        return _of_shards(files, source, place)
    if not _is_table(source):
        _refuse_images(images, source)
        others: list[str] = []

        def passed(path: str) -> None:
            if shards.kind(path):
                others.append(path)

        rows = write_list(image_list.of_folder(source, passed), place)
        if rows.count:
            return replace(_of_files(rows, source, _paths([source])), note=shards.passed_over(source, others))
        if files := shards.below(source, others):
            return _of_shards(files, source, place)
        raise DataError(f"{source} holds no images")
    if not storage.name(source).lower().endswith(".parquet"):
        return _of_table(_csv_parts(source), source, images, place)
    if not parquet.holds_images(source):
        return _of_table(parquet.read_parts(source), source, images, place)
    _refuse_images(images, source)
    return _of_parquet([source], source, place)


def _is_table(source: Location) -> bool:
    """Whether it is to be read as a table, not as a folder; DataError for a path where there is nothing."""
    if isinstance(source, str):
        return source.lower().endswith((".csv", ".parquet"))
    if not (os.path.isfile(source) or os.path.isdir(source)):  # False where a name is too long to be one
        raise DataError(f"no input at {source}; give a CSV with a column id, or a folder of images")
    return not os.path.isdir(source)


def _csv_parts(source: Location) -> Iterator[pd.DataFrame]:
    if isinstance(source, Path):
        yield from read_parts(source)
        return
    try:
        opened = storage.open_file(source)
    except FileNotFoundError:
        raise DataError(f"no such file: {source}") from None
    with opened as file:
        yield from read_parts(source, file)


def inputs_from_table(frame: pd.DataFrame, table: Path, images: Location | None) -> Inputs:
    """Ids and files of a table's rows, in memory; `table` is where relative paths count from."""
    return _of_table(iter([frame]), table, images, None)


def inputs_from_files(names: Sequence[str], paths: Sequence[Path]) -> Inputs:
    """Ids and the file of each, in memory."""
    here = Path()
    rows = (image_list.row(key, here, str(path)) for key, path in zip(names, paths, strict=True))
    return _of_files(write_list(rows, None), here)


def inputs_from_open_files(files: Sequence[tuple[str, BinaryIO]]) -> Inputs:
    """Images by name, each read when its turn comes. Names may repeat; sha256 is of them alone."""
    rows = write_list((ImageEntry(name, name) for name, _ in files), None)

    def reader(_: Iterable[ImageEntry], start: int, stop: int) -> Iterator[Item]:
        for name, file in files[start:stop]:
            yield Item(name, name, file.read())

    return Inputs(rows, rows.sha256, reader)


def _of_files(rows: ImageList, root: Location, needs: tuple[Path, ...] = ()) -> Inputs:
    return Inputs(rows, artifacts.json_sha256([ascii(root), rows.sha256]), partial(_in_files, root), needs)


def _paths(given: Iterable[Location]) -> tuple[Path, ...]:
    return tuple(place for place in given if isinstance(place, Path))


def _of_shards(files: Sequence[Location], source: Location, place: Path | None) -> Inputs:
    if shards.is_parquet(files):
        if others := [file for file in files if not parquet.holds_images(file)]:
            raise DataError(
                f"{source}: no column image in {join_limited(others)}; several files are read for their images"
            )
        return _of_parquet(files, source, place)
    known: list[shards.Shard] = []
    rows = write_list(shards.tar_rows(files, known), place)
    if not rows.count:
        raise DataError(f"{source} holds no images")
    facts = [[shard.size, shard.version] for shard in known]
    _distinct(rows, source)
    return Inputs(rows, artifacts.json_sha256([rows.sha256, facts]), partial(_in_tars, tuple(known)), _paths(files))


def _of_parquet(files: Sequence[Location], source: Location, place: Path | None) -> Inputs:
    known = [(file, parquet.facts(file)) for file in files]
    rows = chain.from_iterable(_named(parquet.image_rows(file), file) for file in files)
    kept = _distinct(write_list(rows, place), source)
    facts = known[0][1] if len(known) == 1 else [each for _, each in known]
    return Inputs(kept, artifacts.json_sha256([kept.sha256, facts]), partial(_in_parquet, known), _paths(files))


def _in_files(root: Location, rows: Iterable[ImageEntry], start: int, stop: int) -> Iterator[Item]:
    placed = ((row, join(root, row.path)) for row in rows)
    for in_store, some_rows in groupby(placed, lambda each: isinstance(each[1], str)):
        if in_store:
            found = ((row._replace(path=str(place)), ByteRange(place, 0, row.size)) for row, place in some_rows)
            yield from _ahead(found, lambda spans: ([span] for span in spans))
        else:
            yield from (Item(row.id, str(place), cast(Path, place)) for row, place in some_rows)


def _in_tars(known: Sequence[shards.Shard], rows: Iterable[ImageEntry], start: int, stop: int) -> Iterator[Item]:
    placed = shards.spans(known, rows, start, stop)
    if isinstance(known[0].place, str):
        return _ahead(placed, byte_ranges.neighbours)
    return (Item(row.id, row.path, span) for row, span in placed)


def _ahead(
    placed: Iterable[tuple[ImageEntry, ByteRange]], group: Callable[[Iterable[ByteRange]], Iterable[list[ByteRange]]]
) -> Iterator[Item]:
    """Images of a store, their bytes fetched ahead of who reads them."""
    waiting: deque[ImageEntry] = deque()

    def asked() -> Iterator[ByteRange]:
        for row, span in placed:
            waiting.append(row)
            yield span

    for source in byte_ranges.fetched(group(asked())):
        row = waiting.popleft()
        yield Item(row.id, row.path, source)


def _in_parquet(
    known: Sequence[tuple[Location, list[Any]]], rows: Iterable[ImageEntry], start: int, stop: int
) -> Iterator[Item]:
    given = iter(rows)
    for number, first, last in shards.stretches([sum(facts[2]) for _, facts in known], start, stop):
        file, facts = known[number]
        if parquet.facts(file) != facts:
            raise storage.changed(file)
        for data, row in zip(parquet.image_bytes(file, first, last), given, strict=False):
            yield Item(row.id, row.path, data)


def _of_table(parts: Iterator[pd.DataFrame], table: Location, images: Location | None, place: Path | None) -> Inputs:
    named = image_list.of_table(parts, table, images)
    kept = write_list(_named(named.rows, table) if named.given else named.rows, place)
    return _of_files(_distinct(kept, table), named.root)


def _refuse_images(images: Location | None, source: Location) -> None:
    if images is not None:
        raise DataError(f"{source} has the images itself, none are looked for in {images}; leave out --images")


def _named(rows: Iterator[ImageEntry], table: Location) -> Iterator[ImageEntry]:
    for number, row in enumerate(rows, 1):
        if not row.id:
            raise DataError(f"{table}: row {number} has no id; give every image one")
        yield row


def _distinct(rows: ImageList, table: Location) -> ImageList:
    if repeated := repeated_ids(rows):
        raise DataError(
            f"{table}: ids given more than once: {join_limited(map(repr, repeated))}; each image is scored once"
        )
    return rows
