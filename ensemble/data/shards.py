"""Several files as one list: which are meant, and the images inside tars in webdataset's layout."""

import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from glob import has_magic
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
from ensemble.data.storage import FileStat, Location

MAX_FILES = 1_000_000  # files that braces may name
COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how gzip, bzip2, xz and zstd begin
_BRACES = re.compile(r"\{(?:([0-9]{1,18})\.\.([0-9]{1,18})|([^{}]*,[^{}]*))\}")


class Shard(NamedTuple):
    """One tar of several: its bytes and version, and how many images it holds."""

    location: Location
    stat: FileStat
    images: int


def names_shards(location: Location) -> bool:
    """Whether it is a tar, or a pattern with * ? [ ] or {000..099} for several files."""
    if _is_pattern(location):
        return True
    may_be_folder = isinstance(location, Path) or has_magic(location)  # of a store's tar nothing is requested
    return kind(location) == ".tar" and not (may_be_folder and storage.is_dir(location))


def find_shards(location: Location) -> list[Location]:
    """The tar, or the files that a pattern means, in the order of their names; `names_shards` has said that it is one.

    DataError for a pattern that means none, or other files.
    """
    text = str(location)
    if not _is_pattern(location):
        return require_one_kind([location], text)
    wrap = Path if isinstance(location, Path) else str
    found: set[Location] = set()
    for pattern in expand(text):
        found.update(storage.find_matches(wrap(pattern)) if has_magic(pattern) else [wrap(pattern)])
    if not found:
        raise DataError(f"no file matches {text}")
    return require_one_kind(sorted(found, key=str), text)


def _is_pattern(location: Location) -> bool:
    """Whether it has wildcards or braces, and is not itself a file or folder whose name looks so."""
    text = str(location)
    if not (has_magic(text) or _BRACES.search(text)):
        return False
    return not ((isinstance(location, Path) or has_magic(text)) and storage.exists(location))


def describe_skipped(folder: Location, paths: Sequence[str]) -> str:
    """What to tell the user of tars and Parquet files at these paths below a folder of images; empty for none."""
    if not paths:
        return ""
    like = storage.join(folder, os.path.join(os.path.dirname(paths[0]), f"*{kind(paths[0])}"))
    return escape_control(
        f"{folder} is read as a folder of images; skipped in it: {join_limited(map(repr, paths))}. "
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
            if count > MAX_FILES:
                break
            low, high = sorted((int(first), int(last)))
            choices = [f"{number:0{width}}" for number in range(low, high + 1)]
        else:
            choices = names.split(",")
            count *= len(choices)
        parts.append(choices)
        at = match.end()
    if count > MAX_FILES:
        raise DataError(f"{pattern} names more than {MAX_FILES:,} files; name a folder in their place")
    return ["".join(chosen) for chosen in product(*parts, [pattern[at:]])]


def kind(location: Location) -> str:
    """.tar or .parquet, by a file's name, also for a tar that is compressed; empty for other files."""
    name = storage.name(location).lower()
    return ".tar" if name.endswith((".tar", *COMPRESSED)) else ".parquet" if name.endswith(".parquet") else ""


def require_one_kind(files: list[Location], given: str) -> list[Location]:
    """The files, if all are tars or all are Parquet files; else DataError, which calls them `given`."""
    kinds = {kind(file) for file in files}
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


def tar_entries(files: Sequence[Location], shards: list[Shard]) -> Iterator[ImageEntry]:
    """The images of tars in their order; each file is added to `shards` once its entries are through.

    An id is a member's path without its suffix. Of members only headers are looked at; of an
    object in a store that takes reading most of it, several at a time. DataError for a tar that
    is damaged, or holds images that would be left out.
    """
    stop, requests = Event(), storage.CONCURRENT_REQUESTS
    lazily = len(files) == 1 or isinstance(files[0], Path)

    def listing(file: Location) -> tuple[FileStat, Iterable[ImageEntry]]:
        try:
            stat = storage.stat(file)
        except OSError as error:
            raise DataError(f"no tar at {file} ({error.strerror or 'not found'})") from None
        entries = _entries(file, stat.size, stop)
        return stat, entries if lazily else list(entries)

    listings = map(listing, files) if lazily else ordered_map(listing, files, requests, requests, stop)
    for file, (stat, entries) in zip(files, listings, strict=True):
        count = 0
        for count, entry in enumerate(entries, 1):  # noqa: B007  # counts what was given out
            yield entry
        shards.append(Shard(file, stat, count))


def _entries(file: Location, size: int, stop: Event) -> Iterator[ImageEntry]:
    tally, unknown, unreadable = Tally(), Counter[str](), LimitedList()

    def is_image(name: str) -> bool:
        if stop.is_set():
            raise CancelledError
        suffix = os.path.splitext(name)[1].lower()
        if any(part.startswith(".") for part in normpath(name).split("/") if part != ".."):
            return False
        unknown[suffix] += suffix in OTHER_IMAGE_SUFFIXES
        return suffix in IMAGE_SUFFIXES

    try:
        with storage.open_file(file, size) as opened:
            if opened.read(6).startswith(_COMPRESSED_MAGIC):
                raise _compressed(file)
            opened.seek(0)
            for name, offset, length in list_tar(opened, size, is_image, tally):
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


def file_ranges(counts: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Rows [start, stop) of files with so many rows each: (file, first, last + 1), counted within the file."""
    ends = list(accumulate(counts))
    file = bisect_right(ends, start)
    while start < stop and file < len(ends):
        begin = ends[file] - counts[file]
        last = min(stop, ends[file])
        if start < last:
            yield file, start - begin, last - begin
        start, file = last, file + 1


def locate_bytes(
    shards: Sequence[Shard], entries: Iterable[ImageEntry], start: int, stop: int
) -> Iterator[tuple[ImageEntry, ByteRange]]:
    """The entries [start, stop) of tars with where their bytes lie; DataError as a tar that has changed is reached."""
    entries = iter(entries)
    for file, first, last in file_ranges([shard.images for shard in shards], start, stop):
        shard = shards[file]
        try:
            same = storage.stat(shard.location) == shard.stat
        except OSError as error:
            why = error.strerror or "not found"
            raise DataError(f"{shard.location} is gone ({why}); run the command on what is there") from None
        if not same:
            raise storage.changed(shard.location)
        for _, entry in zip(range(first, last), entries, strict=False):
            yield entry, ByteRange(shard.location, entry.offset, entry.size)
