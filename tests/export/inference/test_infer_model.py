"""infer --model: any two-class image classifier, from a folder or the Hub."""

import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import transformers
from helpers import exported_run, run_cli, write_csv, write_image
from hub_client import environment
from small_members import small_member

from ensemble.core import artifacts
from ensemble.models.backbone import save_classifier


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A transformers and a timm classifier whose classes are real and ai."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, family in {"swin": "swin", "timm": "timm/test_vit"}.items():
        save_classifier(small_member(family, size=160 if name == "timm" else 32), folder / name)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for value in (10, 120, 240):
        write_image(folder / f"{value}.png", value)
    return folder


def classes(folder, *names):
    """The same network with classes of other names, and as many outputs as there are names."""
    network = transformers.AutoModelForImageClassification.from_pretrained(folder)
    if len(names) != 2:
        network = transformers.AutoModelForImageClassification.from_config(
            transformers.AutoConfig.from_pretrained(folder, num_labels=len(names))
        )
    network.config.id2label = dict(enumerate(names))
    network.config.label2id = {name: index for index, name in enumerate(names)}
    network.save_pretrained(folder)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def infer(call, source, photos, output, *more, code=0):
    said = call("infer", "--model", source, "--input", photos, "--output", output, *more, code=code)
    return pd.read_csv(output) if code == 0 else said


@pytest.mark.parametrize("kind", ["swin", "timm"])
def test_a_classifier_scores_alike_from_a_folder_and_from_the_hub(
    kind, hub, call, repo, checkpoints, photos, tmp_path, tiles
):
    hub.add(repo, files(checkpoints / kind))
    here = infer(call, checkpoints / kind, photos, tmp_path / "here.csv")
    there = infer(call, f"hf://{repo}", photos, tmp_path / "there.csv", "--members")
    assert list(here["target"]) == list(there["target"])
    assert list(there[repo]) == list(there["target"])
    assert here["target"].between(0, 1).all()
    said = call(
        *("evaluate", "--model", f"hf://{repo}", "--data", tiles, "--grid", "none", "--limit", "4"),
        *("--output", tmp_path / "evaluated"),
    )
    assert f"Which images {repo} was trained on is not known here" in said


def test_class_names_say_which_side_is_ai_or_the_user_does(hub, call, repo, checkpoints, photos, tmp_path):
    folder = shutil.copytree(checkpoints / "swin", tmp_path / "copy")
    straight = infer(call, folder, photos, tmp_path / "out.csv")["target"]
    classes(folder, "Fake", "Human")
    turned = infer(call, folder, photos, tmp_path / "out.csv")["target"]
    assert list(turned) == pytest.approx(list(1 - straight))
    classes(folder, "LABEL_0", "LABEL_1")
    hub.add(repo, files(folder))
    said = infer(call, f"hf://{repo}", photos, tmp_path / "out.csv", code=2)
    assert said == (
        f"Error: hf://{repo}: cannot tell which of LABEL_0, LABEL_1 means AI-made; name it with --positive\n"
    )
    named = infer(call, f"hf://{repo}", photos, tmp_path / "out.csv", "--positive", "label_0")["target"]
    assert list(named) == list(turned)
    said = infer(call, f"hf://{repo}", photos, tmp_path / "out.csv", "--positive", "fake", code=2)
    assert "no class is called 'fake'; the classes are LABEL_0, LABEL_1" in said


