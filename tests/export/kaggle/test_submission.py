import csv

import numpy as np
import pandas as pd
import pytest
from helpers import read_csv, run_cli, write_csv, write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import HOSTILE_NAMES

from ensemble.core.errors import DataError
from export.kaggle.submission import (
    align_to_sample,
    read_sample,
    read_scores,
    submission_values,
    write_submission,
)

IDS = ["007", "NA", "c"]
SOUND = {"id": IDS, "target": ["0.1", "0.2", "0.3"]}


def submit(folder, ours, sample=None, *arguments):
    """The exit code, what was said, and the file's text if one was written."""
    write_csv(folder / "sample.csv", **(sample or {"id": IDS, "target": ["0.5"] * 3}))
    write_csv(folder / "scores.csv", **ours)
    output = folder / "out.csv"
    places = ("--scores", folder / "scores.csv", "--sample", folder / "sample.csv", "--output", output)
    code, out, err = run_cli("submit", *places, *arguments)
    return code, out or err, output.read_text(encoding="utf-8") if output.exists() else None


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("target", [["0", "1", "0.25"], ["1e-09", "0.999999999", "1"]])
def test_a_submission_like_the_sample_is_written(tmp_path, target):
    code, said, text = submit(tmp_path, {"id": IDS, "target": target})
    assert (code, text) == (0, "id,target\n" + "".join(f"{k},{v}\n" for k, v in zip(IDS, target, strict=True)))
    assert f"3 rows as in {tmp_path}/sample.csv -> {tmp_path}/out.csv; what made it: out.csv.json" in said


def test_rows_take_the_samples_order_and_columns_its_names(tmp_path):
    ours = {"id": ["c", "007", "NA"], "target": ["0.3", "0.1", "0.2"], "one": ["9"] * 3}
    code, said, text = submit(tmp_path, ours, {"label": ["0.5"] * 3, "Id": IDS})
    assert (code, text) == (0, "label,Id\n0.1,007\n0.2,NA\n0.3,c\n")
    assert "Rows were put into the sample's order." in said


def test_rows_in_order_are_not_said_to_have_moved(tmp_path):
    assert "Rows were put" not in submit(tmp_path, SOUND)[1]


def test_written_again_in_place_it_stays_the_same(tmp_path):
    write_csv(tmp_path / "sample.csv", Id=["b", "a"], label=["0.5"] * 2)
    write_csv(tmp_path / "out.csv", id=["a", "b"], target=["0.1", "0.2"])
    for _ in range(2):
        assert run_cli("submit", "--scores", "out.csv", "--sample", "sample.csv", "--output", "out.csv")[0] == 0
        assert (tmp_path / "out.csv").read_text() == "Id,label\nb,0.2\na,0.1\n"


REFUSALS = {
    "no target": ({"id": IDS, "one": ["0"] * 3}, "it needs id and target, as infer writes them"),
    "another id": ({**SOUND, "id": ["007", "NA", "d"]}, "it lacks 1: c; it has 1 more: d\n"),
    "a lost zero": ({**SOUND, "id": ["7", "NA", "c"]}, "more: 7 (only leading zeros differ: keep ids as text)"),
    "a suffix": ({**SOUND, "id": ["007.png", "NA.jpg", "c.png"]}, "(only the files' suffixes differ: run infer with"),
    "a folder": ({**SOUND, "id": ["t/007", "t/NA", "t/c"]}, "(only the folder differs: run infer with"),
    "a missing row": ({"id": IDS[:2], "target": ["0.1", "0.2"]}, "it lacks 1: c\n"),
    "a doubled row": ({"id": [*IDS, "c"], "target": ["0.1"] * 4}, "has ids more than once: c"),
    "empty": ({**SOUND, "target": ["0.1", "", "0.3"]}, "target is empty or outside [0, 1] for 1 ids: NA"),
    "text": ({**SOUND, "target": ["ai", "real", "0.3"]}, "for 2 ids: 007, NA"),
    "above one": ({**SOUND, "target": ["0.1", "0.2", "1.01"]}, "for 1 ids: c"),
    "below zero": ({**SOUND, "target": ["-0.1", "0.2", "0.3"]}, "for 1 ids: 007"),
    "infinite": ({**SOUND, "target": ["0.1", "inf", "nan"]}, "for 2 ids: NA, c"),
    "constant": ({**SOUND, "target": ["0.5"] * 3}, "every target is 0.5; such a submission ranks nothing"),
    "labels": ({**SOUND, "target": ["0", "1", "1.0"]}, "every target is 0 or 1, as labels are"),
}


