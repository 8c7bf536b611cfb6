"""infer --engine ray on a cluster of processes: the files are those of one machine."""

import json
import os
import shutil
import tempfile
import time
from dataclasses import replace

import cluster_job
import pytest
import ray_nodes
from helpers import STACKER, read_csv, write_csv
from object_store import KEYS, needs_s3, upload_folder

from ensemble.core import artifacts
from ensemble.data import storage
from export.bundle import bundle as bundles

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return cluster_job.make(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def nodes():
    with ray_nodes.cluster(2) as nodes:
        yield nodes


def on_cluster(nodes, work, output, *more, **options):
    call = cluster_job.command(work, output, "--engine", "ray", "--address", nodes.address, *more, **options)
    return cluster_job.run(call, nodes.environment)


def same(nodes, work, tmp_path, *more, source="test.csv", size=()):
    """Both ways; what each said."""
    here, there = tmp_path / "here.csv", tmp_path / "there.csv"
    said = cluster_job.run(cluster_job.command(work, here, *more, source=source))
    told = on_cluster(nodes, work, there, *more, *size, source=source)
    assert cluster_job.written(here) == cluster_job.written(there)
    made = [json.loads(path.with_name(f"{path.name}.json").read_text())["made"] for path in (here, there)]
    assert made[0] | {"date": ""} == made[1] | {"date": ""}
    return said, told


def test_members_broken_images_and_hostile_ids(nodes, work, tmp_path):
    said, told = same(nodes, work, tmp_path, "--members")
    assert len(read_csv(tmp_path / "there.errors.csv")) > 100
    assert "1 worker of 2 cores on a Ray cluster: the cluster has 2 cores and 0 GPUs on 1 node" in told
    assert said.splitlines()[0] == told.splitlines()[0]  # what runs the members, and why


def test_other_images_give_other_bytes(nodes, work, tmp_path):
    """The twin: what `same` compares depends on the images."""
    (tmp_path / "images").mkdir()
    for file in (work / "images").iterdir():
        shutil.copy(file, tmp_path / "images" / file.name)
    shutil.copy(work / "images" / "1.png", tmp_path / "images" / "2.png")
    shutil.copy(work / "test.csv", tmp_path / "test.csv")
    os.symlink(work / "bundle", tmp_path / "bundle")
    on_cluster(nodes, work, tmp_path / "one.csv")
    on_cluster(nodes, tmp_path, tmp_path / "two.csv")
    assert cluster_job.written(tmp_path / "one.csv")[0] != cluster_job.written(tmp_path / "two.csv")[0]


def test_two_workers_and_a_cascade_that_was_fitted_by_one(nodes, work, tmp_path):
    here, there = tmp_path / "here.csv", tmp_path / "there.csv"
    more = ("--cascade", "0.01", "--members")
    told = on_cluster(nodes, work, there, *more, "--cpus-per-worker", "1")
    assert "2 workers of 1 core each" in told
    cells = read_csv(there)
    assert (cells.loc[cells["target"] != "", ["one", "two"]] == "").any(axis=1).sum() > 0
    # what members cost was measured on one core: on one core it is the same cascade
    call = cluster_job.command(work, here, *more)
    cluster_job.run(["taskset", "-c", "0", *call])
    assert cluster_job.written(here) == cluster_job.written(there)


def test_another_runtime_and_batch(nodes, work, tmp_path):
    same(nodes, work, tmp_path, "--runtime", "onnxruntime", "--batch-size", "5", "--members")


def test_mirrored_images(nodes, work, tmp_path):
    """What the bundle's stack says of mirroring reaches the workers: they run that member twice."""
    shutil.copytree(work / "bundle", tmp_path / "bundle")
    os.symlink(work / "images", tmp_path / "images")
    values = bundles.read_contents(tmp_path / "bundle")
    artifacts.write_json(tmp_path / "bundle" / "stacker.json", replace(STACKER, tta_members=("one",)).to_dict())
    values["files"]["stacker.json"] = artifacts.file_sha256(tmp_path / "bundle" / "stacker.json")
    bundles.write_contents(tmp_path / "bundle", values)
    said, told = same(nodes, tmp_path, tmp_path, "--tta", "--members", source="images")
    assert "Averaged over mirrored images: one" in said
    assert "Averaged over mirrored images: one" in told


@pytest.mark.parametrize("kind", ["sets", "tars"])
def test_images_in_parquet_files_and_in_tars(nodes, work, tmp_path, kind):
    cluster_job.write_shards(work, tmp_path)
    same(nodes, work, tmp_path, "--members", source=tmp_path / kind)


@needs_s3
def test_images_of_a_store(work, tmp_path, s3_server):
    """The workers have the credentials of those who started them."""
    url = f"s3://bucket-{time.time_ns()}"
    cluster_job.write_shards(work, tmp_path)
    keys = KEYS | {"AWS_ENDPOINT_URL": s3_server[0]}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in keys.items():
            patch.setenv(name, value)
        storage._filesystem.cache_clear()
        storage.filesystem(url).mkdir(url)
        upload_folder(tmp_path / "tars", f"{url}/tars")
    storage._filesystem.cache_clear()
    output = tmp_path / "out.csv"
    with ray_nodes.cluster(2, environment=keys) as nodes:
        call = cluster_job.command(work, output, "--engine", "ray", "--address", nodes.address)
        call[call.index("--input") + 1] = f"{url}/tars"
        cluster_job.run(call, nodes.environment | keys)
    scores = cluster_job.written(output)[0]
    cluster_job.run(cluster_job.command(work, output, source=tmp_path / "tars"))
    assert cluster_job.written(output)[0] == scores


def test_a_folder_named_from_where_the_command_runs(nodes, work, tmp_path):
    """Relative names, whose workers were started elsewhere: they are in the list of errors as they were given."""
    for output, more in (("here.csv", ()), ("there.csv", ("--engine", "ray", "--address", nodes.address))):
        call = cluster_job.command(work, output, *more)
        call[call.index("--input") + 1] = "images"
        cluster_job.run(call, nodes.environment, cwd=work)
    assert cluster_job.written(work / "here.csv") == cluster_job.written(work / "there.csv")
    assert read_csv(work / "there.errors.csv")["path"][0] == "images/0.png"


def test_an_image_that_goes_while_the_list_is_scored_fails_alone(nodes, work, tmp_path):
    """Listed, then gone everywhere: a failure, as on one machine."""
    folder = shutil.copytree(work / "images", tmp_path / "images")
    paths = [f"images/{row % 20}.png" for row in range(256)]
    write_csv(tmp_path / "test.csv", id=[str(row) for row in range(256)], path=paths)
    os.symlink(work / "bundle", tmp_path / "bundle")
    call = cluster_job.command(tmp_path, tmp_path / "out.csv", "--engine", "ray", "--address", nodes.address)
    gone = folder / "3.png"
    # it goes after the list was made, before a worker is there
    hook = "from export.cluster import driver as cluster; import os; plan = cluster.plan_run\n"
    hook += f"cluster.plan_run = lambda *all: (os.unlink({str(gone)!r}), plan(*all))[1]\nimport cli; cli.main()"
    cluster_job.run([call[0], "-c", hook, *call[2:]], nodes.environment)
    errors = read_csv(tmp_path / "out.errors.csv")
    assert set(errors.loc[errors["path"] == str(gone), "error"]) == {f"{gone}: no such file"}
    assert (errors["path"] == str(gone)).sum() == sum(path == "images/3.png" for path in paths)


def test_ray_is_started_for_the_job_and_gone_after_it(work, tmp_path):
    here, there = tmp_path / "here.csv", tmp_path / "there.csv"
    cluster_job.run(cluster_job.command(work, here))
    temporary = tempfile.mkdtemp(prefix="t-", dir="/tmp")
    environment = {"TMPDIR": temporary, "HOME": str(tmp_path), "RAY_ADDRESS": ""}
    cluster_job.run(cluster_job.command(work, there, "--engine", "ray"), environment)
    assert cluster_job.written(here) == cluster_job.written(there)
    os.rmdir(temporary)  # it is empty
    assert not (tmp_path / ".ray").exists()  # no token of Ray's is kept
