"""Tables of members' scores: what is a member, what is missing, and what is refused in one line."""

import numpy as np
import pandas as pd
import pytest

from ensemble.core.errors import DataError
from ensemble.stacking.score_table import labelled_scores, read_score_table


def table(rows=30, **columns):
    rng = np.random.default_rng(0)
    label = np.arange(rows) % 2
    frame = pd.DataFrame(
        {"id": [f"i{k}" for k in range(rows)], "label": label, "a": rng.random(rows), "b": rng.random(rows)}
    )
    return frame.assign(**columns)


def write(tmp_path, frame, name="scores.csv"):
    path = tmp_path / name
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("name", ["scores.csv", "scores.parquet"])
def test_every_other_column_of_numbers_is_a_member(tmp_path, name):
    frame = table(group="g", generator="x", source="s", path="p/1.jpg")
    read = read_score_table(write(tmp_path, frame, name))
    assert read.members == ("a", "b")
    np.testing.assert_allclose(1 / (1 + np.exp(-read.logits)), frame[["a", "b"]].to_numpy(), atol=1e-9)
    assert read.notes == ("Not members, since they are not numbers: path.",)
    assert read_score_table(write(tmp_path, frame, name), ["b"]).members == ("b",)


def test_without_id_rows_are_numbered_and_without_group_each_row_is_one(tmp_path):
    path = write(tmp_path, table().drop(columns="id"))
    rows, described, _ = labelled_scores(read_score_table(path), path)
    assert described["id"].tolist() == [str(k) for k in range(30)]
    assert rows.group_count == 30
    path = write(tmp_path, table(group=[f"g{k // 3}" for k in range(30)]))
    assert labelled_scores(read_score_table(path), path)[0].group_count == 10


@pytest.mark.parametrize(("values", "ai"), [(["fake", "human"], "fake"), (["ai", "real"], "ai"), ([1, 0], 1)])
def test_labels_are_numbers_or_class_names(tmp_path, values, ai):
    column = [values[k % 2] for k in range(30)]
    path = write(tmp_path, table(label=column))
    rows, _, _ = labelled_scores(read_score_table(path), path)
    assert rows.labels.tolist() == [int(value == ai) for value in column]


def test_empty_cells_and_nan_are_answers_that_were_not_given(tmp_path):
    a = pd.Series(np.linspace(0, 1, 30).astype(str))
    a[[3, 4, 5]] = ["", "NaN", "None"]
    path = write(tmp_path, table(a=a, b=[0.5 if k != 4 else None for k in range(30)]))
    read = read_score_table(path)
    assert np.isnan(read.logits[:, 0]).sum() == 3
    rows, _, notes = labelled_scores(read, path)
    assert len(rows.labels) == 29
    assert "1 rows have no score by any member and are left out." in notes
    assert any(line.startswith("a: no answer on 2 of 29 rows;") for line in notes)
    assert "b: the same score for all rows, so it does not count." in notes


def test_exact_0_and_1_have_finite_logits(tmp_path):
    read = read_score_table(write(tmp_path, table(a=[k % 2 for k in range(30)])))
    assert np.abs(read.logits[:, 0]).max() == pytest.approx(np.log(1e6), rel=1e-3)


LOGITS = np.linspace(-9, 9, 30)
REFUSED = {
    "ids twice": (table(id=["x"] * 30), {}, "ids given more than once: 'x'"),
    "an infinity": (
        table(a=["inf", *["0.1"] * 29]),
        {},
        "a of id 'i0' is inf; it is infinite; leave such a cell empty",
    ),
    "logits": (
        table(a=LOGITS),
        {},
        "a of id 'i0' is -9, and so on in 28 rows; it is no probability in 0..1; add --logits",
    ),
    "a member that is not there": (table(), {"members": ["c"]}, "has no scores of c; its columns: id, label, a, b"),
    "a member that is no score": (table(), {"members": ["label"]}, "has no scores of label"),
    "text for a member": (table(a="much"), {"members": ["a"]}, "a holds text or nothing, not numbers"),
    "no scores": (table()[["id", "label"]], {}, "has no column of scores"),
    "an odd name": (table(**{"../a": 0.5}), {}, r"columns that cannot be members' names: '\.\./a'; rename them"),
}


@pytest.mark.parametrize(("frame", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, frame, options, message):
    with pytest.raises(DataError, match=message) as refused:
        read_score_table(write(tmp_path, frame), **options)
    assert "\n" not in str(refused.value)


UNFIT = {
    "no label": (table().drop(columns="label"), r"has no column label .* give --apply stacker\.json"),
    "one class": (table(label=1), "must hold two classes"),
    "few rows": (table(rows=19), "has 19 rows with scores; a stacker needs 20 or more"),
}


@pytest.mark.parametrize(("frame", "message"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_fitted_on_is_refused_in_one_line(tmp_path, frame, message):
    path = write(tmp_path, frame)
    with pytest.raises(DataError, match=message):
        labelled_scores(read_score_table(path), path)


def test_logits_are_taken_as_they_are(tmp_path):
    np.testing.assert_allclose(read_score_table(write(tmp_path, table(a=LOGITS)), inputs="logit").logits[:, 0], LOGITS)
