"""Archives on the Hugging Face Hub, streamed at one commit; what arrived is kept, so a killed fetch goes on from there.

huggingface_hub makes every request, so HF_ENDPOINT, HF_TOKEN and `hf auth login` count.
"""

import io
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble.core.errors import DataError, join_limited
from ensemble.core.hub_download import explain, is_transport, redacted_line
from ensemble.data.archives import group_parts
from ensemble.fetch.output_folder import require_room

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK = 1 << 18
RETRIES = 5  # in a row without a byte
RETRY_SECONDS = 0.25  # before the first; four times as long before each further one


@dataclass(frozen=True)
class Part:
    """One file of an archive on the Hub; `sha256` where the Hub tells it (files in large-file storage)."""

    path: str
    size: int
    sha256: str | None = None


class BrokenPartError(DataError):
    """A part arrived otherwise than the Hub announced it."""


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a DataError that says what to do."""
    from huggingface_hub import errors

    url = f"https://huggingface.co/datasets/{repo}"
    try:
        yield
    except Exception as error:
        reason: str | None
        match error:
            case errors.GatedRepoError():
                reason = f"access is granted on request: accept its terms at {url}, then run: hf auth login"
            case errors.RevisionNotFoundError():
                reason = "it has no such revision"
            case errors.RepositoryNotFoundError():
                reason = "no such data set, or it is private: check the name, or run: hf auth login"
            case errors.RemoteEntryNotFoundError():
                reason = f"the files have moved; see {url}/tree/main"
            case _:
                reason = explain(error)
        if reason is None:
            raise
        raise DataError(f"{repo}: {reason}") from None


def pin(repo: str, revision: str | None = None) -> tuple[str, str | None]:
    """The commit that `revision` (default: main) of a data set means now, and its licence by its card."""
    from huggingface_hub import HfApi

    with hub_errors(repo):
        info = HfApi().dataset_info(repo, revision=revision)
    licence = (info.card_data.to_dict() if info.card_data else {}).get("license")
    return str(info.sha), ", ".join(licence) if isinstance(licence, list) else licence


def list_archives(repo: str, commit: str, pattern: str) -> dict[str, list[Part]]:
    """The archives that match `pattern`, by name -> their parts in order. DataError if there is none, or a gap."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    folder = pattern.partition("*")[0].rpartition("/")[0]
    with hub_errors(repo):
        tree = HfApi().list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset")
        files = {item.path: item for item in tree if isinstance(item, RepoFile)}
    grouped = group_parts(list(files), pattern)
    if not grouped:
        raise DataError(f"{repo} has no {pattern} any more; {folder} holds {join_limited(sorted(files)) or 'nothing'}")
    return {name: [_part(files[path]) for path in paths] for name, paths in grouped.items()}


def _part(file: Any) -> Part:
    return Part(file.path, file.size, file.lfs.sha256 if file.lfs else None)


class PartStream(io.RawIOBase):
    """The bytes of an archive's parts, one after the other: first what `folder` keeps, then the Hub's rest.

    `verified` counts the parts that have been read to their end and found whole; `on_bytes` is told
    the size of each piece that came over the network.
    """

    def __init__(
        self, repo: str, commit: str, parts: Sequence[Part], folder: Path, on_bytes: Callable[[int], None]
    ) -> None:
        super().__init__()
        self.verified = 0
        self._parts, self._folder = parts, folder
        self._chunks = self._read(repo, commit, on_bytes)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """True: this is for reading."""
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill `buffer` with at most one piece; 0 at the end of the last part."""
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._rest))
        target[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        """End the download; what has arrived stays."""
        if not self.closed:
            self._chunks.close()
        super().close()

    def discard_current(self) -> Part:
        """Delete what is kept of the part that is being read, so that the next try downloads it again."""
        part = self._parts[self.verified]
        self._chunks.close()
        kept_file(self._folder, part).unlink(missing_ok=True)
        return part

    def _read(self, repo: str, commit: str, on_bytes: Callable[[int], None]) -> Generator[bytes, None, None]:
        for part in self._parts:
            digest, size = sha256(), 0
            for chunk in _part_chunks(repo, commit, part, kept_file(self._folder, part), on_bytes):
                digest.update(chunk)
                size += len(chunk)
                yield chunk
            if size != part.size or part.sha256 not in (None, digest.hexdigest()):
                kept_file(self._folder, part).unlink()
                raise BrokenPartError(f"{part.path} arrived broken (not the size or SHA-256 that the Hub tells)")
            self.verified += 1


def kept_file(folder: Path, part: Part) -> Path:
    """Where what has arrived of a part is kept."""
    return folder / f"{sha256(part.path.encode()).hexdigest()[:12]}-{part.path.rpartition('/')[2]}"


def _part_chunks(repo: str, commit: str, part: Part, kept: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    kept.parent.mkdir(parents=True, exist_ok=True)
    if kept.exists() and kept.stat().st_size > part.size:
        kept.unlink()
    size = 0
    if kept.exists():
        with kept.open("rb") as file:
            while chunk := file.read(CHUNK):
                size += len(chunk)
                yield chunk
    if size < part.size:
        with kept.open("ab") as file:
            for chunk in _download(repo, commit, part, size):
                require_room(kept.parent)
                file.write(chunk)
                file.flush()
                on_bytes(len(chunk))
                yield chunk


def _download(repo: str, commit: str, part: Part, start: int) -> Iterator[bytes]:
    """Pieces of a file from byte `start` on; a dropped connection is taken up again where it broke off."""
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
            if not is_transport(error) or _is_refusal(error) or failures >= RETRIES:
                with hub_errors(repo):
                    raise
            problem = redacted_line(error)
        if failures >= RETRIES:
            raise DataError(f"{repo}: the download of {part.path} broke off ({problem}); run the same command again")
        time.sleep(RETRY_SECONDS * 4**failures)
        failures += 1


def _is_refusal(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 500)
    return 400 <= status < 500 and status not in (408, 429)


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
        for chunk in response.iter_raw(CHUNK):
            if skip < len(chunk):
                yield chunk[skip:]
            skip = max(skip - len(chunk), 0)
