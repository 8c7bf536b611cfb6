import re
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
from helpers import (
    SCALES,
    STACKER,
    change_json,
    expected_logits,
    exported_run,
    make_frame,
    noisy_logits,
    run_cli,
    write_bundle,
    write_image,
    write_member,
    write_stacker,
)

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.models.runner import score_images
from ensemble.stacking.stacker import Stacker
from export.bundle import builder, bundle
from export.inference.loading import load_bundle


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def run(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "run")


def test_a_bundle_scores_as_its_members(exported, tmp_path):
    files = [write_image(tmp_path / f"{value}.png", value) for value in (0, 30, 128, 200, 255)]
    ensemble = load_bundle(artifacts.bundle_path(exported))
    runners, stacker = ensemble.runners, ensemble.stacker
    logits, errors = score_images(files, runners, batch_size=2)
    assert [runner.name for runner in runners] == list(SCALES)
    assert stacker == STACKER
    assert errors == {}
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected_logits(files), rtol=1e-5, atol=1e-6)
    # sigmoid(0.1 + (0.5 * 4 - 0.25 * 2) * (brightness - 0.5))
    assert stacker.target(logits) == pytest.approx([0.3430, 0.3838, 0.5257, 0.6287, 0.7006], abs=1e-4)


def test_members_come_in_the_stackers_order(run):
    write_stacker(run, Stacker(("two", "one"), (1.0, 2.0), 0.0))
    write_bundle(run)
    ensemble = load_bundle(artifacts.bundle_path(run))
    assert [runner.name for runner in ensemble.runners] == list(ensemble.stacker.members) == ["two", "one"]


FILES = ["members/one.fp32.onnx", "members/two.fp32.onnx", "stacker.json", "certificate.json", "bundle.json"]