@pytest.mark.parametrize(("ours", "message"), REFUSALS.values(), ids=REFUSALS)
def test_anything_else_is_refused(tmp_path, ours, message):
    code, said, text = submit(tmp_path, ours)
    assert (code, text, said.count("\n")) == (2, None, 1)
    assert message in said


SAMPLES = {
    "one column": ({"id": IDS}, "needs two columns, an id and the target; it has: id"),
    "three columns": ({**SOUND, "more": ["0"] * 3}, "it has: id, target, more"),
    "an id twice": ({"id": ["a", "a"], "target": ["0", "0"]}, "has ids more than once: a"),
    "names of classes": ({"id": IDS, "target": ["ai", "real", "ai"]}, "target holds ai, real in place of numbers"),
    "isReal": ({"id": IDS, "isReal": ["0.5"] * 3}, "seems to mean that an image is real"),
    "P(real)": ({"id": IDS, "is_real": ["0.5"] * 3}, "seems to mean that an image is real"),
}


@pytest.mark.parametrize(("sample", "message"), SAMPLES.values(), ids=SAMPLES)
def test_a_sample_that_is_not_understood_is_refused(tmp_path, sample, message):
    code, said, text = submit(tmp_path, SOUND, sample)
    assert (code, text) == (2, None)
    assert message in said


@pytest.mark.parametrize("column", ["target", "label", "is_fake", "real_or_fake", "Realistic"])
def test_other_names_of_the_target_are_taken(tmp_path, column):
    assert submit(tmp_path, SOUND, {"id": IDS, column: ["0.5"] * 3})[0] == 0


@pytest.mark.parametrize("column", ["real", "target"])
def test_what_1_means_can_be_said(tmp_path, column):
    sample = {"id": IDS, column: ["0.5"] * 3}
    assert submit(tmp_path, SOUND, sample, "--positive", "real")[2] == f"id,{column}\n007,0.9\nNA,0.8\nc,0.7\n"
    assert submit(tmp_path, SOUND, sample, "--positive", "ai")[2] == f"id,{column}\n007,0.1\nNA,0.2\nc,0.3\n"


HARD = ("--hard", "--threshold", 0.2)


def test_labels_by_a_threshold(tmp_path):
    sample = {"id": IDS, "target": ["0"] * 3}
    assert submit(tmp_path, SOUND, sample, *HARD)[2] == "id,target\n007,0\nNA,1\nc,1\n"
    assert submit(tmp_path, SOUND, sample, *HARD, "--positive", "real")[2] == "id,target\n007,1\nNA,0\nc,0\n"


def test_labels_are_refused_where_the_sample_has_probabilities(tmp_path):
    code, said, _ = submit(tmp_path, SOUND, None, *HARD)
    assert (code, "so it takes probabilities: leave out --hard" in said) == (2, True)


@pytest.mark.parametrize(("threshold", "name"), [(0.01, "ai"), (0.9, "real")])
def test_a_threshold_that_tells_nothing_apart_is_refused(tmp_path, threshold, name):
    code, said, _ = submit(tmp_path, SOUND, {"id": IDS, "target": ["0"] * 3}, "--hard", "--threshold", threshold)
    assert (code, f"calls all 3 images {name}" in said) == (2, True)


@pytest.mark.parametrize(("values", "noted"), [(["0", "1", "0"], True), (["1"] * 3, True), (["0", "1", "0.5"], False)])
def test_a_sample_of_labels_is_pointed_out(tmp_path, values, noted):
    said = submit(tmp_path, SOUND, {"id": IDS, "target": values})[1]
    assert ("The sample holds only 0 and 1: if labels are scored" in said) == noted


