"""The formats that images are read from: tars and patterns, Parquet files, tables, folders."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import cast

import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import DataError, join_limited
from ensemble.data import byte_ranges, parquet, shards, storage, tables
from ensemble.data.byte_ranges import ByteRange
from ensemble.data.files import walk_images
from ensemble.data.image_list import ImageEntry
from ensemble.data.parquet import ParquetVersion
from ensemble.data.storage import Location, join
from ensemble.images.decode import ImageSource


@dataclass(frozen=True)
class Item:
    """One image to score. path: what a list of errors calls it. source: its file, its bytes, or where they lie."""

    id: str
    path: str
    source: ImageSource


# ---- loaders: list entries -> their images. They can be pickled, for other machines.
# sha256 is the hash of what is read: of the list's own hash, and of what that does not tell.


@dataclass(frozen=True)
class FileLoader:
    """Images that are files below a root, on disk or in a store."""

    root: Location

    def __call__(self, entries: Iterable[ImageEntry], start: int, stop: int) -> Iterator[Item]:
        """Paths of files on disk; bytes of those in a store."""
        located = ((entry, join(self.root, entry.path)) for entry in entries)
        for remote, part in groupby(located, lambda each: isinstance(each[1], str)):
            if remote:
                ranges = ((entry._replace(path=str(url)), ByteRange(url, 0, entry.size)) for entry, url in part)
                yield from _fetched(ranges, lambda each: ([one] for one in each))
            else:
                yield from (Item(entry.id, str(path), cast(Path, path)) for entry, path in part)

    def sha256(self, entries: str) -> str:
        """Hash of root and entries, which hold sizes and times."""
        return artifacts.json_sha256([ascii(self.root), entries])


@dataclass(frozen=True)
class ParquetLoader:
    """Images in a column of Parquet files."""

    files: list[tuple[Location, ParquetVersion]]

    def __call__(self, entries: Iterable[ImageEntry], start: int, stop: int) -> Iterator[Item]:
        """Encoded bytes; DataError at the first of a file that has changed."""
        entries = iter(entries)
        for number, first, last in shards.file_ranges(
            [sum(version.group_rows) for _, version in self.files], start, stop
        ):
            file, version = self.files[number]
            if parquet.read_version(file) != version:
                raise storage.changed(file)
            for data, entry in zip(parquet.image_bytes(file, first, last), entries, strict=False):
                yield Item(entry.id, entry.path, data)

    def sha256(self, entries: str) -> str:
        """Hash of ids and of the files' versions, not of the images' bytes."""
        versions = [version for _, version in self.files]
        return artifacts.json_sha256([entries, versions if len(versions) > 1 else versions[0]])


@dataclass(frozen=True)
class TarLoader:
    """Images in tars, which are full once the entries have been read."""

    shards: list[shards.Shard]

    def __call__(self, entries: Iterable[ImageEntry], start: int, stop: int) -> Iterator[Item]:
        """Byte ranges of tars on disk; bytes of those in a store."""
        located = shards.locate_bytes(self.shards, entries, start, stop)
        if isinstance(self.shards[0].location, str):
            return _fetched(located, byte_ranges.group_adjacent)
        return (Item(entry.id, entry.path, each) for entry, each in located)

    def sha256(self, entries: str) -> str:
        """Hash of ids, offsets and the tars' versions, not of the images' bytes."""
        return artifacts.json_sha256([entries, [shard.stat for shard in self.shards]])


def _fetched(
    located: Iterable[tuple[ImageEntry, ByteRange]], group: Callable[[Iterable[ByteRange]], Iterable[list[ByteRange]]]
) -> Iterator[Item]:
    """Images of a store, their bytes fetched ahead of who reads them."""
    waiting: deque[ImageEntry] = deque()

    def ranges() -> Iterator[ByteRange]:
        for entry, each in located:
            waiting.append(entry)
            yield each

    for source in byte_ranges.fetch_ahead(group(ranges())):
        entry = waiting.popleft()
        yield Item(entry.id, entry.path, source)


# ---- formats


@dataclass(frozen=True)
class OpenedImages:
    """A source of images, opened.

    entries: of all images, in order; read once. loader: their images, once the entries are read.
    files: the folder or the files that are read from, without which no image can be; none for a
    table, whose images may lie anywhere, and for a store.
    distinct: whether no id can be there twice. shards: paths of tars and Parquet files among a folder's images.
    """

    entries: Iterator[ImageEntry]
    loader: FileLoader | ParquetLoader | TarLoader
    files: tuple[Path, ...] = ()
    distinct: bool = False
    shards: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Format:
    """A way in which images are stored. A new one is an entry of FORMATS, of which the first that matches is taken.

    open: location, and where the images of a table lie -> its images. names_files: whether it is such a table.
    """

    name: str
    matches: Callable[[Location], bool]
    open: Callable[[Location, Location | None], OpenedImages]
    names_files: bool = False


def find_format(location: Location) -> Format:
    """How a location is read; DataError for nothing there. Of a URL the name alone says it, but for a Parquet file."""
    for each in FORMATS:
        if each.matches(location):
            return each
    raise DataError(f"no input at {location}; give a CSV with a column id, or a folder of images")


def open_images(location: Location, images: Location | None = None) -> OpenedImages:
    """List the images at a location; `images`: where those of a table lie. DataError for what cannot be read."""
    found = find_format(location)
    if images is not None and not found.names_files:
        raise DataError(f"{location} has the images itself, none are looked for in {images}; leave out --images")
    return found.open(location, images)


def _is_table(location: Location) -> bool:
    return location.lower().endswith((".csv", ".parquet")) if isinstance(location, str) else os.path.isfile(location)


def _open_folder(folder: Location) -> OpenedImages:
    """Ids are relative POSIX paths. DataError, at the end of the entries, for images of kinds that cannot be read."""
    others: list[str] = []
    found = walk_images(folder, other_file=lambda path: others.append(path) if shards.kind(path) else None)
    if isinstance(folder, Path):
        entries = (tables.stat_entry(file.path, folder, file.path) for file in found)
    else:
        entries = (ImageEntry(file.path, *file) for file in found)
    return OpenedImages(entries, FileLoader(folder), _local([folder]), distinct=True, shards=others)


def open_table(batches: Iterator[pd.DataFrame], location: Location, images: Location | None) -> OpenedImages:
    """The images of a table; paths count from `location`, or from `images`, where ids are looked up."""
    entries, root, has_ids = tables.resolve_entries(batches, location, images)
    return OpenedImages(_require_ids(entries, location) if has_ids else entries, FileLoader(root))


def open_shards(files: Sequence[Location], location: Location) -> OpenedImages:
    """The images inside of tars, or of Parquet files; `location` is what errors call them."""
    if shards.kind(files[0]) != ".parquet":
        opened: list[shards.Shard] = []
        return OpenedImages(shards.tar_entries(files, opened), TarLoader(opened), _local(files))
    if others := [file for file in files if not parquet.holds_images(file)]:
        raise DataError(
            f"{location}: no column image in {join_limited(others)}; several files are read for their images"
        )
    return _open_parquet(files)


def _open_parquet(files: Sequence[Location]) -> OpenedImages:
    loader = ParquetLoader([(file, parquet.read_version(file)) for file in files])
    entries = chain.from_iterable(_require_ids(parquet.image_entries(file), file) for file in files)
    return OpenedImages(entries, loader, _local(files))


def _local(locations: Iterable[Location]) -> tuple[Path, ...]:
    return tuple(location for location in locations if isinstance(location, Path))


def _require_ids(entries: Iterator[ImageEntry], table: Location) -> Iterator[ImageEntry]:
    for number, entry in enumerate(entries, 1):
        if not entry.id:
            raise DataError(f"{table}: row {number} has no id; give every image one")
        yield entry


FORMATS = (
    Format("shards", shards.names_shards, lambda location, _: open_shards(shards.find_shards(location), location)),
    Format(
        "parquet",
        lambda location: _is_table(location) and shards.kind(location) == ".parquet" and parquet.holds_images(location),
        lambda location, _: _open_parquet([location]),
    ),
    Format(
        "table",
        _is_table,
        lambda location, images: open_table(tables.read_batches(location), location, images),
        names_files=True,
    ),
    Format("folder", lambda url: isinstance(url, str) or os.path.isdir(url), lambda folder, _: _open_folder(folder)),
)
