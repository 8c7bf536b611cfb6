import csv
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from pictures import HOSTILE_NAMES, write_files
from tar_shards import write_tar

from ensemble.core.errors import DataError
from ensemble.data.readers import find_format
from ensemble.data.sources import ReadOptions, read_data
from ensemble.data.tables import read_table, resolve_entries


@pytest.fixture
def table(tmp_path):
    """Writes a CSV, and for each id an empty image, since nothing is decoded here."""

    def write(*rows: tuple[str, ...], encoding: str = "utf-8") -> Path:
        if "id" in rows[0]:
            write_files(tmp_path / "images", *(f"{row[rows[0].index('id')]}.jpg" for row in rows[1:]))
        with (tmp_path / "train.csv").open("w", newline="", encoding=encoding) as file:
            csv.writer(file).writerows(rows)
        return tmp_path / "train.csv"

    return write


def read(path, **options):
    return read_data([path], ReadOptions(**options))


def located(table, images=None):
    """The root of a table's images, and their paths."""
    entries, root, _ = resolve_entries(iter([read_table(table)]), table, images)
    return root, [entry.path for entry in entries]


def refusal(*arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(*arguments, **options)
    return str(caught.value)


# ---- folders


def test_a_folder_of_two_classes(tmp_path):
    write_files(tmp_path, "ai/b.png", "ai/in/a.jpg", "real/a.jpg", ".hidden/x.jpg", "labels.csv")
    items, notes = read(tmp_path)
    assert [(item.id, item.label) for item in items] == [("real/a.jpg", 0), ("ai/b.png", 1), ("ai/in/a.jpg", 1)]
    assert [item.file for item in items] == [tmp_path / item.id for item in items]
    assert all(item.group is item.generator is None for item in items)
    assert {item.source for item in items} == {tmp_path.name}
    assert notes == []


def test_other_folder_names_are_mapped_and_said_aloud(tmp_path):
    write_files(tmp_path, "FAKE/a.png", "human/a.png")
    items, notes = read(tmp_path)
    assert {item.id: item.label for item in items} == {"human/a.png": 0, "FAKE/a.png": 1}
    assert notes == ["FAKE counts as ai, human as real"]


def test_ambiguous_folder_names_need_positive(tmp_path):
    write_files(tmp_path, "cats/a.png", "dogs/a.png")
    message = refusal(tmp_path)
    assert message == (
        f"{tmp_path}: one folder a class, such as ai/ and real/: "
        "cannot tell which of cats, dogs means AI-made; name it with --positive"
    )
    items, notes = read(tmp_path, positive="cats")
    assert {item.id: item.label for item in items} == {"dogs/a.png": 0, "cats/a.png": 1}
    assert notes == ["cats counts as ai, dogs as real"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("ai/a.png", "real/note.txt"), "real holds no images; both classes need some"),
        (("ai/a.png",), "two classes are needed, found 1: ai"),
        (("a.png", "b.png"), "two classes are needed, found 0: none"),
        (("ai/a.png", "real/a.png", "other/a.png"), "two classes are needed, found 3: ai, other, real"),
        (("ai/a.heic", "real/a.png"), "images that cannot be read would be skipped (1 .heic)"),
    ],
)
def test_a_folder_without_two_classes_is_refused(tmp_path, names, message):
    write_files(tmp_path, *names)
    assert message in refusal(tmp_path)


def test_missing_data_is_refused(tmp_path):
    assert refusal(tmp_path / "train").startswith(f"no data at {tmp_path / 'train'}; put images in ")


# ---- CSV files


KEYS = ("007", "7", "NA", "1e5", "nan", " x", "None", "True")


def test_ids_stay_the_text_they_are(table):
    items, _ = read(table(("id", "label"), *((key, str(n % 2)) for n, key in enumerate(KEYS))))
    assert [item.id for item in items] == list(KEYS)
    assert [item.file.name for item in items] == [f"{key}.jpg" for key in KEYS]


def test_paths_stay_the_text_they_are(table, tmp_path):
    path = table(("path", "label"), *((key, str(n % 2)) for n, key in enumerate(KEYS)))
    write_files(tmp_path, *KEYS)
    items, _ = read(path)
    assert [item.id for item in items] == list(KEYS)
    assert [item.file for item in items] == [tmp_path / key for key in KEYS]


