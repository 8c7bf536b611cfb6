"""Archives on the Hub, through the real huggingface_hub, from a loopback server."""

import os
import shutil
import tarfile
from collections import namedtuple

import pytest
from dataset_server import COMMIT
from fetch_cases import (
    MIDJOURNEY,
    REPO,
    images,
    loopback,
    member,
    originals,
    picture,
    put,
    take,
    tar_gz,
)
from helpers import read_csv

from ensemble.core.errors import DataError
from ensemble.data import sources
from ensemble.fetch import hub_stream, output_folder
from ensemble.fetch.catalogue import ImageSource, load_catalogue
from ensemble.fetch.fetch_job import class_quotas
from ensemble.fetch.output_folder import safe_file_name

SOURCES = load_catalogue()
MJ, SD = SOURCES["midjourney-v5"], SOURCES["sd21"]
TWO = ImageSource(
    "two", "two classes", "tar.gz", hub=REPO, path="two.tar.gz", classes={"AI": 1, "real": 0}, licence="MIT"
)


@pytest.fixture
def hub(monkeypatch):
    with loopback(monkeypatch) as hub:
        yield hub


def test_images_keep_their_bytes_and_get_a_row_each(hub, tmp_path):
    files = images(5) | {"Midjourneyv5-5K/é ü.JPG": picture(9)}
    put(hub, MIDJOURNEY, files)
    outcome = take(MJ, tmp_path)
    rows = read_csv(tmp_path / "data.csv")
    assert list(rows.columns) == ["id", "path", "label", "source", "generator", "original"]
    assert {row.original: (tmp_path / row.path).read_bytes() for row in rows.itertuples()} == files
    assert set(rows["label"] + rows["source"] + rows["generator"]) == {"1midjourney-v5midjourney-v5"}
    assert (outcome.counts, outcome.new, outcome.exhausted) == ({1: 6}, 6, True)
    assert sorted(os.listdir(tmp_path)) == ["ai", "data.csv", "fetch.json"]


def test_the_table_is_one_that_data_reads(hub, tmp_path):
    hub.repos[REPO]["two.tar.gz"] = tar_gz(images(3, "x/AI") | images(2, "x/real"))
    take(TWO, tmp_path)
    items, _ = sources.read_data([tmp_path / "data.csv"])
    assert [item.label for item in items] == [1, 1, 1, 0, 0]
    assert all(item.file.is_file() and item.source == "two" for item in items)


def test_a_limit_stops_the_download_and_takes_the_first_images(hub, tmp_path):
    data = put(hub, MIDJOURNEY, images(400))
    hub.pause = 0.002
    outcome = take(MJ, tmp_path, limit=20)
    assert originals(tmp_path) == [f"Midjourneyv5-5K/{number}.png" for number in range(20)]
    assert outcome.downloaded_bytes < 20 * 3600 + 3 * hub_stream.CHUNK_BYTES
    assert len(data) > 10 * outcome.downloaded_bytes
    assert not (tmp_path / ".partial").exists()


def test_the_same_fetch_again_asks_for_nothing(hub, tmp_path):
    put(hub, MIDJOURNEY, images(30))
    take(MJ, tmp_path, limit=10)
    before, hub.seen[:] = (tmp_path / "data.csv").stat().st_mtime_ns, []
    outcome = take(MJ, tmp_path, limit=10)
    assert (outcome.new, outcome.counts, hub.seen) == (0, {1: 10}, [])
    assert (tmp_path / "data.csv").stat().st_mtime_ns == before
    assert take(MJ, tmp_path, limit=5).counts == {1: 10}, "what is there stays"
    assert hub.seen == []


def test_a_source_that_was_read_to_its_end_is_not_asked_again(hub, tmp_path):
    put(hub, MIDJOURNEY, images(4))
    assert take(MJ, tmp_path, limit=100).exhausted
    hub.seen.clear()
    assert take(MJ, tmp_path, limit=1000).exhausted
    assert hub.seen == []


