"""Where bytes lie: paths on disk, and URLs of object stores (s3://, gs://), which fsspec reads.

Nothing but URLs reaches fsspec.
"""

import glob
import io
import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import datetime
from errno import ENOENT
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from ensemble.core.errors import DataError, UnavailableError, error_line, escape_control

Location = Path | str  # a URL is the text
DRIVERS = {"s3": "s3fs", "gs": "gcsfs", "memory": "fsspec"}  # memory: of this process, for trying out
COPY_COMMANDS = {"s3": "aws s3 sync", "gs": "gcloud storage rsync --recursive"}
BLOCK_BYTES = 4 << 20  # of one request for adjacent images, and at most of an image that is fetched ahead
CONCURRENT_REQUESTS = 16  # most of their time is waiting
VERSION_KEYS = ("ETag", "generation", "etag", "mtime", "LastModified", "created")  # what stores call a version
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


class FileStat(NamedTuple):
    """A file's bytes, and a number that tells its versions apart: of a path the time of change in ns."""

    size: int
    version: int


class ListedFile(NamedTuple):
    """A file of a listing: its path below the listed folder, its bytes and version; -1 where they are not known yet."""

    path: str
    size: int = -1
    version: int = -1


# ---- locations


def is_url(text: object) -> bool:
    """Whether a location, or a text that may be one, is a URL."""
    return isinstance(text, str) and _URL.match(text) is not None


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
    shown = escape_control(_SECRET.sub("", text))
    if scheme == "hf":
        raise DataError(
            f"{shown}: hf:// names bundles and models; download images first: hf download --repo-type dataset"
        )
    if scheme not in DRIVERS:
        raise DataError(f"{shown}: images are read from a path, s3:// or gs://")
    if re.search(r"://[^/]*@|[?&][^/]*(signature|credential|token)[^/]*=", text, re.IGNORECASE):
        raise DataError(
            f"{shown}: leave the password or signature out of it; credentials are the store's own variables"
        )
    return scheme + text[len(match[1]) :]


def not_on_disk(url: str) -> DataError:
    """What to raise where labelled images lie in an object store."""
    folder = str(parent(url)) if os.path.splitext(url)[1] else url.rstrip("/")
    copy = COPY_COMMANDS.get(url.partition(":")[0])
    example = f", for example: {copy} {folder} {name(folder)}" if copy else ""
    return DataError(
        escape_control(f"{url}: only infer reads images from an object store; copy them to disk first{example}")
    )


def join(root: Location, path: str) -> Location:
    """A path below a location; a URL stands for itself, and so does an absolute path, unless the root is a URL."""
    if is_url(path):
        return parse_location(path)
    return f"{root.rstrip('/')}/{path}" if isinstance(root, str) else root / path


def parent(location: Location) -> Location:
    """The folder that a file lies in."""
    return location.rpartition("/")[0] if isinstance(location, str) else location.parent


def name(location: Location) -> str:
    """The last part of a location."""
    return location.rstrip("/").rpartition("/")[2] if isinstance(location, str) else location.name


# ---- files and folders


def stat(location: Location) -> FileStat:
    """Size and version of a file; FileNotFoundError where there is none."""
    if isinstance(location, str):
        with translate_errors(location):
            info = filesystem(location).info(location)
        if info["type"] != "file":
            raise FileNotFoundError(location)
        return FileStat(info["size"] or 0, _version(info))
    found = location.stat()
    if not S_ISREG(found.st_mode):  # a pipe may never end
        raise FileNotFoundError(ENOENT, "not a regular file", str(location))
    return FileStat(found.st_size, found.st_mtime_ns)


def exists(location: Location) -> bool:
    """Whether a file or a folder is there; False also for a name that is too long to be one."""
    return bool(_object_type(location)) if isinstance(location, str) else os.path.exists(location)


def is_dir(location: Location) -> bool:
    """Whether it is a folder; in a store, whether something lies below it."""
    return _object_type(location) == "directory" if isinstance(location, str) else os.path.isdir(location)


def _object_type(url: str) -> str:
    try:
        with translate_errors(url):
            return filesystem(url).info(url)["type"]
    except FileNotFoundError:
        return ""


def open_file(location: Location, size: int | None = None) -> IO[bytes]:
    """A file, of `size` bytes if known, for reading with seeks; of an object BLOCK_BYTES are requested at a time."""
    if isinstance(location, Path):
        return location.open("rb")
    return io.BufferedReader(_ObjectFile(location, stat(location).size if size is None else size), BLOCK_BYTES)