def test_hostile_names_survive_a_csv(table):
    rows = [(name, ("ai", "real")[n % 2]) for n, name in enumerate(HOSTILE_NAMES)]
    items, _ = read(table(("id", "label"), *rows))
    assert [item.id for item in items] == list(HOSTILE_NAMES)
    assert all(item.file.name == f"{item.id}.jpg" and item.file.is_file() for item in items)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_passed_over(table, encoding):
    items, _ = read(table(("id", "label"), ("é", "ai"), ("b", "real"), encoding=encoding))
    assert [item.id for item in items] == ["é", "b"]


@pytest.mark.parametrize(
    ("values", "positive", "labels", "note"),
    [
        (("1", "0", "1"), None, [1, 0, 1], "label column of train.csv: 1 counts as ai, 0 as real"),
        (("1.0", "0.0", " 1"), None, [1, 0, 1], "label column of train.csv: 1 counts as ai, 0 as real"),
        (("1", "0", "1"), "0", [0, 1, 0], "0 counts as ai, 1 as real"),
        (("ai", "real", " ai"), None, [1, 0, 1], None),
        (("Fake", "Human", "Fake"), None, [1, 0, 1], "Fake counts as ai, Human as real"),
        (("2", "1", "2"), "2", [1, 0, 1], "2 counts as ai, 1 as real"),
        (("x", "y", "x"), "Y", [0, 1, 0], "y counts as ai, x as real"),
    ],
)
def test_labels_are_read_and_said_aloud(table, values, positive, labels, note):
    path = table(("id", "label"), *zip("abc", values, strict=True))
    items, notes = read(path, positive=positive)
    assert [item.label for item in items] == labels
    assert notes == ([note] if note else [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("0", "1", "2"), "('0' 1 times, '1' 1 times, '2' 1 times): two classes are needed, found 3: 0, 1, 2"),
        (("1", "1", "1"), "('1' 3 times): two classes are needed, found 1: 1"),
        (("ai", "real", ""), "two classes are needed, found 3: , ai, real"),
        (("ai", "real", "AI"), "two classes are needed, found 3: AI, ai, real"),
        (("1", "2", "2"), "cannot tell which of 1, 2 means AI-made; name it with --positive"),
        (("cat", "dog", "dog"), "cannot tell which of cat, dog means AI-made; name it with --positive"),
    ],
)
def test_labels_other_than_two_classes_are_refused(table, values, message):
    path = table(("id", "label"), *zip("abc", values, strict=True))
    assert refusal(path).startswith(f"{path}: the label column must hold two classes (")
    assert refusal(path).endswith(message)


def test_group_source_and_generator_are_read(table):
    path = table(
        ("id", "label", "group", "source", "generator"), ("a", "1", "g1", "web", "gan"), ("b", "0", "", "", "")
    )
    items, _ = read(path)
    found = [(item.group, item.source, item.generator) for item in items]
    assert found == [("g1", "web", "gan"), (None, "train", None)]


def test_another_column_can_hold_the_groups(table):
    path = table(("id", "label", "group", "scene"), ("a", "1", "g", "s1"), ("b", "0", "g", "s2"))
    items, _ = read(path, group_column="scene")
    assert [item.group for item in items] == ["s1", "s2"]
    assert refusal(path, group_column="photo") == f"{path} has no column 'photo'; it has: id, label, group, scene"


def test_doubled_ids_are_refused(table):
    path = table(("id", "label"), ("a", "1"), ("b", "0"), ("a", "0"))
    assert refusal(path) == f"{path}: ids given more than once: 'a'"


@pytest.mark.parametrize(
    ("header", "message"),
    [(("id", "target"), "needs a column label; it has: id, target"), (("key", "label"), "needs a column id or path")],
)
def test_a_missing_column_is_refused(table, header, message):
    assert message in refusal(table(header, ("a", "1"), ("b", "0")))


def test_missing_paths_are_listed(table):
    path = table(("path", "label"), ("a", "1"), ("b.jpg", "0"), ("", "1"))
    write_files(path.parent, "b.jpg")
    message = refusal(path)
    assert message.startswith(f"2 of 3 paths in {path} do not exist below {path.parent}: 'a', '';")
    assert message.endswith("name their folder with --images")


def test_paths_count_from_the_csv_or_from_images(table, tmp_path):
    path = table(("path", "label"), ("a.jpg", "1"), ("b.jpg", "0"))
    write_files(tmp_path / "other", "a.jpg", "b.jpg")
    assert "do not exist" in refusal(path)
    items, _ = read(path, images=tmp_path / "other")
    assert [item.file for item in items] == [tmp_path / "other/a.jpg", tmp_path / "other/b.jpg"]


