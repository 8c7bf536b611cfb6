import os
import pickle
import tarfile
from functools import partial

import pandas as pd
import pytest
from helpers import PREPROCESS_CONFIG, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import HOSTILE_NAMES, write_files
from tar_shards import IMAGES, member, write_shards, write_tar

from ensemble.core.errors import ArtifactError, DataError, ImageError
from ensemble.data import byte_ranges, shards
from ensemble.data.inputs import ids, names, read_inputs
from ensemble.images.decode import decode
from export.inference import benchmark


def rows(inputs, start=0, stop=None):
    return [
        (item.id, item.path, item.source if isinstance(item.source, bytes) else item.source.read())
        for item in inputs.items(start, inputs.count if stop is None else stop)
    ]


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("given", ["folder", "braces", "glob", "names"])
def test_shards_are_one_list_in_the_order_of_their_names(tmp_path, given, spill):
    folder = write_shards(tmp_path / "a b")
    source = {"folder": folder, "braces": folder / "s-{00..03}.tar", "glob": folder / "*.tar"}.get(
        given, folder / "s-{03,00,02,01}.tar"
    )
    inputs = read_inputs(source, spill=tmp_path if spill else None)
    assert [(key, data) for key, _, data in rows(inputs)] == [(name[:3], data) for name, data in IMAGES.items()]
    assert rows(inputs)[5][1] == f"{folder}/s-03.tar:005.bmp"
    assert list(names(inputs))[5] == "s-03.tar:005.bmp"


def test_any_split_into_shards_gives_the_same_rows(tmp_path_factory):
    whole = [(name[:3], data) for name, data in IMAGES.items()]

    @settings(deadline=None, max_examples=40)
    @given(
        cuts=st.lists(st.integers(0, 9), max_size=4).map(sorted), at=st.tuples(st.integers(0, 10), st.integers(0, 10))
    )
    def check(cuts, at):
        folder = write_shards(tmp_path_factory.mktemp("shards"), cuts)
        inputs = read_inputs(folder)
        assert [(key, data) for key, _, data in rows(inputs)] == whole
        assert rows(inputs, *at) == rows(inputs)[slice(*at)]

    check()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_an_id_is_a_members_path_without_its_suffix(tmp_path, form):
    keys = [*HOSTILE_NAMES, "deep/er/x.y", "n" * 300, "ümlaut " * 30]
    file = write_tar(tmp_path / "s.tar", {f"./{key}.PNG": b"x" for key in keys}, form)
    assert ids(read_inputs(file)) == keys


def test_what_is_no_image_and_what_is_hidden_is_left_out(tmp_path):
    files = {"a.jpg": b"a", "a.txt": b"", "._a.jpg": b"", ".hidden/b.jpg": b"", "d": member("d", kind=tarfile.DIRTYPE)}
    assert ids(read_inputs(write_tar(tmp_path / "s.tar", files))) == ["a"]


def test_members_larger_than_an_image_can_be_and_empty_ones_are_unreadable_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("ensemble.images.decode.MAX_BYTES", 5000)
    file = write_tar(tmp_path / "s.tar", {"a.bmp": IMAGES["000.bmp"], "b.png": b"", "c.png": b"c" * 5001})
    good, *bad = read_inputs(file).items(0, 3)
    assert decode(good.source, good.path).size == (32, 32)
    for item, message in zip(
        bad, (r"s\.tar:b\.png: the file is empty", r"s\.tar:c\.png: 5001 bytes, more"), strict=True
    ):
        with pytest.raises(ImageError, match=message):
            decode(item.source, item.path)


def cut(file, size):
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size + size if size < 0 else size)


