"""Heat maps on the page: a real run of tiny networks."""

import base64
import io
import threading
from functools import partial

import httpx2
import numpy as np
import pytest
from helpers import run_cli
from pictures import encoded, noise
from PIL import Image
from small_members import write_networks
from small_server import ENSEMBLE, BaseClient, grey, parts, refused, running, scored
from starlette.testclient import TestClient

from ensemble.data.inputs import inputs_from_files
from ensemble.stacking.stack import read_stacker
from export.inference.explain import explain_image
from export.inference.infer import infer
from export.inference.loading import load_networks
from export.runtimes.settings import RuntimeOptions
from export.web.limits import UploadLimits
from export.web.server import make_app

NAME = "<script>, é.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_networks(tmp_path_factory.mktemp("explain"))


@pytest.fixture(scope="module")
def networks(run):
    """The ensemble, and what makes heat maps of it."""
    ensemble, networks = load_networks(run, read_stacker(run), RuntimeOptions("torch", device="cpu"))
    return ensemble, partial(explain_image, ensemble, networks)


@pytest.fixture
def client(networks):
    ensemble, explain = networks
    with TestClient(make_app(ensemble, UploadLimits(megabytes=1), explain=explain), "http://localhost") as found:
        yield found


def asked(client, name, data):
    answer = client.post("/api/explain", files=parts((name, data)))
    assert answer.status_code == 200, answer.text
    return answer.json()


def picture(member):
    head, _, text = member["heat"].partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(text)), formats=["PNG"])


def test_each_member_has_a_map_over_the_image(client, networks, tmp_path):
    one, other = (encoded(noise(seed, 90, 60)) for seed in (5, 6))
    (tmp_path / "a.png").write_bytes(one)
    expected = infer(inputs_from_files(["a"], [tmp_path / "a.png"]), networks[0], with_members=True)[0].iloc[0]
    answer = asked(client, NAME, one)
    assert client.get("/api/info").json()["explain"] is True
    assert answer["name"] == NAME
    assert answer["target"] == pytest.approx(expected["target"])
    assert {name: member["p"] for name, member in answer["members"].items()} == pytest.approx(
        {name: expected[name] for name in ("one", "two")}
    )
    assert "not proof" in answer["note"]
    maps = [picture(member) for member in answer["members"].values()]
    maps += [picture(member) for member in asked(client, NAME, other)["members"].values()]
    assert [found.size for found in maps] == [(90, 60)] * 4
    assert len({found.tobytes() for found in maps}) == 4
    assert asked(client, NAME, one) == answer
    for found in maps[:2]:  # grey is the image; colour the heat
        red, _, blue = np.asarray(found.convert("RGB"), dtype=int).transpose(2, 0, 1)
        assert np.abs(red - blue).max() > 20


def test_a_large_image_has_smaller_maps(client):
    answer = asked(client, "a.png", encoded(Image.new("RGB", (1024, 300), (9, 99, 200))))
    assert picture(answer["members"]["one"]).size == (512, 150)


def test_what_is_no_image_is_told(client):
    refused(client.post("/api/explain", files=parts(("a.png", b"nothing"))), 422, "a.png: not an image")
    refused(client.post("/api/explain", files=parts(("a.png", b""))), 422, "a.png: the file is empty")
    refused(client.post("/api/explain", files=parts(*[("a", grey(1))] * 2)), 413, "at most 1 in one request")
    refused(client.post("/api/explain", files=parts(("a", bytes(1_100_000)))), 413, "over 1 MB")
    refused(client.post("/api/explain", json=[]), 415, "multipart/form-data")
    refused(client.post("/api/explain", files=parts(("a", grey(1))), headers={"origin": "http://x"}), 403, "another")


def test_without_networks_there_is_no_such_path():
    with TestClient(make_app(ENSEMBLE, UploadLimits()), "http://localhost") as found:
        assert found.get("/api/info").json()["explain"] is False
        assert found.post("/api/explain", files=parts(("a.png", grey(1)))).status_code == 404


def test_maps_wait_for_what_came_before():
    at_work, go_on, order = threading.Event(), threading.Event(), []

    def explain(name, data):
        order.append(name)
        at_work.set()
        assert go_on.wait(30)
        return {"name": name}

    def ask(name):
        with httpx2.Client(timeout=60) as found:
            return found.post(f"{url}/api/explain", files=parts((name, b"x"))).json()["name"]

    with running(ENSEMBLE, explain) as url, httpx2.Client(timeout=60) as found:
        first = threading.Thread(target=ask, args=("first",))
        first.start()
        assert at_work.wait(30)
        answers = []
        second = threading.Thread(target=lambda: answers.append(scored(BaseClient(found, url), ("b.png", grey(2)))))
        second.start()
        second.join(0.3)
        assert answers == []
        go_on.set()
        first.join(30)
        second.join(30)
        assert answers[0]["images"][0]["name"] == "b.png"
    assert order == ["first"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--bundle", "x", "--explain"], "a bundle has no PyTorch members"),
        (["--bundle", "x", "--runtime", "torch"], "a bundle has no PyTorch members"),
    ],
)
def test_a_bundle_has_no_maps(options, text):
    code, _, said = run_cli("serve", *options)
    assert code == 2
    assert text in said.splitlines()[-1]
