"""The page on a real port."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPConnection

import httpx2
import pytest
from helpers import exported_run, run_cli, run_python
from small_members import write_networks
from small_server import ENSEMBLE, FILES, BaseClient, expected, grey, parts, refused, runner, running, scored, serving
from starlette.testclient import TestClient


def test_the_page_and_nothing_else_is_served():
    def asked(path):  # as it is: other clients tidy it up first
        connection = HTTPConnection(*url.removeprefix("http://").split(":"))
        connection.request("GET", path)
        answer = connection.getresponse()
        connection.close()
        return answer.status, answer.getheader("content-type", "").partition(";")[0]

    with running(ENSEMBLE) as url:
        assert {path: asked(path) for path in FILES} == {path: (200, kind) for path, kind in FILES.items()}
        assert asked("/api/score")[0] == 405
        for path in (
            "/index.html",
            "/../serve.py",
            "/%2e%2e/serve.py",
            "/page.js/../../serve.py",
            "//etc/passwd",
            "/..",
        ):
            assert asked(path)[0] == 404


def test_twenty_clients_at_once_each_get_their_own_answers():
    def ask(number):
        shades = [(7 * number + step) % 256 for step in range(3)]
        with httpx2.Client(timeout=60) as found:
            for _ in range(3):
                files = [(f"{number}-{shade}.png", grey(shade)) for shade in shades]
                images = scored(BaseClient(found, url), *files)["images"]
                assert [image["name"] for image in images] == [name for name, _ in files]
                assert [image["target"] for image in images] == pytest.approx([expected(s) for s in shades], abs=1e-6)
        return number

    with running(ENSEMBLE) as url, ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, range(20))) == list(range(20))


def test_beyond_the_places_to_wait_in_a_client_is_asked_to_come_back():
    at_work, go_on = threading.Event(), threading.Event()

    def wait():
        at_work.set()
        assert go_on.wait(30)

    ensemble = replace(ENSEMBLE, runners=(runner("one", 4, wait), ENSEMBLE.runners[1]))
    with running(ensemble, waiting=1) as url, httpx2.Client(timeout=60) as found, ThreadPoolExecutor(1) as pool:
        first = pool.submit(scored, BaseClient(found, url), ("a.png", grey(1)))
        assert at_work.wait(30)
        with httpx2.Client() as other:
            busy = other.post(f"{url}/api/score", files=parts(("b.png", grey(2))))
            go_on.set()
            refused(busy, 503, "too many requests are waiting")
            assert busy.headers["retry-after"] == "1"
            assert first.result()["images"][0]["name"] == "a.png"
            assert scored(BaseClient(other, url), ("b.png", grey(2)))["images"][0]["name"] == "b.png"


NO_TORCH = "import sys; sys.modules['torch'] = None; import cli; cli.main()"


def test_the_command_serves_a_run_without_torch_until_it_is_stopped(tmp_path):
    run = exported_run(tmp_path / "run")
    with serving("-c", NO_TORCH, "serve", "--run", run) as (url, _), httpx2.Client(timeout=60) as found:
        (image,) = scored(BaseClient(found, url), ("a.png", grey(220)))["images"]
        assert found.post(f"{url}/api/explain", files=parts(("a.png", grey(1)))).status_code == 404
        other = found.get(url, headers={"host": "evil.example"})
    assert image["target"] == pytest.approx(expected(220), abs=1e-4)
    refused(other, 421, "'evil.example'")
    missing = run_python("-c", NO_TORCH, "serve", "--run", run, "--explain", "--port", "0")
    assert missing.returncode == 2
    assert "torch" in missing.stderr.splitlines()[-1]


def test_the_command_serves_torch_members_with_heat_maps(tmp_path, monkeypatch):
    from export.web import server

    apps, run = [], write_networks(tmp_path / "run")
    monkeypatch.setattr(server, "serve_forever", lambda app, socket: apps.append(app))
    command = ("serve", "--run", run, "--runtime", "torch", "--allow-host", "good.example", "--port", "0")
    assert run_cli(*command, "--device", "cpu")[0] == 0
    found = TestClient(apps[0], "http://localhost")
    (image,) = scored(found, ("a.png", grey(220)))["images"]
    maps = found.post("/api/explain", files=parts(("a.png", grey(220)))).raise_for_status().json()
    found.get("/", headers={"host": "good.example"}).raise_for_status()
    assert maps["target"] == pytest.approx(image["target"])
    assert all(member["heat"].startswith("data:image/png;base64,") for member in maps["members"].values())


def test_a_port_that_is_taken_is_told(tmp_path):
    from export.web import server

    with server.listen("127.0.0.1", 0) as socket:
        port = socket.getsockname()[1]
        code, _, said = run_cli("serve", "--run", tmp_path, "--port", port)
    assert code == 2
    assert said.startswith(f"Error: cannot listen on 127.0.0.1 port {port} (")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--bundle", "x", "--run", "y"], "give either --bundle or --run, not both"),
        (["--cascade", "--runtime", "torch"], "leave out --runtime torch"),
        (["--tune", "--runtime", "torch"], "leave out --runtime torch"),
        (["--precision", "int8", "--runtime", "torch"], "leave out --runtime torch"),
        (["--bundle", "nowhere", "--port", "0"], "nowhere"),
        (["--host", ""], "Error: --host is empty"),
        (["--host", "no such host"], "Error: cannot listen on no such host port 7860 ("),
        (["--host", "é" * 70], "choose another --host or --port"),
        (["--max-mb", "0"], "0 is not in the range"),
    ],
)
def test_wrong_use_is_one_line(options, text):
    code, _, said = run_cli("serve", *options)
    assert code == 2
    assert text in said.splitlines()[-1]


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "python_multipart"])
def test_a_missing_package_is_told(package):
    code = f"import sys; sys.modules[{package!r}] = None; import cli; cli.main()"
    result = run_python("-c", code, "serve", "--port", "0")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "Error: the page needs more packages; run: pip install 'manyeyes[serve]'\n"
