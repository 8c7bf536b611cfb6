import json
import re

import numpy as np
import pytest
from helpers import (
    change_json,
    heldout,
    make_frame,
    noisy_logits,
    run_cli,
    write_folded_run,
    write_member,
    write_run,
    write_stacker,
)

from ensemble.core import artifacts, metrics
from ensemble.core.bootstrap import bootstrap_scores, paired_difference, percentile_interval, score_intervals
from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import Interval
from ensemble.stacking import stack
from ensemble.stacking.fit import fit_stacker
from ensemble.stacking.scores import ModelScores, format_scores, score_frames, score_models, verdict
from ensemble.stacking.stack import read_stacker
from ensemble.stacking.stacker import METHODS, read_stacker_values


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    run = tmp_path_factory.mktemp("stacked")
    frame = write_run(run)
    return run, frame, run_cli("stack", "--run", run)


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path)
    write_stacker(tmp_path)
    return tmp_path


def scored(width=0.01, **aurocs):
    """Lines with these AUROC, each difference from the stack's known to `width` either side."""

    def line(name, value):
        apart = value - aurocs["stack"]
        difference = None if name == "stack" else Interval(apart, apart - width, apart + width)
        return ModelScores(name, Interval(value, value, value), Interval(0.5, 0.4, 0.6), difference)

    return [line(name, value) for name, value in aurocs.items()]


def test_the_command_prints_every_score_and_where_it_wrote(stacked):
    run, _, (code, out, err) = stacked
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].startswith("On 48 held-out images in 12 groups; the stack out of fold")
    assert [line.split()[0] for line in lines[2:6]] == ["one", "two", "mean", "stack"]
    assert lines[6].startswith("The stack ")
    kinds = [line.split()[0] for line in lines[10:15]]
    assert kinds == list(METHODS)
    assert lines[-4].startswith("Calibration: none")
    assert lines[-3].startswith("Threshold: ")
    assert lines[-2] == "The data of this run was not audited."
    assert lines[-1] == f"-> {run / 'stacker.json'}"


def test_stacker_json_holds_what_the_design_names(stacked):
    run, frame, (_, out, _) = stacked
    values = json.loads((run / "stacker.json").read_text())
    one, two = (artifacts.read_json(run / "members" / name / "member.json", "") for name in ("one", "two"))
    assert (values["format_version"], values["inputs"], len(values["member_calibrations"])) == (2, "logit", 2)
    assert values["members"] == ["one", "two"]
    assert values["coef"][0] > values["coef"][1] > 0
    assert values["calibration"]["kind"] == "none"
    assert values["kind"] == "logistic"
    assert 0 < values["threshold"] < 1
    assert values["threshold_rule"] == "balanced_accuracy"
    assert set(values["kinds"]) == set(METHODS)
    assert [weight["value"] for weight in values["weights"]] == values["coef"]
    assert all(weight["low"] < weight["value"] < weight["high"] for weight in values["weights"])
    assert values["rows"] == {"split": "heldout", "images": 48, "groups": 12, "stack": "out of fold"}
    assert values["fitted_on"]["data_sha256"] == one["data_sha256"] == two["data_sha256"]
    assert set(values["fitted_on"]["members"]) == {"one", "two"}
    assert set(values["scores"]) == {"one", "two", "mean", "stack"}
    for score in values["scores"].values():
        assert score["auroc"]["low"] <= score["auroc"]["value"] <= score["auroc"]["high"]
        assert score["log_loss"]["low"] <= score["log_loss"]["value"] <= score["log_loss"]["high"]
        assert f"{score['auroc']['value']:.4f}" in out
    balanced = values["balanced_accuracy"]
    assert 0.5 < balanced["low"] < balanced["value"] <= balanced["high"]
    labels = heldout(frame)["label"]
    expected = metrics.auroc(labels, noisy_logits(frame, 2, 1).astype(np.float32))
    assert values["scores"]["one"]["auroc"]["value"] == expected


def test_the_stacker_read_back_is_the_one_that_was_fitted(stacked):
    run, _, (_, out, _) = stacked
    stacker = read_stacker(run)
    assert stacker.members == ("one", "two")
    assert all(f"{weight:+.4f} [" in out for weight in stacker.coef)


def test_the_mean_is_the_stack_of_equal_weights(stacked):
    run, _, _ = stacked
    values = json.loads((run / "stacker.json").read_text())
    assert values["scores"]["mean"]["auroc"] == values["kinds"]["mean"]["auroc"]
    assert values["scores"]["mean"]["log_loss"] == values["kinds"]["mean"]["log_loss"]


