import shutil
from collections import namedtuple

import pytest

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.core.recipe import Recipe
from ensemble.training import checkpoint


def recipe(**train):
    values = {"lr": 1e-3, "epochs": 2, "batch_size": 4, **train}
    return Recipe.model_validate({"name": "one", "backbone": {"architecture": "convnext"}, "train": values})


def kind(data="d", seed=0, version=1, **train):
    return checkpoint.training_fingerprint(recipe(**train), data, seed, version)


@pytest.fixture
def begun(tmp_path):
    work = checkpoint.open_workdir(tmp_path, "one", kind())
    (work / "fit").mkdir()
    (work / "fit" / "state.safetensors").write_bytes(b"state")
    return tmp_path


def test_the_same_training_is_gone_on_from(begun):
    assert checkpoint.find_resumable(begun, {"one": kind(), "two": kind()}, fresh=False) == ["one"]
    work = checkpoint.open_workdir(begun, "one", kind())
    assert (work / "fit" / "state.safetensors").read_bytes() == b"state"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (kind(lr=2e-3), "train.lr 0.001 became 0.002"),
        (kind(data="e"), "the data or its split changed"),
        (kind(seed=3), "seed 0 became 3"),
        (kind(version=2), "manyeyes' own training changed"),
    ],
)
def test_what_changed_is_said_and_nothing_is_lost(begun, other, told):
    with pytest.raises(ArtifactError) as error:
        checkpoint.find_resumable(begun, {"one": other}, fresh=False)
    assert f"one: its training was interrupted, and since then {told}" in str(error.value)
    assert "--fresh" in str(error.value)
    assert (begun / "work" / "one" / "fit" / "state.safetensors").exists()


def test_fresh_throws_it_away(begun):
    assert checkpoint.find_resumable(begun, {"one": kind(lr=2e-3)}, fresh=True) == []
    assert not (begun / "work" / "one").exists()


def test_work_without_a_state_is_no_loss(tmp_path):
    checkpoint.open_workdir(tmp_path, "one", kind())
    assert checkpoint.find_resumable(tmp_path, {"one": kind(lr=2e-3)}, fresh=False) == []
    work = checkpoint.open_workdir(tmp_path, "one", kind(lr=2e-3))
    assert artifacts.read_json(work / checkpoint.FINGERPRINT_FILE, "")["recipe"]["train"]["lr"] == 2e-3


def test_finished_folds_count_as_begun(begun):
    shutil.rmtree(begun / "work" / "one" / "fit")
    artifacts.write_json(begun / "work" / "one" / "fold-1" / "done.json", {})
    assert checkpoint.find_resumable(begun, {"one": kind()}, fresh=False) == ["one"]


def test_a_disk_that_is_too_small_is_said_before_the_start(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=2**30))
    checkpoint.check_disk(tmp_path, [])
    checkpoint.check_disk(tmp_path, [50 * 2**20])
    with pytest.raises(ArtifactError, match=r"needs about 8\.8 GiB .* and 1\.0 are free; make room"):
        checkpoint.check_disk(tmp_path, [800 * 2**20, 100 * 2**20])
