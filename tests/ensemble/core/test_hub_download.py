"""The real huggingface_hub client against a loopback server, in a process of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import exported_run
from hub_client import client
from hub_layouts import VIT_EXTRACTOR
from safetensors.torch import load_file

PREDICT = """
import sys, pandas as pd
from export import Predictor
name, image = sys.argv[1].split("|")
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


def test_checkpoint_comes_from_the_hub_with_only_what_is_needed(repos, call):
    folder = Path(call("-c", LOCATE, "org/new").strip())
    assert {path.name for path in folder.iterdir()} == {"config.json", "preprocessor_config.json", "model.safetensors"}


def test_second_use_downloads_nothing(repos, call):
    call("-c", LOCATE, "org/new")
    repos.seen.clear()
    call("-c", LOCATE, "org/new")
    assert repos.seen
    assert not [request for request in repos.seen if request.startswith("GET") and "/resolve/" in request]


def test_old_repository_without_safetensors_gives_its_pytorch_weights(repos, call, hub_child):
    folder = Path(call("-c", LOCATE, "org/old").strip())
    assert (folder / "pytorch_model.bin").is_file()
    with client("http://127.0.0.1:9", hub_child.home) as without_network:
        code, said, _ = without_network("-c", LOCATE, "org/old")
    assert (code, Path(said.strip())) == (0, folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/none", "no such repository, or it is private"),
        ("org/gated", "accept its terms on the Hub, then run: hf auth login"),
        ("org/unconfigured", "has no config.json"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(name, message, repos, call):
    said = call("-c", LOCATE, name, code=1)
    assert f"Error: {name}" in said
    assert message in said


@pytest.mark.parametrize("name", ["org/detector", "org/bundle"])
def test_predictor_scores_with_a_model_from_the_hub(name, repos, call, photo):
    assert 0 < float(call("-c", PREDICT, f"hf://{name}|{photo}")) < 1


def test_classifier_of_three_classes_is_refused(repos, call, photo):
    assert "two classes are needed, found 3" in call("-c", PREDICT, f"hf://org/new|{photo}", code=1)


@pytest.mark.parametrize("name", ["org/detector", "hf://org/detector", "org/detector@main"])
def test_export_finds_a_member_on_the_hub(name, repos, call):
    script = "import sys; from export.bundle.export import locate_classifier; print(locate_classifier(sys.argv[1]))"
    folder = Path(call("-c", script, name).strip())
    assert {path.name for path in folder.iterdir()} == {"config.json", "preprocessor_config.json", "model.safetensors"}
