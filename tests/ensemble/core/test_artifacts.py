import json
import os

import numpy as np
import pandas as pd
import pytest

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError

HELP = "run it again"


def refusal(function, *arguments) -> str:
    with pytest.raises(ArtifactError) as caught:
        function(*arguments)
    return str(caught.value)


@pytest.fixture
def below_a_file(tmp_path):
    """A place where nothing can be written: below a regular file."""
    (tmp_path / "file").write_text("text")
    return tmp_path / "file" / "inner" / "x.json"


# ---- writing


def test_replacing_makes_folders_and_leaves_only_the_file(tmp_path):
    with artifacts.replacing(tmp_path / "a" / "b.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a" / "b.txt").exists()
    assert os.listdir(tmp_path / "a") == ["b.txt"]
    assert (tmp_path / "a" / "b.txt").read_text() == "new"


def write_half(path, error):
    with artifacts.replacing(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_whole(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(error):
        write_half(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


def test_a_full_disk_is_an_artifact_error(tmp_path):
    path = tmp_path / "x.txt"
    message = refusal(write_half, path, OSError(28, "No space left on device"))
    assert message == f"cannot write {path}: No space left on device; choose another place"
    assert os.listdir(tmp_path) == []


def test_a_folder_in_the_way_is_an_artifact_error(tmp_path):
    (tmp_path / "x.json").mkdir()
    assert refusal(artifacts.write_json, tmp_path / "x.json", {}).startswith(f"cannot write {tmp_path / 'x.json'}: ")
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_name_too_long_is_an_artifact_error(tmp_path):
    assert "File name too long; choose another place" in refusal(artifacts.write_json, tmp_path / ("x" * 255), {})


@pytest.mark.parametrize(
    "write",
    [
        lambda path: artifacts.write_json(path, {}),
        lambda path: artifacts.write_parquet(path, pd.DataFrame({"id": ["a"]})),
        lambda path: artifacts.replace_folder(path, path),
        lambda path: artifacts.ensure_writable(path.parent),
    ],
    ids=["json", "parquet", "folder", "check"],
)
def test_an_unwritable_place_is_an_artifact_error(below_a_file, write):
    assert refusal(write, below_a_file) == f"cannot make {below_a_file.parent}: Not a directory; choose another place"


def test_ensure_writable_leaves_an_empty_folder(tmp_path):
    artifacts.ensure_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


def folder_with(path, text):
    path.mkdir()
    (path / text).write_text(text)
    return path


def test_replace_folder_moves_to_a_new_place(tmp_path):
    artifacts.replace_folder(folder_with(tmp_path / "new", "new"), tmp_path / "run" / "member")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [
        "run/member/new"
    ]
    assert not (tmp_path / "new").exists()


def test_replace_folder_leaves_nothing_of_the_old(tmp_path):
    target = folder_with(tmp_path / "member", "old")
    folder_with(tmp_path / ".member.old", "left by a kill")
    artifacts.replace_folder(folder_with(tmp_path / "new", "new"), target)
    assert os.listdir(tmp_path) == ["member"]
    assert os.listdir(target) == ["new"]


def test_a_failed_replace_folder_keeps_a_whole_one(tmp_path):
    target = folder_with(tmp_path / "member", "old")
    with pytest.raises(ArtifactError, match="cannot move"):
        artifacts.replace_folder(tmp_path / "missing", target)
    assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["member"]


def test_what_a_killed_replace_folder_set_aside_is_put_back_once(tmp_path):
    folder_with(tmp_path / ".member.old", "old")
    artifacts.restore_folder(tmp_path / "member")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["member", "member/old"]
    folder_with(tmp_path / ".member.old", "older")
    artifacts.restore_folder(tmp_path / "member")
    assert os.listdir(tmp_path / "member") == ["old"]


# ---- reading


def test_json_comes_back_with_its_version(tmp_path):
    path = tmp_path / "x.json"
    artifacts.write_json(path, {"name": "é", "values": [1.5, None]})
    assert artifacts.read_json(path, HELP) == {"format_version": 1, "name": "é", "values": [1.5, None]}
    assert "é" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"format_version": 2}', "was written by another version of manyeyes"),
        (b'{"name": 1}', "was written by another version of manyeyes"),
        (b"[1]", "was written by another version of manyeyes"),
        (b'{"format_version": 1', "is damaged (not JSON)"),
        (b"\xff\xfe", "is damaged (not JSON)"),
        (b"", "is damaged (not JSON)"),
    ],
)
def test_json_of_another_kind_is_refused(tmp_path, data, message):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    assert refusal(artifacts.read_json, path, HELP) == f"{path} {message}; {HELP}"


