import os
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
from helpers import run_python, write_csv
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import HOSTILE_NAMES, encoded, noise, write_files

from ensemble.core.errors import DataError, ImageError
from ensemble.data.inputs import ids, inputs_from_files, names, read_inputs
from ensemble.data.readers import Item
from ensemble.images.decode import decode

LISTING = """
import re, sys
from pathlib import Path
from ensemble.data.inputs import read_inputs

def grown(since=0):  # not ru_maxrss: it starts at what the parent held
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024 - since

few, many, spill = map(Path, sys.argv[1:])
spill.mkdir()
assert read_inputs(few, spill=spill).count == 5_000
before = grown()  # what libraries and a part of a table take
inputs = read_inputs(many, spill=spill)
assert sum(1 for _ in inputs.items(0, inputs.count)) == inputs.count == 100_000
streamed = grown(before)
held = list(inputs.items(0, inputs.count))
print(streamed, grown(before))
"""


@pytest.fixture(params=["in memory", "on disk"])
def listed(request, tmp_path_factory):
    """read_inputs with the list of rows in memory, and with it on disk."""
    if request.param == "in memory":
        return read_inputs
    return partial(read_inputs, spill=tmp_path_factory.mktemp("spill"))


def rows(inputs):
    return list(inputs.items(0, inputs.count))


def files(inputs):
    return [item.source for item in rows(inputs)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a", "b", "a"]}, "ids given more than once: 'a'; each image is scored once"),
        ({"id": ["a", "zz", ""]}, "2 of 3 ids have no image in .*: 'zz', ''; name their folder with --images"),
        ({"id": ["a", "same"]}, r"ids that match more than one file in .*: 'same' \(x/same\.png and y/same\.png\)"),
        ({"path": ["a.png", "zz.png"]}, "1 of 2 paths in .* do not exist below .*: 'zz.png'"),
        ({"path": ["a.png", "a.png"]}, "ids given more than once: 'a.png'"),
        ({"name": ["a"]}, "needs a column id or path; it has: name"),
        ({"id": []}, "has no rows"),
    ],
)
def test_tables_that_leave_a_doubt_are_refused(tmp_path, listed, columns, message):
    write_files(tmp_path, "a.png", "b.png", "x/same.png", "y/same.png")
    with pytest.raises(DataError, match=message):
        listed(write_csv(tmp_path / "test.csv", **columns))


def test_the_suffix_settles_an_ambiguous_id(tmp_path):
    write_files(tmp_path, "a.jpg", "a.png")
    assert files(read_inputs(write_csv(tmp_path / "test.csv", id=["a.png", "a.jpg"]))) == [
        tmp_path / "a.png",
        tmp_path / "a.jpg",
    ]


def test_an_image_without_an_id_is_named_by_its_row(tmp_path, listed):
    write_files(tmp_path, "a.png", "b.png")
    columns = {"path": ["a.png", "gone.png", "b.png"], "id": ["1", "2", ""]}
    with pytest.raises(DataError, match=r"test\.csv: row 3 has no id; give every image one"):
        listed(write_csv(tmp_path / "test.csv", **columns))


def test_a_folder_of_images_is_refused_where_the_input_has_them_itself(tmp_path):
    write_files(tmp_path / "photos", "a.png")
    pd.DataFrame({"image": [b"a"]}).to_parquet(tmp_path / "set.parquet")
    for source in (tmp_path / "photos", tmp_path / "set.parquet"):
        with pytest.raises(DataError, match=r"has the images itself, none .* leave out --images"):
            read_inputs(source, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "gone.csv", "no input at .*gone.csv; give a CSV with a column id, or a folder"),
        (lambda path: path, "holds no images"),
        (lambda path: write_csv(path / "test.csv", id=["a"]), "1 of 1 ids have no image"),
    ],
)
def test_a_missing_input_is_refused(tmp_path, listed, make, message):
    with pytest.raises(DataError, match=message):
        listed(make(tmp_path))


@pytest.mark.parametrize("name", ["photos", "n" * 300])
def test_a_missing_image_folder_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=rf"no such folder: .*{name} \(--images\)"):
        read_inputs(write_csv(tmp_path / "test.csv", id=["a"]), tmp_path / name)