LONG_NAME = member("././@LongLink", 3, tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT) + b"ab\0" + bytes(509)
HOSTILE = {
    "cut in a member": (lambda file: cut(file, 5000), "is not a whole tar: unexpected end of data; fetch or write"),
    "cut between members": (lambda file: cut(file, 3584), "is not a whole tar: it has no end, and may have been"),
    "empty": (lambda file: cut(file, 0), "is not a whole tar: empty file"),
    "no tar": (lambda file: file.write_bytes(b"x" * 2000), "is not a whole tar: "),
    "terabytes": (
        lambda file: file.write_bytes(member("a.png", 5 << 40).tobuf(tarfile.GNU_FORMAT)),
        "is not a whole tar: unexpected end",
    ),
    "negative": (
        lambda file: file.write_bytes(member("a.png", -512).tobuf(tarfile.GNU_FORMAT) + bytes(1024)),
        "is not a whole tar: a member of -512 bytes",
    ),
    "beyond numbers": (
        lambda file: file.write_bytes(
            write_tar(file, {f"{number}.png": b"" for number in range(4095)}).read_bytes()[: 4095 * 512]
            + member("z.png", 1 << 70).tobuf(tarfile.GNU_FORMAT)
            + bytes(1024)
        ),
        "is not a whole tar: unexpected end of data",
    ),
    "gzip": (
        lambda file: write_tar(file, {"a.png": b"a"}, mode="w:gz"),
        "a compressed tar cannot be read",
    ),
    "absolute": (
        lambda file: write_tar(file, {"/etc/a.png": b"a"}),
        "images would be left out (1 with an absolute path: '/etc/a.png'); write it again without them",
    ),
    "above": (lambda file: write_tar(file, {"../a.png": b"a"}), "left out (1 with '..' in the path: '../a.png')"),
    "link": (
        lambda file: write_tar(file, {"a": member("a.png", kind=tarfile.SYMTYPE, link="/etc/passwd")}),
        "left out (1 that are links: 'a.png')",
    ),
    "pipe": (lambda file: write_tar(file, {"a": member("a.png", kind=tarfile.FIFOTYPE)}), "1 that are devices, pipes"),
    "sparse": (
        lambda file: file.write_bytes(
            member("a.png", kind=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT) + bytes(1024)
        ),
        "1 that are devices, pipes or sparse files: 'a.png'",
    ),
    "other images": (lambda file: write_tar(file, {"a.heic": b"a", "b.png": b"b"}), "left out (1 .heic)"),
    "not UTF-8": (lambda file: write_tar(file, {os.fsdecode(b"\xe9.png"): b"a"}, tarfile.GNU_FORMAT), "not UTF-8"),
    "huge pax header": (
        lambda file: file.write_bytes(member("a", 1 << 40, tarfile.XHDTYPE).tobuf(tarfile.GNU_FORMAT)),
        "is not a whole tar: a header of 1099511627776 bytes",
    ),
    "negative pax header": (
        lambda file: file.write_bytes(member("a", -512, tarfile.XHDTYPE).tobuf(tarfile.GNU_FORMAT) + bytes(1024)),
        "is not a whole tar: a header of -512 bytes",
    ),
    "thousands of long names": (
        lambda file: file.write_bytes(LONG_NAME * 3000 + member("a.png").tobuf(tarfile.GNU_FORMAT) + bytes(1024)),
        "is not a whole tar: maximum recursion depth",
    ),
    "doubled": (lambda file: write_tar(file, {"a.png": b"a", "a.jpg": b"a"}), "ids given more than once: 'a'"),
    "no image": (lambda file: write_tar(file, {"a.json": b"a"}), "holds no images"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_tars_that_leave_a_doubt_are_refused_in_one_line(tmp_path, case):
    file = write_tar(tmp_path / "s.tar", {"a.png": b"a" * 3000, "b.png": b"b" * 3000})
    assert ids(read_inputs(file)) == ["a", "b"]
    change, message = HOSTILE[case]
    change(file)
    with pytest.raises(DataError) as raised:
        read_inputs(file)
    assert message in str(raised.value)
    assert str(file) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_damaged_tar_is_read_or_refused_in_one_line(tmp_path, form):
    files = {"n" * 150 + ".png": b"a" * 700, "é.png": b"b" * 10, "c.json": b"{}", "c.png": b"c" * 600}
    file, outcomes = tmp_path / "s.tar", set()
    whole = write_tar(file, files, form).read_bytes()[:9216]

    def outcome():
        try:
            return len(rows(read_inputs(file)))
        except DataError as error:
            return f"refused in {len(str(error).splitlines())} line"

    @settings(deadline=None, max_examples=150)
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=5))
    def check(changes):
        damaged = bytearray(whole)
        for place, value in changes:
            damaged[place] = value
        for start in range(0, len(damaged), 512):  # sums are made right, or else nothing else is looked at
            if damaged[start + 257 : start + 262] == b"ustar":
                damaged[start + 148 : start + 156] = b" " * 8
                damaged[start + 148 : start + 156] = b"%06o\0 " % sum(damaged[start : start + 512])
        file.write_bytes(damaged)
        outcomes.add(outcome())

    check()
    assert {3, "refused in 1 line"} <= outcomes <= {0, 1, 2, 3, 4, "refused in 1 line"}


