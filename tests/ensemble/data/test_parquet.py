import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import HOSTILE_NAMES, encoded, noise, write_files

from ensemble.core.errors import DataError, ImageError
from ensemble.data import parquet
from ensemble.data.inputs import ids, names, read_inputs
from ensemble.data.readers import Item
from ensemble.images.decode import decode

IMAGES = [encoded(noise(seed), "BMP") for seed in range(7)]
ROWS = [f"set.parquet:{row}" for row in range(7)]


def write_parquet(file, group=3, **columns):
    pq.write_table(pa.table(columns), file, row_group_size=group, compression="none")
    return file


def structs(paths):
    return [{"bytes": image, "path": path} for image, path in zip(IMAGES, paths, strict=True)]


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": IMAGES}, ROWS),
        ({"image": IMAGES, "id": list("gfedcba")}, list("gfedcba")),
        ({"image": IMAGES, "id": pa.array(range(7), pa.int64())}, list("0123456")),
        ({"image": structs([*"abc", None, "", *"de"])}, [*"abc", "set.parquet:3", "set.parquet:4", *"de"]),
        ({"image": structs("abcdefg"), "id": list(HOSTILE_NAMES[:7])}, list(HOSTILE_NAMES[:7])),
        ({"image": [{"bytes": image} for image in IMAGES]}, ROWS),
        (
            {"image": pa.array(IMAGES, pa.large_binary()), "path": ["elsewhere"] * 7},
            ROWS,
        ),
    ],
)
def test_images_come_out_of_the_file_with_an_id(tmp_path, columns, expected, spill):
    file = write_parquet(tmp_path / "set.parquet", **columns)
    inputs = read_inputs(file, spill=tmp_path if spill else None)
    rows = [Item(key, f"{file}:{row}", IMAGES[row]) for row, key in enumerate(expected)]
    for start in range(8):
        for stop in range(start, 8):
            assert list(inputs.items(start, stop)) == rows[start:stop]


@pytest.mark.parametrize(
    "nulls", [[None, b"", IMAGES[0]], [None, {"bytes": None, "path": "/etc/passwd"}, {"bytes": IMAGES[0]}]]
)
def test_a_null_is_an_unreadable_row(tmp_path, nulls):
    *gone, good = read_inputs(write_parquet(tmp_path / "set.parquet", image=nulls, id=list("abc"))).items(0, 3)
    assert decode(good.source).size == (32, 32)
    for row, item in enumerate(gone):
        with pytest.raises(ImageError, match=rf"set.parquet:{row}: the file is empty"):
            decode(item.source, item.path)


def test_a_large_row_group_is_not_held(tmp_path):
    images = [os.urandom(1 << 14) for _ in range(1024)]
    file = tmp_path / "set.parquet"
    pq.write_table(pa.table({"image": images}), file, compression="none", write_batch_size=16)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in parquet.image_bytes(file, 0, len(images))]
    assert max(held) < sum(map(len, images)) / 2


