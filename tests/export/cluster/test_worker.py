"""What a worker does about files that it may not read, and what the desk cannot hand out; no Ray runs."""

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
    """A desk whose methods are called where they are."""

    def __init__(self, desk):
        self._desk = desk

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
    return Job(bundle_transfer.source_of(folder), tmp_path, (), 1, node_versions(PACKAGES))


def worker(job, desk):
    inputs = read_inputs(job.home / "list.csv")
    prepared = prepare(job, RuntimeOptions(device="cpu"), desk)
    opened = journal.Journal(Path(), ("one", "two"), inputs.count, "key")
    return Worker(job, prepared, False, inputs.reader, opened, desk)


def desk_of(job):
    return Coordinator(job.bundle.folder, read_inputs(job.home / "list.csv").rows)


def forbid(monkeypatch, path):
    """To tests that run as root, too."""
    mine = os.access
    monkeypatch.setattr(os, "access", lambda given, how: Path(given) != path and mine(given, how))


def answers(job, desk):
    return [row for table in worker(job, desk)(task(range(1))) for row in table.to_pylist()]


def test_images_that_a_worker_may_not_read_are_told(job, monkeypatch):
    desk = Remote(desk_of(job))
    assert [answer["unseen"] for answer in answers(job, desk)] == [[]]
    hidden = job.home / "images" / "b.png"
    (job.home / "images" / "b.png").write_bytes(b"broken")  # in place of what reading it would raise
    assert [answer["unseen"] for answer in answers(job, desk)] == [[]]
    forbid(monkeypatch, hidden)
    assert [answer["unseen"] for answer in answers(job, desk)] == [[os.fsencode(hidden)]]


def test_a_place_that_a_worker_may_not_read_ends_the_job(job, monkeypatch):
    job = replace(job, places=(job.home / "images",))
    answers(job, Remote(desk_of(job)))
    forbid(monkeypatch, job.home / "images")
    with pytest.raises(DataError, match=r"images is not on .*10\.0\.0\.1\), where a worker runs, or may not be read"):
        answers(job, Remote(desk_of(job)))


def test_a_working_folder_that_a_worker_may_not_enter_is_passed_over(job, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "chdir", forbidden)
    assert len(answers(job, Remote(desk_of(job)))) == 1


def test_what_the_system_refuses_is_one_line_for_the_desk(job, monkeypatch):
    def forbidden(*given):
        raise PermissionError(13, "Permission denied", "/some/file")

    desk = desk_of(job)
    ready = worker(job, Remote(desk))
    monkeypatch.setattr(cluster_worker, "settle", forbidden)
    with pytest.raises(DataError):
        list(ready(task(range(1))))
    assert str(desk.refusal()).startswith("on ")
    assert "Permission denied: '/some/file'; mend that there" in str(desk.refusal())
    with pytest.raises(DataError, match="Permission denied"):
        prepare(job, RuntimeOptions(device="cpu"), Remote(desk))


def test_a_member_that_was_damaged_meanwhile_is_not_run(job):
    desk = Remote(desk_of(job))
    ready = worker(job, desk)
    file = next((job.bundle.folder / "members").rglob("*.onnx"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    for call in (lambda: prepare(job, RuntimeOptions(device="cpu"), desk), lambda: list(ready(task(range(1))))):
        with pytest.raises(ArtifactError, match=rf"{file.name} is damaged"):
            call()


def test_what_the_desk_cannot_hand_out_is_told_as_it_was_there(job):
    desk = desk_of(job)
    ready = worker(job, Remote(desk))
    job.bundle.folder.rename(job.home / "moved")
    for call in (lambda: prepare(job, RuntimeOptions(device="cpu"), Remote(desk)), lambda: list(ready(task(range(1))))):
        with pytest.raises(ArtifactError, match=r"bundle\.json cannot be read: No such file or directory"):
            call()
    assert type(desk.refusal()) is ArtifactError
