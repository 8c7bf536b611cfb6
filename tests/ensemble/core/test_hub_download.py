"""The real huggingface_hub client against a loopback server; in a subprocess, since it reads HF_ENDPOINT once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import exported_run
from hub_client import environment
from hub_layouts import VIT_EXTRACTOR
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[3]
PREDICT = """
import sys, pandas as pd
from export import Predictor
*names, image = sys.argv[1].split("|")
for name in names:
    print(Predictor.load(name).predict(pd.DataFrame({"path": [image]}))["target"][0])
"""
LOCATE = "import sys; from ensemble.models.checkpoints import locate_checkpoint; print(locate_checkpoint(sys.argv[1]))"


@pytest.fixture(scope="module")
def repos(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, num_labels=3
    )
    transformers.SwinForImageClassification(config).save_pretrained(folder / "new")
    (folder / "new" / "preprocessor_config.json").write_text(json.dumps({**VIT_EXTRACTOR, "resample": 3, "size": 32}))
    (folder / "new" / "README.md").write_text("not needed")
    shutil.copytree(folder / "new", folder / "old")
    torch.save(load_file(folder / "old" / "model.safetensors"), folder / "old" / "pytorch_model.bin")
    (folder / "old" / "model.safetensors").unlink()
    shutil.copytree(folder / "new", folder / "unconfigured")
    (folder / "unconfigured" / "config.json").unlink()
    two = transformers.SwinForImageClassification(transformers.SwinConfig(**{**config.to_dict(), "num_labels": 2}))
    two.config.id2label, two.config.label2id = {0: "Fake", 1: "Real"}, {"Fake": 0, "Real": 1}
    shutil.copytree(folder / "new", folder / "detector")
    two.save_pretrained(folder / "detector")
    shutil.copytree(exported_run(folder / "run") / "bundle", folder / "bundle")
    for name in ("new", "old", "unconfigured", "detector", "bundle"):
        files = [path for path in (folder / name).rglob("*") if path.is_file()]
        hub.add(f"org/{name}", {path.relative_to(folder / name).as_posix(): path.read_bytes() for path in files})
    hub.add("org/gated", {}, gated=True)
    return hub


def locate(hub, name, cache, code=0, script=LOCATE):
    done = subprocess.run(
        [sys.executable, "-c", script, name],
        env=environment(hub.url, cache),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done


def test_checkpoint_comes_from_the_hub_with_only_what_is_needed(repos, tmp_path):
    folder = Path(locate(repos, "org/new", tmp_path).stdout.strip())
    assert {path.name for path in folder.iterdir()} == {"config.json", "preprocessor_config.json", "model.safetensors"}


def test_second_use_downloads_nothing(repos, tmp_path):
    locate(repos, "org/new", tmp_path)
    repos.seen.clear()
    locate(repos, "org/new", tmp_path)
    assert not [request for request in repos.seen if request.startswith("GET") and "/resolve/" in request]


def test_old_repository_without_safetensors_gives_its_pytorch_weights(repos, tmp_path):
    folder = Path(locate(repos, "org/old", tmp_path).stdout.strip())
    assert (folder / "pytorch_model.bin").is_file()
    without_network = SimpleNamespace(url="http://127.0.0.1:9")
    assert Path(locate(without_network, "org/old", tmp_path).stdout.strip()) == folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/none", "no such repository, or it is private"),
        ("org/gated", "accept its terms on the Hub, then run: hf auth login"),
        ("org/unconfigured", "has no config.json"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(name, message, repos, tmp_path):
    done = locate(repos, name, tmp_path, code=1)
    assert f"Error: {name}" in done.stderr
    assert message in done.stderr


def test_predictor_scores_with_models_from_the_hub_but_not_of_three_classes(repos, tmp_path, photo):
    names = "hf://org/detector|hf://org/bundle|hf://org/new"
    done = locate(repos, f"{names}|{photo}", tmp_path, code=1, script=PREDICT)
    detector, bundle = map(float, done.stdout.split())
    assert 0 < detector < 1
    assert 0 < bundle < 1
    assert "two classes are needed, found 3" in done.stderr


def test_export_finds_a_member_on_the_hub(repos, tmp_path):
    script = "import sys; from export.bundle.export import locate_classifier as f; print(*map(f, sys.argv[1].split()))"
    folders = locate(repos, "org/detector hf://org/detector org/detector@main", tmp_path, script=script).stdout.split()
    assert len(folders) == 3
    for folder in folders:
        names = {path.name for path in Path(folder).iterdir()}
        assert names == {"config.json", "preprocessor_config.json", "model.safetensors"}
