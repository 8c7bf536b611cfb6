"""Archives that are not trusted: images out of a tar.gz stream or a ZIP, one at a time, in bounded memory.

Nothing here writes to disk, and no name of an archive becomes a path.
"""

import fnmatch
import gzip
import re
import stat
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import IO, Any, Self, cast

from ensemble.core.errors import DataError, error_line, join_limited

MAX_IMAGE_BYTES = 64 << 20
MAX_RATIO = 100  # unpacked to packed; photographs and PNGs stay below 3
RATIO_SLACK = 16 << 20  # unpacked bytes below which the ratio does not matter
MAX_HEADER_BYTES = 1 << 20
MAX_NAME = 1024
TOO_LARGE = f"over {MAX_IMAGE_BYTES >> 20} MiB"
_NAMED = 3
_KINDS_REFUSED = {"link": "that are links", "special": "that are devices, pipes or sparse files"}
# tarfile parses their numbers unguarded, and calls itself for each of many headers of one member
_FROM_DAMAGED_HEADERS = (ValueError, ArithmeticError, LookupError, RecursionError)


class DamagedArchiveError(DataError):
    """The bytes are not those of a whole archive."""


@dataclass
class Tally:
    """What was not taken: `refused` is hostile or broken, `passed` is of no use here; counts by reason."""

    refused: Counter[str] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def refuse(self, reason: str, name: str) -> None:
        """Count a member that is never written, and remember the first names."""
        self.refused[reason] += 1
        if len(self.names[reason]) < _NAMED:
            self.names[reason].append(ascii(name[:200]))

    def refusals(self) -> list[str]:
        """One line a reason: "2 with '..' in the path: 'a/../b', 'c/../d'"."""
        return [
            f"{count} {reason}: {', '.join(self.names[reason])}{' ...' if count > len(self.names[reason]) else ''}"
            for reason, count in sorted(self.refused.items())
        ]


def unsafe_reason(name: str) -> str | None:
    """Why a member's name must not be trusted, or None."""
    path = name.replace("\\", "/")
    if len(name) > MAX_NAME:
        return f"with a name over {MAX_NAME} characters"
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "with an absolute path"
    if ".." in path.split("/"):
        return "with '..' in the path"
    return None


def read_tar(stream: IO[bytes], wanted: Callable[[str], bool], tally: Tally) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the wanted files of a tar.gz stream, in its order, to its end or until the caller stops.

    Links, devices, sparse files, unsafe names and files over MAX_IMAGE_BYTES are refused and counted.
    Raises DamagedArchiveError, or DataError for a stream that expands more than MAX_RATIO-fold.
    """
    unpacked = _Bounded(stream)
    try:
        with tarfile.open(fileobj=cast(Any, unpacked), mode="r|", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else every header of a million files stays in memory
                fine = _is_fine(member.name, _tar_kind(member), member.size, wanted, tally)
                if fine and (file := tar.extractfile(member)):
                    yield member.name, file.read()
        while unpacked.read(1 << 20):
            pass  # the end of the stream holds its checksum
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, *_FROM_DAMAGED_HEADERS) as error:
        raise DamagedArchiveError(error_line(error)) from None


def _is_fine(name: str, kind: str, size: int, wanted: Callable[[str], bool], tally: Tally) -> bool:
    """Whether to read a member: a wanted file, not too large. What must not be trusted is counted as refused."""
    if kind == "folder" and not unsafe_reason(name):
        return False
    reason = unsafe_reason(name) or _KINDS_REFUSED.get(kind)
    if not reason:
        if not wanted(name):
            return False
        if size <= MAX_IMAGE_BYTES:
            return True
        reason = TOO_LARGE
    tally.refuse(reason, name)
    return False


def _tar_kind(member: tarfile.TarInfo) -> str:
    if member.isdir():
        return "folder"
    if member.issym() or member.islnk():
        return "link"
    return "file" if member.isreg() and not member.issparse() else "special"


def list_tar(file: IO[bytes], size: int, wanted: Callable[[str], bool], tally: Tally) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of the wanted files of a tar of `size` bytes, not compressed; their bytes are not read.

    Refuses what `read_tar` does, but for large files, and only of the wanted. Raises
    DamagedArchiveError, also for a tar without the zeros that end one: the rest may be lost.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # as in read_tar
                if member.size < 0:  # the next would lie before it, and so round and round
                    raise DamagedArchiveError(f"a member of {member.size} bytes")
                if wanted(member.name) and _is_fine(member.name, _tar_kind(member), 0, wanted, tally):
                    if member.offset_data + member.size > size:  # no int64 may hold it
                        raise DamagedArchiveError("unexpected end of data")
                    yield member.name, member.offset_data, member.size
            file.seek(tar.offset)
            if not file.read(1):
                raise DamagedArchiveError("it has no end, and may have been cut off")
    except (tarfile.TarError, EOFError, *_FROM_DAMAGED_HEADERS) as error:
        raise DamagedArchiveError(error_line(error)) from None


class _Bounded:
    """Reads a gzip stream, and stops when it expands beyond all photographs."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._in = self._out = 0
        self._gzip = gzip.GzipFile(fileobj=cast(Any, SimpleNamespace(read=self._read_packed)), mode="rb")

    def _read_packed(self, size: int = -1) -> bytes:
        data = self._packed.read(size)
        self._in += len(data)
        return data

    def read(self, size: int = -1, /) -> bytes:
        data = self._gzip.read(size)
        self._out += len(data)
        if self._out > RATIO_SLACK + MAX_RATIO * self._in:
            raise DataError(f"an archive that expands more than {MAX_RATIO}-fold is refused as a bomb")
        return data


