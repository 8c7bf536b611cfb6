import re

import numpy as np
import pandas as pd
import pytest
from helpers import (
    change_json,
    heldout,
    heldout_scores,
    make_frame,
    noisy_logits,
    run_cli,
    write_folded_run,
    write_member,
    write_run,
    write_scores,
)

from ensemble.core import artifacts, metrics
from ensemble.core.errors import ArtifactError
from ensemble.models import members
from ensemble.training.train_all import summary
from ensemble.training.train_member import Outcome


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path / "run")
    return tmp_path / "run"


def refused(run, names, *parts):
    with pytest.raises(ArtifactError) as error:
        members.heldout_logits(run, artifacts.list_members(run, names))
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_logits_are_matched_to_rows_by_id(tmp_path):
    frame = make_frame()
    logits = noisy_logits(frame, 1)
    artifacts.write_parquet(artifacts.dataset_path(tmp_path), frame)
    scores = heldout_scores(frame, logits)
    write_scores(tmp_path, "plain", frame, scores)
    write_scores(tmp_path, "shuffled", frame, scores.sample(frac=1, random_state=0))
    rows, found = members.heldout_logits(tmp_path, ["plain", "shuffled"])
    assert list(rows["id"]) == list(heldout(frame)["id"])
    assert list(rows["label"]) == list(heldout(frame)["label"])
    np.testing.assert_array_equal(found, np.stack([logits.astype(np.float32)] * 2, axis=1))


def test_unseen_rows_are_no_held_out_rows(run):
    frame = make_frame()
    unseen = frame["group"] == "heldout3"
    frame.loc[unseen, "split"] = "unseen"
    artifacts.write_parquet(artifacts.dataset_path(run), frame)
    scores = heldout_scores(make_frame(), noisy_logits(make_frame(), 1))
    scores.loc[scores["id"].isin(frame.loc[unseen, "id"]), "split"] = "unseen"
    write_scores(run, "one", frame, scores)
    rows, logits = members.heldout_logits(run, ["one"])
    assert len(rows) == len(logits) == 44
    assert "heldout3" not in set(rows["group"])


def test_ids_are_text(tmp_path):
    frame = make_frame()
    frame.loc[:3, "id"] = ["007", "NA", "1e5", " 7"]
    write_member(tmp_path, "one", frame, noisy_logits(frame, 1))
    artifacts.write_parquet(artifacts.dataset_path(tmp_path), frame)
    rows, logits = members.heldout_logits(tmp_path, ["one"])
    assert list(rows["id"][:4]) == ["007", "NA", "1e5", " 7"]
    assert np.isfinite(logits).all()


def test_members_are_listed_by_name_and_chosen_in_the_order_given(run):
    (run / "members" / ".two.old").mkdir()
    assert artifacts.list_members(run) == ["one", "two"]
    assert artifacts.list_members(run, ("two", "one", "two")) == ["two", "one"]


def test_no_members_says_what_to_run(tmp_path):
    with pytest.raises(ArtifactError, match=r"no members in .*; train them first: python cli\.py train-all recipes/"):
        artifacts.list_members(tmp_path)


def test_a_half_written_member_is_refused(run):
    (run / "members" / "two" / "member.json").unlink()
    refused(run, (), "member 'two'", "is not complete (no member.json)", "run train-all again, or remove the folder")
    assert members.heldout_logits(run, artifacts.list_members(run, ("one",)))[1].shape == (48, 1)


def test_an_unknown_member_is_refused_with_those_there_are(run):
    refused(run, ("one", "three"), "no member 'three'", "it has: one, two")


def test_a_member_of_another_data_set_is_refused_by_name(run):
    other = make_frame(groups=13)
    write_member(run, "two", other, noisy_logits(other, 1))
    refused(run, (), "member 'two' was trained on another data set or split", "leave it out with --members")
    assert members.heldout_logits(run, ["one"])[1].shape == (48, 1)


def test_a_run_without_its_data_set_is_refused(run):
    artifacts.dataset_path(run).unlink()
    refused(run, (), "no ", "dataset.parquet; run train-all first")


def drop(scores):
    return scores.drop(index=[4, 7])


def double(scores):
    return scores.iloc[[0, 1, *range(len(scores))]]