USES = {
    "--threshold 0.5": "--threshold makes labels: add --hard",
    "--hard": "--hard needs a threshold: name the run or bundle that made the scores",
    "--run missing": "no missing/stacker.json; name the run or bundle that made the scores",
    "--output scores.parquet": "a submission's name ends in .csv",
    "--output sample.csv": "sample.csv is the sample and would be overwritten",
    "--output scores.csv --hard --threshold 0.2": "scores.csv has the scores, which would be lost",
    "--output scores.csv --positive real": "scores.csv has the scores, which would be lost",
    "--output out.csv --scores out.csv.json": "out.csv.json has the scores and would be overwritten",
    "--output out.csv --sample out.csv.json": "out.csv.json has the sample and would be overwritten",
    "--output folder.csv": "folder.csv.json is a folder, and says what made folder.csv; choose another --output",
    "--scores none.csv": "no scores at none.csv; make them first: python cli.py infer --onnx --output none.csv",
    "--sample none.csv": "no such file: none.csv",
}


@pytest.mark.parametrize(("options", "message"), USES.items())
def test_wrong_use_is_one_line(tmp_path, options, message):
    write_csv(tmp_path / "sample.csv", id=IDS, target=["0"] * 3)
    write_csv(tmp_path / "scores.csv", **SOUND)
    write_csv(tmp_path / "out.csv.json", **SOUND)
    (tmp_path / "folder.csv.json").mkdir()
    places = ("--scores", "scores.csv", "--sample", "sample.csv", "--output", "out.csv")
    code, out, err = run_cli("submit", *places, *options.split())
    assert (code, out, message in err) == (2, "", True), err
    assert not (tmp_path / "out.csv").exists()


def test_a_row_of_a_parquet_without_an_id_is_refused(tmp_path):
    sample = read_sample(write_csv(tmp_path / "sample.csv", id=["a", "None"], target=["0.5"] * 2))
    path = tmp_path / "scores.parquet"
    pd.DataFrame({"id": ["a", None], "target": [0.1, 0.2]}).to_parquet(path)
    with pytest.raises(DataError, match=r"scores\.parquet has rows without an id"):
        read_scores(path, sample)
    pd.DataFrame({"id": ["a", "None"], "target": [0.1, 0.2]}).to_parquet(path)
    assert list(read_scores(path, sample)["id"]) == ["a", "None"]


def test_a_file_that_is_no_csv_is_refused(tmp_path):
    write_csv(tmp_path / "sample.csv", **SOUND)
    with pytest.raises(DataError, match=r"scores\.csv is not a readable CSV"):
        read_scores(write_image(tmp_path / "scores.csv"), read_sample(tmp_path / "sample.csv"))


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=8)


@given(st.lists(TEXT, min_size=2, max_size=8, unique=True), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_any_ids_in_any_order_come_out_as_the_samples(tmp_path_factory, ids, random):
    folder = tmp_path_factory.mktemp("any")
    ids = [*ids, *(name for name in HOSTILE_NAMES if name not in ids)]
    shuffled = random.sample(ids, len(ids))
    targets = {key: f"{number / len(ids):.9g}" for number, key in enumerate(ids)}
    write_csv(folder / "sample.csv", id=ids, target=["0.5"] * len(ids))
    write_csv(folder / "scores.csv", id=shuffled, target=[targets[key] for key in shuffled])
    sample = read_sample(folder / "sample.csv")
    values, moved = align_to_sample(read_scores(folder / "scores.csv", sample), sample, folder / "scores.csv")
    write_submission(folder / "out.csv", sample, submission_values(values, sample, None, None, folder / "scores.csv"))
    assert moved == (shuffled != ids)
    assert list(read_csv(folder / "out.csv")["id"]) == ids
    with (folder / "out.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["id", "target"], *([key, targets[key]] for key in ids)]


def test_a_shuffle_with_the_wrong_targets_would_be_seen(tmp_path):
    sample = read_sample(write_csv(tmp_path / "sample.csv", id=["a", "b"], target=["0.5"] * 2))
    table = read_scores(write_csv(tmp_path / "scores.csv", id=["b", "a"], target=["0.2", "0.1"]), sample)
    np.testing.assert_array_equal(align_to_sample(table, sample, tmp_path)[0], [0.1, 0.2])
    assert table["target"].tolist() == [0.2, 0.1]
