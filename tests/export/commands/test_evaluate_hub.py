"""evaluate --model of what is on the Hub: as the model card says, and a classifier whose labels do not speak."""

import json
import re
import shlex

import pytest
from helpers import exported_run, run_cli
from small_members import small_member

from ensemble.core import artifacts
from ensemble.models.backbone import save_classifier


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """Files of a classifier with labels that nobody can read."""
    folder = tmp_path_factory.mktemp("silent")
    save_classifier(small_member("swin", size=32), folder)
    config = json.loads((folder / "config.json").read_text())
    named = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    (folder / "config.json").write_text(json.dumps(config | named))
    return folder


def test_the_command_in_the_card_runs(hub, call, repo, tmp_path, tiles, monkeypatch):
    call("push", repo, "--run", exported_run(tmp_path / "run"))
    (command,) = re.findall(r"`python cli.py (evaluate .*)`", hub.files(repo)["README.md"].decode())
    typed = [{"YOURS": tiles, "evaluated": tmp_path / "evaluated"}.get(word, word) for word in shlex.split(command)]
    assert typed.count(tiles) == typed.count(tmp_path / "evaluated") == 1
    assert "AUROC" in call(*typed, "--grid", "none")
    assert artifacts.read_json(tmp_path / "evaluated" / "evaluation.json", "")["model"]["source"] == f"hf://{repo}"


def test_a_missing_output_is_told_before_anything_is_downloaded(hub, call, repo, tmp_path, tiles):
    call("push", repo, "--run", exported_run(tmp_path / "run"))
    hub.sent.clear()
    said = call("evaluate", "--model", f"hf://{repo}", "--data", tiles, "--grid", "none", code=2)
    assert "a model outside a run has no place for its evaluations; name a folder with --output" in said
    assert not hub.sent


def test_the_class_that_means_ai_is_named_apart_from_that_of_the_data(hub, call, repo, tmp_path, tiles, silent):
    hub.add(repo, {path.name: path.read_bytes() for path in silent.iterdir()})
    plain = ("evaluate", "--data", tiles, "--grid", "none", "--model")
    said = call(*plain, f"hf://{repo}", "--output", tmp_path / "none", code=2)
    told = "cannot tell which of LABEL_0, LABEL_1 means AI-made; name it with --model-positive"
    assert said == f"Error: hf://{repo}: {told}\n"
    assert call(*plain, silent, "--output", tmp_path / "none", code=2) == f"Error: {silent}: {told}\n"
    auroc = []
    for name in ("LABEL_0", "LABEL_1"):
        output = tmp_path / name
        call(*plain, f"hf://{repo}", "--positive", "ai", "--model-positive", name, "--output", output)
        auroc.append(artifacts.read_json(output / "evaluation.json", "")["cells"]["clean"]["auroc"]["value"])
    assert sum(auroc) == pytest.approx(1)
    assert auroc[0] != auroc[1]


def test_a_positive_class_is_of_a_classifier_alone(tmp_path, tiles):
    run = exported_run(tmp_path / "run")
    given = ("evaluate", "--data", tiles, "--grid", "none", "--output", tmp_path / "out", "--model-positive", "ai")
    for model in (run, run / "bundle"):
        code, _, err = run_cli(*given, "--model", model)
        assert (code, err.count("leave out --model-positive")) == (2, 1)
    code, _, err = run_cli(*given)
    assert (code, err.count("--model-positive names a class of --model")) == (2, 1)
