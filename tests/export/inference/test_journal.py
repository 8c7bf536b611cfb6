import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import PREPROCESS_CONFIG, ROOT, STACKER, read_csv, write_image
from pictures import HOSTILE_NAMES

from ensemble.core.errors import ArtifactError
from ensemble.data.inputs import inputs_from_files
from ensemble.models.runner import Runner
from export.inference import infer, journal
from export.inference.outputs import Failure

KEY = {"the members": "a", "--fill": None}
IDS = [*HOSTILE_NAMES, "\ud800 of another coding"]
ROWS = journal.ScoredBatch(
    IDS,
    np.linspace(-9, 9, 2 * len(IDS), dtype=np.float32).reshape(-1, 2),
    {1: Failure(IDS[1], "no/UTF-8 \udcff", "not an image\nat all")},
)
ROWS.logits[1] = np.nan


def opened(folder, key=KEY, count=None):
    return journal.open_journal(folder, key, ["one", "two"], count or len(IDS))[0]


def same(found):
    texts = [text.encode("utf-8", "replace").decode() for text in IDS]
    failure = Failure(IDS[1], "no/UTF-8 ?", "not an image\nat all")
    return (
        found.ids == texts
        and np.array_equal(found.logits, ROWS.logits, equal_nan=True)
        and found.logits.dtype == np.float32
        and found.failures == {1: failure}
    )


def test_a_shard_comes_back_as_it_was_written(tmp_path):
    book = opened(tmp_path)
    assert book.missing_shards() == [0]
    book.write(0, book.encode(0, ROWS))
    assert same(book.read(0))
    assert book.missing_shards() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.parquet", "journal.json"]


def test_a_folder_may_have_a_name_that_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"o\xe9.csv.partial")
    folder.mkdir()
    book = opened(folder)
    book.write(0, book.encode(0, ROWS))
    assert same(book.read(0))


def test_a_damaged_shard_is_done_again_or_says_the_same(tmp_path):
    book = opened(tmp_path)
    book.write(0, book.encode(0, ROWS))
    whole = book.path(0).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.choice(len(whole), 150, replace=False):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        for damaged in (bytes(flipped), whole[:place]):
            book.path(0).write_bytes(damaged)
            found = book.read(0)
            assert found is None or (same(found) and len(damaged) == len(whole))
            refused += found is None
    assert refused > 200


def test_a_shard_of_another_number_list_or_key_is_not_taken(tmp_path):
    book = opened(tmp_path, count=2 * journal.SHARD_ROWS)
    rows = journal.ScoredBatch(
        [str(row) for row in range(journal.SHARD_ROWS)], np.zeros((journal.SHARD_ROWS, 2), np.float32), {}
    )
    book.write(0, book.encode(0, rows))
    book.path(1).write_bytes(book.path(0).read_bytes())
    assert book.missing_shards() == [1]
    assert opened(tmp_path, KEY | {"the members": "b"}, 2 * journal.SHARD_ROWS).missing_shards() == [0, 1]


@pytest.mark.parametrize(
    "damage", ["", "{", '{"format_version": 1, "key": {}}', '{"format_version": 1}', '{"format_version": 1, "key": 3}']
)
def test_finished_shards_outlive_a_damaged_journal(tmp_path, damage):
    book = opened(tmp_path)
    book.write(0, book.encode(0, ROWS))
    (tmp_path / "journal.json").write_text(damage)
    again, changed = journal.open_journal(tmp_path, KEY, ["one", "two"], len(IDS))
    assert (changed, again.missing_shards()) == ([], [])
    assert json.loads((tmp_path / "journal.json").read_text())["key"] == KEY


def test_what_changed_is_named_and_its_shards_go(tmp_path):
    book = opened(tmp_path)
    book.write(0, book.encode(0, ROWS))
    again, changed = journal.open_journal(tmp_path, {"the members": "b", "--fill": 0.5}, ["one", "two"], len(IDS))
    assert changed == ["the members", "--fill"]
    assert again.missing_shards() == [0]
    assert not book.path(0).exists()


