import pytest
from helpers import write_csv, write_image

from ensemble.errors import DataError
from export.submission import check_submission


def check(folder, **ours):
    sample = write_csv(folder / "sample_submission.csv", id=["007", "NA", "c"], target=["0.5", "0.5", "0.5"])
    return check_submission(write_csv(folder / "submission.csv", **ours), sample)


@pytest.mark.parametrize("target", [["0", "1", "0.25"], ["1e-9", "0.999999999", "1.0"]])
def test_a_submission_like_the_sample_is_counted(tmp_path, target):
    assert check(tmp_path, id=["007", "NA", "c"], target=target) == 3


SOUND = {"id": ["007", "NA", "c"], "target": ["0.1", "0.2", "0.3"]}
REFUSALS = {
    "another column": ({**SOUND, "one": ["0"] * 3}, "has columns id, target, one, the sample id, target"),
    "a missing column": ({"id": SOUND["id"]}, "has columns id, the sample id, target"),
    "columns swapped": ({"target": SOUND["target"], "id": SOUND["id"]}, "has columns target, id, the sample id"),
    "another id": ({**SOUND, "id": ["007", "NA", "d"]}, "ids differ: c, d"),
    "a lost zero": ({**SOUND, "id": ["7", "NA", "c"]}, "ids differ: 007, 7"),
    "a missing row": ({"id": ["007", "NA"], "target": ["0.1", "0.2"]}, "ids differ: c"),
    "a doubled row": ({"id": ["007", "NA", "c", "c"], "target": ["0.1"] * 4}, "or some more than once"),
    "another order": ({**SOUND, "id": ["NA", "007", "c"]}, "the same ids stand in another order"),
    "empty": ({**SOUND, "target": ["0.1", "", "0.3"]}, "target is empty or outside .* for 1 ids: NA"),
    "text": ({**SOUND, "target": ["ai", "real", "0.3"]}, "for 2 ids: 007, NA"),
    "above one": ({**SOUND, "target": ["0.1", "0.2", "1.01"]}, "for 1 ids: c"),
    "below zero": ({**SOUND, "target": ["-0.1", "0.2", "0.3"]}, "for 1 ids: 007"),
    "infinite": ({**SOUND, "target": ["0.1", "inf", "nan"]}, "for 2 ids: NA, c"),
}


@pytest.mark.parametrize(("ours", "message"), REFUSALS.values(), ids=REFUSALS)
def test_anything_else_is_refused(tmp_path, ours, message):
    with pytest.raises(DataError, match=message):
        check(tmp_path, **ours)


@pytest.mark.parametrize("name", ["submission.csv", "sample.csv"])
def test_a_missing_file_is_named(tmp_path, name):
    for present in {"submission.csv", "sample.csv"} - {name}:
        write_csv(tmp_path / present, **SOUND)
    with pytest.raises(DataError, match=f"no such file: .*{name}"):
        check_submission(tmp_path / "submission.csv", tmp_path / "sample.csv")


def test_a_sample_without_target_is_refused(tmp_path):
    for name in ("submission.csv", "sample.csv"):
        write_csv(tmp_path / name, id=["a"], label=["1"])
    with pytest.raises(DataError, match=r"sample\.csv needs the columns id and target"):
        check_submission(tmp_path / "submission.csv", tmp_path / "sample.csv")


def test_a_file_that_is_no_csv_is_refused(tmp_path):
    write_csv(tmp_path / "sample.csv", **SOUND)
    write_image(tmp_path / "submission.csv")
    with pytest.raises(DataError, match=r"submission\.csv is not a readable CSV"):
        check_submission(tmp_path / "submission.csv", tmp_path / "sample.csv")