def test_its_scores_are_submitted_whatever_stack_a_run_has(checkpoints, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_cli("infer", "--model", checkpoints / "swin", "--input", photos, "--output", "scores.csv")[0] == 0
    ids = [path.name for path in photos.iterdir()]
    write_csv(tmp_path / "sample.csv", id=ids, target=["0"] * len(ids))
    exported_run(tmp_path / "runs" / "default")
    submit = ("submit", "--scores", "scores.csv", "--sample", "sample.csv", "--output", "out.csv")
    code, said, err = run_cli(*submit)
    assert code == 0, err
    assert "No held-out scores of a single classifier: a reversed one would not be noticed." in said
    middle = pd.read_csv("scores.csv")["target"].median()
    assert run_cli(*submit, "--hard", "--threshold", middle)[0] == 0
    assert sorted(pd.read_csv("out.csv")["target"]) == [0, 1, 1]
    assert "--hard needs a threshold" in run_cli(*submit, "--hard")[2]
    code, _, err = run_cli(*submit, "--run", "runs/default")
    assert (code, err) == (
        2,
        "Error: these scores were made by infer --model, not by runs/default/stacker.json; leave out --run and "
        "--bundle\n",
    )


def test_the_fingerprint_tells_weights_under_one_name_apart(call, checkpoints, photos, tmp_path):
    def identity(folder):
        infer(call, folder, photos, tmp_path / "out.csv")
        return json.loads((tmp_path / "out.csv.json").read_text())["made"]["identity"]

    one, same, other = (tmp_path / part / "swin" for part in ("one", "same", "other"))
    for folder in (one, same):
        shutil.copytree(checkpoints / "swin", folder)
    save_classifier(small_member("swin", size=32, seed=1), other)
    assert identity(one) == identity(same) != identity(other)


def test_what_is_no_two_class_classifier_is_refused_in_one_line(hub, call, repo, checkpoints, photos, tmp_path):
    def refused(name, change):
        folder = shutil.copytree(checkpoints / "swin", tmp_path / name)
        change(folder)
        hub.add(f"{repo}-{name}", files(folder))
        said = infer(call, f"hf://{repo}-{name}", photos, tmp_path / "out.csv", code=2)
        assert said.count("\n") == 1
        assert f"{repo}-{name}" in said
        assert "snapshots" not in said
        return said

    three = refused("three", lambda folder: classes(folder, "ai", "real", "drawn"))
    assert "two classes are needed, found 3: ai, drawn, real" in three
    assert "two classes are needed, found 1: LABEL_0" in refused("one", lambda folder: classes(folder, "LABEL_0"))
    bare = refused("bare", lambda folder: (folder / "model.safetensors").unlink())
    assert "has neither model.safetensors nor pytorch_model.bin: no weights to load" in bare
    other = refused("other", lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'))
    assert "Error:" in other
    assert "no config.json" in refused("empty", lambda folder: (folder / "config.json").unlink())
    broken = refused("broken", lambda folder: (folder / "model.safetensors").write_bytes(b"nothing of the kind"))
    assert "cannot be loaded" in broken


OPEN = """
import sys, transformers
for name in sys.argv[2:]:
    place = {"subfolder": f"members/{name}"}
    network = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1], **place)
    processor = transformers.AutoImageProcessor.from_pretrained(sys.argv[1], **place)
    print(name, *network.config.id2label.values(), type(processor).__name__)
"""


def test_members_pushed_with_a_bundle_open_each_by_itself(hub, call, run, repo, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    assert "exporting first" not in call("push", repo, "--run", run, "--members")
    there = hub.files(repo)
    opened = subprocess.run(
        [sys.executable, "-c", OPEN, repo, "tiny_convnext", "tiny_vit"],
        env=environment(hub.url, tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert opened.stdout.splitlines() == [
        "tiny_convnext real ai BitImageProcessor",
        "tiny_vit real ai TimmWrapperImageProcessor",
    ]
    folder = tmp_path / "opened" / "tiny_vit"
    folder.mkdir(parents=True)
    for path in there:
        if path.startswith("members/tiny_vit/"):
            (folder / path.rpartition("/")[2]).write_bytes(there[path])
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "member.json"}
    assert set(json.loads((folder / "member.json").read_text())) == {
        *("format_version", "name", "labels", "contract", "files")
    }
    photos = write_image(tmp_path / "photos" / "a.png", 77).parent
    original = infer(call, artifacts.member_path(run, "tiny_vit"), photos, tmp_path / "out.csv")
    assert list(infer(call, folder, photos, tmp_path / "out.csv")["target"]) == list(original["target"])
    assert str(tmp_path).encode() not in b"".join(there.values())

    call("stack", "--run", run, "--threshold", "0.25")
    said = call("push", repo, "--run", run)
    assert "The bundle is missing or older than the members or the stack: exporting first." in said
    assert "7 of an earlier push deleted" in said
    assert b"at least **0.2500**" in hub.files(repo)["README.md"]
    assert not [path for path in hub.files(repo) if path.startswith("members/tiny_vit/")]