def test_a_folder_of_shards_is_walked_as_one_of_images(tmp_path):
    write_shards(tmp_path / "elsewhere")
    folder = write_shards(tmp_path / "folder" / "s", (3,))  # s/s-00.tar s/s-01.tar
    for number, name in enumerate((".hidden/a", ".trash", "s-", "t/.hidden/a")):
        write_tar(folder.parent / f"{name}.tar", {f"{number}.png": b"a"})
    (folder / "z").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.tar")
    with pytest.raises(DataError, match=r"ids given more than once: '000', '001'"):
        read_inputs(folder)
    (folder / "s-00.tar").unlink()
    (folder / "s-01.tar").unlink()
    assert ids(read_inputs(folder.parent)) == ["2", *(name[:3] for name in IMAGES)]  # s-.tar before s/


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_shards_among_images_are_spoken_of(tmp_path, kind):
    write_files(tmp_path, "photos/a.png", "photos/b.txt", f"photos/x/c.{kind}", f"photos/.d.{kind}")
    inputs = read_inputs(tmp_path / "photos")
    assert ids(inputs) == ["a.png"]
    assert f"skipped in it: 'x/c.{kind}'. For the images inside of such files name them" in inputs.note
    assert inputs.note.endswith(f"'{tmp_path}/photos/x/*.{kind}'")
    (tmp_path / f"photos/x/c.{kind}").unlink()
    assert read_inputs(tmp_path / "photos").note == ""


def test_an_id_in_two_shards_is_refused(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", {"same.png": b"a"})
    with pytest.raises(DataError, match="ids given more than once: 'same'; each image is scored once"):
        read_inputs(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("*.tar.gz", "a compressed tar cannot be read"),
        ("*.csv", r"several files are read as one list if all are \.tar or all are \.parquet, not 'x\.csv', 'y\.csv'"),
        ("none*.tar", "no file matches"),
        ("s-{00..09}.tar", r"no tar at .*s-04\.tar \(No such file"),
        ("{" + ",".join(f"{number:05}" for number in range(99)) + "}.tar", r"no tar at .*00000\.tar \(No such file"),
        ("n" * 300 + ".tar", r"no tar at .*n\.tar \(File name too long"),
        ("n" * 300 + ".csv", r"no input at .*n\.csv; give"),
        ("n" * 300 + "*.tar", "no file matches"),
        ("pipe.tar", r"no tar at .*pipe\.tar \(not a regular file"),
        ("{s-00,pipe}.tar", r"no tar at .*pipe\.tar \(not a regular file"),
        ("pipe.parquet", r"no input at .*pipe\.parquet; give"),
        ("{pipe,pipe}.parquet", r"pipe\.parquet is not a readable Parquet file: .*not a regular file"),
        ("pipe*.tar", "no file matches"),
        ("{0..9999999}.tar", "names more than 1,000,000 files"),
        ("gone.tar", r"no tar at .*gone\.tar"),
        ("mixed", r"all are \.tar or all are \.parquet, not 'b\.tar'"),
    ],
)
def test_patterns_that_leave_a_doubt_are_refused(tmp_path, given, message):
    write_shards(tmp_path)
    write_files(tmp_path, "x.csv", "y.csv", "z.tar.gz", "mixed/a.parquet", "mixed/b.tar")
    for kind in ("tar", "parquet"):
        os.mkfifo(tmp_path / f"pipe.{kind}")
    with pytest.raises(DataError, match=message):
        read_inputs(tmp_path / given)


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    assert ids(read_inputs(write_tar(tmp_path / "a[1]{00..01}*.tar", {"a.png": b"a"}))) == ["a"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a{08..11}b", "a08b a09b a10b a11b"),
        ("{8..11}", "8 9 10 11"),
        ("{0..10}", "0 1 2 3 4 5 6 7 8 9 10"),
        ("{00..10}", "00 01 02 03 04 05 06 07 08 09 10"),
        ("{10..08}", "08 09 10"),
        ("{0..1" + "0" * 5000 + "}", "{0..1" + "0" * 5000 + "}"),
        ("{a,b}-{0..1}", "a-0 a-1 b-0 b-1"),
        ("{x}{1..}", "{x}{1..}"),
    ],
)
def test_braces_are_read_as_shells_read_them(pattern, names):
    assert shards.expand(pattern) == names.split()


def test_a_shard_that_changes_meanwhile_is_said_so(tmp_path):
    inputs = read_inputs(write_shards(tmp_path))
    os.utime(tmp_path / "s-02.tar", ns=(1, 1))
    assert len(rows(inputs, 0, 3)) == 3
    with pytest.raises(DataError, match=r"s-02\.tar was changed meanwhile; run the same command again"):
        rows(inputs)
    (tmp_path / "s-00.tar").unlink()
    with pytest.raises(DataError, match=r"s-00\.tar is gone \(No such file or directory\)"):
        rows(inputs)