def test_rows_have_an_id_a_name_for_errors_and_a_file(tmp_path, listed):
    names = sorted(f"in/{name}.jpg" for name in HOSTILE_NAMES)
    write_files(tmp_path, *names)
    assert rows(listed(tmp_path)) == [Item(name, str(tmp_path / name), tmp_path / name) for name in names]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_is_read_in_parts_as_if_whole(tmp_path, listed, kind, monkeypatch):
    monkeypatch.setattr("ensemble.data.tables.BATCH_ROWS", 3)
    monkeypatch.setattr("ensemble.data.parquet.BATCH_ROWS", 3)
    monkeypatch.setattr("ensemble.data.image_list.BATCH_ROWS", 2)
    write_files(tmp_path, *(f"{name}.jpg" for name in HOSTILE_NAMES))
    frame = pd.DataFrame({"path": [f"{name}.jpg" for name in HOSTILE_NAMES], "id": HOSTILE_NAMES})
    for columns in (["id"], ["path"], ["path", "id"]):
        table = tmp_path / f"table.{kind}"
        frame[columns].to_csv(table, index=False) if kind == "csv" else frame[columns].to_parquet(table)
        found = listed(table)
        assert ids(found) == list(frame[columns[-1]])
        assert files(found) == [tmp_path / path for path in frame["path"]]
    missing = r"5 of 15 paths in .* do not exist below .*: 'x0', 'x1', 'x2', 'x3', 'x4'; name"
    for message, columns in (
        (missing, {"path": [*frame["path"], *(f"x{number}" for number in range(5))]}),
        (r"given more than once: '1,2', '1e5'; each", {"id": [*HOSTILE_NAMES, "1e5", "1,2", "1,2"]}),
    ):
        table = write_csv(tmp_path / "doubtful.csv", **columns)
        with pytest.raises(DataError, match=message):
            listed(table)


def test_a_range_of_rows_is_that_slice(tmp_path, monkeypatch):
    monkeypatch.setattr("ensemble.data.image_list.BATCH_ROWS", 4)
    inputs = inputs_from_files([str(number) for number in range(10)], [tmp_path / str(number) for number in range(10)])
    expected = rows(inputs)
    assert [row.id for row in expected] == list("0123456789")

    @settings(deadline=None)
    @given(start=st.integers(0, 10), stop=st.integers(0, 11))
    def check(start, stop):
        assert list(inputs.items(start, stop)) == expected[start:stop]

    check()


def test_ids_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("ensemble.data.image_list._hashes", lambda batch: np.zeros(len(batch), dtype=np.uint64))
    write_files(tmp_path, "a.jpg", "b.jpg")
    assert ids(read_inputs(write_csv(tmp_path / "test.csv", id=["b", "a"]))) == ["b", "a"]
    with pytest.raises(DataError, match="given more than once: 'a'; each"):
        read_inputs(write_csv(tmp_path / "test.csv", id=["b", "a", "a"]))


def test_the_hash_changes_with_ids_order_sizes_and_times(tmp_path):
    write_files(tmp_path, "a.jpg", "b.jpg")
    table = tmp_path / "test.csv"

    def sha256(*keys, spill=None):
        return read_inputs(write_csv(table, id=keys), spill=spill).sha256

    first = sha256("a", "b")
    assert first == sha256("a", "b") == sha256("a", "b", spill=tmp_path)
    seen = {first, sha256("b", "a"), sha256("a"), sha256("a.jpg", "b")}
    write_files(tmp_path, "a.jpg", data=b"more")
    seen.add(sha256("a", "b"))
    os.utime(tmp_path / "a.jpg", ns=(1, 1))
    seen.add(sha256("a", "b"))
    assert len(seen) == 6


def test_a_file_that_goes_is_an_unreadable_row(tmp_path, listed):
    write_files(tmp_path, "a.png", "b.png", data=encoded(noise(1)))
    (tmp_path / "c.png").symlink_to("nowhere")
    found = listed(tmp_path)
    (tmp_path / "b.png").unlink()
    assert ids(found) == ["a.png", "b.png", "c.png"]
    good, *gone = found.items(0, 3)
    assert decode(good.source).size == (32, 32)
    for item in gone:
        with pytest.raises(ImageError, match="no such file"):
            decode(item.source, item.path)


def test_names_that_are_not_utf8_are_kept(tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.jpg")
    inputs = inputs_from_files([file.name], [file])
    assert rows(inputs) == [Item(file.name, str(file), file)]
    assert list(names(inputs)) == [file.name]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_memory_of_a_list_does_not_grow_with_its_rows(tmp_path):
    write_files(tmp_path, "one.jpg")
    tables = []
    for count in (5_000, 100_000):
        tables.append(tmp_path / f"{count}.csv")
        tables[-1].write_text("id,path\n" + "".join(f"image {row:09},one.jpg\n" for row in range(count)))
    done = run_python("-c", LISTING, *tables, tmp_path / "spill")
    assert done.returncode == 0, done.stderr
    streamed, held = map(float, done.stdout.split())
    assert streamed < 16  # MB
    assert held > 32
