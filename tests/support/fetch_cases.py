"""Small archives of the same shape as the catalogue's, and the command that fetches them."""

import io
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import huggingface_hub.constants
import pytest
from dataset_server import Hub, serve
from helpers import ROOT, read_csv
from pictures import encoded, noise

from ensemble.fetch import hub_stream
from ensemble.fetch.catalogue import ImageSource
from ensemble.fetch.fetch import FetchResult, fetch

REPO = "InfImagine/FakeImageDataset"
MIDJOURNEY = "ImageData/val/Midjourneyv5-5K/Midjourneyv5-5K.tar.gz"
SD21 = "ImageData/val/SDv21-CC15K/SDv21-CC15K.tar.gz"
RUN = """
import sys, cli
codes = []
for line in sys.argv[1:]:
    sys.argv[1:] = line.split(" ")
    try:
        cli.main()
    except SystemExit as stop:
        codes.append(stop.code)
print(codes, file=sys.stderr)
"""


@cache
def picture(number: int) -> bytes:
    """3,172 bytes that do not compress."""
    return encoded(noise(number))


def tar_gz(files: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    """Files in this order, `extra` members without content before the last of them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for number, (name, data) in enumerate(files.items()):
            for info in extra if number == len(files) - 1 else ():
                tar.addfile(info)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zipped(files: dict[str, bytes], links: dict[str, str] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        for name, target in (links or {}).items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    return buffer.getvalue()


def images(count: int, folder: str = "Midjourneyv5-5K") -> dict[str, bytes]:
    return {f"{folder}/{number}.png": picture(number) for number in range(count)}


def parts(path: str, data: bytes, count: int) -> dict[str, bytes]:
    """`data` cut into path.000, path.001, ..."""
    size = -(-len(data) // count)
    return {f"{path}.{number:03}": data[number * size : (number + 1) * size] for number in range(count)}


def start(hub: Hub, *lines: str, home: Path) -> "subprocess.Popen[str]":
    """cli.py in a process of its own, once for each line."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", RUN, *lines]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextmanager
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that huggingface_hub, in this process, takes for the real one; small pieces, quick retries."""
    monkeypatch.setattr(hub_stream, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(hub_stream, "CHUNK_BYTES", 1 << 14)
    with serve(Hub(repos={REPO: {"README.md": b"card"}})) as hub:
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def put(hub: Hub, path: str, files: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    hub.repos[REPO][path] = tar_gz(files, *extra)
    return hub.repos[REPO][path]


def take(source: ImageSource, folder: Path, limit: int = 0, **more: bool) -> FetchResult:
    return fetch(source, folder, limit, **more)


def originals(folder: Path) -> list[str]:
    return list(read_csv(folder / "data.csv")["original"])
