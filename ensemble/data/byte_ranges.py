"""Stretches of files and objects, fetched ahead of who reads them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ensemble.core.parallel import ordered_map
from ensemble.data import storage
from ensemble.data.storage import Location


@dataclass(frozen=True)
class ByteRange:
    """Bytes [offset, offset + size) of a place, read when asked for.

    With offset 0 it is all of a file, which is not there if size is -1.
    """

    place: Location
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes; FileNotFoundError for an object that is gone, DataError for one that has changed."""
        whole = not self.offset  # what lies in an archive has a header before it
        if self.size < 0:
            raise FileNotFoundError(self.place)
        if not self.size:
            return b""
        try:  # one byte more, to see that a file has not grown
            data = storage.read_range(self.place, self.offset, self.size + whole)
        except FileNotFoundError:
            if whole:
                raise
            raise storage.changed(self.place) from None
        if len(data) != self.size:
            raise storage.changed(self.place)
        return data


def fetched(groups: Iterable[list[ByteRange]]) -> Iterator[ByteRange | bytes]:
    """Spans of objects with their bytes, AHEAD requests in flight; each group, of one place and close together, is one.

    A span that is large, or gone, stays as it is: who decodes it reads it, and is told.
    """

    def fetch(group: list[ByteRange]) -> list[ByteRange] | list[bytes]:
        first, last = group[0], group[-1]
        if last.offset + last.size - first.offset > storage.BLOCK:
            return list(group)
        if len(group) == 1:
            try:
                return [first.read()]
            except FileNotFoundError:
                return list(group)
        data = ByteRange(first.place, first.offset, last.offset + last.size - first.offset).read()
        starts = [span.offset - first.offset for span in group]
        return [data[start : start + span.size] for start, span in zip(starts, group, strict=True)]

    for group in ordered_map(fetch, groups, storage.AHEAD, storage.AHEAD):
        yield from group


def neighbours(spans: Iterable[ByteRange]) -> Iterator[list[ByteRange]]:
    """Spans that follow on each other in one place, up to a BLOCK of it at a time."""
    group: list[ByteRange] = []
    for span in spans:
        if group and (
            span.place != group[0].place
            or span.offset < group[-1].offset + group[-1].size
            or span.offset + span.size > group[0].offset + storage.BLOCK
        ):
            yield group
            group = []
        group.append(span)
    if group:
        yield group
