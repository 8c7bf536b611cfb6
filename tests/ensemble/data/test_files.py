import os
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import HOSTILE_NAMES, encoded, noise, write_files

from ensemble.core.errors import DataError
from ensemble.data.files import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, compact, find_files, list_images

NAMES = st.one_of(st.text("aA.- é\n/", min_size=1, max_size=3), st.sampled_from(HOSTILE_NAMES))
PATHS = st.lists(st.tuples(NAMES, st.sampled_from([".jpg", ".png", ".jpg.png"])).map("".join), min_size=1, max_size=12)


def resolve_ids(ids, folder):
    return list(find_files(compact(ids), folder))


def refusal(function, *arguments) -> str:
    with pytest.raises(DataError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_image_suffixes_in_either_case(tmp_path, suffix):
    write_files(tmp_path, f"a{suffix}", f"b{suffix.upper()}")
    assert list_images(tmp_path) == [f"a{suffix}", f"b{suffix.upper()}"]


def test_images_are_listed_sorted_and_nested(tmp_path):
    write_files(tmp_path, "b.jpg", "a/z.png", "a/b/c.gif", "B.jpg")
    assert list_images(tmp_path) == ["B.jpg", "a/b/c.gif", "a/z.png", "b.jpg"]


def test_other_files_and_hidden_ones_are_passed_over(tmp_path):
    write_files(tmp_path, "a.jpg", "labels.csv", "note.txt", "noend", ".b.jpg", ".cache/c.jpg", ".d.heic", ".png")
    assert list_images(tmp_path) == ["a.jpg"]


def test_images_of_another_kind_are_refused_with_counts(tmp_path):
    write_files(tmp_path, "a.jpg", "b.heic", "in/c.HEIC", "d.svg")
    expected = "images that cannot be read would be skipped (2 .heic, 1 .svg); convert or move them"
    assert refusal(list_images, tmp_path) == f"{tmp_path}: {expected}"


@pytest.mark.parametrize("suffix", sorted(OTHER_IMAGE_SUFFIXES))
def test_no_image_suffix_is_skipped_silently(tmp_path, suffix):
    write_files(tmp_path, f"a{suffix}")
    assert f"(1 {suffix})" in refusal(list_images, tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    write_files(tmp_path, "a.jpg")
    assert refusal(list_images, tmp_path / "no") == f"no such folder: {tmp_path / 'no'}"
    assert refusal(list_images, tmp_path / "a.jpg") == f"no such folder: {tmp_path / 'a.jpg'}"


def test_an_empty_folder_lists_nothing(tmp_path):
    assert list_images(tmp_path) == []


def test_linked_folders_are_followed(tmp_path):
    write_files(tmp_path, "elsewhere/b.jpg", "data/a.jpg")
    for name in ("one", "two"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "elsewhere")
    assert list_images(tmp_path / "data") == ["a.jpg", "one/b.jpg", "two/b.jpg"]


@pytest.mark.parametrize(("link", "target"), [("self", "."), ("in/round", "..")])
def test_links_are_not_followed_in_circles(tmp_path, link, target):
    write_files(tmp_path, "a.jpg", "in/c.jpg")
    (tmp_path / link).symlink_to(target)
    assert list_images(tmp_path) == ["a.jpg", "in/c.jpg"]


def test_an_unreadable_folder_is_refused(tmp_path, monkeypatch):
    write_files(tmp_path, "a.jpg", "locked/b.jpg")
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert refusal(list_images, tmp_path) == f"cannot read the folder {tmp_path / 'locked'}: Permission denied"


def test_names_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    assert "file names that are not UTF-8: 'caf\\udce9.jpg'; rename them" in refusal(list_images, tmp_path)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["1.jpg", "2", "2.png"], ["1.jpg", "2.png", "2.png"]),
        (["in/3", "in/3.gif", "3", "3.gif"], ["in/3.gif"] * 4),
        (["001", "01", "1"], ["in/001.jpg", "in/01.jpg", "1.jpg"]),
        (["a.b", "a.b.jpg"], ["a.b.jpg", "a.b.jpg"]),
    ],
)
def test_ids_name_files_with_and_without_suffix(tmp_path, ids, expected):
    write_files(tmp_path, "1.jpg", "2.png", "in/3.gif", "in/001.jpg", "in/01.jpg", "a.b.jpg", "in/1.png")
    assert resolve_ids(ids, tmp_path) == expected


def test_the_fuller_reading_of_an_id_wins(tmp_path):
    write_files(tmp_path, "1.jpg", "1.jpg.png", "in/2.jpg", "2.png")
    assert resolve_ids(["1.jpg", "1.jpg.png", "2", "2.jpg"], tmp_path) == ["1.jpg", "1.jpg.png", "2.png", "in/2.jpg"]


def test_missing_ids_are_listed(tmp_path):
    write_files(tmp_path, "1.jpg")
    message = refusal(resolve_ids, ["1", "2", "1.png", ""], tmp_path)
    assert message == f"3 of 4 ids have no image in {tmp_path}: '2', '1.png', ''; name their folder with --images"


