from pathlib import Path

import pytest
from helpers import write_csv
from pictures import write_files

from ensemble.core.errors import DataError
from ensemble.data.sources import ReadOptions, read_data


def several(*paths, **options):
    return read_data(list(paths), ReadOptions(**options))


def refused(*paths, **options) -> str:
    with pytest.raises(DataError) as caught:
        several(*paths, **options)
    return str(caught.value)


def ids(items) -> list[str]:
    return sorted(item.id for item in items)


def test_ids_of_several_folders_begin_with_their_names(tmp_path):
    for name in ("web", "film"):
        write_files(tmp_path / name, "ai/1.png", "real/1.png")
    items, notes = several(tmp_path / "web", tmp_path / "film")
    assert ids(items) == ["film/ai/1.png", "film/real/1.png", "web/ai/1.png", "web/real/1.png"]
    assert {item.id: (item.path, item.source) for item in items}["web/ai/1.png"] == ("ai/1.png", "web")
    assert all(item.file.is_file() for item in items)
    assert notes == []


def test_folders_of_one_name_are_told_apart_by_those_above(tmp_path):
    places = [tmp_path / name for name in ("a/x/train", "b/x/train", "b/y/train", "other")]
    for place in places:
        write_files(place, "ai/1.png", "real/1.png")
    items, _ = several(*places)
    assert sorted({item.source for item in items}) == ["a/x/train", "b/x/train", "other", "y/train"]
    assert len(set(ids(items))) == 8


def test_a_csv_and_a_folder_of_one_name_are_told_apart(tmp_path):
    write_files(tmp_path / "train", "ai/1.png", "real/1.png")
    write_files(tmp_path, "train.csv", data=b"path,label\ntrain/ai/1.png,1\n")
    items, _ = several(tmp_path / "train.csv", tmp_path / "train")
    assert {item.source for item in items} == {"train.csv", "train"}
    assert ids(items) == ["train.csv/train/ai/1.png", "train/ai/1.png", "train/real/1.png"]


def test_each_of_several_may_hold_one_class(tmp_path):
    write_files(tmp_path / "flickr", "human/1.png", "human/2.png")
    write_files(tmp_path / "gan", "fake/1.png")
    write_files(tmp_path / "sd", "x/1.png")
    items, notes = several(tmp_path / "flickr", tmp_path / "gan", tmp_path / "sd", positive="x")
    assert [(item.id, item.label, item.source) for item in items] == [
        ("flickr/human/1.png", 0, "flickr"),
        ("flickr/human/2.png", 0, "flickr"),
        ("gan/fake/1.png", 1, "gan"),
        ("sd/x/1.png", 1, "sd"),
    ]
    places = [tmp_path / name for name in ("flickr", "gan", "sd")]
    said = ("human as real", "fake counts as ai", "x counts as ai")
    assert notes == [f"{place}: {text}" for place, text in zip(places, said, strict=True)]


def test_one_class_in_all_of_them_is_refused(tmp_path):
    write_files(tmp_path / "a", "ai/1.png")
    write_files(tmp_path / "b", "ai/1.png")
    message = refused(tmp_path / "a", tmp_path / "b")
    assert message == f"{tmp_path / 'a'}, {tmp_path / 'b'} holds no real images; both classes need some"


def test_one_class_whose_name_says_nothing_is_refused(tmp_path):
    write_files(tmp_path / "a", "ai/1.png")
    write_files(tmp_path / "b", "cats/1.png")
    message = refused(tmp_path / "a", tmp_path / "b")
    assert message.startswith(f"{tmp_path / 'b'}: one folder a class")
    assert message.endswith("cannot tell whether cats is ai or real; say it with --classes cats=ai (or =real)")
    items, _ = several(tmp_path / "a", tmp_path / "b", classes={"cats": "real", "ai": "ai"})
    assert [item.label for item in items] == [1, 0]


@pytest.mark.parametrize("spelling", ["train", "./train", "a/../train", "link"])
def test_the_same_data_twice_is_refused(tmp_path, monkeypatch, spelling):
    write_files(tmp_path, "train/ai/1.png", "train/real/1.png", "a/x")
    (tmp_path / "link").symlink_to(tmp_path / "train")
    monkeypatch.chdir(tmp_path)
    message = refused(Path("train"), Path(spelling))
    assert message.endswith(" is given more than once")
    assert "train" in message


def test_csvs_and_folders_are_combined(tmp_path):
    columns = {"id": ["007", "NA"], "label": ["1", "1"], "source": ["gan", ""], "group": ["g", ""]}
    path = write_csv(write_files(tmp_path, "images/007.jpg", "images/NA.jpg") / "train.csv", **columns)
    write_files(tmp_path / "film", "human/1.png")
    items, notes = several(path, tmp_path / "film")
    assert [(item.id, item.label, item.source, item.group) for item in items] == [
        ("007", 1, "gan", "g"),
        ("NA", 1, "train", None),
        ("film/human/1.png", 0, "film", None),
    ]
    assert notes == [
        f"{path}: label column of train.csv: 1 counts as ai, 0 as real",
        f"{tmp_path / 'film'}: human as real",
    ]


def two_tables(tmp_path, *columns) -> list[Path]:
    for folder, label in (("a", "1"), ("b", "0")):
        cells = ["1.png" if column == "path" else "1" for column in columns]
        text = ",".join((*columns, "label")) + "\n" + ",".join((*cells, label)) + "\n"
        write_files(tmp_path / folder, "1.png")
        write_files(tmp_path / folder, "train.csv", data=text.encode())
    return [tmp_path / "a/train.csv", tmp_path / "b/train.csv"]


def test_paths_of_csvs_are_prefixed_and_their_ids_are_not(tmp_path):
    tables = two_tables(tmp_path, "path")
    items, _ = several(*tables)
    assert [(item.id, item.source, item.label) for item in items] == [
        ("a/train/1.png", "a/train", 1),
        ("b/train/1.png", "b/train", 0),
    ]


def test_an_id_in_two_csvs_is_refused(tmp_path):
    tables = two_tables(tmp_path, "id", "path")
    assert refused(*tables) == f"{tables[0]}, {tables[1]}: ids given more than once: '1'"


def test_a_csv_that_misses_some_paths_is_refused_among_others(tmp_path):
    columns = {"path": [f"{number}.jpg" for number in range(9)], "label": list("010101010")}
    path = write_csv(write_files(tmp_path, "0.jpg", "1.jpg") / "train.csv", **columns)
    write_files(tmp_path / "film", "ai/1.png", "real/1.png")
    message = refused(tmp_path / "film", path)
    assert message.startswith(f"7 of 9 paths in {path} do not exist below {path.parent}: '2.jpg', ")
    assert "'6.jpg' and 2 more; name their folder with --images" in message


def test_a_group_column_that_only_one_has(tmp_path):
    columns = {"id": ["a", "b"], "label": ["1", "0"], "scene": ["s1", ""]}
    path = write_csv(write_files(tmp_path, "images/a.jpg", "images/b.jpg") / "train.csv", **columns)
    write_files(tmp_path / "film", "ai/1.png", "real/1.png")
    items, _ = several(path, tmp_path / "film", group_column="scene")
    assert [item.group for item in items] == ["s1", None, None, None]
