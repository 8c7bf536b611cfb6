"""What to score: any location that a reader opens -> a list of ids, and the image of each."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pandas as pd

from ensemble.core.errors import DataError
from ensemble.data import shards, storage
from ensemble.data.image_list import ImageEntry, ImageList, ids_that_may_repeat, read_list, write_list
from ensemble.data.readers import FileLoader, Item, OpenedImages, open_images, open_shards, open_table
from ensemble.data.storage import Location
from ensemble.data.tables import require_unique, stat_entry


@dataclass(frozen=True)
class Inputs:
    """Images to score, in the order of the input: their rows, and the images themselves.

    sha256: of ids, paths, sizes and times of change (of objects in a store, their ETags), in order;
    where Parquet files or tars hold the images, of ids and those files' sizes, times of change
    and rows, not of the images' bytes.
    loader: the rows [start, stop), start, stop -> their images, streamed. That of files can be
    pickled, for other machines to read by.
    files: as of `OpenedImages`.
    note: what a user should be told, if anything: of tars or Parquet files among a folder's images.
    """

    rows: ImageList
    sha256: str
    loader: Callable[[Iterable[ImageEntry], int, int], Iterator[Item]]
    files: tuple[Path, ...] = ()
    note: str = ""

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """The images of the rows [start, stop), streamed."""
        return self.loader(read_list(self.rows, start, stop), start, stop)

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
    """List the images of a folder, a table with `id` or `path`, Parquet files with images, or tars: see `readers`.

    images: where those of a table lie. Each location may be a URL that `storage.parse_location` gave. With `spill`,
    a folder, the list is kept in a file there instead of in memory. Raises DataError for a missing input, no images,
    or ids missing, doubled or ambiguous.
    """
    path = spill / "rows.arrow" if spill else None
    opened = open_images(source, images)
    rows = write_list(opened.entries, path)
    note = shards.describe_skipped(source, opened.shards)
    if not rows.count and opened.shards:  # a folder of them
        files = shards.require_one_kind([storage.join(source, path) for path in opened.shards], str(source))
        opened, note = open_shards(files, source), ""
        rows = write_list(opened.entries, path)
    if not rows.count:
        raise DataError(f"{source} holds no images")
    return _inputs(rows, opened, source, note)


def _inputs(rows: ImageList, opened: OpenedImages, source: Location, note: str = "") -> Inputs:
    if not opened.distinct:
        require_unique(ids_that_may_repeat(rows), source, "; each image is scored once")
    return Inputs(rows, opened.loader.sha256(rows.sha256), opened.loader, opened.files, note)


def inputs_from_table(frame: pd.DataFrame, table: Path, images: Location | None) -> Inputs:
    """Ids and files of a table's rows, in memory; `table` is where relative paths count from."""
    opened = open_table(iter([frame]), table, images)
    return _inputs(write_list(opened.entries, None), opened, table)


def inputs_from_files(names: Sequence[str], paths: Sequence[Path]) -> Inputs:
    """Ids and the file of each, in memory."""
    loader = FileLoader(Path())
    rows = write_list((stat_entry(key, loader.root, str(path)) for key, path in zip(names, paths, strict=True)), None)
    return Inputs(rows, loader.sha256(rows.sha256), loader)


def inputs_from_open_files(files: Sequence[tuple[str, BinaryIO]]) -> Inputs:
    """Images by name, each read when its turn comes. Names may repeat; sha256 is of them alone."""
    rows = write_list((ImageEntry(name, name) for name, _ in files), None)

    def loader(_: Iterable[ImageEntry], start: int, stop: int) -> Iterator[Item]:
        for name, file in files[start:stop]:
            yield Item(name, name, file.read())

    return Inputs(rows, rows.sha256, loader)
