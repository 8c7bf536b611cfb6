"""A model card's evaluations: of the present members and stack alone, and what they are worth."""

import json

import markdown_it
import pytest
from helpers import change_json, exported_run, run_cli
from huggingface_hub import ModelCard

from ensemble.core import artifacts
from export.hub.card_scores import read_evaluations
from export.hub.model_card import base_checkpoint, render_card

HOSTILE = "<img src=x> | [x](http://evil) `$"


@pytest.fixture
def run(tmp_path, tiles):
    """With an evaluation called fresh, made by the command."""
    run = exported_run(tmp_path / "run")
    done = run_cli("evaluate", "--data", tiles, "--run", run, "--onnx", "--name", "fresh", "--cells", "jpeg 50,blur 2")
    assert done[0] == 0, done
    return run


def record_of(run, name="fresh"):
    return artifacts.evaluation_path(run, name) / "evaluation.json"


def write_record(run, name, **changes):
    values = artifacts.read_json(record_of(run), "")
    artifacts.write_json(record_of(run, name), values | {"name": name} | changes)


def names(run):
    return {record["name"] for record in read_evaluations(run, artifacts.read_json(run / "stacker.json", ""))}


def card_of(run):
    return render_card("me/det", run / "bundle", run, [base_checkpoint(run, name) for name in ("one", "two")], None)


def test_a_row_says_what_the_command_found(run, tiles):
    record = artifacts.read_json(record_of(run), "")
    clean, worst = record["cells"]["clean"], record["worst"]

    def shown(score):
        return f"{score['value']:.4f} [{score['low']:.4f}, {score['high']:.4f}]"

    count = f"{record['rows']['real']} real, {record['rows']['ai']} ai, in {record['rows']['groups']} groups"
    card = card_of(run)
    assert (
        f"| fresh | {count} | {shown(clean['auroc'])} | balanced accuracy {shown(clean['balanced_accuracy'])} "
        f"| {worst['cell']} of 3: AUROC {shown(worst)} |"
    ) in card
    assert str(tiles) not in card
    (told,) = ModelCard(card).data.to_dict()["model-index"]
    (result,) = told["results"]
    assert result["dataset"] == {"type": "evaluation fresh", "name": "fresh"}
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("roc_auc", round(clean["auroc"]["value"], 4))]


@pytest.mark.parametrize("member", [False, True], ids=["stack", "member"])
def test_an_evaluation_of_other_members_or_another_stack_is_left_out(run, member):
    assert names(run) == {"fresh"}
    path = run / "stacker.json"
    fitted_on = artifacts.read_json(path, "")["fitted_on"]
    changed = {"fitted_on": fitted_on | {"members": {"one": "other", "two": "other"}}} if member else {"threshold": 0.4}
    change_json(path, **changed)
    assert names(run) == set()


def test_a_damaged_or_older_record_is_left_out(run):
    write_record(run, "older", model={"source": "x", "onnx": True, "identity": "y"})
    artifacts.evaluation_path(run, "damaged").mkdir()
    record_of(run, "damaged").write_text("{")
    assert names(run) == {"fresh"}


def test_no_test_is_called_so_and_no_result_for_the_hub(run):
    write_record(run, "known", trained=3)
    write_record(run, "peeked", track="transductive")
    card = card_of(run)
    assert "| known; 3 images were in the run's own training: **THIS IS NO TEST** |" in card
    assert "| peeked; transductive: training images were chosen by looking at it |" in card
    results = ModelCard(card).data.eval_results
    assert sorted(result.dataset_name for result in results) == ["fresh", "peeked"]


def test_images_of_one_class_tell_of_that_class(run):
    score = {"value": 0.9, "low": None, "high": None}
    cells = {"clean": {"accuracy_real": score}}
    rows = {"images": 8, "real": 8, "ai": 0, "groups": 1}
    worst = {"cell": "clean", "score": "accuracy_real", **score}
    write_record(run, "reals", stress=True, cells=cells, rows=rows, worst=worst)
    card = card_of(run)
    assert "| reals | 8 real, 0 ai, in 1 groups |  | accuracy on real 0.9000 |  |" in card
    found = {result.dataset_name: result for result in ModelCard(card).data.eval_results}
    assert (found["reals"].metric_type, found["reals"].metric_name) == ("accuracy_real", "accuracy on real")


def test_a_hostile_name_is_shown_and_does_nothing(run):
    values = artifacts.read_json(record_of(run), "")
    record_of(run).write_text(json.dumps(values | {"name": HOSTILE}))
    text = ModelCard(card_of(run)).text
    html = markdown_it.MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(text)
    assert "&lt;img src=x&gt; | [x](http://evil) `$" in html
    assert "<img" not in html
    assert 'href="http://evil' not in html
