import asyncio
import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import exported_run, write_image
from pictures import HOSTILE_NAMES
from small_server import ENSEMBLE, FILES, grey, parts, refused, runner, scored
from starlette.testclient import TestClient

from ensemble.core.errors import UnavailableError
from ensemble.data.inputs import read_inputs
from ensemble.models.external import External
from export.inference.infer import infer
from export.inference.loading import load_bundle
from export.runtimes import autotune
from export.runtimes.settings import RuntimeOptions
from export.web.limits import UploadLimits
from export.web.server import make_app


@contextmanager
def client(ensemble=ENSEMBLE, **limits):
    with TestClient(make_app(ensemble, UploadLimits(**limits)), "http://localhost") as found:
        yield found


def test_images_are_scored_as_infer_does(tmp_path):
    for name, brightness in (("a.png", 150), ("b.png", 220)):  # 0.56 and 0.70, of a threshold of 0.6
        write_image(tmp_path / name, brightness)
    frame, _ = infer(read_inputs(tmp_path), ENSEMBLE, with_members=True)
    with client() as found:
        answer = scored(found, *((name, (tmp_path / name).read_bytes()) for name in ("a.png", "b.png")))
    assert (answer["threshold"], answer["positive"]) == (0.6, "ai")
    assert [image["name"] for image in answer["images"]] == list(frame["id"])
    assert [image["target"] for image in answer["images"]] == list(frame["target"])
    assert [image["members"] for image in answer["images"]] == frame[["one", "two"]].to_dict("records")
    assert [(image["ai"], image["error"]) for image in answer["images"]] == [(False, None), (True, None)]


def test_broken_images_have_their_own_message_and_no_score():
    files = [("same.png", b"nothing"), ("fine.png", grey(220)), ("same.png", b""), ("cut.png", grey(9)[:60])]
    with client() as found:
        images = scored(found, *files)["images"]
    assert [image["error"] and image["error"].split(" (")[0] for image in images] == [
        "same.png: not an image in a known format",
        None,
        "same.png: the file is empty",
        "cut.png: cannot be decoded",
    ]
    assert [image["ai"] for image in images] == [None, True, None, None]
    assert [image["target"] is None for image in images] == [True, False, True, True]
    assert images[0]["members"] == {"one": None, "two": None}


def test_hostile_names_come_back_as_they_were():
    names = [name for name in HOSTILE_NAMES if name.isprintable() and '"' not in name] + ["../../etc/passwd", "=1+1"]
    with client() as found:
        images = scored(found, *((name, grey(100)) for name in names))["images"]
    assert [image["name"] for image in images] == names


def test_too_many_images_are_refused():
    with client(images=2) as found:
        assert len(scored(found, *[("a", grey(1))] * 2)["images"]) == 2
        refused(found.post("/api/score", files=parts(*[("a", grey(1))] * 3)), 413, "at most 2 in one request")


@pytest.mark.parametrize(("headers", "chunks"), [([(b"content-length", b"900000")], 0), ([], 6)], ids=["told", "not"])
def test_a_body_without_end_is_read_to_the_limit_only(headers, chunks):
    head = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    read, sent = 0, []

    async def receive():
        nonlocal read
        read += 1
        return {"type": "http.request", "body": bytes(100_000) if read > 1 else head, "more_body": True}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x"), *headers]
    scope = {"type": "http", "method": "POST", "path": "/api/score", "query_string": b"", "headers": headers}
    asyncio.run(make_app(ENSEMBLE, UploadLimits(megabytes=0.4))(scope, receive, send))
    assert sent[0]["status"] == 413
    assert b"over 0.4 MB in one request" in sent[1]["body"]
    assert read == chunks


def test_the_limit_of_size_is_told():
    with client(megabytes=0.01) as found:
        assert len(scored(found, ("a.png", grey(1)))["images"]) == 1
        refused(found.post("/api/score", files=parts(("a", bytes(70_000)))), 413, "over 0.01 MB in one request")


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        ({"json": []}, 415, "multipart/form-data"),
        ({"files": [("others", ("a", b"x"))]}, 400, "no images: send each as a part named images"),
        ({"files": parts(("a", b"x")), "data": {"images": "x"}}, 400, "Too many fields"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400, "Missing boundary"),
    ],
)
def test_what_is_no_upload_is_refused(request_, status, text):
    with client() as found:
        refused(found.post("/api/score", **request_), status, text)


def test_a_member_without_an_answer_is_told():
    ensemble = replace(ENSEMBLE, runners=(ENSEMBLE.runners[0], runner("two", np.nan)))
    with client(ensemble) as found:
        refused(found.post("/api/score", files=parts(("a.png", grey(1)))), 500, "no finite logit")


def test_members_that_a_cascade_leaves_out_are_null(tmp_path, monkeypatch):
    monkeypatch.setattr(
        autotune, "seconds_per_image", lambda runner, *others: {"one": 0.001, "two": 0.009}[runner.name]
    )
    for number in range(12):
        write_image(tmp_path / "images" / f"{number:02}.png", 20 * number)
    bundle = exported_run(tmp_path / "run", cascade=True) / "bundle"
    ensemble = load_bundle(bundle, RuntimeOptions(device="cpu", cascade=0.01))
    frame, _ = infer(read_inputs(tmp_path / "images"), ensemble, with_members=True)
    files = [(name, (tmp_path / "images" / name).read_bytes()) for name in frame["id"]]
    with client(ensemble) as found:
        assert found.get("/api/info").json()["cascade"]
        images = scored(found, *files)["images"]
    found = pd.DataFrame([{"target": image["target"], **image["members"]} for image in images], dtype=float)
    pd.testing.assert_frame_equal(found, frame[["target", "one", "two"]], check_exact=True)
    assert found["two"].isna().any()
    assert not found["two"].isna().all()


def test_members_that_are_looked_up_are_refused():
    with pytest.raises(UnavailableError, match="other cannot score new images"):
        make_app(replace(ENSEMBLE, externals=(External("other", pd.Series(), pd.Series()),)), UploadLimits())


def test_every_answer_forbids_foreign_content():
    with client() as found:
        for path in (*FILES, "/api/info", "/nothing"):
            headers = found.get(path).headers
            assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://| style=| on\w+=", "".join(found.get(path).text for path in FILES))


def test_info_says_what_runs():
    with client(images=3, megabytes=5) as found:
        info = found.get("/api/info").json()
    assert info.pop("version")
    assert info == {
        "positive": "ai",
        "threshold": 0.6,
        "members": ["one", "two"],
        "runs": {"one": "openvino bf16", "two": "openvino fp32"},
        "device": "cpu",
        "cascade": False,
        "explain": False,
        "limits": {"images": 3, "megabytes": 5},
    }
