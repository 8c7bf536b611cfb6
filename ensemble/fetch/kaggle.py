"""Data sets on Kaggle: the ZIP that Kaggle makes of them, read where it lies, so only the images wanted are downloaded.

kagglehub signs in and asks for the download; the ZIP's directory and the images in it are then read by
byte range. Where the server gives no ranges, kagglehub downloads the whole ZIP, resuming, and it is
read from disk.
"""

import io
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ensemble.core.errors import DataError
from ensemble.data.archives import DamagedArchiveError, Tally, read_zip
from ensemble.fetch.catalogue import Source
from ensemble.fetch.quotas import Job, file_filter, file_label, require_package

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK = 4 << 20  # bytes a request
RETRIES = 5
RETRY_SECONDS = 0.25  # before the first; four times as long before each further one
TIMEOUT = 60  # seconds without a byte


def fetch_zip(job: Job, limit: int) -> bool:
    """Fetch from a data set on Kaggle; whether its ZIP was read to its end."""
    version = job.state.get("version")
    with open_zip(job.source, version, job.store.partial, job.received) as (file, number):
        job.remember(version=number)
        try:
            for name, data in read_zip(file, file_filter(job), job.tally):
                label = file_label(job.source, name, Tally())
                if label is not None:
                    job.take(name, label, data)
                if job.full:
                    return False
        except DamagedArchiveError as error:
            shutil.rmtree(job.store.partial, ignore_errors=True)
            raise DataError(f"{job.source.kaggle}: {error}; run the same command again") from None
    return True


@contextmanager
def open_zip(
    source: Source, version: int | None, partial: Path, on_bytes: Callable[[int], None]
) -> Iterator[tuple[IO[bytes], int]]:
    """The data set's ZIP as a file, and the version that it is; `version` None means the newest."""
    require_package("kagglehub", "a data set on Kaggle")
    from kagglehub.clients import build_kaggle_client, download_file
    from kagglehub.handle import parse_dataset_handle

    _require_credentials(source)
    logging.getLogger("kagglehub").setLevel(logging.WARNING)  # it prints to the console by itself
    with kaggle_errors(source), build_kaggle_client() as client:
        number = version or _newest(client, source)
        handle = parse_dataset_handle(f"{source.kaggle}/versions/{number}")
        response = _request(client, source, number)
        size = int(response.headers.get("Content-Length", 0))
        if size and response.headers.get("Accept-Ranges") == "bytes":
            response.close()
            with io.BufferedReader(_RangeFile(response.url, size, on_bytes), BLOCK) as file:
                yield file, number
            return
        partial.mkdir(parents=True, exist_ok=True)
        kept = partial / f"{source.name}-{number}.zip"
        download_file(response, str(kept), handle)
        with kept.open("rb") as file:
            yield file, number


def _require_credentials(source: Source) -> None:
    from kagglehub.config import get_kaggle_credentials

    try:
        found = get_kaggle_credentials()
    except ValueError as error:
        raise DataError(f"{error}; download it again from https://www.kaggle.com/settings") from None
    if not found:
        raise DataError(
            f"Kaggle wants to know who downloads {source.kaggle}: accept its terms at {source.url}, create an API "
            "token at https://www.kaggle.com/settings, and save it as ~/.kaggle/kaggle.json, or set KAGGLE_API_TOKEN, "
            "or KAGGLE_USERNAME and KAGGLE_KEY"
        )


def _newest(client: Any, source: Source) -> int:
    from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

    request = ApiGetDatasetRequest()
    request.owner_slug, request.dataset_slug = source.kaggle.split("/")
    return int(client.datasets.dataset_api_client.get_dataset(request).current_version_number)


def _request(client: Any, source: Source, version: int) -> Any:
    from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

    request = ApiDownloadDatasetRequest()
    request.owner_slug, request.dataset_slug = source.kaggle.split("/")
    request.dataset_version_number = version
    return client.datasets.dataset_api_client.download_dataset(request)


@contextmanager
def kaggle_errors(source: Source) -> Iterator[None]:
    """Turn what kagglehub and its HTTP client raise into a DataError that says what to do."""
    import requests
    from kagglehub.exceptions import DataCorruptionError

    try:
        yield
        return
    except DataCorruptionError:
        reason = "the download arrived broken and was deleted; run the same command again"
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            reason = f"Kaggle refuses ({status}): accept its terms at {source.url}, and check your API token"
        elif status == 404:
            reason = f"Kaggle has no such data set (404), or not for you; see {source.url}"
        else:
            reason = f"Kaggle answers {status}; run the same command again later"
    except requests.RequestException as error:
        reason = _unreachable(error)
    raise DataError(f"{source.kaggle}: {reason}")


def _unreachable(error: Exception) -> str:
    return f"Kaggle cannot be reached ({type(error).__name__}); run the same command again to go on"


class _RangeFile(io.RawIOBase):
    """A file behind a URL, read by byte range; wrapped in a BufferedReader, whose buffer is one request."""

    def __init__(self, url: str, size: int, on_bytes: Callable[[int], None]) -> None:
        import requests

        super().__init__()
        self._url, self._size, self._on_bytes = url, size, on_bytes
        self._position = 0
        self._session = requests.Session()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        target = memoryview(buffer).cast("B")
        stop = min(self._position + len(target), self._size)
        if stop <= self._position:
            return 0
        data = self._get(self._position, stop)
        target[: len(data)] = data
        self._position += len(data)
        self._on_bytes(len(data))
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._session.close()
        super().close()

    def _get(self, start: int, stop: int) -> bytes:
        import requests

        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        for attempt in range(RETRIES + 1):
            try:
                with self._session.get(self._url, headers=headers, timeout=TIMEOUT, stream=True) as response:
                    if response.status_code < 500 and response.status_code != 206:
                        raise DataError(
                            f"Kaggle's link is refused or has run out (HTTP {response.status_code}); "
                            "run the same command again to go on"
                        )
                    response.raise_for_status()
                    if len(data := response.content) == stop - start:
                        return bytes(data)
                    raise requests.ConnectionError("too few bytes")
            except requests.RequestException as error:
                if attempt == RETRIES:  # no OSError: zipfile would take it for the end of a damaged file
                    raise DataError(_unreachable(error)) from None
                time.sleep(RETRY_SECONDS * 4**attempt)
        raise AssertionError("unreachable")
