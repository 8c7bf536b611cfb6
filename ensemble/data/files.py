"""Image files below a folder, on disk or in a store, and the one that an id means."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ensemble.core.errors import DataError, LimitedList, join_limited
from ensemble.data.image_list import BATCH_ROWS, as_bytes, as_text
from ensemble.data.storage import ListedFile, Location, walk

IMAGE_SUFFIXES = frozenset(
    (".jpg .jpeg .jpe .jfif .mpo .png .webp .gif .bmp .tif .tiff .avif .ppm .pgm .pbm .pnm").split()
)
# Images that would be skipped: refused aloud, since a class may consist of nothing else.
OTHER_IMAGE_SUFFIXES = frozenset(
    (".heic .heif .jxl .jp2 .j2k .svg .psd .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .ico .exr .hdr .tga .eps").split()
)
# JPEG, PNG, GIF, TIFF; WebP is a RIFF
IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")


def expand_user(name: str) -> Path:
    """The path that `name` is, with ~ as the home folder; ~USER of a user who is not here stays as it is."""
    return Path(os.path.expanduser(name))  # Path.expanduser raises for such a user


def as_utf8(name: str | os.PathLike[str]) -> str:
    """A name as UTF-8, which its bytes need not be: others stand as U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


def list_images(folder: Path, skipped: Counter[str] | None = None) -> list[str]:
    """The paths of `walk_images`, of a folder on disk."""
    return [file.path for file in walk_images(folder, skipped)]


def walk_images(
    folder: Location, skipped: Counter[str] | None = None, other_file: Callable[[str], object] = lambda path: None
) -> Iterator[ListedFile]:
    """All images below `folder`, sorted by their relative POSIX paths; hidden files are left out.

    Holds the names of one folder and of those above it. Raises DataError, at the end, if there
    are images of a kind that cannot be read: leaving them out silently would change the data.
    With `skipped` they are counted there by suffix instead. Other files (a CSV, a text) are
    skipped; `other_file` is called with the path of each.
    """
    if isinstance(folder, Path) and not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    unknown, unreadable = Counter[str](), LimitedList()
    for file in walk(folder):
        suffix = os.path.splitext(file.path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            if file.path == file.path.encode(errors="replace").decode():
                yield file
            else:
                unreadable.add(ascii(file.path))
        elif suffix in OTHER_IMAGE_SUFFIXES or (isinstance(folder, Path) and _has_image_magic(folder / file.path)):
            unknown[suffix or "without suffix"] += 1
        else:
            other_file(file.path)
    if skipped is not None:
        skipped.update(unknown)
    elif unknown:
        kinds = join_limited(f"{count} {suffix}" for suffix, count in sorted(unknown.items()))
        raise DataError(f"{folder}: images that cannot be read would be skipped ({kinds}); convert or move them")
    if unreadable.count:
        raise DataError(f"{folder}: file names that are not UTF-8: {unreadable}; rename them")


def _has_image_magic(file: Path) -> bool:
    """Whether a file of another or no suffix is an image all the same, by its first bytes."""
    try:
        with file.open("rb") as opened:
            start = opened.read(12)
    except OSError:
        return False
    return start.startswith(IMAGE_MAGIC) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def compact(texts: Iterable[str]) -> pa.LargeBinaryArray:
    """Many texts in little memory: 8 bytes each, and their UTF-8."""
    texts = iter(texts)
    parts = []
    while part := [as_bytes(text) for text in islice(texts, BATCH_ROWS)]:
        parts.append(pa.array(part, pa.large_binary()))
    return pa.chunked_array(parts, pa.large_binary()).combine_chunks()


def texts(array: pa.LargeBinaryArray) -> Iterator[str]:
    """What `compact` was given, in order."""
    return (as_text(value.as_py()) for value in array)


def find_files(ids: pa.LargeBinaryArray, folder: Location) -> Iterator[str]:
    """For each id the one image below `folder` that it names, as a relative POSIX path.

    An id is a relative path or a file name, each with or without its suffix; the fuller
    reading wins. Raises DataError listing ids that name no file, or more than one.
    """
    paths = compact(file.path for file in walk_images(folder))
    found, other = np.full((2, len(ids)), -1, dtype=np.int32)
    folders, suffix = r"(?s)^.*/", r"\.[^./]*$"
    for left_out in (None, suffix, folders, f"{folders}|{suffix}"):  # the fullest reading first
        keys = pc.replace_substring_regex(paths, left_out, "") if left_out else paths
        matches = pc.index_in(ids, value_set=keys).fill_null(-1).to_numpy()
        new = (found < 0) & (matches >= 0)
        found[new] = matches[new]
        first = pc.index_in(keys, value_set=keys).to_numpy()
        later = np.flatnonzero(first != np.arange(len(first)))[::-1]
        following = np.full(len(first), -1, dtype=np.int32)  # where the second of several equal keys is, at the first
        following[first[later]] = later
        other[new] = following[matches[new]]
        if (found >= 0).all():
            break
    missing, ambiguous = np.flatnonzero(found < 0), np.flatnonzero(other >= 0)
    if len(missing):
        raise DataError(
            f"{len(missing)} of {len(ids)} ids have no image in {folder}: "
            f"{join_limited(repr(as_text(ids[row].as_py())) for row in missing)}; name their folder with --images"
        )
    if len(ambiguous):
        columns = (ids.take(ambiguous), paths.take(found[ambiguous]), paths.take(other[ambiguous]))
        pairs = (f"{key!r} ({path} and {second})" for key, path, second in zip(*map(texts, columns), strict=True))
        raise DataError(
            f"ids that match more than one file in {folder}: {join_limited(pairs)}; write their suffix, or "
            "name a narrower folder with --images"
        )
    for start in range(0, len(ids), BATCH_ROWS):
        yield from texts(paths.take(pa.array(found[start : start + BATCH_ROWS])))
