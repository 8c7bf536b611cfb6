import gzip
import io
import struct
import tarfile
import zipfile

import pytest
from fetch_cases import images, member, picture, tar_gz, zipped

from ensemble.core.errors import DataError, escape_control
from ensemble.data import archives
from ensemble.data.archives import DamagedArchiveError, Tally, group_parts, read_tar, read_zip

EVERY = "a/0.png a/1.png a/2.png".split()
HOSTILE_NAMES = {
    "../up.png": "with '..' in the path",
    "a/../../up.png": "with '..' in the path",
    "a\\..\\up.png": "with '..' in the path",
    "/etc/x.png": "with an absolute path",
    "C:\\x.png": "with an absolute path",
    "n" * 2000 + ".png": "with a name over 1024 characters",
}


def untar(data, wanted=lambda name: True):
    tally = Tally()
    return list(read_tar(io.BytesIO(data), wanted, tally)), tally


def unzip(data, wanted=lambda name: True):
    tally = Tally()
    return list(read_zip(io.BytesIO(data), wanted, tally)), tally


def test_images_come_in_the_archives_order_with_their_bytes():
    files = {f"a/{number}.png": picture(number) for number in (2, 0, 1)}
    assert untar(tar_gz(files))[0] == list(files.items())
    assert unzip(zipped(files))[0] == list(files.items())


@pytest.mark.parametrize("pack", [tar_gz, zipped])
@pytest.mark.parametrize(("name", "reason"), HOSTILE_NAMES.items())
def test_a_hostile_name_is_refused_and_named(pack, name, reason):
    found, tally = (untar if pack is tar_gz else unzip)(pack({"a/0.png": b"0", name: b"x", "a/1.png": b"1"}))
    assert [name for name, _ in found] == ["a/0.png", "a/1.png"]
    assert tally.refused == {reason: 1}
    assert tally.refusals()[0].startswith(f"1 {reason}: '{name[:2].encode('unicode_escape').decode()}")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "that are links"),
        (tarfile.LNKTYPE, "that are links"),
        (tarfile.CHRTYPE, "that are devices, pipes or sparse files"),
        (tarfile.FIFOTYPE, "that are devices, pipes or sparse files"),
    ],
)
def test_links_and_devices_in_a_tar_are_refused(kind, reason):
    found, tally = untar(tar_gz(images(3, "a"), member("a/evil.png", kind, "/etc/passwd")))
    assert [name for name, _ in found] == EVERY
    assert tally.refusals() == [f"1 {reason}: 'a/evil.png'"]


def test_links_in_a_zip_are_refused():
    found, tally = unzip(zipped(images(3, "a"), {"a/evil.png": "/etc/passwd"}))
    assert [name for name, _ in found] == EVERY
    assert tally.refusals() == ["1 that are links: 'a/evil.png'"]


def test_folders_are_nothing_to_speak_of():
    assert untar(tar_gz(images(1, "a"), member("a", tarfile.DIRTYPE)))[1] == Tally()


def test_only_wanted_files_are_read():
    asked = []
    found, _ = untar(tar_gz(images(3, "a")), lambda name: asked.append(name) or name.endswith("1.png"))
    assert asked == EVERY
    assert found == [("a/1.png", picture(1))]


@pytest.mark.parametrize("pack", [tar_gz, zipped])
def test_a_file_beyond_all_photographs_is_refused(pack, monkeypatch):
    monkeypatch.setattr(archives, "MAX_IMAGE_BYTES", 5000)
    found, tally = (untar if pack is tar_gz else unzip)(pack({"a.png": b"a" * 5001, "b.png": b"b" * 5000}))
    assert [name for name, _ in found] == ["b.png"]
    assert sum(tally.refused.values()) == 1


def test_a_bomb_is_refused_before_it_is_unpacked():
    zeros = {f"{number}.png": bytes(8 << 20) for number in range(8)}
    reached = []
    with pytest.raises(DataError, match="more than 100-fold is refused as a bomb"):
        reached.extend(read_tar(io.BytesIO(tar_gz(zeros)), lambda name: reached.append(name) or False, Tally()))
    assert len(reached) < 5
    with pytest.raises(DataError, match="refused as a bomb"):
        unzip(zipped(zeros, method=zipfile.ZIP_DEFLATED))


def test_as_many_bytes_that_do_not_compress_are_no_bomb():
    data = bytes(range(256)) * 4096
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=0) as file,
        tarfile.open(fileobj=file, mode="w|") as tar,
    ):
        for number in range(40):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert len(untar(packed.getvalue(), lambda name: name == "39.png")[0]) == 1


def test_a_huge_header_is_not_read_into_memory():
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    data = gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 12))
    with pytest.raises(DamagedArchiveError, match="a header of 1099511627776 bytes"):
        untar(data)


