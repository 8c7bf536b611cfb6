"""infer --engine ray when a worker, a machine or the command itself dies, and where memory is short."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time

import cluster_job
import psutil
import pytest
import ray_nodes

pytestmark = pytest.mark.cluster
SHARDS = 24
STOPPED = "Stopped. What was finished is kept; the same command goes on from there."


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images that take a moment to decode, so that there is a middle of the job."""
    return cluster_job.make(tmp_path_factory.mktemp("work"), side=400, rows=SHARDS * 128 - 5)


@pytest.fixture(scope="module")
def undisturbed(work):
    cluster_job.run(cluster_job.command(work, work / "undisturbed.csv", "--members"))
    return cluster_job.written(work / "undisturbed.csv")


def start(nodes, work, output, *more):
    call = cluster_job.command(work, output, "--members", "--engine", "ray", "--address", nodes.address, *more)
    return subprocess.Popen(
        call,
        env=os.environ | nodes.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def shards(output):
    return len(list(output.with_name(f"{output.name}.partial").glob("*.parquet")))


def wait_for(process, output, count):
    """Until so many shards are there, and the job goes on."""
    waited = time.monotonic() + 90
    while shards(output) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < waited
        time.sleep(0.02)
    assert process.poll() is None


def finish(process, output, code=1):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    assert err.count("\n") == 1, err
    return out


@pytest.fixture(scope="module")
def nodes():
    with ray_nodes.cluster(2) as nodes:
        yield nodes


def test_a_killed_worker_is_replaced_and_nothing_is_doubled(nodes, work, undisturbed, tmp_path):
    output = tmp_path / "out.csv"
    process = start(nodes, work, output, "--cpus-per-worker", "1")
    wait_for(process, output, 2)
    workers = nodes.workers("MapWorker")
    assert len(workers) == 2
    workers[0].kill()
    finish(process, output)
    assert cluster_job.written(output) == undisturbed


def test_the_command_killed_and_started_again_scores_only_what_is_missing(nodes, work, undisturbed, tmp_path):
    output = tmp_path / "out.csv"
    process = start(nodes, work, output)
    wait_for(process, output, 5)
    process.kill()
    process.communicate()
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out.csv.partial").glob("*.parquet")}
    assert 5 <= len(kept) < SHARDS
    process = start(nodes, work, output)
    wait_for(process, output, len(kept) + 1)
    now = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out.csv.partial").glob("*.parquet")}
    assert {name: now[name] for name in kept} == kept
    out = finish(process, output)
    assert f"Going on: {128 * len(kept):,} of" in out or f"Going on: {128 * len(kept) - 5:,} of" in out
    assert cluster_job.written(output) == undisturbed


def test_a_job_goes_on_with_its_cores_on_a_cluster_that_has_changed(work, undisturbed, tmp_path):
    """A smaller machine joins: a new job's equal share would be one core."""
    output = tmp_path / "out.csv"
    with ray_nodes.cluster(2) as nodes:
        process = start(nodes, work, output)
        wait_for(process, output, 3)
        process.kill()
        process.communicate()
        nodes.add(1)
        out = finish(start(nodes, work, output), output)
    assert "Going on: " in out
    assert "1 worker of 2 cores on a Ray cluster: the cluster has 3 cores" in out
    assert cluster_job.written(output) == undisturbed


def test_interrupted_it_stops_at_once_and_goes_on_on_one_machine(nodes, work, undisturbed, tmp_path):
    output = tmp_path / "out.csv"
    process = start(nodes, work, output, "--cpus-per-worker", "2")
    wait_for(process, output, 3)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, STOPPED)
    assert time.monotonic() - began < 10
    assert 3 <= shards(output) < SHARDS
    said = cluster_job.run(cluster_job.command(work, output, "--members"))
    assert "Going on: " in said
    assert cluster_job.written(output) == undisturbed


def test_a_ray_of_its_own_goes_with_the_killed_command(work, tmp_path):
    output = tmp_path / "out.csv"
    call = cluster_job.command(work, output, "--engine", "ray")
    temporary = tempfile.mkdtemp(prefix="t-", dir="/tmp")  # what a killed command leaves
    environment = os.environ | {"TMPDIR": temporary, "RAY_ADDRESS": ""}
    process = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(process, output, 1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in children)
    process.kill()
    process.communicate()
    # two agents of Ray's own look for the others about a minute longer
    _, alive = psutil.wait_procs([child for child in children if "Agent" not in child.name()], timeout=20)
    shutil.rmtree(temporary)
    assert alive == []


def test_a_killed_node_among_several(work, undisturbed, tmp_path):
    output = tmp_path / "out.csv"
    with ray_nodes.cluster(1, 1) as nodes:
        process = start(nodes, work, output)
        wait_for(process, output, 3)
        assert len(nodes.workers("MapWorker")) == 2
        nodes.kill(nodes.held[1])
        out = finish(process, output)
    assert "on 2 nodes" in out
    assert cluster_job.written(output) == undisturbed


def test_a_head_that_dies_is_told_and_the_job_goes_on_elsewhere(work, undisturbed, tmp_path):
    output = tmp_path / "out.csv"
    with ray_nodes.cluster(2) as nodes:
        process = start(nodes, work, output)
        wait_for(process, output, 2)
        nodes.kill(nodes.held[0])
        out, err = process.communicate(timeout=150)  # Ray itself ends it after a minute
    assert process.returncode == 1, out + err
    assert re.match(rf"The head of the cluster at .*:{nodes.address.rpartition(':')[2]} is gone\. ", err)
    assert err.count("\n") == 1
    assert "Going on: " in cluster_job.run(cluster_job.command(work, output, "--members"))
    assert cluster_job.written(output) == undisturbed


def test_a_small_object_store(work, undisturbed, tmp_path):
    output = tmp_path / "out.csv"
    with ray_nodes.cluster(2, store=80_000_000) as nodes:
        finish(start(nodes, work, output, "--cpus-per-worker", "1"), output)
    assert cluster_job.written(output) == undisturbed


def test_workers_that_always_die_end_the_job(nodes, work, tmp_path):
    output = tmp_path / "out.csv"
    process = start(nodes, work, output)
    waited = time.monotonic() + 110
    while process.poll() is None and time.monotonic() < waited:
        for worker in nodes.workers("MapWorker(MapBatches(Worker)).submit"):
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        time.sleep(0.05)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 2, err
    assert re.search(r"workers died 4 times at the images from row \d+ on, most likely for want of memory", err)
    assert err.count("\n") == 1
