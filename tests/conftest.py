"""Pictures, and small files of them, that several test files share."""

import importlib.util
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

# Tiny networks gain nothing from threads, which wait for each other on a busy machine; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

PHOTOS = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")
HOSTILE_NAMES = ("a b", "é 写真", "1,2", 'it\'s "it"', "two\nlines", "<script>", "007", "NA", "1e5", "a.b")


def photo_file(name: str) -> Path:
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "data" / name


def noise(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def write_files(folder: Path, *names: str, data: bytes = b"") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


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
