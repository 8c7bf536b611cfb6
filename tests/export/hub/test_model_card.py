"""The model card: what it says of a run, and that no text from a file does more than be read."""

import json

import markdown_it
import pytest
import yaml
from helpers import STACKER, exported_run, make_frame
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.core import artifacts
from ensemble.core.errors import HubError
from ensemble.core.metrics import Interval
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle, operating_point
from export.hub.markdown import escape
from export.hub.model_card import BEGIN_MARK, END_MARK, BaseCheckpoint, base_checkpoint, merge_card, render_card

HOSTILE = "<script>alert(1)</script> | [x](http://evil) ![](y) <!-- manyeyes push: end --> `$x$`\n# @all www.evil.com"
TEXT = """\
# det

Tells AI-made images from real photographs: 2 fine-tuned vision models, combined by logistic weights of their logits, \
fitted on held-out images. It gives `target`, the probability that an image is AI-made. Made with manyeyes.

## Use

```
python cli.py infer --bundle hf://me/det --input photos/ --output scores.csv
```

```python
from export import Predictor

predictor = Predictor.load("hf://me/det")
```

Call an image AI-made where `target` is at least **0.5000** (rule: fixed). The files are ONNX:
uint8 pixels [N, S, S, 3] in, a float32 logit [N] out.

## Members

| member | weight | made from | licence of that | image |
| --- | --- | --- | --- | --- |
| one | 0.5000 | [microsoft/swin](https://huggingface.co/microsoft/swin) | mit | 8 px, squash |
| two | 0.2500 | a local checkpoint | not known | 8 px, squash |

## Trained on

20 images in 5 groups of copies and near-duplicates. Sources: not named. Generators, with their images: flux (4), \
\\`x\\` (2). The other 48 images below were held out.

| rows | class | images | groups |
| --- | --- | --- | --- |
| heldout | ai | 24 | 12 |
| heldout | real | 24 | 12 |
| train | ai | 6 | 3 |
| train | real | 6 | 3 |
| tune | ai | 4 | 2 |
| tune | real | 4 | 2 |

Metadata gives nothing away. (The shortcut null, which knows how files are stored and sees no picture: balanced \
accuracy 0.5200 [0.4800, 0.5600], auroc 0.5100.)

## Scores

|  | AUROC | log-loss |
| --- | --- | --- |
| one | 0.9000 [0.8000, 0.9500] | 0.4000 |
| stack | 0.9500 [0.9000, 0.9900] | 0.3000 [0.2000, 0.4000] |

On 48 held-out images in 12 groups; the stack was scored out of fold. At its threshold of 0.5000, the stack's balanced \
accuracy is 0.8000 [0.7000, 0.9000]. In brackets: 95 % intervals, by drawing groups again. So few groups make them \
rough, and rather too short.

## Exported files

Every file is listed in `bundle.json` with its SHA-256. Largest difference of a logit from the original's: 2.0e-06.

Below fp32 may run:

- openvino bf16: one, two; certified
- onnxruntime int8: one; **not certified**, allowed by who exported it

## Intended use, and limits
"""


def interval(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def change(path, **values):
    path.write_text(json.dumps(artifacts.read_json(path, "") | values), encoding="utf-8")


def came_from(run, name, checkpoint, **recorded):
    recipe = {"backbone": {"checkpoint": checkpoint}}
    change(artifacts.member_path(run, name) / "member.json", recipe=recipe, **recorded)


@pytest.fixture
def run(tmp_path):
    run = exported_run(tmp_path / "run")
    frame = make_frame()
    trained = frame["split"].isin(["train", "tune"])
    frame.loc[frame["label"] == 1, "generator"] = "flux"
    frame.loc[frame.index[trained & (frame["label"] == 1)][:6], "generator"] = ["flux"] * 4 + ["`x`"] * 2
    frame.loc[frame.index[trained & (frame["label"] == 1)][6:], "generator"] = None
    artifacts.write_parquet(artifacts.dataset_path(run), frame)
    came_from(run, "one", "microsoft/swin", hub_checkpoint="microsoft/swin")
    came_from(run, "two", "clients/secret", hub_checkpoint=None)  # a folder, in the directory of that day
    null = {"balanced_accuracy": interval(0.52, 0.48, 0.56), "auroc": 0.51}
    told = {"headline": "Metadata gives nothing away.", "blocked": False, "null": null}
    artifacts.write_json(artifacts.audit_path(run), told)
    folder = artifacts.bundle_path(run)
    scores = {
        "one": {"auroc": interval(0.9, 0.8, 0.95), "log_loss": interval(0.4)},
        "stack": {"auroc": interval(0.95, 0.9, 0.99), "log_loss": interval(0.3, 0.2, 0.4)},
    }
    rows = {"split": "heldout", "images": 48, "groups": 12, "stack": "out of fold"}
    balanced = interval(0.8, 0.7, 0.9)
    change(folder / "stacker.json", scores=scores, rows=rows, threshold_rule="fixed", balanced_accuracy=balanced)
    measured = {"fp32": {"onnxruntime": {"max_abs_difference": 2e-6}}}
    change(folder / "certificate.json", members={"one": measured, "two": {}})
    precisions = {
        "openvino bf16": {"members": ["one", "two"], "certified": True},
        "onnxruntime int8": {"members": ["one"], "certified": False},
    }
    bundle.write_bundle(folder, bundle.read_contents(folder)["members"], precisions=precisions)
    return run


def card_of(run, name="me/det", licence=None):
    known = [base_checkpoint(run, name) for name in STACKER.members]
    known[0] = BaseCheckpoint(known[0].member, known[0].checkpoint, known[0].description, "mit")
    return render_card(name, artifacts.bundle_path(run), run, known, licence)


def test_a_card_says_what_the_run_is(run):
    card = ModelCard(card_of(run))
    said, limits, _ = card.text.partition("## Intended use, and limits\n")
    assert said + limits == f"{BEGIN_MARK}\n\n{TEXT}"
    assert card.text.endswith(f"--data YOURS --output evaluated`.\n\n{END_MARK}\n")
    fields = card.data.to_dict()
    (told,) = fields.pop("model-index")
    assert fields == {
        "library_name": "manyeyes",
        "license": "unknown",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "ai-generated-image-detection", "ensemble", "onnx", "manyeyes"],
        "base_model": ["microsoft/swin"],
    }
    assert told["name"] == "det"
    assert [(found["type"], found["value"]) for found in told["results"][0]["metrics"]] == [
        ("roc_auc", 0.95),
        ("log_loss", 0.3),
        ("balanced_accuracy", 0.8),
    ]
    assert str(run) not in card_of(run)


