"""Several files as one list: which are meant, and the images inside tars in webdataset's layout."""

import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from glob import glob, has_magic
from itertools import accumulate, product
from pathlib import Path
from posixpath import normpath
from threading import Event
from typing import NamedTuple

from ensemble.core.errors import DataError, LimitedList, escape_control, join_limited
from ensemble.core.parallel import ordered_map
from ensemble.data import storage
from ensemble.data.archives import DamagedArchiveError, Tally, list_tar
from ensemble.data.byte_ranges import ByteRange
from ensemble.data.files import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES
from ensemble.data.image_list import ImageEntry
from ensemble.data.storage import Location

MOST = 1_000_000  # files that braces may name
COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how gzip, bzip2, xz and zstd begin
_BRACES = re.compile(r"\{(?:([0-9]{1,18})\.\.([0-9]{1,18})|([^{}]*,[^{}]*))\}")


class Shard(NamedTuple):
    """One file of several: its bytes and version, and how many images it holds."""

    place: Location
    size: int
    version: int
    rows: int


def find(source: Location) -> list[Location]:
    """The tars that are meant by one, or the files that a pattern with * ? [ ] or {000..099} means; else none.

    They are in the order of their names. DataError for a pattern that means none, or other files.
    """
    text = str(source)
    if (isinstance(source, Path) or has_magic(text)) and storage.exists(source):  # its name may look like a pattern
        return [] if storage.is_folder(source) or kind(source) == ".parquet" else _of_one_kind([source], text)
    if not (has_magic(text) or _BRACES.search(text)):
        return _of_one_kind([source], text) if kind(source) == ".tar" else []
    found = [place for each in expand(text) for place in (_matching(each, source) if has_magic(each) else [each])]
    if not found:
        raise DataError(f"no file matches {text}")
    wrap = Path if isinstance(source, Path) else str
    return _of_one_kind([wrap(each) for each in sorted(set(found))], text)


def below(folder: Location, paths: Sequence[str]) -> list[Location]:
    """The tars, or the Parquet files, at these paths below a folder without images; DataError if there are both."""
    return _of_one_kind([storage.join(folder, path) for path in paths], str(folder)) if paths else []


def passed_over(folder: Location, paths: Sequence[str]) -> str:
    """What to say of tars and Parquet files at these paths below a folder of images; empty if there are none."""
    if not paths:
        return ""
    like = storage.join(folder, os.path.join(os.path.dirname(paths[0]), f"*{kind(paths[0])}"))
    return escape_control(
        f"{folder} is read as a folder of images; passed over in it: {join_limited(map(repr, paths))}. "
        f"For the images inside of such files name them: '{like}'"
    )


def expand(pattern: str) -> list[str]:
    """Braces as shells and webdataset write them: x{08..11} is x08 x09 x10 x11, x{a,b} is xa xb."""
    parts, choices, at, count = [], [], 0, 1
    for match in _BRACES.finditer(pattern):
        parts.append([pattern[at : match.start()]])
        first, last, names = match.groups()
        if names is None:
            padded = any(len(number) > 1 and number[0] == "0" for number in (first, last))
            width = max(len(first), len(last)) if padded else 0
            count *= abs(int(last) - int(first)) + 1
            if count > MOST:
                break
            low, high = sorted((int(first), int(last)))
            choices = [f"{number:0{width}}" for number in range(low, high + 1)]
        else:
            choices = names.split(",")
            count *= len(choices)
        parts.append(choices)
        at = match.end()
    if count > MOST:
        raise DataError(f"{pattern} names more than {MOST:,} files; name a folder in their place")
    return ["".join(chosen) for chosen in product(*parts, [pattern[at:]])]


def _matching(pattern: str, source: Location) -> list[str]:
    if isinstance(source, Path):
        return [path for path in glob(pattern, recursive=True) if os.path.isfile(path)]
    scheme = pattern.partition("://")[0]
    with storage.translate_errors(pattern):
        return [f"{scheme}://{path.lstrip('/')}" for path in storage.filesystem(pattern).glob(pattern)]


def kind(place: Location) -> str:
    """.tar or .parquet, by a file's name, also for a tar that is compressed; empty for other files."""
    name = storage.name(place).lower()
    return ".tar" if name.endswith((".tar", *COMPRESSED)) else ".parquet" if name.endswith(".parquet") else ""


def is_parquet(files: Sequence[Location]) -> bool:
    """Whether files of one kind are Parquet files; else they are tars."""
    return kind(files[0]) == ".parquet"


