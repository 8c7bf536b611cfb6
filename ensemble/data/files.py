"""Image files on disk: listing folders, and finding the file that an id means."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ensemble.core.errors import DataError, LimitedList, join_limited

IMAGE_SUFFIXES = frozenset(
    (".jpg .jpeg .jpe .jfif .mpo .png .webp .gif .bmp .tif .tiff .avif .ppm .pgm .pbm .pnm").split()
)
# Images that would be skipped: refused aloud, since a class may consist of nothing else.
OTHER_IMAGE_SUFFIXES = frozenset(
    (".heic .heif .jxl .jp2 .j2k .svg .psd .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .ico .exr .hdr .tga .eps").split()
)
# JPEG, PNG, GIF, TIFF; WebP is a RIFF
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")
PART = 4096  # texts at a time as Python objects


def expand_user(name: str) -> Path:
    """The path that `name` is, with ~ as the home folder; ~USER of a user who is not here stays as it is."""
    return Path(os.path.expanduser(name))  # Path.expanduser raises for such a user


def as_utf8(name: str | os.PathLike[str]) -> str:
    """A name as UTF-8, which its bytes need not be: others stand as U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


def list_images(folder: Path, skipped: Counter[str] | None = None) -> list[str]:
    """`walk_images` as a list."""
    return list(walk_images(folder, skipped))


def walk_images(
    folder: Path, skipped: Counter[str] | None = None, passed: Callable[[str], object] | None = None
) -> Iterator[str]:
    """POSIX paths of all images below `folder`, relative to it, sorted; hidden files are left out.

    Holds the names of one folder and of those above it. Raises DataError, at the end, if there
    are images of a kind that cannot be read: leaving them out silently would change the data.
    With `skipped` they are counted there by suffix instead. Other files (a CSV, a text) are
    passed over; `passed` is called with the path of each.
    """
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    unknown, unreadable = Counter[str](), LimitedList()
    for path in _walk(folder):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            if path == path.encode(errors="replace").decode():
                yield path
            else:
                unreadable.add(ascii(path))
        elif suffix in OTHER_IMAGE_SUFFIXES or _starts_like_an_image(folder / path):
            unknown[suffix or "without suffix"] += 1
        elif passed:
            passed(path)
    if skipped is not None:
        skipped.update(unknown)
    elif unknown:
        kinds = join_limited(f"{count} {suffix}" for suffix, count in sorted(unknown.items()))
        raise DataError(f"{folder}: images that cannot be read would be skipped ({kinds}); convert or move them")
    if unreadable.count:
        raise DataError(f"{folder}: file names that are not UTF-8: {unreadable}; rename them")


def _starts_like_an_image(file: Path) -> bool:
    """Whether a file of another or no suffix is an image all the same, by its first bytes."""
    try:
        with file.open("rb") as opened:
            start = opened.read(12)
    except OSError:
        return False
    return start.startswith(IMAGE_STARTS) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def _walk(folder: Path) -> Iterator[str]:
    """All files below, in the order of their sorted paths."""
    open_folders = [("", iter(_names(folder)))]
    while open_folders:
        parent, names = open_folders[-1]
        name = next(names, None)
        if name is None:
            open_folders.pop()
        elif name.endswith("/"):
            open_folders.append((parent + name, iter(_names(folder / parent / name))))
        else:
            yield parent + name


def _names(folder: Path) -> list[str]:
    """What lies in a folder, sorted; names of folders end in /, since so they stand in paths."""
    try:
        with os.scandir(folder) as entries:
            kinds = ((entry, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
            return sorted(
                entry.name + "/" * is_folder
                for entry, is_folder in kinds
                if (not _loops(folder, entry.name) if is_folder else not _is_special(entry))
            )
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from None


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_special(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a pipe, a socket or a device, which may never end; a link to nothing is none."""
    try:
        return not entry.is_file() and os.path.exists(entry.path)
    except OSError:
        return False


def _loops(parent: Path, name: str) -> bool:
    """Whether a link leads back to a folder that it lies in, and so round and round."""
    link = parent / name
    return link.is_symlink() and parent.resolve().is_relative_to(link.resolve())


def resolve_ids(ids: Sequence[str], folder: Path) -> list[str]:
    """`find_files` as a list."""
    return list(find_files(compact(ids), folder))


def compact(texts: Iterable[str]) -> pa.LargeBinaryArray:
    """Many texts in little memory: 8 bytes each, and their UTF-8."""
    texts = iter(texts)
    parts = []
    while part := [text.encode(errors="surrogatepass") for text in islice(texts, PART)]:
        parts.append(pa.array(part, pa.large_binary()))
    return pa.chunked_array(parts, pa.large_binary()).combine_chunks()


def texts(array: pa.LargeBinaryArray) -> Iterator[str]:
    """What `compact` was given, in order."""
    return map(_text, array)


def find_files(ids: pa.LargeBinaryArray, folder: Path | str, images: Iterable[str] | None = None) -> Iterator[str]:
    """For each id the one image below `folder` that it names, as a relative POSIX path; `images` are known paths.

    An id is a relative path or a file name, each with or without its suffix; the fuller
    reading wins. Raises DataError listing ids that name no file, or more than one.
    """
    paths = compact(walk_images(Path(folder)) if images is None else images)
    found, other = np.full((2, len(ids)), -1, dtype=np.int32)
    for keys in _readings(paths):
        matches = pc.index_in(ids, value_set=keys).fill_null(-1).to_numpy()
        new = (found < 0) & (matches >= 0)
        found[new] = matches[new]
        other[new] = _second(keys)[matches[new]]
        if (found >= 0).all():
            break
    missing, ambiguous = np.flatnonzero(found < 0), np.flatnonzero(other >= 0)
    if len(missing):
        raise DataError(
            f"{len(missing)} of {len(ids)} ids have no image in {folder}: "
            f"{join_limited(repr(_text(ids[row])) for row in missing)}; name their folder with --images"
        )
    if len(ambiguous):
        told = (f"{_text(ids[row])!r} ({_text(paths[found[row]])} and {_text(paths[other[row]])})" for row in ambiguous)
        raise DataError(
            f"ids that match more than one file in {folder}: {join_limited(told)}; write their suffix, or "
            "name a narrower folder with --images"
        )
    for start in range(0, len(ids), PART):
        yield from texts(paths.take(pa.array(found[start : start + PART])))


def _readings(paths: pa.LargeBinaryArray) -> Iterator[pa.LargeBinaryArray]:
    """What may name each path, the fullest first: itself, without suffix, its file name, that without suffix."""
    folders, suffix = r"(?s)^.*/", r"\.[^./]*$"
    yield paths
    for left_out in (suffix, folders, f"{folders}|{suffix}"):
        yield pc.replace_substring_regex(paths, left_out, "")


def _second(keys: pa.LargeBinaryArray) -> np.ndarray:
    """int32 [N]: for the first of several equal keys where the next is, -1 for all others."""
    first = pc.index_in(keys, value_set=keys).to_numpy()
    later = np.flatnonzero(first != np.arange(len(first)))[::-1]
    second = np.full(len(first), -1, dtype=np.int32)
    second[first[later]] = later
    return second


def _text(value: pa.LargeBinaryScalar) -> str:
    return value.as_py().decode(errors="surrogatepass")
