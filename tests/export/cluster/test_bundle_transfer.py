"""A bundle that a machine of a cluster lacks is sent to it, once, in pieces, and checked; no Ray runs."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import exported_run

from ensemble.core.errors import ArtifactError
from export.bundle import bundle
from export.cluster import bundle_transfer
from export.cluster.worker import check_plan
from export.inference.plan import Plan, PlannedMember
from export.runtimes.settings import RuntimeConfig


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A bundle that this machine lacks, and what hands it out from elsewhere."""
    monkeypatch.setattr(bundle_transfer, "CHUNK_BYTES", 100)
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "a cache"))
    folder = exported_run(tmp_path / "run") / "bundle"
    source = bundle_transfer.describe_bundle(folder)
    shutil.move(folder, tmp_path / "elsewhere")
    asked = []

    def fetch(name, start):
        asked.append((name, start))
        return (tmp_path / "elsewhere" / name).read_bytes()[start : start + 100]

    return source, fetch, asked, tmp_path


def files(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_it_is_sent_once_in_pieces(source):
    source, fetch, asked, tmp_path = source
    found = bundle_transfer.local_bundle(source, fetch)
    assert files(found) == files(tmp_path / "elsewhere")
    assert len(asked) == sum(-(-size // 100) for size in source.sizes.values()) > len(source.sizes)
    asked.clear()
    assert bundle_transfer.local_bundle(source, fetch) == found
    assert asked == []


def test_the_same_bundle_at_the_same_place_is_used(source):
    source, fetch, asked, tmp_path = source
    shutil.copytree(tmp_path / "elsewhere", source.folder)
    assert bundle_transfer.local_bundle(source, fetch) == source.folder
    assert asked == []


def test_another_bundle_at_the_same_place_is_left_alone(source):
    source, fetch, _, tmp_path = source
    shutil.copytree(tmp_path / "elsewhere", source.folder)
    (source.folder / "bundle.json").write_text("{}")
    assert bundle_transfer.local_bundle(source, fetch).is_relative_to(tmp_path / "a cache")
    assert (source.folder / "bundle.json").read_text() == "{}"


@pytest.mark.parametrize("left", ["damaged", "half"])
def test_what_was_damaged_or_cut_short_is_sent_again(source, left):
    source, fetch, asked, tmp_path = source
    found = bundle_transfer.local_bundle(source, fetch)
    if left == "damaged":
        (found / "stacker.json").write_bytes(b"x")
    else:
        found.rename(found.with_name(f"{found.name}.arriving"))
    asked.clear()
    assert files(bundle_transfer.local_bundle(source, fetch)) == files(tmp_path / "elsewhere")
    assert asked
    assert [path.name for path in found.parent.iterdir() if path.is_dir()] == [found.name]


def test_bytes_that_changed_on_the_way_are_refused(source):
    source, fetch, _, _ = source
    for changed, message in ((b"stacker.json", "is damaged"), (b"bundle.json", "was changed while it was sent")):
        with pytest.raises(ArtifactError, match=message):
            bundle_transfer.local_bundle(
                source,
                lambda name, start, changed=changed: (
                    fetch(name, start).replace(b"1", b"7") if name == changed.decode() else fetch(name, start)
                ),
            )


def test_no_room_says_so(source, monkeypatch):
    source, fetch, _, _ = source

    def full(name, start):
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match=r"cannot be kept in .*: No space left on device; make room"):
        bundle_transfer.local_bundle(source, full)
    assert bundle_transfer.local_bundle(source, fetch).is_dir()


def test_a_file_that_is_missing_where_the_job_starts(source):
    source, _, _, tmp_path = source
    (tmp_path / "elsewhere" / "stacker.json").unlink()
    with pytest.raises(ArtifactError, match=r"stacker\.json is missing; make it anew"):
        bundle_transfer.describe_bundle(tmp_path / "elsewhere")


def test_a_bundle_that_was_replaced_meanwhile_is_not_taken_for_the_one_that_was_planned(source):
    source, fetch, _, tmp_path = source
    other = bundle.read_contents(tmp_path / "elsewhere")
    bundle.write_contents(tmp_path / "elsewhere", other | {"precisions": {}, "more": "a"})
    with pytest.raises(ArtifactError, match=r"was changed while it was sent; run the same command again"):
        bundle_transfer.local_bundle(source, fetch)
    assert not [path for path in (tmp_path / "a cache" / "bundles").iterdir() if path.suffix == ""]


def test_a_worker_runs_the_files_that_were_planned_alone(source):
    (source, *_) = source
    (name, sha256), *_ = source.listed["files"].items()
    planned = PlannedMember("one", Path(name), sha256, None, 0.0, RuntimeConfig("onnxruntime"))
    check_plan(source, Plan(None, (planned,), None))
    with pytest.raises(ArtifactError, match=r"was changed meanwhile; run the same command again"):
        check_plan(source, Plan(None, (replace(planned, sha256="0" * 64),), None))


def test_a_bundle_that_another_user_may_not_read_is_sent(source, monkeypatch):
    source, fetch, asked, tmp_path = source
    shutil.copytree(tmp_path / "elsewhere", source.folder)
    mine = os.access
    hidden = source.folder / "stacker.json"
    monkeypatch.setattr(os, "access", lambda path, how: path != hidden and mine(path, how))
    assert bundle_transfer.local_bundle(source, fetch).is_relative_to(tmp_path / "a cache")
    assert asked
