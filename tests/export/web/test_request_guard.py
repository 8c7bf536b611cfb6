"""Requests that a page of another site sends through its visitor's browser."""

from socket import gethostname

import pytest
from small_server import ENSEMBLE, grey, parts, refused, scored
from starlette.testclient import TestClient

from export.web import request_guard
from export.web.limits import UploadLimits
from export.web.server import make_app


def client(own, host):
    return TestClient(make_app(ENSEMBLE, UploadLimits(), own), headers={"host": host})


@pytest.mark.parametrize(
    ("listening", "others", "host", "known"),
    [
        ("127.0.0.1", (), "localhost:7860", True),
        ("127.0.0.1", (), "LOCALHOST", True),
        ("127.0.0.1", (), "127.0.0.1:7860", True),
        ("127.0.0.1", (), "[::1]:7860", True),
        ("127.0.0.1", (), "evil.example:7860", False),
        ("127.0.0.1", (), "localhost.evil.example", False),
        ("127.0.0.1", (), "10.0.0.1", False),
        ("127.0.0.1", (), "localhost@evil.example", False),
        ("127.0.0.1", (), "[::1", False),
        ("127.0.0.1", (), "", False),
        ("127.0.0.1", (), gethostname(), False),
        ("127.0.0.1", ("Photos.example", "b.example"), "photos.example", True),
        ("127.0.0.1", ("Photos.example", "b.example"), "a.example", False),
        ("10.0.0.1", (), "10.0.0.1:7860", True),
        ("fe80::1", (), "[fe80::1]:7860", True),
        ("127.0.1.1", ("myhost",), "myhost", True),
        ("0.0.0.0", (), "10.0.0.1:7860", True),  # noqa: S104
        ("::", (), "[fe80::2]:7860", True),
        ("0.0.0.0", (), gethostname(), True),  # noqa: S104
        ("0.0.0.0", (), "evil.example", False),  # noqa: S104
        ("0.0.0.0", ("good.example",), "good.example", True),  # noqa: S104
    ],
)
def test_only_its_own_names_are_answered(listening, others, host, known):
    with client(request_guard.allowed_hosts(listening, others), host) as found:
        for path in ("/", "/api/info"):
            answer = found.get(path)
            assert known == (answer.status_code == 200)
            if not known:
                refused(answer, 421, "--allow-host")


@pytest.mark.parametrize(
    ("headers", "own"),
    [
        ({}, True),
        ({"origin": "http://localhost:7860"}, True),
        ({"origin": "https://LOCALHOST:7860", "sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "http://localhost:3000"}, False),
        ({"origin": "http://localhost"}, False),
        ({"origin": "null"}, False),
        ({"origin": ""}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"origin": "http://localhost:7860", "sec-fetch-site": "cross-site"}, False),
    ],
)
def test_images_are_taken_from_its_own_page_and_from_programs_only(headers, own):
    with client(request_guard.LOCAL, "localhost:7860") as found:
        found.headers.update(headers)
        assert found.get("/").status_code == 200  # a link may lead here
        if own:
            assert scored(found, ("a.png", grey(1)))["images"][0]["error"] is None
        else:
            refused(found.post("/api/score", files=parts(("a.png", grey(1)))), 403, "a page of another site")


def test_a_refusal_is_not_to_be_run_as_a_page():
    with client(request_guard.LOCAL, "<script>") as found:
        answer = found.get("/")
        refused(answer, 421, "not a name of this server")
        assert answer.headers["x-content-type-options"] == "nosniff"
