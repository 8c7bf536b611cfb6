import shutil
from hashlib import sha256

import numpy as np
import pandas as pd
import pytest
from pictures import encoded, noise
from PIL import Image

from ensemble.core import artifacts
from ensemble.core.errors import DataError
from ensemble.data import dataset, splits
from ensemble.data.sources import LabelledImage, read_data
from ensemble.data.splits import Fractions

HALVES = Fractions(tune=0.3, heldout=0.3)
STRING = "string"


def build(items, skip_unreadable=False, hold_out=()):
    items, indexed = dataset.index_items(items, skip_unreadable)
    frame = dataset.assemble(items, indexed, dataset.near_pairs(indexed), HALVES, 0, hold_out)
    return frame, list(indexed.errors.values())


def refusal(items, **options) -> str:
    with pytest.raises(DataError) as caught:
        build(items, **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def items(tiles):
    return read_data([tiles])[0]


@pytest.fixture(scope="module")
def frame(items):
    return build(items)[0]


@pytest.fixture
def add(tmp_path):
    """Writes one more image and labels it."""

    def add(name: str, data: bytes, label: int = 1, group: str | None = None) -> LabelledImage:
        (tmp_path / name).write_bytes(data)
        return LabelledImage(name, str(tmp_path), name, label, group)

    return add


def row(frame: pd.DataFrame, key: str) -> pd.Series:
    return frame.set_index("id").loc[key]


# ---- columns

DTYPES = {
    "id": STRING,
    "root": STRING,
    "path": STRING,
    "label": "int8",
    "source": STRING,
    "generator": STRING,
    "group": STRING,
    "split": STRING,
    "fold": "Int16",
    "width": "int32",
    "height": "int32",
    "format": STRING,
    "bytes": "int64",
    "sha256": STRING,
    "phash": STRING,
}


@pytest.mark.parametrize("stored", [False, True], ids=["built", "stored"])
def test_the_columns_are_those_of_the_design(items, tmp_path, stored):
    named = [LabelledImage(i.id, i.root, i.path, i.label, None, "web", "gan" if i.label else None) for i in items]
    frame = build(named)[0]
    if stored:
        artifacts.write_parquet(tmp_path / "dataset.parquet", frame)
        frame = artifacts.read_parquet(tmp_path / "dataset.parquet", "")
    assert list(frame) == list(DTYPES)
    for column, dtype in DTYPES.items():
        if dtype == STRING:
            assert pd.api.types.infer_dtype(frame[column], skipna=True) == STRING
        else:
            assert str(frame[column].dtype) == dtype


def test_a_row_says_what_the_file_is(add, items):
    data = encoded(noise(5, 40, 30), "JPEG")
    frame, skipped = build([*items, add("photo.png", data, label=0)])
    found = row(frame, "photo.png")
    assert (found["width"], found["height"], found["format"], found["bytes"]) == (40, 30, "JPEG", len(data))
    assert found["sha256"] == sha256(data).hexdigest()
    assert len(found["phash"]) == 16
    assert found["label"] == 0
    assert pd.isna(found["fold"])
    assert dataset.files(frame)[frame["id"].tolist().index("photo.png")].read_bytes() == data
    assert skipped == []


def test_rows_are_sorted_and_do_not_depend_on_the_order_given(items, frame):
    assert frame["id"].is_monotonic_increasing
    shuffled = [items[i] for i in np.random.default_rng(0).permutation(len(items))]
    pd.testing.assert_frame_equal(build(shuffled)[0], frame)


def test_describe_counts_classes_and_splits(frame):
    lines = dataset.describe(frame).splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["ai", "30", "images", "(30", ".bmp)"],
        ["real", "30", "images", "(30", ".bmp)"],
    ]
    counts = frame["split"].value_counts()
    assert [line.split()[:2] for line in lines[2:]] == [[s, str(counts[s])] for s in ("train", "tune", "heldout")]


# ---- splits


@pytest.mark.parametrize(("tune", "heldout"), [(0, 0.2), (0.2, 0), (0.5, 0.5), (-0.1, 0.5)])
def test_impossible_shares_are_refused(tune, heldout):
    with pytest.raises(DataError) as caught:
        Fractions(tune, heldout)
    assert str(caught.value) == f"--tune {tune} and --heldout {heldout}: both must be above 0 and their sum below 1"


def test_more_images_move_none_of_those_there(items, frame, add):
    before = frame.set_index("id")["split"]
    more = [add(f"{number}.bmp", encoded(noise(900 + number), "BMP"), number % 2) for number in range(20)]
    after = build([*more, *items])[0].set_index("id")["split"]
    assert len(after) == len(before) + 20
    pd.testing.assert_series_equal(after[before.index], before)


def test_a_split_without_a_class_is_refused(items):
    few = [item for item in items if item.id in {"ai/00.bmp", "real/00.bmp"}]
    message = refusal(few)
    assert " split has no " in message
    assert message.endswith(
        "2 groups are too few for these shares; add images, raise --tune and --heldout, or try another --seed"
    )


def test_a_split_of_one_class_names_the_lacking_one(items):
    real = [LabelledImage(i.id, i.root, i.path, 0) for i in items]
    assert refusal(real).startswith("the train split has no ai images: 60 groups")
    ai = [LabelledImage(i.id, i.root, i.path, 1) for i in items]
    assert refusal(ai).startswith("the train split has no real images: 60 groups")


# ---- groups


def test_groups_never_straddle_splits(items):
    grouped = [LabelledImage(i.id, i.root, i.path, i.label, f"scene {int(i.id[-6:-4]) % 10}") for i in items]
    frame = build(grouped)[0]
    assert frame["group"].nunique() == 10
    assert (frame.groupby("group")["split"].nunique() == 1).all()
    assert set(frame["split"]) == set(splits.FITTED)