def test_a_larger_limit_goes_on_from_what_is_there(hub, tmp_path):
    put(hub, MIDJOURNEY, images(30))
    take(MJ, tmp_path, limit=10)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "ai").iterdir()}
    outcome = take(MJ, tmp_path, limit=20)
    assert (outcome.new, originals(tmp_path)) == (10, [f"Midjourneyv5-5K/{number}.png" for number in range(20)])
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_half_of_each_class_where_there_are_two(hub, tmp_path):
    put(hub, "two.tar.gz", images(10, "AI") | images(10, "real"))
    assert take(TWO, tmp_path, limit=7).counts == {0: 3, 1: 4}
    assert originals(tmp_path) == [
        "AI/0.png",
        "AI/1.png",
        "AI/2.png",
        "AI/3.png",
        "real/0.png",
        "real/1.png",
        "real/2.png",
    ]
    assert take(TWO, tmp_path, limit=30).counts == {0: 10, 1: 10}
    assert len(set(originals(tmp_path))) == 20


def test_a_class_that_is_short_does_not_read_the_source_again(hub, tmp_path):
    put(hub, "two.tar.gz", images(10, "AI") | images(2, "real"))
    assert take(TWO, tmp_path, limit=8).counts == {0: 2, 1: 4}
    hub.seen.clear()
    assert take(TWO, tmp_path, limit=8).counts == {0: 2, 1: 4}
    assert hub.seen == []
    assert take(TWO, tmp_path, limit=12).counts == {0: 2, 1: 6}, "but a larger limit does"


@pytest.mark.parametrize(
    ("limit", "labels", "expected"), [(5, (0, 1), {0: 2, 1: 3}), (5, (0,), {0: 5}), (4, (0, 1), {0: 2, 1: 2})]
)
def test_class_quotas_are_even(limit, labels, expected):
    assert class_quotas(limit, labels) == expected


def test_hostile_members_are_counted_and_never_written(hub, tmp_path):
    files = images(2) | {"../../evil.png": picture(50), "/abs.png": picture(51), "last.png": picture(52)}
    links = [member("Midjourneyv5-5K/l.png", tarfile.SYMTYPE, "/etc/passwd"), member("d.png", tarfile.FIFOTYPE)]
    put(hub, MIDJOURNEY, files, *links)
    outcome = take(MJ, tmp_path / "out")
    assert originals(tmp_path / "out") == ["Midjourneyv5-5K/0.png", "Midjourneyv5-5K/1.png", "last.png"]
    assert sum(outcome.tally.refused.values()) == 4
    assert len(list((tmp_path / "out" / "ai").iterdir())) == 3
    assert os.listdir(tmp_path) == ["out"]
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_files_that_are_no_images_are_passed_over(hub, tmp_path):
    junk = {
        "a/readme.txt": b"x",
        "a/._0.png": b"x",
        "__MACOSX/1.png": picture(1),
        "a/html.png": b"<html>",
        "a/no.jpg": b"",
    }
    put(hub, MIDJOURNEY, junk | images(1))
    outcome = take(MJ, tmp_path)
    assert (outcome.counts, outcome.tally.passed, outcome.tally.refused) == ({1: 1}, {"not images": 5}, {})


def test_images_outside_the_folder_are_passed_over(hub, tmp_path):
    put(hub, "f.tar.gz", images(2, "x/in/deep") | images(3, "x/inner") | images(1, "in"))
    source = ImageSource("f", "f", "tar.gz", hub=REPO, path="f.tar.gz", folder="in", label=0, licence="MIT")
    outcome = take(source, tmp_path)
    assert originals(tmp_path) == ["x/in/deep/0.png", "x/in/deep/1.png", "in/0.png"]
    assert outcome.tally.passed == {"of another class": 3}


def test_an_archive_without_images_is_an_error(hub, tmp_path):
    put(hub, MIDJOURNEY, {"readme.txt": b"moved"})
    with pytest.raises(DataError, match=r"midjourney-v5 gave no image \(1 not images\)"):
        take(MJ, tmp_path / "out")