def test_a_second_process_is_refused_and_a_killed_one_blocks_nobody(tmp_path):
    output = tmp_path / "out.csv"
    hold = f"""
from pathlib import Path
from export.inference import journal
with journal.locked_workdir(Path({str(output)!r})) as folder:
    (folder / "journal.json").write_text("kept")
    print("held", flush=True)
    input()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ArtifactError, match=r"another infer is writing .*out\.csv; wait for it"),
            journal.locked_workdir(output),
        ):
            pass
        other.kill()
    with journal.locked_workdir(output) as folder:
        assert (folder / "journal.json").read_text() == "kept"


def test_what_killed_writers_left_goes(tmp_path):
    folder = tmp_path / "out.csv.partial"
    folder.mkdir()
    for name in ("lock", "journal.json", "00000.parquet", ".rows.arrow.17.tmp", "00001.tmp"):
        (folder / name).write_text("left")
    with journal.locked_workdir(tmp_path / "out.csv"):
        assert sorted(path.name for path in folder.iterdir()) == ["00000.parquet", "journal.json", "lock"]


def test_without_a_journal_the_folder_goes(tmp_path):
    with journal.locked_workdir(tmp_path / "out.csv") as folder:
        (folder / "rows.arrow").write_bytes(b"a list")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    mine = write_image(tmp_path / "out.csv.partial" / "mine.png")
    with (
        pytest.raises(ArtifactError, match=r"out\.csv\.partial is in the way"),
        journal.locked_workdir(tmp_path / "out.csv"),
    ):
        pass
    assert mine.exists()
    (tmp_path / "other.csv.partial").write_text("a file")
    with (
        pytest.raises(ArtifactError, match=r"cannot make .*other\.csv\.partial"),
        journal.locked_workdir(tmp_path / "other.csv"),
    ):
        pass


def mean(pixels):
    return pixels.mean(axis=(1, 2, 3)).astype(np.float32)


def score(output, files, run=mean, **options):
    said = []
    runners = tuple(Runner(name, PREPROCESS_CONFIG, run) for name in STACKER.members)
    ensemble = infer.Ensemble(runners, STACKER, "cpu", identity="tiny")
    with journal.locked_workdir(output) as folder:
        inputs = inputs_from_files([f"{row}" for row in range(len(files))], files)
        infer.infer_to_file(inputs, ensemble, output, folder, infer.ScoreOptions(**options), said.append)
    return said


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    few = [write_image(folder / f"{value}.png", value) for value in range(7)]
    return [few[row % 7] for row in range(2 * journal.SHARD_ROWS + 9)]


def fails_at(call):
    calls = iter(range(call))

    def run(pixels):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return mean(pixels)

    return run


@pytest.mark.parametrize("damage", [None, "truncated", "gone"])
def test_only_what_is_missing_is_scored_and_the_same_file_results(tmp_path, files, damage):
    score(tmp_path / "whole.csv", files)
    output = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        score(output, files, fails_at(4))  # two members: after two shards of three
    first = tmp_path / "out.csv.partial" / "00000.parquet"
    if damage == "truncated":
        first.write_bytes(first.read_bytes()[:-1])
    elif damage:
        first.unlink()
    rows = []
    said = score(output, files, lambda pixels: rows.append(len(pixels)) or mean(pixels))
    done = journal.SHARD_ROWS * (1 if damage else 2)
    assert said == [f"Going on: {done} of {len(files)} rows were scored before."]
    assert sum(rows) == 2 * (len(files) - done)
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "whole.csv"]


def test_a_shard_that_says_something_else_shows_in_the_file(tmp_path, files):
    score(tmp_path / "whole.csv", files)
    output = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        score(output, files, fails_at(4))
    folder = tmp_path / "out.csv.partial"
    key = json.loads((folder / "journal.json").read_text())["key"]
    book = journal.open_journal(folder, key, STACKER.members, len(files))[0]
    rows = book.read(0)
    rows.logits[3] += 1
    book.write(0, book.encode(0, rows))
    assert score(output, files) == [f"Going on: {2 * journal.SHARD_ROWS} of {len(files)} rows were scored before."]
    changed = read_csv(output)["target"] != read_csv(tmp_path / "whole.csv")["target"]
    assert list(np.flatnonzero(changed)) == [3]


@pytest.mark.parametrize("option", ["members", "tta", "fill"])
def test_an_option_that_decides_the_output_starts_anew(tmp_path, files, option):
    output, rows = tmp_path / "out.csv", []
    with pytest.raises(KeyboardInterrupt):
        score(output, files, fails_at(4))
    said = score(output, files, lambda pixels: rows.append(len(pixels)) or mean(pixels), **{option: True})
    assert said == [f"Starting anew: changed since out.csv.partial was begun: --{option}."]
    assert sum(rows) == 2 * len(files)


def test_changed_images_start_anew(tmp_path, files):
    output = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        score(output, files, fails_at(4))
    other = [write_image(tmp_path / "other.png", 200), *files[1:]]
    assert score(output, other) == ["Starting anew: changed since out.csv.partial was begun: the images."]
    score(tmp_path / "whole.csv", other)
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_what_a_kill_while_writing_the_output_left_goes(tmp_path, files):
    (tmp_path / ".out.csv.4711.tmp").write_text("id,tar")
    score(tmp_path / "out.csv", files)
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_full_disk_is_one_line_and_what_was_scored_stays(tmp_path, files, monkeypatch):
    output, sync, calls = tmp_path / "out.csv", os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*00001\.parquet: No space left on device; once it can be"):
        score(output, files)
    assert score(output, files) == [f"Going on: {journal.SHARD_ROWS} of {len(files)} rows were scored before."]


def test_an_output_folder_that_goes_meanwhile_is_one_line(tmp_path, files):
    def run(pixels):
        if (tmp_path / "place").exists():
            (tmp_path / "place").rename(tmp_path / "moved")
        return mean(pixels)

    with pytest.raises(ArtifactError, match=r"cannot write .*00000\.parquet: No such file or directory; once"):
        score(tmp_path / "place" / "out.csv", files, run)
