"""Data sets on Kaggle: read single images out of Kaggle's ZIP over HTTP, without downloading the rest.

kagglehub signs in and gives the download's address; the ZIP's directory and its images are then read by
byte range. Where the server does not support ranges, kagglehub downloads the whole ZIP (it can resume),
and it is read from disk.
"""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fsspec.spec import AbstractBufferedFile

from ensemble.core.errors import DataError
from ensemble.data.archives import DamagedArchiveError, read_zip
from ensemble.fetch.catalogue import ImageSource
from ensemble.fetch.fetch_job import FetchJob, require_package

BLOCK_BYTES = 4 << 20  # size of one request
MAX_RETRIES = 5
RETRY_SECONDS = 0.25  # wait before the first retry; each further wait is four times as long
TIMEOUT_SECONDS = 60  # of a connection that brings no byte


def fetch_zip(job: FetchJob, limit: int) -> bool:
    """Fetch from a data set on Kaggle. Returns whether its ZIP was read to its end."""
    partial_folder = job.output.partial_folder
    with open_zip(job.source, job.state.get("version"), partial_folder, job.count_bytes) as (file, version):
        job.update_state(version=version)
        try:
            for name, data in read_zip(file, job.needs_file, job.tally):
                job.store_file(name, data)
                if job.is_full:
                    return False
        except DamagedArchiveError as error:
            shutil.rmtree(partial_folder, ignore_errors=True)
            raise DataError(f"{job.source.kaggle}: {error}; run the same command again") from None
    return True


@contextmanager
def open_zip(
    source: ImageSource, version: int | None, partial_folder: Path, on_bytes: Callable[[int], None]
) -> Iterator[tuple[IO[bytes], int]]:
    """The data set's ZIP as a file, and its version; `version` None means the newest."""
    require_package("kagglehub", "a data set on Kaggle")
    from kagglehub.clients import build_kaggle_client, download_file
    from kagglehub.handle import parse_dataset_handle
    from kagglesdk.datasets.types import dataset_api_service as api

    _require_credentials(source)
    logging.getLogger("kagglehub").setLevel(logging.WARNING)  # it prints to the console by itself
    with translate_kaggle_errors(source), build_kaggle_client() as client:
        datasets = client.datasets.dataset_api_client
        about, download = api.ApiGetDatasetRequest(), api.ApiDownloadDatasetRequest()
        for request in (about, download):
            request.owner_slug, request.dataset_slug = source.kaggle.split("/")
        version = version or int(datasets.get_dataset(about).current_version_number)
        download.dataset_version_number = version
        response = datasets.download_dataset(download)
        size = int(response.headers.get("Content-Length", 0))
        if size and response.headers.get("Accept-Ranges") == "bytes":
            response.close()
            with _HttpRangeFile(response.url, size, on_bytes) as file:
                yield file, version
            return
        partial_folder.mkdir(parents=True, exist_ok=True)
        path = partial_folder / f"{source.name}-{version}.zip"
        download_file(response, str(path), parse_dataset_handle(f"{source.kaggle}/versions/{version}"))
        with path.open("rb") as file:
            yield file, version


def _require_credentials(source: ImageSource) -> None:
    from kagglehub.config import get_kaggle_credentials

    try:
        credentials = get_kaggle_credentials()
    except ValueError as error:
        raise DataError(f"{error}; download it again from https://www.kaggle.com/settings") from None
    if not credentials:
        raise DataError(
            f"Kaggle wants to know who downloads {source.kaggle}: accept its terms at {source.url}, create an API "
            "token at https://www.kaggle.com/settings, and save it as ~/.kaggle/kaggle.json, or set KAGGLE_API_TOKEN, "
            "or KAGGLE_USERNAME and KAGGLE_KEY"
        )


@contextmanager
def translate_kaggle_errors(source: ImageSource) -> Iterator[None]:
    """Turn errors of kagglehub and its HTTP client into a DataError that says what to do."""
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


class _HttpRangeFile(AbstractBufferedFile):
    """A file at a URL, read by HTTP range requests of about BLOCK_BYTES."""

    def __init__(self, url: str, size: int, on_bytes: Callable[[int], None]) -> None:
        import requests

        super().__init__(fs=None, path=url, block_size=BLOCK_BYTES, size=size)
        self._on_bytes, self._session = on_bytes, requests.Session()

    def close(self) -> None:
        self._session.close()
        super().close()

    def _fetch_range(self, start: int, stop: int) -> bytes:
        import requests

        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        for attempt in range(MAX_RETRIES + 1):
            try:
                with self._session.get(self.path, headers=headers, timeout=TIMEOUT_SECONDS, stream=True) as response:
                    if response.status_code < 500 and response.status_code != 206:
                        raise DataError(
                            f"Kaggle's link is refused or has run out (HTTP {response.status_code}); "
                            "run the same command again to go on"
                        )
                    response.raise_for_status()
                    if len(data := response.content) == stop - start:
                        self._on_bytes(len(data))
                        return bytes(data)
                    raise requests.ConnectionError("too few bytes")
            except requests.RequestException as error:
                if attempt == MAX_RETRIES:  # no OSError: zipfile would take it for the end of a damaged file
                    raise DataError(_unreachable(error)) from None
                time.sleep(RETRY_SECONDS * 4**attempt)
        raise AssertionError("unreachable")