def add(split, key):
    def change(scores):
        extra = scores.iloc[:1].assign(id=key, split=split)
        return pd.concat([scores, extra])

    return change


def flip(scores):
    return scores.assign(label=1 - scores["label"])


def spoil(value):
    def change(scores):
        scores.loc[5, "logit"] = value
        return scores

    return change


REFUSALS = {
    "missing": (drop, "2 rows have no logit (heldout/01-0, heldout/01-3)"),
    "doubled": (double, "ids stand more than once in its held-out rows (heldout/00-0, heldout/00-1)"),
    "from train": (add("heldout", "train/00-1"), "trained or tuned on are among its held-out rows (train/00-1)"),
    "from tune": (add("heldout", "tune/01-2"), "trained or tuned on are among its held-out rows (tune/01-2)"),
    "from train, said to be unseen": (add("unseen", "train/00-1"), "among its held-out rows (train/00-1)"),
    "not of the data set": (add("heldout", "elsewhere/1"), "ids that the data set does not hold out (elsewhere/1)"),
    "labels differ": (flip, "its labels differ from the data set's"),
    "NaN": (spoil(np.nan), "some held-out logits are not finite"),
    "infinite": (spoil(np.inf), "some held-out logits are not finite"),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS)
def test_held_out_rows_that_cannot_be_trusted_are_refused(run, change, message):
    frame = make_frame()
    write_scores(run, "two", frame, change(heldout_scores(frame, noisy_logits(frame, 1))))
    refused(run, (), "two: ", message, "heldout.parquet cannot be used; train 'two' again")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("member.json", "{", "member.json is damaged (not JSON); run train-all again"),
        ("member.json", "\xff", "member.json is damaged (not JSON); run train-all again"),
        ("member.json", "[]", "member.json was written by another version of manyeyes; run train-all again"),
        ("member.json", '{"format_version": 2}', "member.json was written by another version of manyeyes"),
        ("heldout.parquet", "PAR1", "heldout.parquet is damaged"),
        ("../../dataset.parquet", "", "dataset.parquet is damaged"),
    ],
)
def test_damaged_files_are_refused(run, file, content, message):
    (run / "members" / "one" / file).write_text(content, encoding="latin-1")
    refused(run, (), message)


def test_a_member_is_current_for_its_own_values_alone(run):
    info = members.read_info(run, "one")
    wanted = {"data_sha256": info["data_sha256"], "parameters": 1_500_000}
    assert members.is_current(run, "one", wanted)
    assert not members.is_current(run, "one", wanted | {"parameters": 1})
    assert not members.is_current(run, "one", wanted | {"seed": 0})
    assert not members.is_current(run, "three", wanted)