def test_a_bundle_alone_says_what_it_does_not_know(run):
    text = render_card("me/det", artifacts.bundle_path(run), None, (), "apache-2.0")
    assert "Not known here: this was pushed from a bundle alone." in text
    assert "| one | 0.5000 | not known here | not known |" in text
    assert ModelCard(text).data.license == "apache-2.0"


def test_a_point_that_frontier_chose_is_said(run):
    folder = artifacts.bundle_path(run)
    values = bundle.read_contents(folder)
    one, lost = Stacker(("one",), (1.0,), 0.0, 0.31, threshold_rule="fpr=0.05"), Interval(0.01, 0.0, 0.02)
    made_from = operating_point.identity(folder, values["members"], values["files"])
    operating_point.write(
        folder, operating_point.OperatingPoint(one, "auto", {}, None, 200.0, 400.0, lost, "a CPU", made_from)
    )
    card = card_of(run)
    assert (
        "Call an image AI-made where `target` is at least **0.3100** (rule: fpr=0.05) by default, "
        "**0.5000** (rule: fixed) with `--full`, by all members. The files are ONNX:"
    ) in card
    assert (
        "## Members\n\nAll members, with their weights in the stack of all, as `--full` runs them. By default run: one."
        "\n\n| member | weight |"
    ) in card
    assert "## Scores\n\nOf all members, as `--full` runs them.\n\n|" in card
    assert (
        "By default it runs 1 of 2 members, as frontier chose for 200 images/s (400.0 predicted on a CPU; AUROC lost "
        r"against all\: 0.0100 \[0.0000, 0.0200\]); --full runs all."
    ) in card


@pytest.mark.parametrize(
    ("recipe", "recorded", "words", "licence"),
    [
        ({"checkpoint": "org/name"}, {}, "a checkpoint, not known whether of the Hub", "not known"),
        ({"checkpoint": "/home/me/client"}, {}, "a local checkpoint", "not known"),
        ({"architecture": "timm/x", "weights": "w.bin"}, {}, "timm/x, with weights of a file", "not known"),
        ({"architecture": "timm/x"}, {"hub_checkpoint": None}, "timm/x, from random weights", "-"),
    ],
)
def test_where_weights_came_from_is_never_guessed(run, recipe, recorded, words, licence):
    path = artifacts.member_path(run, "one") / "member.json"
    values = {key: value for key, value in artifacts.read_json(path, "").items() if key != "hub_checkpoint"}
    path.write_text(json.dumps(values | {"recipe": {"backbone": recipe}} | recorded), encoding="utf-8")
    card = render_card(
        "me/det", artifacts.bundle_path(run), run, [base_checkpoint(run, name) for name in STACKER.members], None
    )
    assert f"| one | 0.5000 | {words} | {licence} | 8 px, squash |" in card
    assert ModelCard(card).data.base_model is None


def test_a_threshold_that_was_chosen_on_the_scored_rows_is_called_flattered(run):
    change(artifacts.bundle_path(run) / "stacker.json", threshold_rule="balanced_accuracy")
    assert "threshold of 0.5000, which was chosen on these rows and so flatters it, the stack's" in card_of(run)


