import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import change_json, run_cli
from small_members import small_member
from small_report import MEMBERS, SCRIPT, STACKER, Page, make_run, problems, write_evaluation

from ensemble.core import artifacts, metrics
from ensemble.core.bootstrap import paired_difference, score_intervals
from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import Interval, sigmoid
from ensemble.data.dataset import dataset_sha256
from ensemble.evaluation import report, report_scores
from ensemble.stacking.stack import stack_run

CELLS = ("clean", "jpeg 30", "$blur$ <2>")
AUDIT = {
    "headline": "Metadata alone: a <shortcut>.",
    "blocked": True,
    "null": {"balanced_accuracy": Interval(0.61, 0.58, 0.64).to_dict(), "auroc": 0.63},
    "findings": [{"severity": "block", "kind": "null", "text": "<u>files</u> differ"}],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reported") / "run <b>"
    make_run(folder)
    artifacts.write_json(artifacts.audit_path(folder), AUDIT)
    return folder


@pytest.fixture(scope="module")
def held(run):
    return report_scores.read_run_images(run, STACKER)[0]


@pytest.fixture(scope="module")
def said(run):
    return run_cli("report", "--run", run, "--no-heatmaps")


@pytest.fixture(scope="module")
def html(run, said):
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_command_prints_the_verdict_of_the_page_and_where_it_wrote(run, said, page):
    code, out, err = said
    verdict, place = out.splitlines()
    assert (code, err) == (0, "")
    assert verdict.startswith("On 48 held-out images in 12 groups the stack reaches an AUROC of 0.")
    assert place == f"-> {run / 'report.html'}"
    assert verdict in page.text


def test_the_mean_is_out_of_fold_as_in_the_table_of_stack(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    done = stack_run(folder)
    held = report_scores.read_run_images(folder, done.stacker)[0]
    expected = next(line for line in done.scored if line.name == "mean").auroc.value
    assert metrics.auroc(held.labels, held.scores["mean"]) == expected
    assert metrics.auroc(held.labels, done.stacker.mean_logit(held.logits)) != expected  # calibrated on these rows


def test_the_page_shows_the_stack_without_each_source(run, page):
    lines, _ = report_scores.leave_out_parts(run, STACKER)["source"]
    table = page.table("leftout")  # none by generator: there is one of ai, and one name of all real images
    assert list(table) == [
        "source",
        *(line.name for line in sorted(lines, key=lambda line: line.scored[0].auroc.value)),
    ]
    for line in lines:
        auroc = line.scored[0].auroc
        assert table[line.name][:2] == [str(line.images), f"{auroc.value:.3f} {auroc.low:.3f}–{auroc.high:.3f}"]
    assert "Worst source: " in page.text
    assert "What the stack was not fitted on" in page.text


def test_scores_on_the_page_are_those_of_the_rows(page, held):
    table = page.table("scores")
    assert list(table) == ["", *MEMBERS, "mean", "stack", "metadata alone"]
    p = dict(zip(MEMBERS, sigmoid(held.logits.T), strict=True))
    p |= {"mean": sigmoid(held.logits.mean(axis=1)), "stack": sigmoid(held.stack)}
    for name, values in p.items():
        expected = score_intervals(held.labels, values, held.groups)
        shown = dict(zip(table[""], table[name], strict=True))
        for title, key in (("AUROC", "auroc"), ("F1", "f1"), ("TPR at 5 % FPR", "tpr_at_5"), ("ECE", "ece")):
            score = expected[key]
            assert shown[title] == f"{score.value:.3f} {score.low:.3f}–{score.high:.3f}"
        assert shown["balanced accuracy"].startswith(f"{metrics.score('balanced_accuracy', held.labels, values):.3f}")
    assert table["one"][0] == "+0.900"


def test_the_stack_is_scored_out_of_fold(page, held):
    assert not np.allclose(held.stack, STACKER.logit(held.logits))
    assert "48 images (24 ai, 24 real) in 12 groups; the stack is scored out of fold." in page.text


def test_the_stack_is_compared_with_the_best_member_and_the_mean(page, held):
    rows = page.table("versus")
    found = paired_difference(held.labels, sigmoid(held.stack), sigmoid(held.logits[:, 0]), held.groups)
    shown = rows["one (best member)"]
    assert shown[0].split()[0] == f"{found.difference.value:+.3f}"
    assert shown[0].split()[1:] == [f"{found.difference.low:+.3f}", "to", f"{found.difference.high:+.3f}"]
    assert shown[1] == f"{100 * found.better:.1f} % of draws"
    assert "mean" in rows


def test_calls_are_counted_by_class_generator_and_source(page, held):
    called = sigmoid(held.stack) >= 0.5
    ai = held.labels == 1
    table = page.table("confusion", 1)
    assert table["$\\frac{1}$"][:5] == ["ai", "24", "12", str(called[ai].sum()), str((~called)[ai].sum())]
    assert table["none"][5] == f"{100 * (~called)[~ai].mean():.1f} %"
    camera = (held.frame["source"] == "camera").to_numpy()
    assert page.table("confusion", 2)["camera"][3] in (
        str((called & ai & camera).sum()),
        str((called & ~ai & camera).sum()),
    )
    table = page.table("parts")
    assert table["camera"][:2] == [str((camera & ~ai).sum()), str((camera & ai).sum())]
    assert table["camera"][3].startswith(f"{metrics.auroc(held.labels[camera], held.stack[camera]):.3f} ")


def test_members_are_compared_with_each_other(page, held):
    agreeing = np.corrcoef(held.logits[:, 0], held.logits[:, 1])[0, 1]
    apart = ((held.logits[:, 0] >= 0) != (held.logits[:, 1] >= 0)).sum()
    assert page.table("heat")["one"][1] == f"{agreeing:.3f}"
    assert page.table("heat", 1)["one"][1] == f"{apart / 48:.3f}"
    assert f"On {apart} of 48 images" in page.text


def test_the_page_needs_nothing_else_and_hostile_names_stay_text(html, page):
    assert problems(html) == []
    for name in (SCRIPT, "$x$", "' onload='alert(1)", '"><img src=x onerror=alert(1)>', "run <b>"):
        assert name in page.text
    assert len(html) < 2_000_000


@pytest.mark.parametrize(
    ("html", "found"),
    [
        (f"<p>{SCRIPT}</p>", ["tag script"]),
        ('<a href="https://example.org">x</a>', ["link out", "https:"]),
        ('<img src="x.png" alt="x" onerror="alert(1)">', ["img onerror", "picture"]),
        ('<img src="data:image/png;base64," alt="">', ["picture"]),
    ],
)
def test_a_page_that_needs_or_runs_something_is_caught(html, found):
    assert problems(html) == found


def test_the_gallery_shows_the_worst_first_and_fills_up_with_the_nearest(page, held):
    p = sigmoid(held.stack)
    assert len(page.cards) == 24
    for cards, label in ((page.cards[:12], 0), (page.cards[12:], 1)):
        rows = np.flatnonzero(held.labels == label)
        ordered = rows[np.argsort(held.stack[rows] * (2 * label - 1), kind="stable")][:12]
        wrong = (p[ordered] >= 0.5) != (label == 1)
        assert [text[0] for _, text in cards] == list(held.frame["id"].iloc[ordered])
        assert [kind == "card error" for kind, _ in cards] == wrong.tolist()
        assert 0 < wrong.sum() < 12
        for row, (kind, text) in zip(ordered, cards, strict=True):
            told = next(line for line in text if line.startswith("stack "))
            assert told == f"stack {p[row]:.3f}:" + (" right, near the threshold" if kind == "card nearest" else "")
            assert ("wrong" in text) == (kind == "card error")
            assert text[-4:] == [
                "one",
                f"{sigmoid(held.logits[row, 0]):.3f}",
                MEMBERS[1],
                f"{sigmoid(held.logits[row, 1]):.3f}",
            ]
        assert f"{wrong.sum()} of the 12 shown are wrong, the most confident first; the others are right" in page.text


def test_the_heat_map_is_of_the_member_of_the_largest_weight(run, monkeypatch, photos):
    asked = []
    monkeypatch.setattr(
        "ensemble.models.members.load_member", lambda run, name: asked.append(name) or small_member("vit")
    )
    look = report.heatmap_overlay(run, report.largest_weight_member(run, STACKER))
    assert asked == ["one"]
    assert look(photos[0]).mode == "RGB"
    assert report.largest_weight_member(run, replace(STACKER, coef=(0.2, -0.3))) == MEMBERS[1]


def test_a_false_positive_rate_that_reals_cannot_resolve_is_told(page):
    assert "24 held-out reals cannot resolve a false positive rate of 1 %" in page.text
    assert "12 groups of held-out images are few" in page.text


def test_what_metadata_reaches_stands_beside_the_scores(page):
    table = page.table("scores")
    shown = dict(zip(table[""], table["metadata alone"], strict=True))
    assert {title: text for title, text in shown.items() if text} == {
        "AUROC": "0.630",
        "balanced accuracy": "0.610 0.580–0.640",
    }
    assert page.text.count(AUDIT["headline"]) > 5
    assert "The audit would have stopped this training" in page.text
    assert "block null: <u>files</u> differ" in page.text


def test_what_is_gone_is_told_and_not_fatal(tmp_path):
    rows = make_run(tmp_path)
    scores = write_evaluation(tmp_path, "old", rows)
    artifacts.write_parquet(tmp_path / "evaluations" / "old" / "scores.parquet", scores.drop(columns="logit:one"))
    for path in rows["path"]:
        (tmp_path / "images" / path).unlink()
    assert run_cli("report", "--run", tmp_path, "--no-heatmaps", "--output", tmp_path / "new" / "page.html")[0] == 0
    page = Page((tmp_path / "new" / "page.html").read_text())
    assert len(page.cards) == 24
    assert sum("no such file" in " ".join(text) for _, text in page.cards) == 24
    assert "image files are no longer where they were" in page.text
    assert "Too few images of both classes can be read" in page.text
    assert not any(page.table("scores")["metadata alone"])
    assert "The data was not audited" in page.text
    assert "Not shown: evaluation 'old' lacks logit:one" in page.text


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    scores = write_evaluation(run, "first", report_scores.read_run_images(run, STACKER)[0].frame, CELLS)
    file, seen = tmp_path_factory.mktemp("evaluated") / "page.html", []
    report.write_report(run, file, look=lambda image: seen.append(image) or image, resamples=40)
    return scores, file.read_text(), seen


def test_an_evaluation_is_the_second_set_of_rows(evaluated):
    scores, html, _ = evaluated
    page = Page(html)
    clean = scores[scores["cell"] == "clean"]
    assert problems(html) == []
    assert "Evaluation first of photos.csv: 48 images" in page.text
    assert page.table("scores", 1)["stack"][1].startswith(f"{metrics.auroc(clean['label'], clean['logit']):.3f} ")
    assert len(page.cards) == 48
    assert "Nothing here was degraded" not in page.text


def test_heat_maps_stand_beside_their_images_as_attention(evaluated):
    _, html, seen = evaluated
    page = Page(html)
    assert {(image.mode, image.size) for image in seen} == {("RGB", (40, 36))}
    assert sum(image["alt"].startswith("attention of one on ") for image in page.of("img")) == len(seen) == 48
    assert "its attention, not proof" in page.text


def test_robustness_is_told_cell_by_cell(evaluated):
    scores, html, _ = evaluated
    page = Page(html)
    table = page.table("heat", 2)
    stack = {cell: metrics.auroc(part["label"], part["logit"]) for cell, part in scores.groupby("cell")}
    assert list(table) == ["degradation", *CELLS]
    assert {cell: table[cell][2] for cell in CELLS} == {cell: f"{stack[cell]:.3f}" for cell in CELLS}
    worst = min(stack, key=stack.get)
    assert f"worst under {worst}, with an AUROC of {stack[worst]:.3f}" in page.text


def test_an_evaluation_of_reals_alone_is_shown_as_far_as_it_goes(run, held, tmp_path):
    write_evaluation(run, "reals", held.frame, label=0)
    report.write_report(run, tmp_path / "page.html", "reals", resamples=40)
    page = Page((tmp_path / "page.html").read_text())
    shown = dict(zip(page.table("scores", 1)[""], page.table("scores", 1)["stack"], strict=True))
    assert shown["AUROC"] == "–"
    assert re.match(r"0\.\d+ 0\.", shown["accuracy on real"])
    assert len(page.cards) == 36


def test_an_evaluation_that_cannot_be_shown_is_told(run, held):
    with pytest.raises(ArtifactError, match="no evaluation 'second'"):
        report_scores.read_evaluated_images(run, "second", STACKER)
    write_evaluation(run, "second", held.frame, ("jpeg 30",))
    with pytest.raises(ArtifactError, match="'second' has no undamaged images"):
        report_scores.read_evaluated_images(run, "second", STACKER)
    with pytest.raises(ArtifactError, match="'second' lacks logit:third: the stack has other members now"):
        report_scores.read_evaluated_images(run, "second", replace(STACKER, members=("one", "third")))


def test_unseen_generators_are_a_set_of_their_own(tmp_path):
    make_run(tmp_path)
    whole = pd.read_parquet(tmp_path / "dataset.parquet")
    whole.loc[whole["group"].isin(["heldout0", "heldout1", "heldout2"]), "split"] = "unseen"
    artifacts.write_parquet(tmp_path / "dataset.parquet", whole)
    for name in MEMBERS:
        change_json(tmp_path / "members" / name / "member.json", data_sha256=dataset_sha256(whole))
        path = tmp_path / "members" / name / "heldout.parquet"
        scores = pd.read_parquet(path)
        scores["split"] = whole.set_index("id").loc[scores["id"], "split"].to_numpy()
        artifacts.write_parquet(path, scores)
    held, unseen = report_scores.read_run_images(tmp_path, STACKER)
    assert (len(held.frame), len(unseen.frame)) == (36, 12)
    assert np.array_equal(unseen.stack, STACKER.logit(unseen.logits))


def test_the_run_must_have_a_stack(tmp_path):
    code, out, err = run_cli("report", "--run", tmp_path)
    assert (code, out) == (2, "")
    assert f"run: python cli.py stack --run {tmp_path}" in err


def test_worst_is_by_class_and_stable():
    labels, logits = np.array([0, 1, 0, 1, 0]), np.array([1.0, 2.0, 3.0, -1.0, 3.0])
    assert report.most_wrong(labels, logits, 0).tolist() == [2, 4, 0]
    assert report.most_wrong(labels, logits, 1, 1).tolist() == [3]
