import csv
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from helpers import read_csv
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import HOSTILE_NAMES

from ensemble.core.errors import ArtifactError
from export.inference.outputs import Failure, output_format, write_failures, write_scores

HOSTILE = [*HOSTILE_NAMES, "", " spaces ", "😀", "-0", "=1+1", "'", '"', "\ufeff", "a\rb", "a\r\nb"]
VALUES = st.one_of(st.floats(0, 1), st.just(float("nan")))


def scores(ids, target):
    return pd.DataFrame({"id": pd.Series(ids, dtype=object), "target": target})


def whole(frame, fill, returns):
    """What the CSV of a result is, when all of it is there."""
    if fill is not None:
        numbers = frame.columns.drop("id")
        frame.loc[frame["target"].isna(), numbers] = frame.loc[frame["target"].isna(), numbers].fillna(fill)
    quoting = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    return frame.to_csv(index=False, float_format="%.9g", quoting=quoting).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parts_make_the_file_that_the_whole_makes(folder, suffix, data):
    ids = data.draw(st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(codec="utf-8")))))
    members = data.draw(st.sampled_from([[], ["one"], ["one", "two"]]))
    rows = st.lists(VALUES, min_size=1 + len(members), max_size=1 + len(members))
    values = np.array(data.draw(st.lists(rows, min_size=len(ids), max_size=len(ids))), dtype=np.float64)
    values = values.reshape(len(ids), 1 + len(members))
    ends = [0, *sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=3))), len(ids)]
    fill = data.draw(st.sampled_from([None, 0.5]))
    frame = pd.DataFrame(values, columns=["target", *members])
    frame.insert(0, "id", pd.Series(ids, dtype=object))
    parts = [frame[start:stop].reset_index(drop=True) for start, stop in pairwise(ends)]
    returns = any("\r" in key for key in ids)
    output = folder / f"out{suffix}"
    write_scores(output, iter(parts), members, returns, fill)
    if suffix == ".csv":
        assert output.read_bytes() == whole(frame, fill, returns)
        return
    read = pd.read_parquet(output)
    assert list(read["id"]) == ids
    unread = np.isnan(values[:, :1])  # a member that did not run has no p; that is not filled
    expected = values if fill is None else np.where(unread & np.isnan(values), fill, values)
    np.testing.assert_array_equal(read[["target", *members]].to_numpy(), expected)


def test_a_parquet_file_has_null_for_what_could_not_be_read(tmp_path):
    import pyarrow.parquet as pq

    write_scores(tmp_path / "out.parquet", [scores(["a", "b"], [1 / 3, np.nan])])
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.to_pylist() == [{"id": "a", "target": 1 / 3}, {"id": "b", "target": None}]
    assert [str(kind) for kind in table.schema.types] == ["string", "double"]


def test_small_parts_become_large_row_groups(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr("export.inference.outputs.ROW_GROUP_ROWS", 10)
    parts = (scores([str(row), f"{row}b"], np.zeros(2)) for row in range(12))
    write_scores(tmp_path / "out.parquet", parts)
    metadata = pq.read_metadata(tmp_path / "out.parquet")
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [10, 10, 4]


def test_targets_keep_nine_digits(tmp_path):
    write_scores(tmp_path / "out.csv", [scores(["a"], [0.123456789012])])
    assert (tmp_path / "out.csv").read_text() == "id,target\na,0.123456789\n"


@pytest.mark.parametrize("name", ["out.csv", "out.CSV", "out.parquet"])
def test_the_suffix_says_the_format(tmp_path, name):
    assert output_format(tmp_path / name) == name.rpartition(".")[2].lower()


@pytest.mark.parametrize("name", ["out", "out.txt", "out.csv.gz", ".csv"])
def test_another_suffix_is_refused(tmp_path, name):
    with pytest.raises(ArtifactError, match=r"cannot write .*; end its name in \.csv or \.parquet"):
        output_format(tmp_path / name)
    with pytest.raises(ArtifactError, match="end its name"):
        write_scores(tmp_path / name, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_what_was_there_stays_until_all_is_written(tmp_path, suffix):
    output = tmp_path / f"out{suffix}"
    write_scores(output, [scores(["a"], np.ones(1))])
    before = output.read_bytes()

    def broken():
        yield scores(["b"], np.ones(1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scores(output, broken())
    assert output.read_bytes() == before
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("place", ["file.txt/out.csv", "folder.csv", "folder.parquet"])
def test_an_output_that_cannot_be_written_is_one_clear_error(tmp_path, place):
    (tmp_path / "file.txt").write_text("in the way")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot (make|write) .*; choose another place"):
        write_scores(tmp_path / place, [scores(["a"], np.ones(1))])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder.csv", "folder.parquet"]


@pytest.mark.parametrize("output", ["out.csv", "out.parquet"])
def test_failures_are_listed_beside_the_output(tmp_path, output):
    names = [name for name in HOSTILE if "\r" not in name]
    failures = [Failure(name, f"images/{name}.png", f"{name}: the file is empty") for name in names]
    listing = write_failures(tmp_path / output, iter(failures))
    assert listing == tmp_path / "out.errors.csv"
    assert listing.read_bytes() == pd.DataFrame(failures).to_csv(index=False).encode()
    assert write_failures(tmp_path / output, []) is None
    assert list(tmp_path.iterdir()) == []
    assert write_failures(tmp_path / output, []) is None


def test_hostile_failures_survive_the_round_trip(tmp_path):
    failures = [{"id": "plain", "path": f"images/{name}.png", "error": f"{name}: why"} for name in HOSTILE]
    failures += [{"id": name, "path": "images/plain.png", "error": "why"} for name in HOSTILE]
    listing = write_failures(tmp_path / "out.csv", (Failure(**failure) for failure in failures))
    assert read_csv(listing).to_dict("records") == failures