def test_the_hash_is_of_ids_and_of_the_files(tmp_path):
    seen = set()
    for cuts in ((3, 3, 5), (3, 4, 5)):
        write_shards(tmp_path, cuts)
        for time in (1, 2):
            for number in range(4):
                os.utime(tmp_path / f"s-{number:02}.tar", ns=(time, time))
            seen |= {read_inputs(tmp_path).sha256, read_inputs(tmp_path, spill=tmp_path).sha256}
            (tmp_path / "rows.arrow").unlink()
    assert len(seen) == 4


def write_parquets(folder):
    folder.mkdir(parents=True)
    for number, (start, stop) in enumerate([(0, 4), (4, 5), (5, 9)]):
        images = [{"bytes": data, "path": name[:3]} for name, data in list(IMAGES.items())[start:stop]]
        pd.DataFrame({"image": images}).to_parquet(folder / f"train-{number:05}-of-00003.parquet", row_group_size=2)
    return folder


@pytest.mark.parametrize("given", [".", "data", "data/train-*.parquet", "data/train-{00000..00002}-of-00003.parquet"])
def test_parquet_files_are_one_list(tmp_path, given):
    write_parquets(tmp_path / "data")
    write_files(tmp_path, "README.md")
    inputs = read_inputs(tmp_path / given)
    expected = [(name[:3], data) for name, data in IMAGES.items()]
    assert [(key, data) for key, _, data in rows(inputs)] == expected
    for start in range(10):
        for stop in range(start, 11):
            assert rows(inputs, start, stop) == rows(inputs)[start:stop]
    os.utime(tmp_path / "data/train-00001-of-00003.parquet", ns=(1, 1))
    assert len(rows(inputs, 5, 9)) == 4
    with pytest.raises(DataError, match=r"train-00001-of-00003\.parquet was changed meanwhile"):
        rows(inputs)


def test_parquet_files_without_images_are_one_at_a_time(tmp_path):
    write_parquets(tmp_path / "data")
    pd.DataFrame({"id": ["a"]}).to_parquet(tmp_path / "data/list.parquet")
    with pytest.raises(DataError, match=r"no column image in .*list\.parquet; several files are read for their images"):
        read_inputs(tmp_path / "data")


def test_a_reader_can_be_pickled_and_read_by_in_another_process(tmp_path):
    for folder in (write_shards(tmp_path / "tars"), write_parquets(tmp_path / "sets")):
        inputs = read_inputs(folder, spill=tmp_path)
        (tmp_path / "inputs").write_bytes(pickle.dumps(inputs))
        code = (
            "import pickle, sys; inputs = pickle.load(open(sys.argv[1], 'rb'));"
            "print([(i.id, len(getattr(i.source, 'read', lambda: i.source)())) for i in inputs.items(2, 7)])"
        )
        done = run_python("-c", code, tmp_path / "inputs")
        assert done.stdout.strip() == str([(key, len(data)) for key, _, data in rows(inputs, 2, 7)]), done.stderr


def test_neighbours_are_read_together(monkeypatch):
    monkeypatch.setattr("ensemble.data.storage.BLOCK_BYTES", 100)
    cut = partial(byte_ranges.ByteRange, "s3://a/b.tar")
    together = (
        [cut(10, 20), cut(40, 50)],
        [cut(95, 20)],
        [cut(200, 300)],
        [cut(600, 1)],
        [byte_ranges.ByteRange("s3://a/c", 601, 1)],
    )
    assert list(byte_ranges.group_adjacent(each for group in together for each in group)) == list(together)


def test_neighbours_are_cut_out_of_what_was_read_without_another_copy(monkeypatch):
    copied = []

    class Data(bytes):
        def __getitem__(self, key):
            copied.append(len(super().__getitem__(key)))
            return super().__getitem__(key)

    monkeypatch.setattr("ensemble.data.storage.read_range", lambda url, offset, size: Data(range(size)))
    group = [byte_ranges.ByteRange("s3://a/b.tar", 1 + 10 * number, 10) for number in range(20)]
    assert b"".join(byte_ranges.fetch_ahead([group])) == bytes(range(200))
    assert copied == [10] * 20


def test_bench_takes_tars(tmp_path):
    sources, _ = benchmark.benchmark_images(write_shards(tmp_path), None, tmp_path)
    assert len(sources) == len(IMAGES)
    benchmark.score_images(sources, [benchmark.noop_runner(PREPROCESS_CONFIG)], "cpu")
    with pytest.raises(ArtifactError, match="the file is empty"):
        benchmark.score_images([*sources, b""], [benchmark.noop_runner(PREPROCESS_CONFIG)], "cpu")