def test_names_that_meet_in_one_folder_stay_apart(hub, tmp_path):
    put(hub, MIDJOURNEY, {f"{folder}/0.{suffix}": picture(3) for folder in "ab" for suffix in ("png", "PNG")})
    take(MJ, tmp_path)
    assert len(list((tmp_path / "ai").iterdir())) == len(originals(tmp_path)) == 4


@pytest.mark.parametrize(
    ("original", "start", "end"),
    [
        ("a/b/Photo 1.JPG", "Photo_1-", ".jpg"),
        ("写真.png", "image-", ".png"),
        ("con.aux/../..png", "image-", ".png"),
        ("x" * 500 + ".webp", "x" * 60 + "-", ".webp"),
        ("train/00000012", "00000012-", ".jpg"),
        ("-rf.png", "rf-", ".png"),
    ],
)
def test_local_names_are_safe_anywhere(original, start, end):
    name = safe_file_name(original, "JPEG")
    assert name.startswith(start)
    assert name.endswith(end)
    assert name.isascii()
    assert len(name) < 100
    assert name != safe_file_name(original + "x", "JPEG")


def test_later_fetches_stay_at_the_first_ones_commit(hub, tmp_path):
    put(hub, MIDJOURNEY, images(6))
    take(MJ, tmp_path, limit=2)
    hub.seen.clear()
    take(MJ, tmp_path, limit=4)
    assert all(COMMIT in line for line in hub.seen)


def test_a_folder_of_another_source_is_refused(hub, tmp_path):
    put(hub, MIDJOURNEY, images(3))
    take(MJ, tmp_path, limit=2)
    with pytest.raises(DataError, match="holds images of midjourney-v5; choose another --output"):
        take(SD, tmp_path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "data.csv").write_text("path,label\nx.png,1\n")
    with pytest.raises(DataError, match="was not written by fetch; choose another --output"):
        take(MJ, foreign)


def test_a_table_that_points_elsewhere_leads_nowhere(hub, tmp_path):
    put(hub, MIDJOURNEY, images(3))
    take(MJ, tmp_path / "out", limit=2)
    (tmp_path / "precious.png").write_bytes(picture(1))
    table = tmp_path / "out" / "data.csv"
    table.write_text(table.read_text() + "i,../precious.png,1,s,g,Midjourneyv5-5K/2.png\n")
    assert take(MJ, tmp_path / "out").new == 1
    assert (tmp_path / "precious.png").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hub: hub.gated.add(REPO), "access is granted on request: accept its terms at https://huggingface.co/"),
        (lambda hub: hub.locked.add(REPO), "access is granted on request: accept its terms at https://huggingface.co/"),
        (lambda hub: hub.repos.clear(), "no such repository, or it is private"),
        (
            lambda hub: hub.repos[REPO].update({f"{MIDJOURNEY}.zip": hub.repos[REPO].pop(MIDJOURNEY)}),
            "has no ImageData/val/Midjourneyv5-5K/Midjourneyv5-5K.tar.gz any more; ",
        ),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, tmp_path, change, message):
    put(hub, MIDJOURNEY, images(1))
    change(hub)
    with pytest.raises(DataError) as caught:
        take(MJ, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "the Hub does not accept your token; run: hf auth login"),
        (403, "your token has no right to do this"),
        (404, r"the Hub refused \("),
        (429, "the Hub asks to wait"),
        (503, r"the Hub is in trouble \(it answers 503\); run the same command again"),
    ],
)
def test_what_the_hub_answers_is_not_called_unreachable(hub, tmp_path, status, message):
    hub.status = status
    with pytest.raises(DataError, match=f"^{REPO}: .*{message}") as caught:
        take(MJ, tmp_path / "out")
    assert "cannot be reached" not in str(caught.value)


def test_a_full_disk_is_said_before_it_is_full(hub, tmp_path, monkeypatch):
    put(hub, MIDJOURNEY, images(3))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, output_folder.MIN_FREE_BYTES + 1000))
    with pytest.raises(DataError, match="ask for fewer with --limit"):
        take(MJ, tmp_path / "a")
    assert take(MJ, tmp_path / "b", limit=2).counts == {1: 2}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    with pytest.raises(DataError, match="make room"):
        take(MJ, tmp_path / "c", limit=2)
