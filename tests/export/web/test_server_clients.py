"""Clients that speak badly, or go away, on a real port."""

import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from helpers import exported_run
from PIL import Image
from small_server import ENSEMBLE, BaseClient, grey, parts, runner, running, scored, serving

HEAD = b"POST /api/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x"
BODY = b'--x\r\nContent-Disposition: form-data; name="images"; filename="%b"\r\n\r\n' + grey(150) + b"\r\n--x--\r\n"


def connected(url):
    return socket.create_connection(url.removeprefix("http://").split(":"), timeout=30)


def request(body, *headers):
    return b"\r\n".join([HEAD, *headers, b"Content-Length: %d" % len(body), b"Connection: close", b"", body])


def answered(url, data):
    """Status and all of the answer."""
    with connected(url) as found:
        found.sendall(data)
        text = b"".join(iter(lambda: found.recv(65536), b""))
    return int(text.split()[1]), text


@pytest.fixture(scope="module")
def url():
    with running(ENSEMBLE) as url:
        yield url


@pytest.mark.parametrize(
    "length", [b"abc", b"-1", b"+5", b"1_0", b"", b"9" * 30, b"9" * 5000, b"5\r\nContent-Length: 6"]
)
def test_a_length_that_is_none_is_a_bad_request(url, length):
    assert answered(url, HEAD + b"\r\nContent-Length: " + length + b"\r\n\r\n")[0] == 400


def test_a_body_in_chunks_is_scored(url):
    body = BODY % b"a.png"
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:40], body[40:])) + b"0\r\n\r\n"
    status, text = answered(url, HEAD + b"\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks)
    assert status == 200
    assert b'"name":"a.png"' in text


def test_head_is_answered_without_a_body(url):
    for path, status in (("/", 200), ("/api/info", 200), ("/api/score", 405), ("/nothing", 404)):
        found = httpx2.head(url + path)
        assert (found.status_code, found.content) == (status, b"")


@pytest.mark.parametrize(
    ("charset", "name", "shown"), [("utf-8", b"\xc3\xbc.png", "ü.png"), ("utf-7", b"+2AA-.png", "?.png")]
)
def test_a_name_that_is_no_text_is_shown_as_far_as_it_goes(url, charset, name, shown):
    status, text = answered(
        url, request(BODY % name).replace(b"boundary=x", b"boundary=x; charset=" + charset.encode())
    )
    assert status == 200
    assert f'"name":"{shown}"'.encode() in text


def test_who_goes_away_while_waiting_is_dropped_and_others_are_not():
    at_work, go_on, seen = threading.Event(), threading.Event(), []

    def wait():
        seen.append(1)
        at_work.set()
        assert go_on.wait(30)

    ensemble = replace(ENSEMBLE, runners=(runner("one", 4, wait), ENSEMBLE.runners[1]))
    with running(ensemble) as url, httpx2.Client(timeout=60) as found, ThreadPoolExecutor(2) as pool:
        first = pool.submit(scored, BaseClient(found, url), ("first.png", grey(1)))
        assert at_work.wait(30)
        gone = [connected(url) for _ in range(3)]
        for one in gone:
            one.sendall(request(BODY % b"gone.png"))
        last = pool.submit(httpx2.post, f"{url}/api/score", files=parts(("last.png", grey(2))), timeout=60)
        time.sleep(0.5)  # all wait
        for one in gone:
            one.close()
        time.sleep(0.5)
        go_on.set()
        assert first.result()["images"][0]["name"] == "first.png"
        assert last.result().json()["images"][0]["name"] == "last.png"
    assert len(seen) == 2


def test_who_goes_away_while_sending_leaves_no_word(tmp_path):
    run = exported_run(tmp_path / "run")
    with serving("-m", "cli", "serve", "--run", run) as (url, _):  # which looks at what it said
        for body in (BODY[:30], BODY % b"a"):
            with connected(url) as found:
                found.sendall(HEAD + b"\r\nContent-Length: 1000\r\n\r\n" + body)
        assert httpx2.get(url).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(("block", "grows"), [(None, False), ("16m", True)])
def test_memory_is_given_back_after_large_images(tmp_path, monkeypatch, block, grows):
    """Memory held after requests of large images; Pillow's own size of blocks proves that it can grow."""
    monkeypatch.delenv("PILLOW_BLOCK_SIZE", raising=False)
    if block:
        monkeypatch.setenv("PILLOW_BLOCK_SIZE", block)
    run, image = exported_run(tmp_path / "run"), tmp_path / "a.png"
    Image.new("RGB", (13_000, 13_000), (9, 99, 200)).save(image)
    files = parts(*[("a.png", image.read_bytes())] * 4)
    held = []
    with serving("-m", "cli", "serve", "--run", run) as (url, server), httpx2.Client(timeout=120) as client:
        for _ in range(5):
            client.post(f"{url}/api/score", files=files).raise_for_status()
            held.append(int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server}/status").read_text())[1]) * 1024)
    assert (max(held) > 6e8) == grows, held