@pytest.mark.parametrize(
    ("names", "key"),
    [(("1.jpg", "1.png"), "1"), (("a/1.jpg", "b/1.jpg"), "1.jpg"), (("a/1.jpg", "b/1.png", "c/1.gif"), "1")],
)
def test_an_id_of_two_files_is_refused(tmp_path, names, key):
    write_files(tmp_path, *names)
    message = refusal(resolve_ids, [key], tmp_path)
    assert message.endswith(
        f"more than one file in {tmp_path}: '{key}' ({names[0]} and {names[1]}); "
        "write their suffix, or name a narrower folder with --images"
    )


def test_hostile_names_are_found(tmp_path):
    names = [f"{name}.jpg" for name in HOSTILE_NAMES]
    write_files(tmp_path, *(f"in/{name}" for name in names))
    assert list_images(tmp_path) == sorted(f"in/{name}" for name in names)
    assert resolve_ids(names, tmp_path) == resolve_ids(HOSTILE_NAMES, tmp_path) == [f"in/{name}" for name in names]


def test_hostile_folders_are_left_out_of_a_file_name(tmp_path):
    paths = [f"{name}/{number}.jpg" for number, name in enumerate(HOSTILE_NAMES)]
    write_files(tmp_path, *paths)
    assert resolve_ids([str(number) for number in range(len(paths))], tmp_path) == paths


@pytest.mark.parametrize("name", ["0001", "0001.txt", "0001.bin"])
def test_an_image_by_its_bytes_is_not_passed_over_silently(tmp_path, name):
    write_files(tmp_path, "a.png", "notes.txt", "Thumbs.db")
    write_files(tmp_path, name, data=encoded(noise(1)))
    with pytest.raises(DataError, match=r"images that cannot be read would be skipped \(1 "):
        list_images(tmp_path)
    skipped = Counter()
    assert list_images(tmp_path, skipped) == ["a.png"]
    assert skipped == {os.path.splitext(name)[1] or "without suffix": 1}


def test_pipes_and_sockets_are_passed_over(tmp_path):
    write_files(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    os.mkfifo(tmp_path / "c")
    assert list_images(tmp_path) == ["a.jpg"]


def make_tree(folder, paths):
    """What of `paths` can be made as files: not hidden, and no folder in a file's place."""
    made = set()
    for path in paths:
        parts = path.split("/")
        if all(part and not part.startswith(".") for part in parts) and not (folder / path).is_dir():
            try:
                write_files(folder, path)
            except (FileExistsError, NotADirectoryError):
                continue
            made.add(path)
    return sorted(made)


@settings(max_examples=60, deadline=None)
@given(paths=PATHS)
def test_folders_are_walked_in_the_order_of_sorted_paths(paths):
    with tempfile.TemporaryDirectory() as name:
        made = make_tree(Path(name), paths)
        assert list_images(Path(name)) == made


def test_that_order_is_not_the_order_of_names(tmp_path):
    paths = ["a-b/c.png", "a.png", "a/z.png"]
    write_files(tmp_path, *paths)
    assert list_images(tmp_path) == paths
    assert sorted(os.listdir(tmp_path)) == ["a", "a-b", "a.png"]


def resolved(ids, paths):
    """`resolve_ids` in plain words: the files of each id, by the first reading that knows it."""
    readings = [defaultdict(list) for _ in range(4)]
    for path in paths:
        stem = os.path.splitext(path)[0]
        for reading, key in zip(readings, (path, stem, os.path.basename(path), os.path.basename(stem)), strict=True):
            reading[key].append(path)
    return [next((reading[key] for reading in readings if key in reading), []) for key in ids]


@settings(max_examples=60, deadline=None)
@given(paths=PATHS, data=st.data())
def test_ids_are_found_as_by_four_dictionaries(paths, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make_tree(folder, paths)
        known = {
            part
            for path in paths
            for stem in (path, os.path.splitext(path)[0])
            for part in (stem, stem.rpartition("/")[2])
        }
        ids = data.draw(st.lists(st.one_of(st.sampled_from(sorted(known) or ["a"]), NAMES), max_size=8))
        expected = resolved(ids, paths)
        if missing := [key for key, found in zip(ids, expected, strict=True) if not found]:
            message = refusal(resolve_ids, ids, folder)
            assert message.startswith(f"{len(missing)} of {len(ids)} ids have no image in {folder}: {missing[0]!r}")
        elif doubled := [
            f"{key!r} ({' and '.join(found[:2])})" for key, found in zip(ids, expected, strict=True) if len(found) > 1
        ]:
            assert refusal(resolve_ids, ids, folder).startswith(
                f"ids that match more than one file in {folder}: {doubled[0]}"
            )
        else:
            assert resolve_ids(ids, folder) == [found[0] for found in expected]