class _Member(tarfile.TarInfo):
    """A tar header; tarfile by itself takes a damaged one for the archive's end, and reads any length of name."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from None

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        extended = not self.isreg() and not self.isdir() and self.type not in _BARE_TYPES
        if extended and not 0 <= self.size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


_BARE_TYPES = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


def read_zip(file: IO[bytes], wanted: Callable[[str], bool], tally: Tally) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the wanted files of a ZIP, in the order they lie in it; only their bytes are read.

    Links, encrypted or damaged files, unsafe names and files over MAX_IMAGE_BYTES are refused and
    counted. Raises DamagedArchiveError, or DataError for one that expands more than MAX_RATIO-fold.
    """
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise DamagedArchiveError(f"not a ZIP, or a damaged one ({error})") from None
    with archive:
        members = sorted(archive.infolist(), key=lambda info: info.header_offset)
        packed = sum(member.compress_size for member in members)
        if sum(member.file_size for member in members) > RATIO_SLACK + MAX_RATIO * packed:
            raise DataError(f"an archive that expands more than {MAX_RATIO}-fold is refused as a bomb")
        for member in members:
            mode = stat.S_IFMT(member.external_attr >> 16)  # 0 where the ZIP was not made on Unix
            kind = {0: "file", stat.S_IFREG: "file", stat.S_IFLNK: "link"}.get(mode, "special")
            if _is_fine(member.filename, "folder" if member.is_dir() else kind, member.file_size, wanted, tally):
                try:
                    yield member.filename, archive.read(member)
                except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
                    tally.refuse("that are damaged, encrypted or packed in an unknown way", member.filename)


def group_parts(paths: Sequence[str], pattern: str) -> dict[str, list[str]]:
    """The archives among `paths` whose name matches `pattern` -> their files in the order to read them.

    An archive is one file, or parts NAME.0 NAME.1 ... NAME.10, with any number of leading
    zeros. Raises DataError naming a part that is missing between others.
    """
    parts: dict[str, dict[int, str]] = defaultdict(dict)
    for path in sorted(paths):
        base, number = re.fullmatch(r"(.*?)(?:\.(\d+))?", path, re.DOTALL).groups()  # type: ignore[union-attr]
        if fnmatch.fnmatchcase(path, pattern):
            parts[path][-1] = path
        elif number is not None and fnmatch.fnmatchcase(base, pattern):
            if int(number) in parts[base]:
                raise DataError(f"{base} has two parts {int(number)}: {parts[base][int(number)]} and {path}")
            parts[base][int(number)] = path
    return {base: _in_order(base, numbered) for base, numbered in sorted(parts.items())}


def _in_order(base: str, numbered: dict[int, str]) -> list[str]:
    if -1 in numbered:
        return [numbered[-1]]
    first = min(numbered)
    width = min(len(path.rpartition(".")[2]) for path in numbered.values())
    gaps = [number for number in range(min(first, 1), max(numbered)) if number not in numbered]
    if gaps:
        missing = join_limited(f"{base}.{number:0{width}}" for number in gaps)
        raise DataError(f"parts are missing at the source, so the archive cannot be read: {missing}")
    return [numbered[number] for number in sorted(numbered)]
