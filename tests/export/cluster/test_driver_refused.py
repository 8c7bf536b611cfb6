"""infer --engine ray where the cluster is not there, is too small, is other than this machine, or lacks the files."""

import os
import shutil
import socket

import cluster_job
import pytest
import ray_nodes
from helpers import exported_run, run_python, write_image

from ensemble.core import artifacts

SHORT = "from ensemble.cluster import connect; connect.ANSWER_SECONDS = 4; import cli; cli.main()"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    run = exported_run(tmp_path_factory.mktemp("run"))
    write_image(run / "images" / "a.png")
    places = ["--bundle", run / "bundle", "--input", run / "images", "--output", run / "out.csv"]
    return ["infer", *places, "--engine", "ray"]


def refused(*arguments):
    done = run_python("-c", SHORT, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "Error: no Ray cluster at 127.0.0.1:9 (Connection refused); start one with: ray start --head"),
        ("nowhere.invalid:6379", "Error: no Ray cluster at nowhere.invalid:6379 ("),
        ("127.0.0.1:99999", "Error: no Ray cluster at 127.0.0.1:99999 ("),
        ("ray://127.0.0.1:10001", "Error: --address ray://127.0.0.1:10001: Ray's client cannot run such a job"),
        ("here", "Error: --address here is not HOST:PORT, and not auto"),
    ],
)
def test_no_cluster_is_told_at_once(arguments, address, message):
    assert refused(*arguments, "--address", address).startswith(message)


def test_an_address_of_the_environment_is_told_alike(arguments, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert "no Ray cluster at 127.0.0.1:9 (Connection refused)" in refused(*arguments)


@pytest.mark.cluster
def test_something_that_is_no_cluster_is_not_waited_for(arguments):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        err = refused(*arguments, "--address", address)
    assert f"no Ray cluster answers at {address} within 4 s; start one with: ray start --head" in err


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return cluster_job.make(tmp_path_factory.mktemp("work"), rows=300)


@pytest.fixture(scope="module")
def nodes():
    with ray_nodes.cluster(2, gpus=1) as nodes:
        yield nodes


def call(nodes, work, output, *more, **options):
    return cluster_job.command(work, output, "--engine", "ray", "--address", nodes.address, *more, **options)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--gpus-per-worker", 2],
            "no node has room for a worker of 1 core and 2 GPUs: the cluster has 2 cores and 1 GPU",
        ),
        (["--workers", 3], "there is no room for 3 workers of 1 core, only for 2: the cluster has 2 cores"),
        (["--cpus-per-worker", 64], "no node has room for a worker of 64 cores: the cluster has 2 cores"),
    ],
)
def test_more_than_the_cluster_has(nodes, work, tmp_path, more, message):
    err = cluster_job.run(call(nodes, work, tmp_path / "out.csv", *more), nodes.environment, code=2)
    assert err.startswith("Error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.cluster
def test_a_cluster_with_another_token(nodes, work, tmp_path):
    environment = nodes.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    err = cluster_job.run(call(nodes, work, tmp_path / "out.csv"), environment, code=2)
    assert err.startswith(f"Error: the Ray cluster at {nodes.address} asks for another token than the one here")
    assert err.count("\n") == 1
    assert nodes.environment["RAY_AUTH_TOKEN"] not in err


@pytest.mark.cluster
def test_a_damaged_bundle_is_one_line(nodes, work, tmp_path):
    shutil.copytree(work / "bundle", tmp_path / "bundle")
    os.symlink(work / "images", tmp_path / "images")
    (tmp_path / "bundle" / "members" / "one.fp32.onnx").write_bytes(b"x")
    err = cluster_job.run(call(nodes, tmp_path, tmp_path / "out.csv", source="images"), nodes.environment, code=2)
    assert "members/one.fp32.onnx is damaged" in err
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def elsewhere(work, tmp_path_factory):
    """A cluster whose one worker runs on a machine that has neither the bundle nor `hidden`."""
    hidden = tmp_path_factory.mktemp("hidden")
    shutil.copytree(work / "images", hidden / "inner")
    cluster_job.write_shards(work, hidden)
    cache = tmp_path_factory.mktemp("cache of the node")
    with ray_nodes.cluster(0) as nodes:
        nodes.add(2, environment={"MANYEYES_CACHE": str(cache)}, hidden=[work / "bundle", hidden])
        yield nodes, hidden, cache


@pytest.mark.cluster
def test_a_machine_without_the_bundle_is_sent_it_once(elsewhere, work, tmp_path):
    nodes, _, cache = elsewhere
    here, there = tmp_path / "here.csv", tmp_path / "there.csv"
    cluster_job.run(cluster_job.command(work, here))
    cluster_job.run(call(nodes, work, there, "--cpus-per-worker", 1), nodes.environment)
    assert cluster_job.written(here) == cluster_job.written(there)
    (kept,) = (path for path in (cache / "bundles").iterdir() if path.is_dir())
    assert artifacts.file_sha256(kept / "bundle.json") == artifacts.file_sha256(work / "bundle" / "bundle.json")
    before = (kept / "bundle.json").stat().st_mtime_ns
    cluster_job.run(call(nodes, work, there), nodes.environment)
    assert (kept / "bundle.json").stat().st_mtime_ns == before


@pytest.mark.cluster
@pytest.mark.parametrize("how", ["folder", "csv", "tars", "sets"])
def test_images_that_a_worker_does_not_see_end_the_job(elsewhere, work, tmp_path, how):
    nodes, hidden, _ = elsewhere
    lines = [f"{row},{hidden}/inner/{row % 20}.png\n" for row in range(300)]
    (tmp_path / "test.csv").write_text("id,path\n" + "".join(lines))
    source, missed = {
        "folder": (hidden / "inner", hidden / "inner"),
        "csv": (tmp_path / "test.csv", hidden / "inner" / "0.png"),
        "tars": (hidden / "tars", hidden / "tars" / "0.tar"),
        "sets": (hidden / "sets", hidden / "sets" / "0.parquet"),
    }[how]
    err = cluster_job.run(call(nodes, work, tmp_path / "out.csv", source=source), nodes.environment, code=2)
    assert err.count("\n") == 1
    assert f"{missed} is not on {socket.gethostname()} (" in err
    assert "where every machine sees" in err
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.cluster
def test_other_versions_on_a_worker_are_named_with_its_machine(work, tmp_path):
    old = tmp_path / "old"
    (old / "pillow-12.0.dist-info").mkdir(parents=True)
    (old / "pillow-12.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: pillow\nVersion: 12.0\n")
    with ray_nodes.cluster(0) as nodes:
        nodes.add(1, environment={"PYTHONPATH": str(old)})
        err = cluster_job.run(call(nodes, work, tmp_path / "out.csv"), nodes.environment, code=2)
    assert f"Error: {socket.gethostname()} (" in err
    assert ") has other versions: Pillow 12.0 there, " in err
    assert "install the same on every machine of the cluster" in err
    assert err.count("\n") == 1