def test_a_stack_that_was_never_scored_claims_nothing(run):
    folder = artifacts.bundle_path(run)
    change(folder / "stacker.json", scores={}, threshold_rule="", balanced_accuracy=None)
    text = render_card("me/det", folder, run, (), None)
    assert "## Scores\n\nNone were measured." in text
    assert "model-index" not in text


def test_hostile_names_are_shown_and_do_nothing(run):
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "")
    frame["generator"] = HOSTILE
    artifacts.write_parquet(artifacts.dataset_path(run), frame)
    change(artifacts.audit_path(run), headline=HOSTILE)
    change(artifacts.member_path(run, "one") / "member.json", recipe={"backbone": {"architecture": HOSTILE}})
    text = ModelCard(card_of(run)).text
    assert text.count(END_MARK) == 1
    assert text.count("\n# ") == 1
    html = markdown_it.MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(text)
    assert html.count("&lt;script&gt;alert(1)") == 3
    assert "<script" not in html
    assert "<img" not in html
    assert 'href="http://evil' not in html


@given(st.text() | st.text(alphabet="\\`*_{}[]<>|~$@:#!&;w.ab -+=()/\n"))
def test_escaped_text_reads_as_it_was_written(text):
    line = escape(text)
    (cell,) = markdown_it.MarkdownIt("commonmark").parseInline(f"x{line}x")
    shown = "".join(token.content for token in cell.children)
    assert {token.type for token in cell.children} <= {"text", "text_special"}
    assert shown == f"x{escaped_by_eye(text)}x"


def escaped_by_eye(text):
    from unicodedata import category

    return " ".join("".join(" " if category(c).startswith("C") else c for c in text).split())


AROUND = st.text(alphabet="ab\n #-<!>é|", max_size=40)


@settings(deadline=None)
@given(AROUND, AROUND)
def test_what_others_wrote_around_our_part_stays(before, after):
    def card(body):
        return f"---\nlicense: unknown\ntags:\n- ours\n---\n{BEGIN_MARK}\n{body}\n{END_MARK}\n"

    head = "---\nlicense: mit\ntags: [theirs]\nlanguage: en\nmodel-index: []\n---\n"
    older = f"{head}{before}{BEGIN_MARK}\nold\n{END_MARK}{after}"
    text = merge_card("me/x", older, card("new"))
    read = ModelCard(text)
    assert read.text.strip() == f"{before}{BEGIN_MARK}\nnew\n{END_MARK}{after}".strip()
    assert read.data.to_dict() == {"license": "mit", "tags": ["ours", "theirs"], "language": "en"}
    assert merge_card("me/x", text, card("new")) == text


def test_a_card_without_our_part_keeps_all_of_its_own():
    text = merge_card(
        "me/x", "# Mine\n\nText.\n", f"---\nlicense: unknown\ntags: [a]\n---\n{BEGIN_MARK}\nnew\n{END_MARK}\n"
    )
    assert text == f"---\nlicense: unknown\ntags:\n- a\n---\n{BEGIN_MARK}\nnew\n{END_MARK}\n\n# Mine\n\nText.\n"


@pytest.mark.parametrize(
    ("older", "message"),
    [
        (f"text {BEGIN_MARK} text", "has lost one of the two marks"),
        (f"{END_MARK} {BEGIN_MARK}", "has lost one of the two marks"),
        ("---\na: [\n---\nx", "YAML of its README.md cannot be read"),
        ("---\n- a\n---\nx", "YAML of its README.md cannot be read"),
        ("---\ntags: [{a: 1}]\n---\nx", "YAML of its README.md cannot be read"),
        ("---\neval_results: 3\n---\nx", "YAML of its README.md cannot be read"),
    ],
)
def test_a_card_that_cannot_be_merged_is_left_alone(older, message):
    with pytest.raises(HubError, match=message):
        merge_card("me/x", older, f"---\nlicense: unknown\ntags: [a]\n---\n{BEGIN_MARK}\nnew\n{END_MARK}\n")


FIELDS = ["license", "tags", "eval_results", "model-index", "base_model", "datasets", "self", "x", "3", "kwargs"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab:", max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_whatever_the_owners_yaml_holds_it_is_kept_or_told_in_one_line(fields):
    older, told = f"---\n{yaml.safe_dump(fields)}\n---\nMine.\n", ""
    try:
        text = merge_card("me/x", older, f"---\nlicense: unknown\ntags: [ours]\n---\n{BEGIN_MARK}\nnew\n{END_MARK}\n")
    except HubError as error:
        text, told = "", str(error)
    assert "\n" not in told
    assert told or text.endswith(f"\n---\n{BEGIN_MARK}\nnew\n{END_MARK}\n\nMine.\n")


def test_words_as_tags_stay_whole():
    text = merge_card(
        "me/x", "---\ntags: theirs\n---\nx", f"---\nlicense: unknown\ntags: [ours]\n---\n{BEGIN_MARK}\n{END_MARK}\n"
    )
    assert ModelCard(text).data.tags == ["ours", "theirs"]