def test_text_that_is_not_utf8_is_said_so(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    for columns in ({"id": bad}, {"image": [b"a"], "id": bad}):
        with pytest.raises(DataError, match=r"set\.parquet is not a readable Parquet file: 'utf-8' codec"):
            read_inputs(write_parquet(tmp_path / "set.parquet", **columns))


def test_an_image_without_an_id_is_named_by_its_row(tmp_path):
    file = write_parquet(tmp_path / "set.parquet", image=[b"a"] * 3, id=["a", "b", None])
    with pytest.raises(DataError, match=r"set\.parquet: row 3 has no id; give every image one"):
        read_inputs(file)


def test_ids_and_names_are_known_without_reading_an_image(tmp_path, monkeypatch):
    inputs = read_inputs(write_parquet(tmp_path / "set.parquet", image=structs("abcdefg")))
    monkeypatch.setattr(parquet, "image_bytes", lambda *arguments: pytest.fail("images were read"))
    assert ids(inputs) == list("abcdefg")
    assert list(names(inputs)) == [f"set.parquet:{row}" for row in range(7)]


def test_only_the_row_groups_asked_for_are_read(tmp_path):
    file = write_parquet(tmp_path / "set.parquet", image=IMAGES, id=list("abcdefg"))
    inputs = read_inputs(file)
    data = bytearray(file.read_bytes())
    place = data.index(IMAGES[0][:64])
    data[4:place] = bytes(place - 4)  # the header of the first group's first page
    changed = file.stat().st_mtime_ns
    file.write_bytes(data)
    os.utime(file, ns=(changed, changed))
    assert [item.id for item in inputs.items(3, 7)] == list("defg")
    with pytest.raises(DataError, match=r"set\.parquet is not a readable Parquet file"):
        list(inputs.items(0, 1))


def test_a_file_that_changes_meanwhile_is_said_so(tmp_path):
    file = write_parquet(tmp_path / "set.parquet", image=IMAGES)
    inputs = read_inputs(file)
    write_parquet(file, image=IMAGES[1:])
    with pytest.raises(DataError, match=r"set\.parquet was changed meanwhile; run the same command again"):
        list(inputs.items(0, 7))
    file.unlink()
    with pytest.raises(DataError, match=r"set\.parquet is not a readable Parquet file: .*No such file"):
        list(inputs.items(0, 7))


def test_the_hash_is_of_ids_and_of_the_file(tmp_path):
    file = write_parquet(tmp_path / "set.parquet", image=IMAGES)
    os.utime(file, ns=(1, 1))
    first = read_inputs(file).sha256
    assert first == read_inputs(file, spill=tmp_path).sha256
    os.utime(file, ns=(2, 2))
    seen = {first, read_inputs(file).sha256}
    for columns in ({"group": 2, "image": IMAGES}, {"image": IMAGES, "id": list("abcdefg")}):
        write_parquet(file, **columns)
        os.utime(file, ns=(1, 1))
        seen.add(read_inputs(file).sha256)
    assert len(seen) == 4


def test_a_file_may_name_images_elsewhere(tmp_path):
    write_files(tmp_path, *(f"images/{name}.jpg" for name in HOSTILE_NAMES))
    names = pa.array(HOSTILE_NAMES).dictionary_encode()
    inputs = read_inputs(write_parquet(tmp_path / "set.PARQUET", id=names, label=[1] * len(HOSTILE_NAMES)))
    assert ids(inputs) == list(HOSTILE_NAMES)
    files = [tmp_path / "images" / f"{name}.jpg" for name in HOSTILE_NAMES]
    assert [item.source for item in inputs.items(0, inputs.count)] == files


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a.jpg"]}, "column image is string; it must hold encoded images, or structs of bytes and path"),
        ({"image": [{"path": "a.jpg"}]}, "column image is struct<path: string>; it must hold encoded images"),
        ({"image": [[1, 2]]}, "column image is list<.*>; it must hold"),
        ({"image": [b"a"], "id": [0.5]}, "column id is double; it must hold text"),
        ({"image": [b"a"] * 2, "id": ["x", "x"]}, "ids given more than once: 'x'; each image is scored once"),
        ({"id": [b"a"]}, "column id is binary; it must hold text"),
        ({"path": ["gone.jpg", None]}, "2 of 2 paths in .* do not exist below .*: 'gone.jpg', ''"),
        ({"label": [1], "url": ["a"]}, "needs a column id or path; it has: label, url"),
        ({"image": pa.array([], pa.binary())}, "has no rows"),
        ({"id": pa.array([], pa.string())}, "has no rows"),
    ],
)
def test_files_that_leave_a_doubt_are_refused(tmp_path, columns, message):
    with pytest.raises(DataError, match=message):
        read_inputs(write_parquet(tmp_path / "set.parquet", **columns))


@pytest.mark.parametrize("spill", [False, True])
def test_a_file_may_have_a_name_that_is_not_utf8(tmp_path, spill):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / "set.parquet").write_bytes(write_parquet(tmp_path / "set.parquet", image=IMAGES).read_bytes())
    inputs = read_inputs(folder / "set.parquet", spill=folder if spill else None)
    assert [item.source for item in inputs.items(0, 7)] == IMAGES


def test_what_is_no_parquet_file_is_said_so(tmp_path):
    write_files(tmp_path, "set.parquet", data=b"id\na\n")
    with pytest.raises(DataError, match=r"set\.parquet is not a readable Parquet file: "):
        read_inputs(tmp_path / "set.parquet")
