"""Image files on disk: listing folders, and finding the file that an id means."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from ensemble.errors import DataError, some

IMAGE_SUFFIXES = frozenset(
    (".jpg .jpeg .jpe .jfif .mpo .png .webp .gif .bmp .tif .tiff .avif .ppm .pgm .pbm .pnm").split()
)
# Images that would be skipped: refused aloud, since a class may consist of nothing else.
OTHER_IMAGE_SUFFIXES = frozenset(
    (".heic .heif .jxl .jp2 .j2k .svg .psd .raw .dng .cr2 .cr3 .nef .arw .orf .rw2 .ico .exr .hdr .tga .eps").split()
)
# JPEG, PNG, GIF, TIFF; WebP is a RIFF
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")


def list_images(folder: Path, skipped: Counter[str] | None = None) -> list[str]:
    """POSIX paths of all images below `folder`, relative to it, sorted; hidden files are left out.

    Raises DataError if it holds images of a kind that cannot be read: leaving them out
    silently would change the data. With `skipped` they are counted there by suffix instead.
    Other files (a CSV, a text) are passed over.
    """
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    found, unknown = [], Counter[str]()
    for path in _walk(folder):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            found.append(path)
        elif suffix in OTHER_IMAGE_SUFFIXES or _starts_like_an_image(folder / path):
            unknown[suffix or "without suffix"] += 1
    if skipped is not None:
        skipped.update(unknown)
    elif unknown:
        kinds = some(f"{count} {suffix}" for suffix, count in sorted(unknown.items()))
        raise DataError(f"{folder}: images that cannot be read would be skipped ({kinds}); convert or move them")
    if unreadable := [path for path in found if path != path.encode(errors="replace").decode()]:
        raise DataError(f"{folder}: file names that are not UTF-8: {some(map(ascii, unreadable))}; rename them")
    return sorted(found)


def _starts_like_an_image(file: Path) -> bool:
    """Whether a file of another or no suffix is an image all the same, by its first bytes."""
    try:
        with file.open("rb") as opened:
            start = opened.read(12)
    except OSError:
        return False
    return start.startswith(IMAGE_STARTS) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def _walk(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _loops(Path(parent), name))
        base = Path(parent).relative_to(folder)
        yield from ((base / name).as_posix() for name in names if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot read the folder {error.filename}: {error.strerror}")


def _loops(parent: Path, name: str) -> bool:
    """Whether a link leads back to a folder that it lies in, and so round and round."""
    link = parent / name
    return link.is_symlink() and parent.resolve().is_relative_to(link.resolve())


def resolve_ids(ids: Sequence[str], folder: Path) -> list[str]:
    """For each id the one image below `folder` that it names, as a relative POSIX path.

    An id is a relative path or a file name, each with or without its suffix; the fuller
    reading wins. Raises DataError listing ids that name no file, or more than one.
    """
    readings: list[dict[str, list[str]]] = [defaultdict(list) for _ in range(4)]
    for path in list_images(folder):
        stem = os.path.splitext(path)[0]
        keys = (path, stem, path.rpartition("/")[2], stem.rpartition("/")[2])
        for reading, key in zip(readings, keys, strict=True):
            reading[key].append(path)
    found, missing, ambiguous = [], [], []
    for key in ids:
        matches = next((reading[key] for reading in readings if key in reading), [])
        if not matches:
            missing.append(key)
        elif len(matches) > 1:
            ambiguous.append(f"{key!r} ({' and '.join(matches[:2])})")
        else:
            found.append(matches[0])
    if missing:
        raise DataError(
            f"{len(missing)} of {len(ids)} ids have no image in {folder}: {some(map(repr, missing))}; "
            "name their folder with --images"
        )
    if ambiguous:
        raise DataError(
            f"ids that match more than one file in {folder}: {some(ambiguous)}; write their suffix, or "
            "name a narrower folder with --images"
        )
    return found