def read_range(location: Location, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size), fewer where the file ends before; FileNotFoundError. Of an object: one request."""
    if isinstance(location, Path):
        with location.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    if not size:
        return b""
    with translate_errors(location):
        try:
            return filesystem(location).cat_file(location, start=offset, end=offset + size)
        except Exception as error:  # s3fs and gcsfs have no kind of their own for status 416
            if getattr(error, "code", None) == 416 or "not satisfiable" in str(error).lower():
                return b""
            raise


def find_matches(pattern: Location) -> list[Location]:
    """The files that match a pattern."""
    if isinstance(pattern, Path):
        return [Path(path) for path in glob.glob(str(pattern), recursive=True) if os.path.isfile(path)]
    scheme = pattern.partition("://")[0]
    with translate_errors(pattern):
        return [f"{scheme}://{path.lstrip('/')}" for path in filesystem(pattern).glob(pattern)]


def walk(folder: Location) -> Iterator[ListedFile]:
    """All files below a folder in the order of their paths, names that begin with a dot left out.

    Holds the names of one folder and of those above it. Raises DataError where the folder cannot be listed.
    """
    list_dir = partial(_list_store, folder) if isinstance(folder, str) else partial(_list_disk, folder)
    open_folders = [list_dir("")]
    while open_folders:
        entry = next(open_folders[-1], None)
        if entry is None:
            open_folders.pop()
        elif entry.path.endswith("/"):
            open_folders.append(list_dir(entry.path))
        else:
            yield entry


def _list_disk(root: Path, below: str) -> Iterator[ListedFile]:
    """A folder's entries, sorted, without special files and links to a folder above; paths of folders end in /."""
    folder = root / below
    try:
        with os.scandir(folder) as entries:
            kinds = ((entry, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
            paths = sorted(
                below + entry.name + "/" * is_folder
                for entry, is_folder in kinds
                if (not _loops(folder, entry.name) if is_folder else not _is_special(entry))
            )
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from None
    return map(ListedFile, paths)


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


def _loops(folder: Path, name: str) -> bool:
    """Whether a link leads back to a folder that it lies in, and so round and round."""
    link = folder / name
    return link.is_symlink() and folder.resolve().is_relative_to(link.resolve())


def _list_store(url: str, below: str) -> Iterator[ListedFile]:
    store = filesystem(url)
    folder = f"{store._strip_protocol(url).rstrip('/')}/{below}".rstrip("/")
    try:
        with translate_errors(url):
            listed = store.ls(folder, detail=True)
    except FileNotFoundError:
        raise DataError(f"nothing lies at {url}; check the bucket and the path") from None
    entries = []
    for info in listed:
        last = info["name"].rstrip("/")[len(folder) + 1 :].rpartition("/")[2]
        is_folder = info["type"] == "directory"
        if not last and is_folder and not _version_value(info):  # a folder that is an object has a version
            raise DataError(f"{url}: keys that begin with {folder}// cannot be listed; rename them")
        if last and not last.startswith("."):
            entries.append(ListedFile(below + last + "/" * is_folder, info["size"] or 0, _version(info)))
    return iter(sorted(entries))


def changed(location: Location) -> DataError:
    """What to raise where the bytes are not those that were listed."""
    return DataError(f"{location} was changed meanwhile; run the same command again")


# ---- fsspec


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
        text = " ".join([*(kind.__name__ for kind in type(error).__mro__), str(error)]).lower()
        for words, meaning in _EXPLAINED:
            if any(word in text for word in words):
                raise DataError(f"{url}: {meaning} ({_line(error)})") from None
        raise DataError(f"{url} cannot be read: {_line(error)}; check its name and region") from None


def _line(error: Exception) -> str:
    """An error in one short line, without the query of a signed address, nor the name and password of an endpoint."""
    return re.sub(r"\?\S+|(?<=://)[^/\s]*@", "", error_line(error))


def _version(info: dict[str, Any]) -> int:
    value = _version_value(info)
    # in memory a listing has the one, info the other
    text = str(value.timestamp() if isinstance(value, datetime) else value)
    return int.from_bytes(sha256(text.encode()).digest()[:7])  # fits an int64


def _version_value(info: dict[str, Any]) -> Any:
    return next((info[key] for key in VERSION_KEYS if info.get(key)), "")


class _ObjectFile(io.RawIOBase):
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