@pytest.mark.parametrize("read", [artifacts.read_json, artifacts.read_parquet])
def test_a_missing_file_is_refused_with_what_to_do(tmp_path, below_a_file, read):
    for path in (tmp_path / "missing", below_a_file):
        assert refusal(read, path, HELP) == f"no {path}; {HELP}"


@pytest.mark.parametrize("data", [b"", b"text", b"PAR1 and no more"])
def test_a_damaged_parquet_is_refused(tmp_path, data):
    path = tmp_path / "x.parquet"
    path.write_bytes(data)
    message = refusal(artifacts.read_parquet, path, HELP)
    assert message.startswith(f"{path} is damaged (")
    assert message.endswith(f"; {HELP}")


# ---- hashes

FRAME = pd.DataFrame(
    {
        "id": ["b", "a", "c"],
        "label": np.array([1, 0, 1], dtype=np.int8),
        "fold": pd.array([None, 1, 2], dtype="Int16"),
        "score": [np.nan, 0.5, 1.5],
        "source": ["web", None, "é\n"],
    }
)
COLUMNS = list(FRAME)


def test_a_frames_hash_does_not_depend_on_order_or_storage(tmp_path):
    expected = artifacts.frame_sha256(FRAME, COLUMNS)
    artifacts.write_parquet(tmp_path / "x.parquet", FRAME)
    stored = artifacts.read_parquet(tmp_path / "x.parquet", HELP)
    extra = FRAME.assign(path="elsewhere").set_index(pd.Index([7, 7, 7]))
    for frame in (FRAME.iloc[::-1], FRAME.sample(frac=1, random_state=1), stored, extra, FRAME[COLUMNS[::-1]]):
        assert artifacts.frame_sha256(frame, COLUMNS) == expected


@pytest.mark.parametrize(
    ("column", "value"), [("id", "d"), ("label", 0), ("fold", 3), ("score", 0.25), ("source", "None")]
)
def test_a_frames_hash_depends_on_every_cell(column, value):
    changed = FRAME.copy()
    changed.loc[0 if column != "source" else 1, column] = value
    assert artifacts.frame_sha256(changed, COLUMNS) != artifacts.frame_sha256(FRAME, COLUMNS)


def test_none_and_nan_are_the_same_lack():
    frames = [pd.DataFrame({"id": ["a"], "x": pd.Series([lack], dtype=object)}) for lack in (None, np.nan, pd.NA)]
    assert len({artifacts.frame_sha256(frame, ["id", "x"]) for frame in frames}) == 1


def test_hashes_of_json_and_files(tmp_path):
    assert artifacts.json_sha256({"a": 1, "b": [2]}) == artifacts.json_sha256(json.loads('{"b": [2], "a": 1}'))
    assert artifacts.json_sha256({"a": 1}) != artifacts.json_sha256({"a": 2})
    (tmp_path / "x").write_bytes(b"abc")
    assert artifacts.file_sha256(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223")


# ---- members


@pytest.fixture
def run(tmp_path):
    for name in ("b", "a"):
        artifacts.write_json(artifacts.member_path(tmp_path, name) / "member.json", {})
    (artifacts.members_path(tmp_path) / "note.txt").write_text("")
    (artifacts.members_path(tmp_path) / ".a.old").mkdir()
    return tmp_path


def test_members_are_listed_by_name_or_as_asked(run):
    assert artifacts.list_members(run) == ["a", "b"]
    assert artifacts.list_members(run, ("b", "a", "b")) == ["b", "a"]


def test_an_unknown_member_is_refused_with_the_known(run):
    assert refusal(artifacts.list_members, run, ("a", "c")) == f"no member 'c' in {run}; it has: a, b"


def test_a_member_without_its_marker_is_refused(run):
    (artifacts.member_path(run, "b") / "member.json").unlink()
    assert refusal(artifacts.list_members, run).startswith(f"member 'b' in {run} is not complete (no member.json);")
    assert artifacts.list_members(run, ("a",)) == ["a"]


def test_a_run_without_members_says_how_to_train_them(tmp_path):
    message = refusal(artifacts.list_members, tmp_path)
    assert message == f"no members in {tmp_path}; train them first: python cli.py train-all recipes/ --run {tmp_path}"
    assert "it has: none" in refusal(artifacts.list_members, tmp_path, ("a",))