def test_a_damaged_header_is_an_error_and_not_the_end():
    data = bytearray(gzip.decompress(tar_gz(images(3, "a"))))
    data[512 + 3584 + 100] ^= 0xFF  # the second header; pictures fill 3,584 bytes
    broken = gzip.compress(bytes(data))
    with tarfile.open(fileobj=io.BytesIO(broken), mode="r|gz") as plain:
        assert plain.getnames() == ["a/0.png"], "tarfile by itself ends here in silence"
    with pytest.raises(DamagedArchiveError, match="bad checksum"):
        untar(broken)


@pytest.mark.parametrize("cut", [0, 5, 600, 4000, -1])
def test_an_archive_cut_short_is_damaged(cut):
    with pytest.raises(DamagedArchiveError):
        untar(tar_gz(images(3, "a"))[:cut])


def test_changed_bytes_are_damage():
    data = bytearray(tar_gz(images(3, "a")))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(DamagedArchiveError):
        untar(bytes(data))


def test_what_came_before_the_damage_is_given():
    got = []
    with pytest.raises(DamagedArchiveError):
        got.extend(name for name, _ in read_tar(io.BytesIO(tar_gz(images(3, "a"))[:-300]), lambda name: True, Tally()))
    assert got == EVERY[:2]


@pytest.mark.parametrize("data", [b"", b"PK", b"not a zip" * 100, b"\x1f\x8b" + bytes(40)])
def test_what_is_no_archive_is_said(data):
    with pytest.raises(DamagedArchiveError):
        unzip(data)
    with pytest.raises(DamagedArchiveError):
        untar(data)


def test_a_damaged_file_in_a_zip_costs_only_itself():
    data = zipped(images(3, "a"))
    place = data.index(picture(1)) + 2000
    broken = data[:place] + b"\0\0\0\0" + data[place + 4 :]
    found, tally = unzip(broken)
    assert [name for name, _ in found] == ["a/0.png", "a/2.png"]
    assert tally.refusals() == ["1 that are damaged, encrypted or packed in an unknown way: 'a/1.png'"]


def test_an_encrypted_file_in_a_zip_is_refused():
    data = bytearray(zipped(images(1, "a")))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.index(signature) + offset
        data[place : place + 2] = struct.pack("<H", 1)
    found, tally = unzip(bytes(data))
    assert (found, sum(tally.refused.values())) == ([], 1)


def test_an_empty_archive_holds_nothing():
    assert untar(tar_gz({}))[0] == []
    assert unzip(zipped({}))[0] == []


def test_names_of_many_refused_members_are_few():
    _, tally = untar(tar_gz({f"../{number}.png": b"" for number in range(5)}))
    assert tally.refusals() == ["5 with '..' in the path: '../0.png', '../1.png', '../2.png' ..."]


def test_names_fit_one_csv_line():
    assert escape_control("é 写真/a\nb\0c\udcff.png") == "é 写真/a\\nb\\x00c\\udcff.png"


def test_parts_are_read_in_the_order_of_their_numbers():
    names = [f"x/A.tar.gz.{number}" for number in (10, 2, 0, 1, 9, 3, 4, 5, 6, 7, 8)]
    assert group_parts([*names, "x/B.tar.gz.0", "README"], "x/A.tar.gz") == {
        "x/A.tar.gz": [f"x/A.tar.gz.{number}" for number in range(11)]
    }


@pytest.mark.parametrize(
    ("numbers", "missing"),
    [("000 002", ".001"), ("000 001 005", ".002, x.tar.gz.003, x.tar.gz.004"), ("002 003", ".001"), ("0 2", ".1")],
)
def test_a_missing_part_is_named(numbers, missing):
    with pytest.raises(DataError) as caught:
        group_parts([f"x.tar.gz.{number}" for number in numbers.split()], "x.tar.gz")
    assert str(caught.value).endswith(f"cannot be read: x.tar.gz{missing}")


def test_parts_may_count_from_one():
    assert group_parts(["x.tar.gz.1", "x.tar.gz.2"], "x.tar.gz") == {"x.tar.gz": ["x.tar.gz.1", "x.tar.gz.2"]}


def test_the_whole_archive_is_preferred_to_parts_of_it():
    assert group_parts(["x.tar.gz.000", "x.tar.gz"], "x.tar.gz") == {"x.tar.gz": ["x.tar.gz"]}


def test_one_number_twice_is_refused():
    with pytest.raises(DataError, match=r"two parts 1: x.tar.gz.001 and x.tar.gz.1"):
        group_parts(["x.tar.gz.000", "x.tar.gz.001", "x.tar.gz.1"], "x.tar.gz")


def test_a_pattern_finds_several_archives_below_its_folder():
    paths = ["d/b.tar.gz.00", "d/b.tar.gz.01", "d/sub/a.tar.gz", "other/c.tar.gz", "d/readme.txt"]
    assert list(group_parts(paths, "d/*.tar.gz").items()) == [
        ("d/b.tar.gz", ["d/b.tar.gz.00", "d/b.tar.gz.01"]),
        ("d/sub/a.tar.gz", ["d/sub/a.tar.gz"]),
    ]
