"""What a worker does about files that it may not read, and what the coordinator cannot hand out; no Ray runs."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import exported_run, write_csv, write_image

from ensemble.cluster.nodes import node_versions
from ensemble.core.errors import ArtifactError, DataError
from ensemble.data.inputs import read_inputs
from export.cluster import bundle_transfer
from export.cluster import worker as cluster_worker
from export.cluster.worker import PACKAGES, Coordinator, Job, Worker, prepare, task
from export.inference import journal
from export.runtimes.settings import RuntimeOptions


class TaskError(Exception):
    """As Ray raises what was raised elsewhere."""

    def __init__(self, cause):
        super().__init__("a traceback")
        self.cause = cause


class Remote:
    """A coordinator whose methods are called where they are."""

    def __init__(self, coordinator):
        self._desk = coordinator

    def __getattr__(self, name):
        def remote(*given):
            try:
                return getattr(self._desk, name)(*given)
            except Exception as error:
                return TaskError(error)

        return SimpleNamespace(remote=remote)


def get(answer):
    if isinstance(answer, TaskError):
        raise answer
    return answer


@pytest.fixture(autouse=True)
def ray(monkeypatch):
    util = SimpleNamespace(get_node_ip_address=lambda: "10.0.0.1")
    fake = SimpleNamespace(get=get, util=util, exceptions=SimpleNamespace(RayTaskError=TaskError))
    monkeypatch.setitem(sys.modules, "ray", fake)


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = exported_run(tmp_path / "run") / "bundle"
    for name in "ab":
        write_image(tmp_path / "images" / f"{name}.png")
    write_csv(tmp_path / "list.csv", path=["images/a.png", "images/b.png"])
    return Job(bundle_transfer.describe_bundle(folder), tmp_path, (), 1, node_versions(PACKAGES))


def worker(job, coordinator):
    inputs = read_inputs(job.workdir / "list.csv")
    prepared = prepare(job, RuntimeOptions(device="cpu"), coordinator)
    opened = journal.Journal(Path(), ("one", "two"), inputs.count, "key")
    return Worker(job, prepared, False, inputs.loader, opened, coordinator)


def coordinator_of(job):
    return Coordinator(job.bundle.folder, read_inputs(job.workdir / "list.csv").rows)


def forbid(monkeypatch, path):
    """To tests that run as root, too."""
    mine = os.access
    monkeypatch.setattr(os, "access", lambda given, how: Path(given) != path and mine(given, how))


def answers(job, coordinator):
    return [row for table in worker(job, coordinator)(task(range(1))) for row in table.to_pylist()]


def test_images_that_a_worker_may_not_read_are_told(job, monkeypatch):
    coordinator = Remote(coordinator_of(job))
    assert [answer["unseen"] for answer in answers(job, coordinator)] == [[]]
    hidden = job.workdir / "images" / "b.png"
    (job.workdir / "images" / "b.png").write_bytes(b"broken")  # in place of what reading it would raise
    assert [answer["unseen"] for answer in answers(job, coordinator)] == [[]]
    forbid(monkeypatch, hidden)
    assert [answer["unseen"] for answer in answers(job, coordinator)] == [[os.fsencode(hidden)]]


def test_a_place_that_a_worker_may_not_read_ends_the_job(job, monkeypatch):
    job = replace(job, paths=(job.workdir / "images",))
    answers(job, Remote(coordinator_of(job)))
    forbid(monkeypatch, job.workdir / "images")
    with pytest.raises(DataError, match=r"images is not on .*10\.0\.0\.1\), where a worker runs, or may not be read"):
        answers(job, Remote(coordinator_of(job)))


def test_a_working_folder_that_a_worker_may_not_enter_is_passed_over(job, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "chdir", forbidden)
    assert len(answers(job, Remote(coordinator_of(job)))) == 1


def test_what_the_system_refuses_is_one_line_for_the_desk(job, monkeypatch):
    def forbidden(*given):
        raise PermissionError(13, "Permission denied", "/some/file")

    coordinator = coordinator_of(job)
    ready = worker(job, Remote(coordinator))
    monkeypatch.setattr(cluster_worker, "set_up_worker", forbidden)
    with pytest.raises(DataError):
        list(ready(task(range(1))))
    assert str(coordinator.failure()).startswith("on ")
    assert "Permission denied: '/some/file'; mend that there" in str(coordinator.failure())
    with pytest.raises(DataError, match="Permission denied"):
        prepare(job, RuntimeOptions(device="cpu"), Remote(coordinator))


def test_a_member_that_was_damaged_meanwhile_is_not_run(job):
    coordinator = Remote(coordinator_of(job))
    ready = worker(job, coordinator)
    file = next((job.bundle.folder / "members").rglob("*.onnx"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    for call in (lambda: prepare(job, RuntimeOptions(device="cpu"), coordinator), lambda: list(ready(task(range(1))))):
        with pytest.raises(ArtifactError, match=rf"{file.name} is damaged"):
            call()


def test_what_the_desk_cannot_hand_out_is_told_as_it_was_there(job):
    coordinator = coordinator_of(job)
    ready = worker(job, Remote(coordinator))
    job.bundle.folder.rename(job.workdir / "moved")
    for call in (
        lambda: prepare(job, RuntimeOptions(device="cpu"), Remote(coordinator)),
        lambda: list(ready(task(range(1)))),
    ):
        with pytest.raises(ArtifactError, match=r"bundle\.json cannot be read: No such file or directory"):
            call()
    assert type(coordinator.failure()) is ArtifactError
