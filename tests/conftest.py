"""Pictures, and small files of them, that several test files share."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from object_store import KEYS, free_port
from pictures import PHOTOS, encoded, noise, photo_file, write_files
from PIL import Image

# Tiny networks gain nothing from threads, which wait for each other on a busy machine; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any, error: object) -> None:
    """Say how a worker that crashed ended: -11 is a segmentation fault, -9 was killed."""
    if error:
        print(f"\n{node.gateway.id} ended with exit code {node.gateway._io.popen.wait(timeout=30)}")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache during the tests: a folder of their own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["MANYEYES_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def photo() -> Path:
    return photo_file("chelsea.png")


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    return [Image.open(photo_file(name)).convert("RGB") for name in PHOTOS]


@pytest.fixture(scope="session")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that a test must not change: ai/ and real/ with 30 unlike images each."""
    folder = tmp_path_factory.mktemp("tiles")
    for label, name in enumerate(("real", "ai")):
        for number in range(30):
            write_files(folder, f"{name}/{number:02}.bmp", data=encoded(noise(100 * label + number), "BMP"))
    return folder


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ and recipes/ of a small main job."""
    import small_job

    return small_job.make_data(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="session")
def run(work: Path) -> Path:
    """A trained and stacked run with its bundle; a test that changes it takes a copy."""
    import small_job

    return small_job.make_run(work)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A loopback Hub of no repositories."""
    import hub_api

    with hub_api.serve(tmp_path_factory.mktemp("store")) as hub:
        yield hub


@pytest.fixture(scope="session")
def hub_child(hub: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    import hub_client

    with hub_client.client(hub.url, tmp_path_factory.mktemp("home")) as child:
        yield child


@pytest.fixture
def call(hub: Any, hub_child: Any) -> Callable[..., str]:
    """A command as its user sees it: its output, or its errors where `code` is not 0. No token is ever among either."""
    import hub_api

    for seen in (hub.faults, hub.seen, hub.received, hub.sent):
        seen.clear()
    hub.wait = 0.0

    def call(*arguments: object, code: int = 0, token: str = hub_api.TOKEN) -> str:
        found, out, err = hub_child(*arguments, HF_TOKEN=token)
        assert found == code, out + err
        assert hub_api.TOKEN not in out + err
        assert hub_api.READER not in out + err
        return out if code == 0 else err

    return call


@pytest.fixture
def repo(hub: Any) -> str:
    """A name that no repository has yet."""
    return f"me/r{len(hub.repos)}"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """An S3 server in a process of its own: (its address, its log of requests)."""
    port, log = free_port(), tmp_path_factory.mktemp("s3") / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "moto.server", "-p", str(port)]
        running = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | KEYS)
    try:
        for _ in range(300):
            with socket.socket() as trying:
                if trying.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", log
    finally:
        running.terminate()
        running.wait(10)