def test_files_are_checked_by_hash(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    files = {weights.name: artifacts.file_sha256(weights)}
    members.check_files(tmp_path, files, "do this")
    weights.write_bytes(b"weightz")
    with pytest.raises(ArtifactError, match=re.escape(f"{weights} is damaged: it is not the file that was written")):
        members.check_files(tmp_path, files, "do this")
    weights.unlink()
    with pytest.raises(ArtifactError, match=re.escape(f"{weights} is missing; do this")):
        members.check_files(tmp_path, files, "do this")


def test_the_command_says_the_same_in_one_line(run):
    (run / "members" / "two" / "member.json").unlink()
    code, out, err = run_cli("stack", "--run", run)
    assert (code, out) == (2, "")
    assert err.startswith("Error: member 'two'")
    assert err.count("\n") == 1


def unseen_run(run, both_classes):
    """A run of which four groups are kept out, with logits that rank them perfectly."""
    frame = make_frame()
    kept_out = frame["group"].isin(["heldout0", "heldout1", "heldout2", "heldout3"])
    if not both_classes:
        kept_out &= frame["label"] == 1
    frame.loc[kept_out, "split"] = "unseen"
    artifacts.write_parquet(artifacts.dataset_path(run), frame)
    rows = frame[frame["split"].isin(["heldout", "unseen"])].reset_index(drop=True)
    logits = np.where(rows["split"] == "unseen", rows["label"] * 4.0 - 2.0, np.arange(len(rows)) % 3)
    scores = rows[["id", "label", "split", "fold"]].assign(logit=logits.astype(np.float32))
    write_scores(run, "one", frame, scores)
    return rows


@pytest.mark.parametrize("both_classes", [True, False])
def test_what_is_kept_out_is_scored_apart(tmp_path, both_classes):
    rows = unseen_run(tmp_path, both_classes)
    held, logits = members.heldout_logits(tmp_path, ["one"])
    assert len(held) == len(logits) == (rows["split"] == "heldout").sum() < len(rows)
    (line,) = summary(tmp_path, [Outcome("one", "trained")]).to_dict("records")
    fair = rows["split"] == "heldout"
    assert line["held-out AUROC"] == f"{metrics.auroc(rows['label'][fair], np.arange(len(rows))[fair] % 3):.4f}"
    if both_classes:
        assert line["unseen AUROC"] == "1.0000"
    else:  # against the held-out real images
        known = rows[(rows["label"] == 0) | ~fair]
        logits = np.where(known["split"] == "unseen", 2.0, known.index % 3)
        assert line["unseen AUROC"] == f"{metrics.auroc(known['label'], logits):.4f}" != "1.0000"


def test_a_stacker_is_fitted_on_held_out_rows_without_folds_and_out_of_fold_with_them(run, tmp_path):
    rows, logits = members.fitting_logits(run, ["one"])
    assert set(rows["split"]) == {"heldout"}
    assert logits.shape == (48, 1)
    folded = tmp_path / "folded"
    frame, scores = write_folded_run(folded, {"one": 1.0, "two": 2.0})
    rows, logits = members.fitting_logits(folded, ["one", "two"])
    fitted = frame["split"] != "heldout"
    assert list(rows["id"]) == list(frame.loc[fitted, "id"])
    assert rows["split"].value_counts().to_dict() == {"train": 12, "tune": 8}
    np.testing.assert_array_equal(logits[:, 1], scores["two"].loc[fitted, "logit"].astype(float))
    held, logits = members.heldout_logits(folded, ["one", "two"])
    assert set(held["split"]) == {"heldout"}
    np.testing.assert_array_equal(logits[:, 0], scores["one"].loc[~fitted, "logit"].astype(float))


def swap_folds(scores):
    return scores.assign(fold=1 - scores["fold"])


def forget_folds(scores):
    return scores.assign(fold=pd.array([None] * len(scores), dtype="Int16"))


def drop_a_fold(scores):
    return scores[(scores["fold"] != 1).fillna(True)]


OUT_OF_FOLD = {
    "of another fold": (swap_folds, "trained or tuned on are among its held-out rows (train/00-0, "),
    "of no fold": (forget_folds, "trained or tuned on are among its held-out rows (train/00-0, "),
    "a fold is missing": (drop_a_fold, "8 rows have no logit (train/01-0, "),
    "doubled": (lambda scores: pd.concat([scores, scores[60:61]]), "ids stand more than once in its held-out rows ("),
    "not finite": (lambda scores: scores.assign(logit=np.nan), "some held-out logits are not finite"),
}


@pytest.mark.parametrize(("change", "message"), OUT_OF_FOLD.values(), ids=OUT_OF_FOLD)
def test_out_of_fold_rows_that_cannot_be_trusted_are_refused(tmp_path, change, message):
    frame, scores = write_folded_run(tmp_path, {"one": 1.0, "two": 1.0})
    write_scores(tmp_path, "two", frame, change(scores["two"]))
    change_json(tmp_path / "members" / "two" / "member.json", folds=2)
    with pytest.raises(ArtifactError, match=re.escape(message)) as error:
        members.fitting_logits(tmp_path, ["one", "two"])
    assert str(error.value).startswith("two: ")
    assert members.fitting_logits(tmp_path, ["one"])[1].shape == (20, 1)


@pytest.mark.parametrize(("count", "told"), [(None, "two without"), (3, "two with 3")])
def test_members_of_different_folds_are_refused_by_name(tmp_path, count, told):
    write_folded_run(tmp_path, {"one": 1.0, "two": 1.0})
    change_json(tmp_path / "members" / "two" / "member.json", folds=count)
    refused(tmp_path, (), f"different folds (one with 2, {told})", "train them alike, or choose some with --members")
    assert members.fitting_logits(tmp_path, ["one"])[1].shape == (20, 1)