def test_what_infer_wrote_is_scored_as_the_logits_were(stacked):
    _, frame, _ = stacked
    rows = heldout(frame)
    p = {"one": metrics.sigmoid(noisy_logits(frame, 2, 1)), "two": metrics.sigmoid(noisy_logits(frame, 1, 2))}
    table = rows[["id"]].assign(target=p["one"] ** 2, **p)
    lines = score_frames(table, rows[["id", "label", "group"]])
    every = {**p, "mean": (p["one"] + p["two"]) / 2, "stack": p["one"] ** 2}
    expected = score_models(every, "stack", rows["label"].to_numpy(), rows["group"].to_numpy(str))
    assert [line.name for line in lines] == ["one", "two", "mean", "stack"]
    assert lines == expected


def test_a_difference_is_the_paired_one(stacked):
    _, frame, _ = stacked
    rows = heldout(frame)
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy(str)
    p = {name: metrics.sigmoid(noisy_logits(frame, *seed)) for name, seed in {"a": (2, 1), "b": (1, 2)}.items()}
    line, reference = score_models(p, "b", labels, groups)
    for name in ("auroc", "log_loss"):
        assert getattr(line, name) == score_intervals(labels, p["a"], groups, names=(name,))[name]
        a, b = bootstrap_scores(labels, [p["a"], p["b"]], groups, (name,))[name]
        difference = percentile_interval(
            metrics.score(name, labels, p["a"]) - metrics.score(name, labels, p["b"]), a - b
        )
        assert getattr(line, f"{name}_difference") == difference
    assert line.auroc_difference == paired_difference(labels, p["a"], p["b"], groups).difference
    assert reference.auroc_difference is None


def test_the_stack_is_scored_out_of_fold(tmp_path):
    frame = make_frame()
    noise = {f"noise{i}": noisy_logits(frame, 0, i) for i in range(8)}
    write_run(tmp_path, noise)
    done = stack.stack_run(tmp_path)
    lines = done.scored
    logits = np.stack(list(noise.values()), axis=1)
    in_sample = metrics.auroc(done.data.scored.labels, done.stacker.logit(logits))
    assert done.data.basis == "out of fold"
    assert lines[-1].name == "stack"
    assert lines[-1].auroc.value < in_sample
    assert "beats its best member" not in verdict(lines)


def test_with_folds_the_stack_is_fitted_on_other_rows_than_it_is_scored_on(tmp_path):
    frame, scores = write_folded_run(tmp_path, {"one": 2.0, "two": 1.0})
    done = stack.stack_run(tmp_path)
    assert done.data.basis == "fitted on other rows"
    assert done.data.ids == list(heldout(frame)["id"])
    held = frame["split"] == "heldout"
    logits = np.stack([table["logit"] for table in scores.values()], axis=1).astype(float)
    auroc = metrics.auroc(frame.loc[held, "label"], done.stacker.logit(logits[held]))
    assert done.scored[-1].auroc.value == auroc
    values = read_stacker_values(artifacts.stacker_path(tmp_path), "")
    assert values["fitted_rows"] == {"images": 20, "groups": 5}
    assert values["rows"] == {"split": "heldout", "images": 48, "groups": 12, "stack": "fitted on other rows"}
    labels, groups = (frame.loc[~held, column].to_numpy() for column in ("label", "group"))
    refitted = fit_stacker(["one", "two"], logits[~held], labels, groups.astype(str))
    assert done.stacker.coef == pytest.approx(refitted.coef)


