"""A stranger's checkpoint: none of its Python runs, nothing else is fetched for it, and what is wrong is one line."""

import ast
import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from helpers import ROOT, run_cli, write_image
from small_members import small_member

from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.core.recipe import Backbone
from ensemble.models.backbone import save_classifier

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import PretrainedConfig
class Config(PretrainedConfig):
    model_type = "evil"
"""
TRUSTING = ("from_pretrained", "from_config")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    save_classifier(small_member("swin"), folder / "swin")
    save_classifier(small_member("timm/test_vit", size=160), folder / "timm")
    write_image(folder / "images" / "1.png")
    return folder


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def infer(folder, checkpoints, *more):
    return run_cli("infer", "--model", folder, "--input", checkpoints / "images", "--output", folder / "o.csv", *more)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_python_that_a_checkpoint_brings_never_runs(name, checkpoints, tmp_path):
    folder, marker = shutil.copytree(checkpoints / "swin", tmp_path / "evil"), tmp_path / "marker"
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    if name == "config.json":
        rewrite(folder / name, model_type="evil", auto_map={"AutoConfig": "code.Config"})
    else:
        rewrite(folder / name, image_processor_type="Evil", auto_map={"AutoImageProcessor": "code.Config"})
    command = [sys.executable, ROOT / "cli.py", "infer", "--model", folder, "--input", checkpoints / "images"]
    command += ["--output", tmp_path / "out.csv"]
    done = subprocess.run(command, input="y\n" * 9, text=True, capture_output=True, cwd=tmp_path, timeout=100)
    assert not marker.exists()
    assert done.returncode == 2
    assert done.stdout == ""  # no question was asked
    [line] = done.stderr.splitlines()
    assert "it needs Python code of its own, which is never run here; choose another checkpoint" in line


def unsafe_calls(source):
    """Lines where an Auto class of transformers is asked without a word on a stranger's code."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in TRUSTING
        and ast.unparse(node.func.value).rpartition(".")[2].startswith("Auto")
        and not any(
            word.arg == "trust_remote_code" and getattr(word.value, "value", None) is False for word in node.keywords
        )
    ]


def test_no_call_leaves_open_whether_a_strangers_code_runs():
    sources = [path for folder in ("ensemble", "export") for path in (ROOT / folder).rglob("*.py")]
    found = {path.name: lines for path in sources if (lines := unsafe_calls(path.read_text(encoding="utf-8")))}
    assert found == {}
    assert unsafe_calls("AutoConfig.from_pretrained(a)\nt.AutoModel.from_config(a, trust_remote_code=True)") == [1, 2]


CONFIGS = {
    "id2label-list": ("swin", {"id2label": ["a", "b"]}),
    "id2label-names": ("swin", {"id2label": {"a": "ai", "b": "real"}}),
    "dtype": ("swin", {"dtype": "evil"}),
    "image-size": ("swin", {"image_size": "x"}),
    "negative": ("swin", {"depths": [-1]}),
    "timm-number": ("timm", {"architecture": 3}),
    "timm-unknown": ("timm", {"architecture": "nope"}),
    "timm-hub": ("timm", {"architecture": "hf-hub:evil/model"}),
    "timm-folder": ("timm", {"architecture": "local-dir:/etc"}),
    "timm-weights": ("timm", {"model_args": {"checkpoint_path": "/etc/passwd"}}),
    "timm-cfg": ("timm", {"pretrained_cfg": 3}),
    "timm-mean": ("timm", {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": None, "std": [1, 1, 1]}}),
}


@pytest.mark.parametrize(("kind", "changes"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_cannot_be_is_one_line(kind, changes, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / kind, tmp_path / "model")
    rewrite(folder / "config.json", **changes)
    code, _, err = infer(folder, checkpoints)
    assert code == 2
    [line] = err.splitlines()
    assert line.startswith("Error: ")
    assert str(folder) in line
    if changes.get("model_args"):
        assert "model_args may not hold checkpoint_path" in line
    if ":" in str(changes.get("architecture")):
        assert "is not one of timm's own" in line


PROCESSORS = {
    "mean": {"image_mean": ["a"]},
    "std": {"image_std": [0, 0, 0]},
    "infinite": {"image_mean": [1e400, 0, 0]},
    "size": {"size": "x"},
    "huge": {"size": {"height": 10**8, "width": 10**8}},
    "filter": {"resample": 99},
}


@pytest.mark.parametrize("changes", PROCESSORS.values(), ids=PROCESSORS)
def test_a_processor_that_cannot_be_is_one_line(changes, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "swin", tmp_path / "model")
    rewrite(folder / "preprocessor_config.json", **changes)
    code, _, err = infer(folder, checkpoints)
    assert code == 2
    [line] = err.splitlines()
    assert "its preprocessor_config.json does not say how images are prepared (" in line


@pytest.mark.parametrize("name", ["id", "target", "label"])
def test_a_folder_named_like_a_column_scores_under_another_name(name, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "swin", tmp_path / name)
    assert infer(folder, checkpoints, "--members")[0] == 0
    table = pd.read_csv(folder / "o.csv")
    assert list(table.columns) == ["id", "target", f"model_{name}"]
    assert list(table["target"]) == list(table[f"model_{name}"])


WHOLE = PreprocessConfig(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).to_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"size": "32"}, {"size": True}, {"size": 32.5}, {"size": 10**8}, {"mean": [0.5]}, {"mean": None},
        {"mean": [0.5, 0.5, float("nan")]}, {"std": [1, 1, 10**400]}, {"crop_pct": "1"}, {"count": [1]},
        {"background": [0, 0, 256]}, {"background": [0, 0, 0.5]}, {"geometry": ["squash"]}, {"filter": {}},
        {"geometry": "center_crop", "crop_pct": 1e-9},
    ],
    ids=str,
)  # fmt: skip
def test_a_contract_holds_numbers_within_bounds(changes):
    assert PreprocessConfig.from_dict(json.loads(json.dumps(WHOLE))).size == 32
    with pytest.raises(ValueError, match=r"must be"):
        PreprocessConfig.from_dict(WHOLE | changes)


def test_backbones_of_recipes_are_asked_alike():
    from ensemble.core.errors import BackboneError
    from ensemble.models.checkpoints import check_source

    with pytest.raises(BackboneError, match="timm has no architecture"):
        check_source(Backbone(architecture="timm/hf-hub:evil/model"))
