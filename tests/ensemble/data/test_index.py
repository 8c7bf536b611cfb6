import os
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, run_python
from pictures import HOSTILE_NAMES, encoded, noise, write_files
from PIL import Image

from ensemble.data import index
from ensemble.data.index import index_files
from ensemble.images import metadata, near_duplicates

SLOWLY = """
import os, signal, sys, time
from pathlib import Path
from ensemble.data import index

index.COMMIT_FILES = 8
read_record = index.read_record
def slow(file):
    time.sleep(0.005)
    return read_record(file)
index.read_record = slow
for number, _ in enumerate(index.read_all(sorted(Path(sys.argv[1]).iterdir()), workers=1), start=1):
    print(number, flush=True)
    if sys.argv[2:] == [str(number)]:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index.sqlite"


@pytest.fixture
def files(tmp_path):
    """Twenty small images of four formats."""
    made = []
    for number in range(20):
        file_format = ("PNG", "JPEG", "WEBP", "BMP")[number % 4]
        name = f"{number:02}.{file_format.lower()}"
        write_files(tmp_path / "files", name, data=encoded(noise(number, 40 + number, 30), file_format))
        made.append(tmp_path / "files" / name)
    return made


@pytest.fixture
def read(monkeypatch):
    """Counts how often each file is read."""
    counts = Counter()
    read_record = index.read_record

    def counted(file):
        counts[file.name] += 1
        return read_record(file)

    monkeypatch.setattr(index, "read_record", counted)
    return counts


def same(one, other):
    pd.testing.assert_frame_equal(one.records, other.records)
    pd.testing.assert_frame_equal(one.headers, other.headers)
    np.testing.assert_array_equal(one.thumbs, other.thumbs)
    np.testing.assert_array_equal(one.rows, other.rows)
    return one.errors == other.errors


# ---- what it finds


def test_a_file_is_described(tmp_path):
    picture = noise(3, 40, 30)
    data = encoded(picture, "JPEG", quality=83)
    file = write_files(tmp_path, "a.png", data=data) / "a.png"
    found = index_files([file])
    facts, header = found.records.iloc[0], found.headers.iloc[0]
    assert (facts["width"], facts["height"], facts["format"], facts["bytes"]) == (40, 30, "JPEG", len(data))
    assert facts["sha256"] == sha256(data).hexdigest()
    assert (header["quality"], header["width"], header["format"]) == (83, 40, "JPEG")
    decoded = Image.open(file)
    np.testing.assert_array_equal(found.thumbs, [near_duplicates.thumbnail(decoded)])
    assert int(facts["phash"], 16) == near_duplicates.perceptual_hash(found.thumbs[0])
    assert len(facts["phash"]) == 16
    assert (list(found.rows), found.errors) == ([0], {})


def test_columns_and_types(files):
    found = index_files(files)
    assert list(found.records) == "width height format bytes sha256 phash pixels".split()
    assert list(found.headers) == list(metadata.read_header(files[0].read_bytes(), 1, 1))
    assert found.records["width"].tolist() == list(range(40, 60))
    assert (str(found.records["width"].dtype), str(found.records["bytes"].dtype)) == ("int32", "int64")
    assert {str(found.headers[name].dtype) for name in ("quality", "width", "exif")} == {"float32"}
    assert {str(found.headers[name].dtype) for name in ("format", "tables")} == {"category"}
    assert (found.thumbs.shape, found.thumbs.dtype) == ((20, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("block", [1, 4, 7, 20])
def test_blocks_make_no_difference(files, monkeypatch, block):
    whole = index_files(files)
    monkeypatch.setattr(index, "BLOCK_FILES", block)
    assert same(index_files(files), whole)


@pytest.mark.parametrize("workers", [1, 8])
def test_results_stand_in_the_order_given(files, workers):
    shuffled = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    found = index_files(shuffled, workers)
    assert found.records["sha256"].tolist() == [sha256(file.read_bytes()).hexdigest() for file in shuffled]
    assert same(found, index_files(shuffled, workers))


def test_pixels_are_equal_whatever_the_file(tmp_path):
    picture, other = noise(5), noise(5)
    other.putpixel((3, 3), (0, 0, 0))
    clear = picture.convert("RGBA")
    clear.putpixel((3, 3), (0, 0, 0, 0))
    data = {
        "a.png": encoded(picture),
        "b.bmp": encoded(picture, "BMP"),
        "c.png": encoded(picture.convert("RGBA")),
        "d.png": encoded(other),
        "e.png": encoded(clear),
    }
    for name, content in data.items():
        write_files(tmp_path, name, data=content)
    pixels = index_files([tmp_path / name for name in data]).records["pixels"].tolist()
    assert pixels[0] == pixels[1] == pixels[2]
    assert len(set(pixels)) == 3


def test_the_size_is_that_of_the_upright_image(tmp_path):
    turned = Image.Exif()
    turned[274] = 6
    file = write_files(tmp_path, "a.jpg", data=encoded(noise(1, 40, 30), "JPEG", exif=turned)) / "a.jpg"
    found = index_files([file])
    assert found.records[["width", "height"]].iloc[0].tolist() == [30, 40]
    assert found.headers[["width", "height", "orientation"]].iloc[0].tolist() == [30, 40, 6]


def test_hostile_names(tmp_path, read):
    names = [*(f"{name}.png" for name in HOSTILE_NAMES), os.fsdecode(b"not utf-8 \xff.png")]
    files = [write_files(tmp_path, name, data=encoded(noise(n))) / name for n, name in enumerate(names)]
    first = index_files(files)
    assert len(first.rows) == len(names)
    assert same(index_files(files), first)
    assert set(read.values()) == {1, 2}
    assert [name for name, count in read.items() if count == 2] == [names[-1]]  # the cache cannot hold its name


def test_take(files):
    found = index_files([files[0], Path("missing.png"), *files[1:]])
    part = found.take(np.array([0, 3, 19]))
    assert list(part.rows) == [0, 4, 20]
    assert part.records["width"].tolist() == [40, 43, 59]
    assert part.headers["width"].tolist() == [40, 43, 59]
    np.testing.assert_array_equal(part.thumbs, found.thumbs[[0, 3, 19]])
    assert part.errors == found.errors


def test_no_files():
    found = index_files([])
    assert (len(found.rows), len(found.records), len(found.thumbs), found.errors) == (0, 0, 0, {})


# ---- errors


def test_errors_are_reported_by_position_and_not_remembered(files, tmp_path, read):
    bad = [tmp_path / "gone.png", write_files(tmp_path, "text.jpg", data=b"text") / "text.jpg", tmp_path]
    found = index_files([bad[0], files[0], bad[1], bad[2], files[1]])
    assert list(found.rows) == [1, 4]
    assert list(found.errors) == [0, 2, 3]
    assert found.errors[0] == f"{bad[0]}: No such file or directory"
    assert found.errors[2].startswith(f"{bad[1]}: not an image in a known format")
    assert found.errors[3] == f"{tmp_path}: Is a directory"
    assert found.records["width"].tolist() == [40, 41]
    again = index_files([bad[0], files[0], bad[1], bad[2], files[1]])
    assert same(again, found)
    assert (read["text.jpg"], read[files[0].name]) == (2, 1)


def test_a_repaired_file_is_read(tmp_path):
    file = write_files(tmp_path, "a.png", data=b"broken") / "a.png"
    assert list(index_files([file]).errors) == [0]
    file.write_bytes(encoded(noise(1)))
    assert list(index_files([file]).rows) == [0]


def test_damaged_metadata_warns_no_one_and_leaves_the_filters_alone(tmp_path):
    data = encoded(noise(0), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x0f\0\x02\0\0\xff\xff\0\0")
    files = [write_files(tmp_path, f"{n}.jpg", data=data) / f"{n}.jpg" for n in range(40)]
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        metadata.read_header(data, 32, 32)  # the twin: these files do warn
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not index_files(files, workers=8).errors
        time.sleep(0.01)
    assert caught == []
    assert warnings.filters == before


# ---- the cache


def test_a_second_pass_reads_no_file(files, read):
    first = index_files(files)
    assert read.total() == len(files)
    second = index_files(files[::-1])
    assert read.total() == len(files)
    assert second.records["sha256"].tolist() == first.records["sha256"].tolist()[::-1]
    assert same(second.take(np.arange(len(files))[::-1]), replace(first, rows=first.rows[::-1]))


def test_a_relative_path_names_the_same_file(files, read, monkeypatch):
    index_files(files)
    monkeypatch.chdir(files[0].parent)
    index_files([Path(file.name) for file in files])
    assert read.total() == len(files)


@pytest.mark.parametrize("keep_mtime", [False, True])
def test_a_changed_file_of_the_same_size_is_read_again(files, read, keep_mtime):
    before = index_files(files)
    file, stat = files[3], files[3].stat()
    time.sleep(0.02)
    file.write_bytes(encoded(noise(99, 43, 30), "BMP"))
    assert file.stat().st_size == stat.st_size
    if keep_mtime:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = index_files(files)
    assert {name for name, count in read.items() if count == 2} == {file.name}
    assert after.records["sha256"][3] == sha256(file.read_bytes()).hexdigest() != before.records["sha256"][3]


def test_another_version_reads_everything_again(files, read, monkeypatch):
    index_files(files)
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    index_files(files)
    assert set(read.values()) == {2}


def test_a_killed_pass_goes_on_where_it_stopped(tmp_path, read):
    names = [f"{number:03}.bmp" for number in range(120)]
    for number, name in enumerate(names):
        write_files(tmp_path / "many", name, data=encoded(noise(number), "BMP"))
    assert run_python("-c", SLOWLY, tmp_path / "many", 50).returncode == -signal.SIGKILL
    files = [tmp_path / "many" / name for name in names]
    found = index_files(files)
    assert len(found.rows) == 120
    assert sorted(read) == names[48:]  # 50 were done, and every eighth was committed with those before it
    assert found.records["sha256"].tolist() == [sha256(file.read_bytes()).hexdigest() for file in files]


def test_a_file_that_is_no_cache_is_replaced(files, read, own_cache):
    write_files(own_cache.parent, own_cache.name, data=b"no database" * 1000)
    first = index_files(files)
    assert len(first.rows) == len(files)
    assert same(index_files(files), first)
    assert same(index_files(files), first)
    assert set(read.values()) == {2}  # the pass that found it, and the one that made a new one


def test_a_damaged_cache_is_no_error(files, own_cache):
    first = index_files(files)
    data = bytearray(own_cache.read_bytes())
    data[4096:] = np.random.default_rng(0).bytes(len(data) - 4096)
    own_cache.write_bytes(data)
    assert same(index_files(files), first)


@pytest.mark.parametrize(
    "change",
    ["facts = 'x'", "facts = '{}'", "facts = '[]'", "thumb = x'00'", "facts = json_set(facts, '$.other', 1)"],
)
def test_a_row_of_the_cache_that_makes_no_sense_is_read_again(files, read, own_cache, change):
    first = index_files(files)
    connection = sqlite3.connect(own_cache)
    with connection:
        assert connection.execute(f"UPDATE facts SET {change}").rowcount == len(files)  # noqa: S608
    connection.close()
    assert same(index_files(files), first)
    assert set(read.values()) == {2}


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written_is_no_error(files, read, tmp_path, monkeypatch, place):
    write_files(tmp_path, "file", data=b"x")
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / place))
    first = index_files(files)
    assert same(index_files(files), first)
    assert set(read.values()) == {2}


def test_two_passes_at_once(files, tmp_path):
    """Another process has the cache open and writes into it."""
    expected = index_files(files[:10])
    command = [sys.executable, "-c", SLOWLY, str(tmp_path / "files")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    with process:
        assert process.stdout.readline() == "1\n"
        assert same(index_files(files[:10]), expected)
        assert len(process.stdout.readlines()) == len(files) - 1
    assert process.returncode == 0
