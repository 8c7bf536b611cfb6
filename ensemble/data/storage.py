"""Where bytes lie: a local path, or a URL of an object store, which fsspec reads. Nothing but URLs reaches fsspec."""

import io
import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import datetime
from errno import ENOENT
from functools import cache
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from ensemble.core.errors import DataError, UnavailableError, error_line, escape_control

Location = Path | str  # a URL is the text
DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "memory": "fsspec"}  # memory: of this process, for trying out
BLOCK = 4 << 20  # bytes of one request for neighbouring images, and at most of an image that is fetched ahead
AHEAD = 16  # requests at the same time: most of their time is waiting
VERSIONS = ("ETag", "generation", "etag", "mtime", "LastModified", "created")  # what stores call a version
# s3fs tries each of these 5 times: minutes at most for a server that is silent
OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 15, "retries": {"total_max_attempts": 2}}}
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SECRET = re.compile(r"(?<=://)[^/?#]*@|[?#].*=.*", re.DOTALL)  # NAME:PASSWORD@, ?SIGNATURE=...
_EXPLAINED = (  # by words in errors and their names, since each store's library has its own
    (
        ("credential", "refresherror"),
        "no credentials were found; set the store's own variables or log in with its tool",
    ),
    (("recursion",), "is redirected without end; set the bucket's region, such as AWS_DEFAULT_REGION"),
    (("connect", "timeout", "dns"), "cannot be reached; check the network, the endpoint and the region"),
)


class ListedFile(NamedTuple):
    """A file of a listing: its path below what was listed, its bytes, and what tells its versions apart."""

    path: str
    size: int
    version: int


def is_url(place: object) -> bool:
    """Whether a place, or a text that may be one, is a URL."""
    return isinstance(place, str) and _URL.match(place) is not None


def parse_location(text: str) -> Location:
    """What a user wrote: a path, also as file://, or a URL; DataError for one that nothing reads.

    URLs with a name and password, or signed, are refused, so that none is printed later.
    """
    match = _URL.match(text)
    if not match:
        return Path(text)
    scheme = match[1].lower()
    if scheme == "file":
        return Path(unquote(urlsplit(text).path))
    told = escape_control(_SECRET.sub("", text))
    if scheme == "hf":
        raise DataError(
            f"{told}: hf:// names bundles and models; download images first: hf download --repo-type dataset"
        )
    if scheme not in DRIVERS:
        raise DataError(f"{told}: images are read from a path, s3:// or gs://")
    if re.search(r"://[^/]*@|[?&][^/]*(signature|credential|token)[^/]*=", text, re.IGNORECASE):
        raise DataError(f"{told}: leave the password or signature out of it; credentials are the store's own variables")
    return scheme + text[len(match[1]) :]


def join(root: Location, path: str) -> Location:
    """A path below a place; a URL stands for itself, and so does an absolute path, unless the place is a URL."""
    if is_url(path):
        return parse_location(path)
    return f"{root.rstrip('/')}/{path}" if isinstance(root, str) else root / path


def parent(place: Location) -> Location:
    """The folder that a file lies in."""
    return place.rpartition("/")[0] if isinstance(place, str) else place.parent


def name(place: Location) -> str:
    """The last part of a place."""
    return place.rstrip("/").rpartition("/")[2] if isinstance(place, str) else place.name


def changed(place: Location) -> DataError:
    """What to raise where the bytes are not those that were listed."""
    return DataError(f"{place} was changed meanwhile; run the same command again")


def filesystem(url: str) -> Any:
    """fsspec's file system for a URL; UnavailableError where the store's package is missing."""
    scheme = url.partition(":")[0]
    try:
        return _filesystem(scheme, os.getpid())
    except ImportError:
        package = DRIVERS[scheme]
        raise UnavailableError(f"{url}: {package} is not installed; run: pip install {package}") from None


@cache
def _filesystem(scheme: str, process: int) -> Any:
    """One for all threads, where fsspec has one for each, with connections of its own; none outlives a fork."""
    import fsspec

    return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **OPTIONS.get(scheme, {}))


@contextmanager
def translate_errors(url: str) -> Generator[None, None, None]:
    """What a store's library raises in the block becomes one line; only FileNotFoundError stays what it is."""
    try:
        yield
    except (FileNotFoundError, DataError, UnavailableError):
        raise
    except PermissionError as error:
        raise DataError(
            f"{url}: no right to read it ({_line(error)}); check credentials and the bucket's policy"
        ) from None
    except Exception as error:  # of botocore, aiohttp, google.auth, gcsfs
        told = " ".join([*(kind.__name__ for kind in type(error).__mro__), str(error)]).lower()
        for words, meaning in _EXPLAINED:
            if any(word in told for word in words):
                raise DataError(f"{url}: {meaning} ({_line(error)})") from None
        raise DataError(f"{url} cannot be read: {_line(error)}; check its name and region") from None