@pytest.mark.parametrize("name", FILES)
def test_one_changed_byte_is_refused_by_name(run, name):
    path = artifacts.bundle_path(run) / name
    content = path.read_bytes()
    digit = next(place for place in range(len(content) // 2, len(content)) if content[place : place + 1].isalnum())
    path.write_bytes(content[:digit] + bytes([content[digit] ^ 1]) + content[digit + 1 :])
    with pytest.raises(
        ArtifactError, match=f"{re.escape(str(path))} is damaged.*; make it anew with: python cli.py export --force"
    ):
        load_bundle(artifacts.bundle_path(run))


def test_any_changed_byte_of_the_contents_list_is_refused_or_means_the_same(run):
    folder = artifacts.bundle_path(run)
    path, sound = folder / "bundle.json", bundle.open_bundle(folder)
    content, refused = path.read_bytes(), 0
    for place in range(0, len(content), 5):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = bundle.open_bundle(folder)
        except ArtifactError as error:
            found = sound
            refused += str(path) in str(error)
        assert found == sound
    assert refused > len(content) / 5 / 2


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(run, name):
    path = artifacts.bundle_path(run) / name
    path.unlink()
    with pytest.raises(
        ArtifactError, match=f"{re.escape(str(path))}( is missing)?; make it anew with: python cli.py export --force"
    ):
        load_bundle(artifacts.bundle_path(run))


def test_files_that_trade_places_are_refused(run):
    members = artifacts.bundle_path(run) / "members"
    (members / "one.fp32.onnx").rename(members / "kept")
    (members / "two.fp32.onnx").rename(members / "one.fp32.onnx")
    (members / "kept").rename(members / "two.fp32.onnx")
    with pytest.raises(ArtifactError, match=r"one\.fp32\.onnx is damaged: it is not the file that was written"):
        load_bundle(artifacts.bundle_path(run))


def test_a_bundle_of_its_members_and_stacker_is_current(exported):
    assert bundle.is_current(exported)


def test_no_bundle_is_not_current(run):
    shutil.rmtree(artifacts.bundle_path(run))
    assert not bundle.is_current(run)


@pytest.mark.parametrize("stacker", [{"threshold": 0.6}, {"coef": (1.0, 2.0)}, {"intercept": 0.0}])
def test_another_stacker_makes_the_bundle_old(run, stacker):
    write_stacker(run, Stacker(**(vars(STACKER) | stacker)))
    assert not bundle.is_current(run)
    write_bundle(run)
    assert bundle.is_current(run)


def test_a_stacker_of_fewer_members_makes_the_bundle_old(run):
    write_stacker(run, Stacker(("one",), (1.0,), 0.0))
    assert not bundle.is_current(run)


def test_a_changed_member_asks_for_stack_and_then_for_export(run):
    frame = make_frame()
    write_member(run, "two", frame, noisy_logits(frame, 1, 5))
    with pytest.raises(ArtifactError, match=r"changed since the stack was fitted; run: python cli\.py stack"):
        bundle.is_current(run)
    write_stacker(run)
    assert not bundle.is_current(run)
    write_bundle(run)
    assert bundle.is_current(run)


def test_another_image_contract_makes_the_bundle_old(run):
    path = artifacts.member_path(run, "two") / "member.json"
    contract = artifacts.read_json(path, "")["contract"]
    change_json(path, contract=contract | {"mean": [0.4, 0.4, 0.4]})
    assert not bundle.is_current(run)


def test_another_converter_makes_the_bundle_old(run, monkeypatch):
    monkeypatch.setattr(bundle, "CONVERTER_VERSION", bundle.CONVERTER_VERSION + 1)
    assert not bundle.is_current(run)


def test_a_bundle_from_before_there_were_certificates_runs_at_fp32_and_is_exported_anew(run, monkeypatch):
    monkeypatch.setattr(bundle, "CONVERTER_VERSION", 1)
    folder = write_bundle(run)
    values = bundle.open_bundle(folder)
    del values["precisions"]
    for entry in values["members"].values():
        del entry["gflop"]
    artifacts.write_json(folder / "bundle.json", {**values, "digest": artifacts.json_sha256(values)})
    monkeypatch.undo()
    assert bundle.certified_precisions(bundle.open_bundle(folder)) == {}
    assert len(load_bundle(folder).runners) == 2
    assert not bundle.is_current(run)
    work = builder.open_workdir(run / "work" / "export", folder, force=False)
    assert work.older == {}
    assert builder.read_record(work.path, "one")["entry"]["source"] != bundle.source_sha256(run, "one")


@pytest.mark.parametrize("where", ["absolute", "above", "windows", "listed", "name"])
def test_a_bundle_that_names_files_outside_its_folder_is_refused_and_they_stay(run, tmp_path, where):
    folder, victim = artifacts.bundle_path(run), tmp_path / "victim.onnx"
    victim.write_bytes(b"mine")
    sound = bundle.open_bundle(folder)
    file = {"windows": r"..\..\victim.onnx", "absolute": str(victim)}.get(where, "../../victim.onnx")
    values = {**sound, "files": {**sound["files"], file: artifacts.file_sha256(victim)}}
    if where == "name":
        values = {**sound, "members": {**sound["members"], "../../victim": sound["members"]["one"]}}
    elif where != "listed":
        values["members"]["one"] |= {"fp16": file, "made": {"fp16": {}}}
    artifacts.write_json(folder / "bundle.json", {**values, "digest": artifacts.json_sha256(values)})
    refusal = re.escape(f"{folder / 'bundle.json'} names files that no bundle has")
    with pytest.raises(ArtifactError, match=f"{refusal}.*; do not use it, or "):
        builder.open_workdir(run / "work" / "export", folder, force=False)
    code, _, err = run_cli("export", "--bundle", folder, "--uncertified")
    assert code == 2
    assert "names files that no bundle has" in err
    assert victim.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "members/", "/", "members/./x", "./x", "a//x", "/x", "a/../x", "a/..", "a\\x", "C:x", "//h/s/x"],
)
def test_a_name_that_is_not_plainly_a_files_is_refused(run, name):
    path = artifacts.bundle_path(run) / "bundle.json"
    sound = bundle.read_contents(path.parent)
    for more, refused in ({name: "0"}, True), ({"a b/é.x..[1]*": "0"}, False):
        values = {**sound, "files": {**sound["files"], **more}}
        artifacts.write_json(path, {**values, "digest": artifacts.json_sha256(values)})
        with pytest.raises(ArtifactError, match="names files that no bundle has") if refused else nullcontext():
            bundle.read_contents(path.parent)


def test_a_damaged_bundle_is_said_not_exported_over(run):
    (artifacts.bundle_path(run) / "members" / "one.fp32.onnx").write_bytes(b"")
    assert bundle.is_current(run)
    with pytest.raises(ArtifactError, match=r"one\.fp32\.onnx is damaged"):
        load_bundle(artifacts.bundle_path(run))
