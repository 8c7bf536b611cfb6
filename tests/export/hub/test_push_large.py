"""A bundle of 1 GB through the loopback Hub: killed half-way and repeated, in little memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, exported_run
from hub_client import environment

from ensemble.core import artifacts
from export.bundle import bundle

SIZES = {"one": 400_000_000, "two": 600_000_000}
LIMIT = 300_000_000  # bytes of memory
WITH_PEAK = """
import re, sys
from pathlib import Path
import cli
try:
    cli.main()
finally:  # not ru_maxrss, which starts at what the parent held
    peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
    print("peak", int(peak) * 1024, file=sys.stderr)
"""


def write_random(path, size, seed):
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        for start in range(0, size, 1 << 24):
            file.write(rng.bytes(min(1 << 24, size - start)))


def command(arguments, hub, home, held=0, **more):
    environ = environment(hub.url, home)
    line = [sys.executable, "-c", f"held = bytes(b'x' * {held})\n{WITH_PEAK}", *map(str, arguments)]
    return subprocess.Popen(line, env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True, **more)


def kill_at(count, moved, arguments, hub, home):
    with command(arguments, hub, home, stdout=subprocess.DEVNULL) as process:
        while moved.total() < count:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    known = None
    while known != (known := moved.total()):  # what was on its way arrives
        time.sleep(0.5)
    moved.clear()


def peak(arguments, hub, home, held=0):
    with command(arguments, hub, home, held) as process:
        _, err = process.communicate()
    assert process.returncode == 0, err
    used = int(err.split("peak ")[1])
    print(arguments[0], f"peak {used / 1e6:.0f} MB")
    return used


@pytest.mark.slow
def test_a_gigabyte_is_pushed_and_pulled_in_little_memory(hub, tmp_path):
    for seen in (hub.faults, hub.received, hub.sent):
        seen.clear()
    run = exported_run(tmp_path / "run")
    folder = artifacts.bundle_path(run)
    files = {name: folder / f"members/{name}.fp32.onnx" for name in SIZES}
    for seed, (name, size) in enumerate(SIZES.items()):
        write_random(files[name], size, seed)
    bundle.write_bundle(folder, bundle.read_contents(folder)["members"])
    digests = {name: artifacts.file_sha256(path) for name, path in files.items()}

    push = ["push", "me/large", "--run", run]
    kill_at(sum(SIZES.values()) // 2, hub.received, push, hub, tmp_path)
    assert peak(push, hub, tmp_path) < LIMIT
    assert peak(["--help"], hub, tmp_path, held=LIMIT) > LIMIT
    assert hub.received[digests["one"]] == 0
    assert hub.received[digests["two"]] == SIZES["two"]

    pull = ["pull", "me/large", tmp_path / "pulled"]
    hub.repos["me/large"].commits = {
        commit: dict(sorted(kept.items())) for commit, kept in hub.repos["me/large"].commits.items()
    }
    kill_at(SIZES["one"] * 2 + 100_000_000, hub.sent, pull, hub, tmp_path)
    assert peak(pull, hub, tmp_path) < LIMIT
    assert hub.sent["members/one.fp32.onnx"] == 0
    assert hub.sent["members/two.fp32.onnx"] == SIZES["two"]
    bundle.open_bundle(tmp_path / "pulled")
    for path in (*files.values(), *Path(hub.store).iterdir()):
        path.unlink()