def _line(error: Exception) -> str:
    """An error in one short line, without the query of a signed address, nor the name and password of an endpoint."""
    return re.sub(r"\?\S+|(?<=://)[^/\s]*@", "", error_line(error))


def facts(place: Location) -> tuple[int, int]:
    """A file's bytes, and what tells its versions apart: for a path the time of change in ns. FileNotFoundError."""
    if isinstance(place, Path):
        found = place.stat()
        if not S_ISREG(found.st_mode):  # a pipe may never end
            raise FileNotFoundError(ENOENT, "not a regular file", str(place))
        return found.st_size, found.st_mtime_ns
    with translate_errors(place):
        info = filesystem(place).info(place)
    if info["type"] != "file":
        raise FileNotFoundError(place)
    return info["size"] or 0, _version(info)


def exists(place: Location) -> bool:
    """Whether a file or a folder is there; False also for a name that is too long to be one."""
    return os.path.exists(place) if isinstance(place, Path) else bool(_type(place))


def is_folder(place: Location) -> bool:
    """Whether it is a folder, or something lies below a URL."""
    return os.path.isdir(place) if isinstance(place, Path) else _type(place) == "directory"


def _type(url: str) -> str:
    try:
        with translate_errors(url):
            return filesystem(url).info(url)["type"]
    except FileNotFoundError:
        return ""


def check(place: Location, known: tuple[int, int]) -> None:
    """DataError where a file's facts are no longer those known, or it is gone."""
    try:
        same = facts(place) == known
    except OSError as error:
        raise DataError(
            f"{place} is gone ({error.strerror or 'not found'}); run the command on what is there"
        ) from None
    if not same:
        raise changed(place)


def readable(path: Path) -> bool:
    """Whether a file or folder is there for this process's user to read."""
    return os.access(path, os.R_OK)


def _version(info: dict[str, Any]) -> int:
    told = _told(info)
    told = str(
        told.timestamp() if isinstance(told, datetime) else told
    )  # in memory a listing has the one, info the other
    return int.from_bytes(sha256(told.encode()).digest()[:7])  # fits an int64


def _told(info: dict[str, Any]) -> Any:
    return next((info[key] for key in VERSIONS if info.get(key)), "")


def open_file(place: Location, size: int | None = None) -> IO[bytes]:
    """A file for reading with seeks; of an object, of `size` bytes if known, a BLOCK is requested at a time."""
    if isinstance(place, Path):
        return place.open("rb")
    return io.BufferedReader(_Ranged(place, facts(place)[0] if size is None else size), BLOCK)


class _Ranged(io.RawIOBase):
    """An object as a file: every read is a request."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._at = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._at))
        data = read_range(self._url, self._at, size)
        if len(data) != size:
            raise changed(self._url)
        buffer[:size] = data
        self._at += size
        return size


def read_range(place: Location, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size), fewer where the file ends before; one request. FileNotFoundError."""
    if isinstance(place, Path):
        with place.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    if not size:
        return b""
    with translate_errors(place):
        try:
            return filesystem(place).cat_file(place, start=offset, end=offset + size)
        except Exception as error:  # s3fs and gcsfs have no kind of their own for status 416
            if getattr(error, "code", None) == 416 or "not satisfiable" in str(error).lower():
                return b""
            raise


def walk(url: str) -> Iterator[ListedFile]:
    """All files below a URL in the order of their paths, names that begin with a dot left out.

    Holds what lies in one folder and in those above it. Raises DataError where nothing lies there.
    """
    root = filesystem(url)._strip_protocol(url).rstrip("/")
    waiting = [iter(_entries(url, root, ""))]
    while waiting:
        entry = next(waiting[-1], None)
        if entry is None:
            waiting.pop()
        elif entry.path.endswith("/"):
            waiting.append(iter(_entries(url, f"{root}/{entry.path.rstrip('/')}", entry.path)))
        else:
            yield entry


def _entries(url: str, folder: str, start: str) -> list[ListedFile]:
    """What lies in a folder, sorted; folders end in /, since so they stand in paths."""
    try:
        with translate_errors(url):
            listed = filesystem(url).ls(folder, detail=True)
    except FileNotFoundError:
        raise DataError(f"nothing lies at {url}; check the bucket and the path") from None
    entries = []
    for info in listed:
        last = info["name"].rstrip("/")[len(folder) + 1 :].rpartition("/")[2]
        is_folder = info["type"] == "directory"
        if not last and is_folder and not _told(info):  # a folder that is an object of its own has a version
            raise DataError(f"{url}: keys that begin with {folder}// cannot be listed; rename them")
        if last and not last.startswith("."):
            entries.append(ListedFile(start + last + "/" * is_folder, info["size"] or 0, _version(info)))
    return sorted(entries)
