"""Stream archives from the Hugging Face Hub at one commit. What has arrived is kept, so a killed fetch can resume.

huggingface_hub makes every request, so HF_ENDPOINT, HF_TOKEN and `hf auth login` count.
"""

import io
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble.core.errors import DataError, join_limited
from ensemble.core.hub_download import explain_error, is_transport, redacted_line
from ensemble.data.archives import group_parts
from ensemble.fetch.output_folder import require_disk_space

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK_BYTES = 1 << 18
MAX_RETRIES = 5  # consecutive tries that bring no byte
RETRY_SECONDS = 0.25  # wait before the first retry; each further wait is four times as long


@dataclass(frozen=True)
class ArchivePart:
    """One file of an archive on the Hub. `sha256` is known for files in large-file storage only."""

    path: str
    size: int
    sha256: str | None = None


class CorruptPartError(DataError):
    """A part does not have the size or SHA-256 that the Hub gives for it."""


@contextmanager
def translate_hub_errors(repo: str) -> Iterator[None]:
    """Turn errors of huggingface_hub into a DataError that says what to do."""
    from huggingface_hub import errors

    url = f"https://huggingface.co/datasets/{repo}"
    reason: str | None
    try:
        yield
    except errors.GatedRepoError:
        reason = f"access is granted on request: accept its terms at {url}, then run: hf auth login"
    except errors.RemoteEntryNotFoundError:
        reason = f"the files have moved; see {url}/tree/main"
    except Exception as error:
        if (reason := explain_error(error)) is None:
            raise
    else:
        return
    raise DataError(f"{repo}: {reason}")


def resolve_revision(repo: str, revision: str | None = None) -> tuple[str, str | None]:
    """The commit that `revision` (default: main) of a data set points to now, and the licence on its card."""
    from huggingface_hub import HfApi

    with translate_hub_errors(repo):
        info = HfApi().dataset_info(repo, revision=revision)
    licence = (info.card_data.to_dict() if info.card_data else {}).get("license")
    return str(info.sha), ", ".join(licence) if isinstance(licence, list) else licence


def list_archives(repo: str, commit: str, pattern: str) -> dict[str, list[ArchivePart]]:
    """Archives that match `pattern`: name -> parts in order. DataError if there is none, or a part is missing."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    folder = pattern.partition("*")[0].rpartition("/")[0]
    with translate_hub_errors(repo):
        tree = HfApi().list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset")
        files = {item.path: item for item in tree if isinstance(item, RepoFile)}
    grouped = group_parts(list(files), pattern)
    if not grouped:
        raise DataError(f"{repo} has no {pattern} any more; {folder} holds {join_limited(sorted(files)) or 'nothing'}")
    parts = {path: ArchivePart(path, file.size, file.lfs.sha256 if file.lfs else None) for path, file in files.items()}
    return {name: [parts[path] for path in paths] for name, paths in grouped.items()}


class PartStream(io.RawIOBase):
    """The bytes of an archive's parts, one after the other: first what is in `folder`, then the rest from the Hub.

    `verified` counts the parts that were read to their end and have the right SHA-256. `on_bytes` is
    called with the size of each chunk that came over the network.
    """

    def __init__(
        self, repo: str, commit: str, parts: Sequence[ArchivePart], folder: Path, on_bytes: Callable[[int], None]
    ) -> None:
        super().__init__()
        self.verified = 0
        self._parts, self._folder = parts, folder
        self._chunks = self._read(repo, commit, on_bytes)
        self._buffered = memoryview(b"")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill `buffer` with at most one chunk. Returns the number of bytes, 0 at the end of the last part."""
        if not self._buffered:
            self._buffered = memoryview(next(self._chunks, b""))
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._buffered))
        target[:size], self._buffered = self._buffered[:size], self._buffered[size:]
        return size

    def close(self) -> None:
        """Stop the download; what has arrived stays on disk."""
        if not self.closed:
            self._chunks.close()
        super().close()

    def discard_current(self) -> ArchivePart:
        """Delete the file of the part being read, so that the next fetch downloads it again."""
        part = self._parts[self.verified]
        self._chunks.close()
        partial_file(self._folder, part).unlink(missing_ok=True)
        return part

    def _read(self, repo: str, commit: str, on_bytes: Callable[[int], None]) -> Generator[bytes, None, None]:
        for part in self._parts:
            digest, size = sha256(), 0
            for chunk in _read_part(repo, commit, part, partial_file(self._folder, part), on_bytes):
                digest.update(chunk)
                size += len(chunk)
                yield chunk
            if size != part.size or part.sha256 not in (None, digest.hexdigest()):
                partial_file(self._folder, part).unlink()
                raise CorruptPartError(f"{part.path} arrived broken (not the size or SHA-256 that the Hub tells)")
            self.verified += 1


def partial_file(folder: Path, part: ArchivePart) -> Path:
    """The file that holds what has arrived of a part."""
    return folder / f"{sha256(part.path.encode()).hexdigest()[:12]}-{part.path.rpartition('/')[2]}"


def _read_part(
    repo: str, commit: str, part: ArchivePart, path: Path, on_bytes: Callable[[int], None]
) -> Iterator[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > part.size:
        path.unlink()
    size = 0
    if path.exists():
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                size += len(chunk)
                yield chunk
    if size < part.size:
        with path.open("ab") as file:
            for chunk in _download(repo, commit, part, size):
                require_disk_space(path.parent)
                file.write(chunk)
                file.flush()
                on_bytes(len(chunk))
                yield chunk


def _download(repo: str, commit: str, part: ArchivePart, start: int) -> Iterator[bytes]:
    """Chunks of a file from byte `start` on; after a dropped connection it resumes at the same byte."""
    failures = 0
    while start < part.size:
        try:
            for chunk in _request(repo, commit, part.path, start):
                start += len(chunk)
                failures = 0
                yield chunk
            if start >= part.size:
                return
            problem = "it ended early"
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            refused = 400 <= status < 500 and status not in (408, 429)
            if not is_transport(error) or refused or failures >= MAX_RETRIES:
                with translate_hub_errors(repo):
                    raise
            problem = redacted_line(error)
        if failures >= MAX_RETRIES:
            raise DataError(f"{repo}: the download of {part.path} broke off ({problem}); run the same command again")
        time.sleep(RETRY_SECONDS * 4**failures)
        failures += 1


def _request(repo: str, commit: str, path: str, start: int) -> Iterator[bytes]:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    url = hf_hub_url(repo, path, repo_type="dataset", revision=commit)
    headers = build_hf_headers() | {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff("GET", url, headers=headers, timeout=timeout, max_retries=0) as response:
        hf_raise_for_status(response)
        skip = 0 if response.status_code == 206 else start  # a server that ignores ranges sends all
        for chunk in response.iter_raw(CHUNK_BYTES):
            if skip < len(chunk):
                yield chunk[skip:]
            skip = max(skip - len(chunk), 0)