@pytest.mark.parametrize(("kind", "size"), [("logistic", 0.7), ("logit", 3.0)])
def test_complementary_members_make_a_stack_that_wins(tmp_path, kind, size):
    frame = make_frame()
    labels, trouble = heldout(frame)["label"] - 0.5, noisy_logits(frame, 0)
    write_run(tmp_path, {"a": labels + size * trouble, "b": labels - size * trouble, "c": noisy_logits(frame, 0.5, 9)})
    lines = stack.stack_run(tmp_path, ("b", "a"), stack.StackOptions(kind)).scored
    assert [line.name for line in lines] == ["b", "a", "mean", "stack"]
    by_name = {line.name: line.auroc.value for line in lines}
    assert by_name["stack"] > 0.99 > by_name["a"] + 0.05


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            scored(a=0.8, b=0.9, mean=0.85, stack=0.95),
            "The stack beats its best member b by 0.0500 [0.0400, 0.0600] and "
            "beats the mean by 0.1000 [0.0900, 0.1100] in AUROC on these rows.",
        ),
        (
            scored(a=0.8, b=0.9, mean=0.85, stack=0.88),
            "The stack loses to its best member b by 0.0200 [0.0100, 0.0300] and "
            "beats the mean by 0.0300 [0.0200, 0.0400] in AUROC on these rows.",
        ),
        (
            scored(a=0.9, mean=0.8, stack=0.9),
            "The stack does not clearly differ from its best member a (+0.0000 [-0.0100, +0.0100]) and "
            "beats the mean by 0.1000 [0.0900, 0.1100] in AUROC on these rows.",
        ),
        (
            scored(0.2, a=0.8, mean=0.85, stack=0.9),
            "The stack does not clearly differ from its best member a (+0.1000 [-0.1000, +0.3000]) and "
            "does not clearly differ from the mean (+0.0500 [-0.1500, +0.2500]) in AUROC on these rows.",
        ),
    ],
)
def test_the_verdict_is_plain(lines, expected):
    assert verdict(lines) == expected


def test_the_table_shows_weights_of_members_only():
    table = format_scores(scored(a=0.8, mean=0.85, stack=0.9), {"a": "+0.500"})
    assert list(table["weight"]) == ["+0.500", "", ""]
    assert table.loc[0, "AUROC"] == "0.8000 [0.8000, 0.8000]"
    assert "weight" not in format_scores(scored(stack=0.8))


def test_a_stacker_of_other_members_is_stale(run):
    assert read_stacker(run).members == ("one", "two")
    frame = make_frame()
    write_member(run, "two", frame, noisy_logits(frame, 1, 5))
    with pytest.raises(
        ArtifactError, match=f"changed since the stack was fitted; run: python cli.py stack --run {run}"
    ):
        read_stacker(run)
    write_stacker(run)
    assert read_stacker(run).members == ("one", "two")


def test_a_member_the_stacker_does_not_weigh_changes_nothing(run):
    frame = make_frame()
    write_member(run, "three", frame, noisy_logits(frame, 1, 5))
    assert read_stacker(run).members == ("one", "two")


def test_a_stacker_whose_member_is_gone_is_refused(run):
    (run / "members" / "two").rename(run / "two")
    with pytest.raises(ArtifactError, match=r"no member 'two' in .*; it has: one"):
        read_stacker(run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no .*stacker\.json; run: python cli\.py stack --run"),
        ("{", r"stacker\.json is damaged \(not JSON\); run: python cli\.py stack"),
        ("{}", r"stacker\.json was written by another version of manyeyes; run: python cli\.py stack"),
        ('{"format_version": 1}', r"stacker\.json is damaged .*; run stack again"),
    ],
)
def test_a_missing_or_damaged_stacker_is_refused(run, content, message):
    path = artifacts.stacker_path(run)
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ArtifactError, match=message):
        read_stacker(run)


def test_another_format_version_is_refused(run):
    change_json(artifacts.stacker_path(run), format_version=3)
    with pytest.raises(ArtifactError, match=re.escape(f"{artifacts.stacker_path(run)} was written by another version")):
        read_stacker(run)


def test_a_failed_stack_leaves_the_older_stacker(run):
    before = artifacts.stacker_path(run).read_bytes()
    (run / "members" / "two" / "heldout.parquet").write_bytes(b"")
    code, _, err = run_cli("stack", "--run", run)
    assert code == 2
    assert "heldout.parquet is damaged" in err
    assert artifacts.stacker_path(run).read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == ["dataset.parquet", "members", "stacker.json"]


def test_calibration_made_anew_in_each_fold_does_not_spoil_the_ranking(stacked):
    _, frame, _ = stacked
    rows = heldout(frame)
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy(str)
    raw = noisy_logits(frame, 2, 1)
    uneven = raw + np.where(np.arange(len(raw)) < 24, 3.0, 0.0)  # as if one fold had been shifted
    plain, spoilt = (metrics.sigmoid(values) for values in (raw, uneven))
    line = score_models({"a": spoilt, "b": plain}, "b", labels, groups, {"a": plain})[0]
    assert line.auroc.value == metrics.auroc(labels, raw) > metrics.auroc(labels, uneven)
    assert line.auroc_difference == Interval(0.0, 0.0, 0.0)
    assert line.log_loss.value == metrics.log_loss(labels, spoilt)
