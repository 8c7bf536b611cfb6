import numpy as np
import pytest
from helpers import write_csv
from pictures import crops, encoded

from ensemble.audit import train_test_shift
from ensemble.core.errors import DataError
from ensemble.data import dataset
from ensemble.data.sources import LabelledImage


@pytest.fixture(scope="module")
def pictures():
    return crops(120)


def put(folder, pictures, quality=90, suffix="jpg"):
    folder.mkdir()
    for number, picture in enumerate(pictures):
        (folder / f"{number:03}.{suffix}").write_bytes(encoded(picture, "JPEG", quality=quality))
    return folder


def indexed(folder):
    files = sorted(path.name for path in folder.iterdir())
    return dataset.index_items([LabelledImage(name, str(folder), name, n % 2) for n, name in enumerate(files)])


def compare(train, test):
    items, seen = indexed(train)
    found = train_test_shift.read_test(test)
    names = np.array([item.id for item in items], dtype=object)
    shared = train_test_shift.overlapping_pairs(seen, found)
    return shared, {f.kind: f for f in train_test_shift.compare_train_test(items, seen, names, found, shared)}


def test_alike_sets_cannot_be_told_apart(tmp_path, pictures):
    shared, found = compare(put(tmp_path / "train", pictures[::2]), put(tmp_path / "test", pictures[1::2]))
    assert shared == []
    assert found["against_files"].severity == "note"
    assert "no clear difference between training and test" in found["against_files"].text
    assert "overlap" not in found


def test_what_tells_them_apart_is_named(tmp_path, pictures):
    small = [picture.resize((64, 64)) for picture in pictures[1::2]]
    _, found = compare(put(tmp_path / "train", pictures[::2]), put(tmp_path / "test", small, quality=60))
    assert found["against_files"].severity == "warn"
    assert "64 (100%) in test, 96 (100%) in training" in found["against_files"].text
    assert found["against_spectrum"].severity == "warn"


def test_pictures_in_both_are_found_though_turned_and_stored_anew(tmp_path, pictures):
    train = put(tmp_path / "train", pictures[:50])
    again = [pictures[3], pictures[7].transpose(0), *pictures[60:80]]
    shared, found = compare(train, put(tmp_path / "test", again, quality=70))
    assert shared == [(3, 0), (7, 1)]
    assert "003.jpg and 000.jpg, 007.jpg and 001.jpg" in found["overlap"].text
    items, seen = indexed(train)
    left, rest = train_test_shift.exclude_overlap(items, seen, shared)
    assert [item.id for item in left] == [f"{n:03}.jpg" for n in range(50) if n not in (3, 7)]
    assert list(rest.records["sha256"]) == [seen.records["sha256"][n] for n in range(50) if n not in (3, 7)]


def test_nothing_left_is_an_error(tmp_path, pictures):
    items, seen = indexed(put(tmp_path / "train", pictures[:4]))
    with pytest.raises(DataError, match="every training image is in the test too"):
        train_test_shift.exclude_overlap(items, seen, [(n, 0) for n in range(4)])


def test_a_csv_of_ids_is_a_test_set(tmp_path, pictures):
    put(tmp_path / "images", pictures[:3])
    found = train_test_shift.read_test(write_csv(tmp_path / "test.csv", id=["002", "000"]))
    assert found.names == ["002.jpg", "000.jpg"]


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_no_test_set_is_refused(tmp_path, what):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no test set at|holds no images"):
        train_test_shift.read_test(tmp_path / what)
