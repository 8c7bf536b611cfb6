"""Byte ranges of files and objects, fetched ahead of who reads them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ensemble.core.parallel import ordered_map
from ensemble.data import storage
from ensemble.data.storage import Location


@dataclass(frozen=True)
class ByteRange:
    """Bytes [offset, offset + size) of a file, read when asked for.

    With offset 0 it is all of a file, which is not there if size is -1.
    """

    location: Location
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes; FileNotFoundError for an object that is gone, DataError for one that has changed."""
        whole = not self.offset  # what lies in an archive has a header before it
        if self.size < 0:
            raise FileNotFoundError(self.location)
        if not self.size:
            return b""
        try:  # one byte more, to see that a file has not grown
            data = storage.read_range(self.location, self.offset, self.size + whole)
        except FileNotFoundError:
            if whole:
                raise
            raise storage.changed(self.location) from None
        if len(data) != self.size:
            raise storage.changed(self.location)
        return data


def fetch_ahead(groups: Iterable[list[ByteRange]]) -> Iterator[ByteRange | bytes]:
    """The bytes of each range, CONCURRENT_REQUESTS in flight; a group, of one file and close together, is one request.

    A range that is large, or gone, stays as it is: the decoder reads it, and reports the error.
    """

    def fetch(group: list[ByteRange]) -> list[ByteRange] | list[bytes]:
        first, last = group[0], group[-1]
        if last.offset + last.size - first.offset > storage.BLOCK_BYTES:
            return list(group)
        if len(group) == 1:
            try:
                return [first.read()]
            except FileNotFoundError:
                return list(group)
        data = ByteRange(first.location, first.offset, last.offset + last.size - first.offset).read()
        starts = [each.offset - first.offset for each in group]
        return [data[start : start + each.size] for start, each in zip(starts, group, strict=True)]

    for group in ordered_map(fetch, groups, storage.CONCURRENT_REQUESTS, storage.CONCURRENT_REQUESTS):
        yield from group


def group_adjacent(ranges: Iterable[ByteRange]) -> Iterator[list[ByteRange]]:
    """Ranges that follow on each other in one file, up to BLOCK_BYTES of it at a time."""
    group: list[ByteRange] = []
    for each in ranges:
        if group and (
            each.location != group[0].location
            or each.offset < group[-1].offset + group[-1].size
            or each.offset + each.size > group[0].offset + storage.BLOCK_BYTES
        ):
            yield group
            group = []
        group.append(each)
    if group:
        yield group