def test_images_without_a_group_are_named_by_their_content(frame):
    assert frame["group"].tolist() == frame["sha256"].tolist()


def test_near_duplicates_share_a_group_and_others_do_not(items, add, photos):
    cat, coffee = photos[:2]
    small = cat.resize((cat.width // 2, cat.height // 2), Image.Resampling.LANCZOS)
    more = [
        add("cat.png", encoded(cat)),
        add("cat.jpg", encoded(cat, "JPEG", quality=50)),
        add("small.webp", encoded(small, "WEBP"), label=0),
        add("coffee.png", encoded(coffee), label=0),
    ]
    frame = build([*items, *more])[0]
    cats = {row(frame, key)["group"] for key in ("cat.png", "cat.jpg", "small.webp")}
    assert len(cats) == 1
    assert row(frame, "coffee.png")["group"] not in cats
    assert frame["group"].nunique() == 60 + 2
    assert cats == {min(frame[frame["group"].isin(cats)]["sha256"])}


def test_equal_pixels_of_one_class_share_a_group(items, add):
    flat = Image.new("RGB", (20, 20), "red")
    frame = build([*items, add("a.png", encoded(flat)), add("b.bmp", encoded(flat, "BMP"))])[0]
    assert row(frame, "a.png")["group"] == row(frame, "b.bmp")["group"]
    assert row(frame, "a.png")["sha256"] != row(frame, "b.bmp")["sha256"]


def test_groups_of_the_user_and_near_duplicates_unite(items, add, photos):
    cat = photos[0]
    more = [
        add("1.png", encoded(cat), group="b"),
        add("2.jpg", encoded(cat, "JPEG"), group="a"),
        add("3.bmp", encoded(noise(800), "BMP"), group="a"),
        add("4.bmp", encoded(noise(801), "BMP"), group="b"),
        add("5.webp", encoded(cat, "WEBP")),
        add("6.bmp", encoded(noise(802), "BMP"), group="c"),
    ]
    frame = build([*items, *more])[0]
    names = [row(frame, item.id)["group"] for item in more]
    assert names == ["a", "a", "a", "a", "a", "c"]


@pytest.mark.parametrize(("mode", "file_format"), [("RGB", "PNG"), ("RGB", "BMP"), ("RGB", "TIFF"), ("RGBA", "PNG")])
def test_identical_pixels_in_both_classes_are_refused(items, add, tmp_path, mode, file_format):
    picture = noise(700)
    one = add("one.png", encoded(picture), label=1)
    two = add("two.img", encoded(picture.convert(mode), file_format), label=0)
    assert refusal([*items, one, two]) == (
        f"identical pixels are labelled both ai and real: {tmp_path / 'one.png'} and {tmp_path / 'two.img'}; "
        "remove one of each"
    )


def test_one_pixel_makes_a_difference(items, add):
    picture = noise(700)
    one = add("one.png", encoded(picture), label=1)
    picture.putpixel((3, 3), (0, 0, 0))
    two = add("two.png", encoded(picture), label=0)
    frame = build([*items, one, two])[0]
    assert row(frame, "one.png")["group"] == row(frame, "two.png")["group"]
    assert (row(frame, "one.png")["label"], row(frame, "two.png")["label"]) == (1, 0)


# ---- unreadable files


def test_a_broken_file_is_refused_by_name(items, add, tmp_path):
    broken = [
        add("text.jpg", b"text"),
        add("half.png", encoded(noise(1))[:900]),
        LabelledImage("no", str(tmp_path), "no", 0),
    ]
    message = refusal([*items, *broken])
    assert message.startswith(f"3 of 63 images cannot be read: {tmp_path / 'half.png'}: ")
    assert f"{tmp_path / 'text.jpg'}: not an image in a known format" in message
    assert f"{tmp_path / 'no'}: No such file or directory" in message
    assert message.endswith("repair or remove them, or leave them out with --skip-unreadable")


def test_skip_unreadable_leaves_broken_files_out(items, frame, add, tmp_path):
    built, skipped = build([add("text.jpg", b"text"), *items], skip_unreadable=True)
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{tmp_path / 'text.jpg'}: not an image")
    pd.testing.assert_frame_equal(built, frame)


def test_nothing_readable_is_refused(add, tmp_path):
    message = refusal([add("text.jpg", b"text")], skip_unreadable=True)
    assert message.startswith(f"no image of 1 can be read: {tmp_path / 'text.jpg'}: not an image")


# ---- the hash


def test_the_hash_depends_on_neither_order_nor_place(items, frame, tiles, tmp_path):
    shutil.copytree(tiles, tmp_path / "moved")
    moved = build(read_data([tmp_path / "moved"])[0])[0]
    assert set(moved["root"]) != set(frame["root"])
    assert dataset.dataset_sha256(moved) == dataset.dataset_sha256(frame)
    assert dataset.dataset_sha256(frame.sample(frac=1, random_state=0)) == dataset.dataset_sha256(frame)


@pytest.mark.parametrize(
    ("column", "value"),
    [("id", "other"), ("label", 9), ("group", "other"), ("split", "other"), ("fold", 1), ("sha256", "other")],
)
def test_the_hash_changes_with_what_decides_a_run(frame, column, value):
    changed = frame.copy()
    changed.loc[5, column] = value
    assert dataset.dataset_sha256(changed) != dataset.dataset_sha256(frame)


@pytest.mark.parametrize("column", ["root", "path", "source", "generator", "phash"])
def test_the_hash_does_not_change_with_the_rest(frame, column):
    assert dataset.dataset_sha256(frame.assign(**{column: "other"})) == dataset.dataset_sha256(frame)