@pytest.mark.parametrize("cell", ["x" * 5000, "a/" * 3000, "nul\0"], ids=["name", "path", "null"])
def test_a_cell_that_can_be_no_file_name_is_missing_like_any_other(tmp_path, cell):
    frame = pd.DataFrame({"path": [cell]})
    for images in (None, tmp_path):
        with pytest.raises(DataError, match=r"1 of 1 paths in .*t\.csv do not exist below"):
            list(resolve_entries(iter([frame]), tmp_path / "t.csv", images)[0])


def test_ids_count_from_images_beside_the_csv_or_from_its_folder(tmp_path):
    table = write_files(tmp_path, "t.csv", data=b"id\na\n") / "t.csv"
    write_files(tmp_path, "a.jpg")
    assert located(table) == (tmp_path, ["a.jpg"])
    write_files(tmp_path, "images/a.png")
    assert located(table) == (tmp_path / "images", ["a.png"])
    with pytest.raises(DataError, match=r"no such folder: .*/missing \(--images\)"):
        located(table, tmp_path / "missing")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a readable CSV: No columns to parse"),
        (b"id,label\n", "has no rows"),
        (b"id,label\na,1,\nb,0,\n", "its rows have more cells than its header has names"),
        (b"id,label\na,1\nb,0,x\n", "is not a readable CSV: Error tokenizing data"),
        ("id,label\né,1\n".encode("latin-1"), "is not a readable CSV: 'utf-8' codec"),
        ("id,label\na,1\n".encode("utf-16"), "is not a readable CSV: 'utf-8' codec"),
    ],
)
def test_a_damaged_csv_is_refused(tmp_path, data, message):
    path = write_files(tmp_path, "t.csv", data=data) / "t.csv"
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_missing_csv_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file: "):
        read_table(tmp_path / "t.csv")


def test_short_rows_are_empty_cells(tmp_path):
    path = write_files(tmp_path, "t.csv", data=b"id,label,group\na,1\nb,0,g\n") / "t.csv"
    assert read_table(path).to_dict("list") == {"id": ["a", "b"], "label": ["1", "0"], "group": ["", "g"]}


def test_images_beside_the_class_folders_are_refused(tmp_path):
    write_files(tmp_path, "ai/1.png", "real/2.png", "stray.JPG", "labels.csv")
    with pytest.raises(DataError, match=r"1 images lie in no class folder \(stray\.JPG\)"):
        read(tmp_path)
    (tmp_path / "stray.JPG").unlink()
    assert len(read(tmp_path)[0]) == 2


# ---- what class names mean


def test_several_folders_may_be_one_class(tmp_path):
    write_files(tmp_path, "gan/1.png", "sd/1.png", "photos/1.png")
    classes = {"gan": "ai", "sd": "ai", "photos": "real"}
    items, notes = read(tmp_path, classes=classes)
    assert {item.id: item.label for item in items} == {"gan/1.png": 1, "sd/1.png": 1, "photos/1.png": 0}
    assert notes == ["gan, sd counts as ai, photos as real"]


def test_class_names_of_other_languages(tmp_path):
    write_files(tmp_path, "生成/1.png", "写真/1.png", "re\u0301el/2.png")
    items, notes = read(tmp_path, classes={"生成": "ai", "写真": "real", "r\u00e9el": "real"})
    assert [item.label for item in items] == [0, 0, 1]
    assert notes == ["生成 counts as ai, re\u0301el, 写真 as real"]
    message = refusal(tmp_path, classes={"生成": "ai", "r\u00e9el": "real"})
    assert message == (
        f"{tmp_path}: one folder a class, such as ai/ and real/: --classes does not say what these are: 写真"
    )


def test_label_texts_of_other_languages(table):
    path = table(("id", "label"), ("a", "falsch"), ("b", "echt"), ("c", "künstlich"))
    classes = {"falsch": "ai", "künstlich": "ai", "echt": "real"}
    items, notes = read(path, classes=classes)
    assert [item.label for item in items] == [1, 0, 1]
    assert notes == ["falsch, künstlich counts as ai, echt as real"]
    message = refusal(path, classes={"falsch": "ai", "echt": "real"})
    assert message.endswith(
        "('falsch' 1 times, 'echt' 1 times, 'künstlich' 1 times): --classes does not say what these are: künstlich"
    )


def test_numbers_can_be_turned_round(table):
    path = table(("id", "label"), ("a", "0"), ("b", "1"))
    items, notes = read(path, classes={"0": "ai", "1": "real"})
    assert [item.label for item in items] == [1, 0]
    assert notes == ["0 counts as ai, 1 as real"]


