"""push and pull that are killed or cut off; the real huggingface_hub against a loopback Hub."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, exported_run
from hub_client import environment
from hub_state import Fault

from ensemble.core import artifacts
from export.bundle import bundle

PIECE = 3 << 20


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("exported"), cascade=True)


@pytest.fixture
def run(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "run")


def large_bundle(folder, sizes, seed=0):
    """The bundle with files of these sizes in place of its members', which nothing could run."""
    rng = np.random.default_rng(seed)
    entries = bundle.read_contents(folder)["members"]
    for entry, size in zip(entries.values(), sizes, strict=True):
        (folder / entry["file"]).write_bytes(rng.bytes(size))
    bundle.write_bundle(folder, entries)
    return folder


def killed_when(reached, command, hub, home):
    """Run a command and kill it once `reached()`."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *map(str, command)],
        env=environment(hub.url, home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=home,
    ) as process:
        deadline = time.monotonic() + 120
        while not reached():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    hub.wait, known = 0.0, None
    while known != (known := (dict(hub.received), dict(hub.sent))):  # what was on its way arrives
        time.sleep(0.5)


def test_a_killed_push_repeated_sends_only_what_is_missing(hub, call, run, repo, tmp_path):
    folder = large_bundle(run / "bundle", (PIECE, 2 * PIECE))
    first, second = (artifacts.file_sha256(folder / f"members/{name}.fp32.onnx") for name in ("one", "two"))
    hub.wait = 0.3
    killed_when(lambda: hub.received[second], ["push", repo, "--bundle", folder], hub, tmp_path)
    assert hub.repos[repo].messages == []  # nothing half is ever seen
    assert hub.received[first] == PIECE
    assert hub.seen.index("POST /verify") < hub.seen.index(f"PUT /lfs/{second}/1")  # one after the other
    before = hub.received[second]
    assert before < 2 * PIECE
    hub.received.clear()
    call("push", repo, "--bundle", folder)
    assert hub.received[first] == 0
    assert hub.received[second] == 2 * PIECE
    bundle_on_hub = hub.files(repo)
    assert bundle_on_hub["members/two.fp32.onnx"] == (folder / "members" / "two.fp32.onnx").read_bytes()


def test_a_killed_pull_repeated_fetches_only_what_is_missing(hub, call, run, repo, tmp_path):
    folder = large_bundle(run / "bundle", (PIECE // 4, 3 * PIECE), seed=1)
    call("push", repo, "--bundle", folder)
    one, two = "members/one.fp32.onnx", "members/two.fp32.onnx"
    hub.wait = 0.3
    command = ["pull", repo, tmp_path / "pulled"]
    killed_when(lambda: hub.sent[two] >= PIECE and hub.sent[one] == PIECE // 4, command, hub, tmp_path)
    assert not (tmp_path / "pulled").exists()
    hub.sent.clear()
    with_same_cache = environment(hub.url, tmp_path)
    again = [sys.executable, str(ROOT / "cli.py"), *map(str, command)]
    subprocess.run(again, env=with_same_cache, check=True, cwd=tmp_path, capture_output=True)
    assert hub.sent[two] == 3 * PIECE
    assert hub.sent[one] == 0
    bundle.open_bundle(tmp_path / "pulled")


@pytest.mark.parametrize("kind", ["PUT /lfs/", "GET /.*/resolve/.*two"])
def test_a_cut_connection_heals_by_itself(kind, hub, call, run, repo, tmp_path):
    folder = large_bundle(run / "bundle", (PIECE, 8 * PIECE), seed=len(kind))
    hub.faults.append(Fault(kind))
    call("push", repo, "--bundle", folder)
    call("pull", repo, tmp_path / "pulled")
    assert hub.faults[0].times == 0
    assert (tmp_path / "pulled" / "members" / "two.fp32.onnx").read_bytes() == (
        folder / "members" / "two.fp32.onnx"
    ).read_bytes()
    if kind.startswith("GET"):
        # what was cut off in the middle went on near there: the client counts in pieces of 10 MiB
        assert 8 * PIECE <= hub.sent["members/two.fp32.onnx"] < 9 * PIECE