def _of_one_kind(files: list[Location], given: str) -> list[Location]:
    kinds = {kind(file) for file in files}
    if kinds == {""} and len(files) == 1:
        return []  # a table
    if len(kinds) > 1 or "" in kinds:
        others = join_limited(
            repr(storage.name(file)) for file in files if kind(file) != kind(files[0]) or not kind(file)
        )
        raise DataError(
            f"{given}: several files are read as one list if all are .tar or all are .parquet, not {others}"
        )
    if packed := [file for file in files if storage.name(file).lower().endswith(COMPRESSED)]:
        raise _compressed(packed[0])
    return files


def _compressed(file: Location) -> DataError:
    return DataError(f"{file}: a compressed tar cannot be read from the middle, to go on; unpack it to a .tar first")


def tar_rows(files: Sequence[Location], shards: list[Shard]) -> Iterator[ImageEntry]:
    """The images of tars in their order; `shards` gets each file's facts once its rows are through.

    An id is a member's path without its suffix. Of members only headers are looked at; of an
    object in a store that takes reading most of it, several at a time. DataError for a tar that
    is damaged, or holds images that would be left out.
    """
    stop = Event()
    if len(files) == 1 or isinstance(files[0], Path):
        listings: Iterable[tuple[Shard, Iterable[ImageEntry]]] = (_lazily(file, stop) for file in files)
    else:
        listings = ordered_map(lambda file: _listed(file, stop), files, storage.AHEAD, storage.AHEAD, stop)
    for shard, rows in listings:
        count = 0
        for count, row in enumerate(rows, 1):  # noqa: B007  # counts what was given out
            yield row
        shards.append(shard._replace(rows=count))


def _lazily(file: Location, stop: Event) -> tuple[Shard, Iterator[ImageEntry]]:
    try:
        size, version = storage.facts(file)
    except OSError as error:
        raise DataError(f"no tar at {file} ({error.strerror or 'not found'})") from None
    return Shard(file, size, version, 0), _rows(file, size, stop)


def _listed(file: Location, stop: Event) -> tuple[Shard, list[ImageEntry]]:
    shard, rows = _lazily(file, stop)
    return shard, list(rows)


def _rows(file: Location, size: int, stop: Event) -> Iterator[ImageEntry]:
    tally, unknown, unreadable = Tally(), Counter[str](), LimitedList()

    def wanted(name: str) -> bool:
        if stop.is_set():
            raise CancelledError
        suffix = os.path.splitext(name)[1].lower()
        if any(part.startswith(".") for part in normpath(name).split("/") if part != ".."):
            return False
        unknown[suffix] += suffix in OTHER_IMAGE_SUFFIXES
        return suffix in IMAGE_SUFFIXES

    try:
        with storage.open_file(file, size) as opened:
            if opened.read(6).startswith(_PACKED):
                raise _compressed(file)
            opened.seek(0)
            for name, offset, length in list_tar(opened, size, wanted, tally):
                path = normpath(name)
                if path != path.encode(errors="replace").decode():
                    unreadable.add(ascii(path))
                yield ImageEntry(os.path.splitext(path)[0], f"{file}:{path}", length, offset=offset)
    except DamagedArchiveError as error:
        raise DataError(f"{file} is not a whole tar: {error}; fetch or write it again") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    if lost := [*tally.refusals(), *(f"{count} {suffix}" for suffix, count in sorted((+unknown).items()))]:
        raise DataError(f"{file}: images would be left out ({join_limited(lost)}); write it again without them")
    if unreadable.count:
        raise DataError(f"{file}: names that are not UTF-8: {unreadable}; write it again with others")


def stretches(counts: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Rows [start, stop) of files with so many rows each: (file, first, last + 1), counted within the file."""
    ends = list(accumulate(counts))
    file = bisect_right(ends, start)
    while start < stop and file < len(ends):
        begin = ends[file] - counts[file]
        last = min(stop, ends[file])
        if start < last:
            yield file, start - begin, last - begin
        start, file = last, file + 1


def spans(
    shards: Sequence[Shard], rows: Iterable[ImageEntry], start: int, stop: int
) -> Iterator[tuple[ImageEntry, ByteRange]]:
    """Rows [start, stop) of tars with where their bytes lie; DataError as a tar is come to that has changed."""
    given = iter(rows)
    for file, first, last in stretches([shard.rows for shard in shards], start, stop):
        shard = shards[file]
        storage.check(shard.place, (shard.size, shard.version))
        for _, row in zip(range(first, last), given, strict=False):
            yield row, ByteRange(shard.place, row.offset, row.size)