def test_classes_that_leave_one_empty_are_refused(tmp_path):
    write_files(tmp_path, "gan/1.png", "sd/1.png")
    assert refusal(tmp_path, classes={"gan": "ai", "sd": "ai"}).endswith("holds no real images; both classes need some")


# ---- kinds of images that cannot be read


def test_kinds_that_cannot_be_read_are_counted(tmp_path):
    write_files(tmp_path, "ai/1.heic", "ai/in/2.HEIC", "ai/3.png", "real/1.png", "real/1.psd", "real/notes.txt")
    skipped = Counter()
    items, _ = read(tmp_path, skipped=skipped)
    assert {item.id for item in items} == {"ai/3.png", "real/1.png"}
    assert skipped == {("ai", ".heic"): 2, ("real", ".psd"): 1}
    assert "images that cannot be read would be skipped (1 .psd)" in refusal(tmp_path)


def test_a_class_of_nothing_else_is_refused(tmp_path):
    write_files(tmp_path, "ai/1.heic", "real/1.png")
    assert refusal(tmp_path, skipped=Counter()) == f"{tmp_path / 'ai'} holds no images; both classes need some"


# ---- tables in Parquet files, and images that are not files on disk


def test_a_labelled_parquet_file_is_read_as_a_csv(tmp_path):
    write_files(tmp_path, "images/007.jpg", "images/b.jpg")
    columns = {"id": ["007", "b"], "label": [1, 0], "scene": ["s1", None], "source": ["web", "film"], "other": [0.5, 1]}
    frame = pd.DataFrame(columns)
    frame.to_parquet(tmp_path / "train.parquet")
    frame.to_csv(tmp_path / "train.csv", index=False)
    items, notes = read(tmp_path / "train.parquet", group_column="scene")
    assert items == read(tmp_path / "train.csv", group_column="scene")[0]
    assert notes == ["label column of train.parquet: 1 counts as ai, 0 as real"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["a.jpg"], "label": [0.5]}, "column label is double; it must hold text"),
        ({"path": ["a.jpg"]}, "needs a column label; it has: path"),
        ({"label": [1]}, "needs a column id or path"),
        ({"path": ["gone.jpg", "a.jpg"], "label": [1, 0]}, "1 of 2 paths in .* do not exist"),
        ({"path": [], "label": []}, "has no rows"),
    ],
)
def test_a_parquet_file_that_leaves_a_doubt_is_refused(tmp_path, columns, message):
    write_files(tmp_path, "a.jpg")
    pd.DataFrame(columns).to_parquet(tmp_path / "train.parquet")
    assert re.search(message, refusal(tmp_path / "train.parquet", one_class=True))


def test_images_inside_of_files_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.png": b"a"})
    pd.DataFrame({"image": [b"a"], "label": [1]}).to_parquet(tmp_path / "a.parquet")
    for name in ("a.tar", "a.parquet"):
        assert refusal(tmp_path / name) == (
            f"{tmp_path / name}: only infer reads images inside of tars and Parquet files; unpack them into folders "
            "first, such as ai/ and real/"
        )


def test_a_table_whose_images_lie_in_a_store_is_refused(table):
    path = table(("path", "label"), ("s3://bucket/ai/a.jpg", "1"), ("s3://bucket/real/b.jpg", "0"))
    assert refusal(path) == (
        "s3://bucket/ai/a.jpg: only infer reads images from an object store; copy them to disk first, for example: "
        "aws s3 sync s3://bucket/ai ai"
    )


def test_formats_are_told_apart(tmp_path):
    write_files(tmp_path, "a.csv", "b.txt")
    write_tar(tmp_path / "a.tar", {"a.png": b"a"})
    pd.DataFrame({"image": [b"a"]}).to_parquet(tmp_path / "images.parquet")
    pd.DataFrame({"path": ["a"]}).to_parquet(tmp_path / "paths.parquet")
    formats = {
        ".": "folder", "a.csv": "table", "b.txt": "table", "paths.parquet": "table",
        "images.parquet": "parquet", "a.tar": "shards", "*.tar": "shards", "{00..09}.parquet": "shards",
    }  # fmt: skip
    assert {name: find_format(tmp_path / name).name for name in formats} == formats
    for url, expected in (("s3://b/a/", "folder"), ("gs://b/a.csv", "table"), ("s3://b/a.tar", "shards")):
        assert find_format(url).name == expected  # without a request
