"""`infer` killed at random moments, then finished: the files are those of a run that nobody disturbed."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, exported_run, read_csv, run_python
from pictures import encoded, noise
from tar_shards import write_tar

from export.inference import journal

SHARDS = 6
ROWS = SHARDS * journal.SHARD_ROWS - 5
# a slower disk, so that kills fall among the shards; what runs in the background of a shell is deaf to interrupts
COMMAND = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
fsync = os.fsync
os.fsync = lambda file: (time.sleep(0.1), fsync(file))
import cli
cli.main()
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny bundle, and a list of images, some of which cannot be read."""
    work = tmp_path_factory.mktemp("work")
    exported_run(work, cascade=True)
    (work / "images").mkdir()
    for number in range(20):
        dark = noise(number, 12, 8).point(lambda value, by=1 + number % 3: value // by)
        (work / "images" / f"{number}.png").write_bytes(encoded(dark) if number % 7 else b"broken")
    lines = [f"{row},images/{row * 7 % 20}.png\n" for row in range(ROWS)]
    (work / "test.csv").write_text("id,path\n" + "".join(lines))
    return work


def arguments(work, output, *more):
    places = ["--bundle", work / "bundle", "--input", work / "test.csv", "--output", output]
    return ["infer", *places, "--members", "--device", "cpu", *more]


def finish(work, output, *more):
    done = run_python("-c", "import cli; cli.main()", *arguments(work, output, *more))
    assert (done.returncode, f"images scored -> {output}" in done.stdout) == (1, True), done.stderr  # some are broken
    assert not output.with_name(f"{output.name}.partial").exists()
    return output.read_bytes(), output.with_name(f"{output.stem}.errors.csv").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(work):
    return finish(work, work / "undisturbed.csv")


def stop_at(work, output, shards, seconds=0.0, how=signal.SIGKILL, more=()):
    """Start the command, and stop it some time after so many shards are there: its exit code and standard error."""
    folder = output.with_name(f"{output.name}.partial")
    command = [sys.executable, "-c", COMMAND, *map(str, arguments(work, output, *more))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and len(list(folder.glob("*.parquet"))) < shards:
            time.sleep(0.005)
        time.sleep(seconds)
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors.decode()


def test_killed_three_times_and_finished(work, undisturbed, tmp_path):
    output, rng = tmp_path / "out.csv", np.random.default_rng(0)
    codes = [stop_at(work, output, shards, rng.uniform(0, 0.1))[0] for shards in (1, 3, SHARDS)]
    assert codes[:2] == [-signal.SIGKILL] * 2
    assert finish(work, output) == undisturbed


def test_killed_among_tars_and_finished(work, undisturbed, tmp_path):
    for shard in range(5):
        rows = {f"{row:04}.png": row for row in range(shard * 200, min(shard * 200 + 200, ROWS))}
        files = {name: (work / "images" / f"{row * 7 % 20}.png").read_bytes() for name, row in rows.items()}
        write_tar(tmp_path / f"tars/{shard}.tar", files)
    output, more = tmp_path / "out.csv", ("--input", tmp_path / "tars")
    codes = [stop_at(work, output, shards, more=more)[0] for shards in (1, 4)]
    assert codes == [-signal.SIGKILL] * 2
    finish(work, output, *more)
    found, expected = read_csv(output), read_csv(work / "undisturbed.csv")
    assert list(found["id"].astype(int)) == list(range(ROWS))
    assert found.drop(columns="id").equals(expected.drop(columns="id"))


@pytest.mark.slow
def test_a_killed_cascade_goes_on_with_the_same_order_and_limits(work, undisturbed, tmp_path):
    more = ("--cascade", "0.01")
    whole = finish(work, work / "cascade.csv", *more)
    cells = read_csv(work / "cascade.csv")
    read = cells["target"] != ""
    left = (cells.loc[read, ["one", "two"]] == "").any(axis=1)
    assert 0 < left.sum() < read.sum()
    assert whole[0] != undisturbed[0]
    codes = [stop_at(work, tmp_path / "out.csv", shards, more=more)[0] for shards in (1, 4)]
    assert codes == [-signal.SIGKILL] * 2
    assert finish(work, tmp_path / "out.csv", *more) == whole


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_fifty_random_moments(work, undisturbed, tmp_path, seed):
    output, rng = tmp_path / "out.csv", np.random.default_rng(seed)
    kills = [
        stop_at(work, output, rng.integers(SHARDS + 1), rng.choice([0.02, 0.2, 2]) * rng.random()) for _ in range(5)
    ]
    assert any(code == -signal.SIGKILL for code, _ in kills)  # others come when all is done
    assert finish(work, output) == undisturbed


def test_interrupted_it_says_that_it_goes_on(work, tmp_path):
    output = tmp_path / "out.csv"
    code, errors = stop_at(work, output, 2, how=signal.SIGINT)
    assert (code, errors.strip()) == (130, "Stopped. What was finished is kept; the same command goes on from there.")
    assert len(list((tmp_path / "out.csv.partial").glob("*.parquet"))) >= 2
