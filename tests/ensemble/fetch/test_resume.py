"""Archives on the Hub, through the real huggingface_hub, in parts, broken, cut off, killed and refused."""

import errno
import signal
import time

import pytest
from dataset_server import COMMIT, Hub, serve
from fetch_cases import (
    MIDJOURNEY,
    REPO,
    SD21,
    images,
    loopback,
    originals,
    parts,
    picture,
    put,
    start,
    take,
    tar_gz,
)
from helpers import read_csv

from ensemble.core.errors import DataError
from ensemble.core.hub_download import INVALID_LOGIN
from ensemble.fetch import hub_rows, hub_stream
from ensemble.fetch.catalogue import load_catalogue

SOURCES = load_catalogue()
MJ, SD = SOURCES["midjourney-v5"], SOURCES["sd21"]


@pytest.fixture
def hub(monkeypatch):
    with loopback(monkeypatch) as hub:
        yield hub


def test_a_kept_archive_is_read_on_from_its_offset(hub, tmp_path):
    data = put(hub, MIDJOURNEY, images(100))
    hub.pause = 0.002
    first = take(MJ, tmp_path, limit=10, keep_archive=True)
    hub.seen.clear()
    second = take(MJ, tmp_path, keep_archive=True)
    assert [line.rpartition(" ")[2] for line in hub.asked("resolve")] == [f"bytes={first.downloaded_bytes}-"]
    assert first.downloaded_bytes + second.downloaded_bytes == len(data)
    assert len(originals(tmp_path)) == 100
    assert not (tmp_path / ".partial").exists(), "nothing is left to go on with"


def test_parts_are_one_archive(hub, tmp_path):
    hub.repos[REPO] |= parts(SD21, tar_gz(images(60)), 12)
    assert take(SD, tmp_path).counts == {1: 60}
    assert len(hub.asked("resolve")) == 12


def test_only_the_parts_that_are_needed_are_downloaded(hub, tmp_path):
    hub.repos[REPO] |= parts(SD21, tar_gz(images(60)), 6)
    take(SD, tmp_path, limit=15)
    assert [line.split(" ")[1][-4:] for line in hub.asked("resolve")] == [".000", ".001"]


def test_a_missing_part_is_refused_before_anything_is_downloaded(hub, tmp_path):
    hub.repos[REPO] |= parts(SD21, tar_gz(images(10)), 4)
    del hub.repos[REPO][f"{SD21}.002"]
    with pytest.raises(DataError, match=r"parts are missing .*: .*SDv21-CC15K.tar.gz.002"):
        take(SD, tmp_path / "out")
    assert hub.asked("resolve") == []
    assert not (tmp_path / "out" / "ai").exists()


def test_a_missing_last_part_ends_too_early(hub, tmp_path):
    hub.repos[REPO] |= parts(SD21, tar_gz(images(40)), 4)
    del hub.repos[REPO][f"{SD21}.003"]
    with pytest.raises(DataError, match=r"ends too early .* (2\d|30) images before that are kept"):
        take(SD, tmp_path)
    assert 20 <= len(originals(tmp_path)) < 40


@pytest.mark.parametrize("place", [10, 1000, -1])
def test_a_broken_part_in_the_middle_is_named_and_downloaded_anew(hub, tmp_path, place):
    whole = parts(SD21, tar_gz(images(60)), 6)
    hub.repos[REPO] |= whole
    bad = bytearray(whole[f"{SD21}.003"])
    bad[place] ^= 0xFF
    hub.served[f"{SD21}.003"] = bytes(bad)
    with pytest.raises(DataError, match=r"SDv21-CC15K.tar.gz.003 (is|arrived) broken .* (2\d|30) before it are kept"):
        take(SD, tmp_path)
    kept = originals(tmp_path)
    assert kept == [f"Midjourneyv5-5K/{number}.png" for number in range(len(kept))]
    assert len(list((tmp_path / "ai").iterdir())) == len(kept) >= 25
    hub.served.clear()
    hub.seen.clear()
    assert take(SD, tmp_path).counts == {1: 60}
    asked = [line.split(" ")[1][-4:] for line in hub.asked("resolve")]
    assert asked == [".003", ".004", ".005"], "the parts before it are not downloaded again"
    rows = read_csv(tmp_path / "data.csv")
    assert all((tmp_path / row.path).read_bytes() == images(60)[row.original] for row in rows.itertuples())


def test_a_part_of_other_pictures_is_caught_by_its_hash_alone(hub, tmp_path):
    """Every byte reads well: only the SHA-256 tells, and what was taken from it is taken back."""
    good, other = images(8), {f"Midjourneyv5-5K/{number}.png": picture(100 + number) for number in range(8)}
    put(hub, MIDJOURNEY, good)
    hub.served[MIDJOURNEY] = tar_gz(other).ljust(len(hub.repos[REPO][MIDJOURNEY]), b"\0")
    with pytest.raises(DataError, match=r"arrived broken .* [4-8] images that touch it are taken back, 0 before it"):
        take(MJ, tmp_path)
    assert originals(tmp_path) == []
    assert list((tmp_path / "ai").iterdir()) == []


def test_several_archives_are_read_one_after_the_other(hub, tmp_path):
    folder = "ImageData/train/stylegan3-80K"
    put(hub, f"{folder}/r/faces.tar.gz", images(3, "x"))
    hub.repos[REPO] |= parts(f"{folder}/t/cats.tar.gz", tar_gz(images(4, "x")), 2)
    take(SOURCES["stylegan3"], tmp_path, limit=5)
    assert originals(tmp_path) == [
        *(f"faces.tar.gz/x/{number}.png" for number in range(3)),
        *(f"cats.tar.gz/x/{number}.png" for number in range(2)),
    ]
    hub.seen.clear()
    assert take(SOURCES["stylegan3"], tmp_path).counts == {1: 7}
    assert hub.asked("faces") == [], "an archive that was read whole is not read again"


def test_a_dropped_connection_is_taken_up_where_it_broke_off(hub, tmp_path):
    data = put(hub, MIDJOURNEY, images(40))
    hub.drops[MIDJOURNEY] = [50_000, 20_000]
    outcome = take(MJ, tmp_path)
    assert (outcome.counts, outcome.downloaded_bytes) == ({1: 40}, len(data))
    starts = [int(line.rpartition("=")[2][:-1]) for line in hub.asked("resolve")]
    assert len(starts) == 3
    assert 0 == starts[0] < starts[1] <= 50_000 < starts[2] <= 70_000


def test_a_server_without_ranges_is_read_from_the_start(hub, tmp_path):
    put(hub, MIDJOURNEY, images(40))
    hub.ranges, hub.drops[MIDJOURNEY] = False, [50_000]
    assert take(MJ, tmp_path).counts == {1: 40}


def test_a_connection_that_stays_down_says_how_to_go_on(hub, tmp_path):
    put(hub, MIDJOURNEY, images(40))
    hub.drops[MIDJOURNEY] = [60_000] + [0] * 20
    with pytest.raises(DataError, match=r"cannot be reached .*; connect and run it again"):
        take(MJ, tmp_path)
    done = len(originals(tmp_path))
    assert 5 < done < 40
    hub.drops.clear()
    assert take(MJ, tmp_path).new == 40 - done


def test_a_killed_fetch_goes_on_and_downloads_only_the_rest(tmp_path):
    data = tar_gz(images(900))
    with serve(Hub(repos={REPO: {MIDJOURNEY: data}}, pause=0.01)) as hub:
        line = f"fetch midjourney-v5 --limit 0 --output {tmp_path / 'out'}"
        process = start(hub, line, home=tmp_path)
        table = tmp_path / "out" / "data.csv"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not table.exists() or table.read_text().count("\n") < 100):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        rows = read_csv(table).to_dict("records")
        assert 100 <= len(rows) + 1 < 900
        assert all((tmp_path / "out" / row["path"]).read_bytes() == images(900)[row["original"]] for row in rows[-3:])
        kept = sum(path.stat().st_size for path in (tmp_path / "out" / ".partial").iterdir())
    with serve(Hub(repos={REPO: {MIDJOURNEY: data}})) as hub:  # the first may still be sending to the dead
        _, errors = start(hub, line, home=tmp_path).communicate(timeout=60)
    assert errors.splitlines()[-1] == "[0]", errors
    assert [line.rpartition(" ")[2] for line in hub.asked("resolve")] == [f"bytes={kept}-"]
    assert hub.sent == {MIDJOURNEY: len(data) - kept}
    assert len(read_csv(table)) == len(set(originals(tmp_path / "out"))) == 900


def test_a_row_that_a_crash_cut_short_is_written_again(hub, tmp_path):
    put(hub, MIDJOURNEY, images(6))
    take(MJ, tmp_path, limit=4)
    table = tmp_path / "data.csv"
    table.write_bytes(table.read_bytes()[:-7])
    assert take(MJ, tmp_path, limit=4).new == 1
    assert originals(tmp_path) == [f"Midjourneyv5-5K/{number}.png" for number in range(4)]


def test_an_image_that_was_deleted_is_fetched_again(hub, tmp_path):
    put(hub, MIDJOURNEY, images(6))
    take(MJ, tmp_path, limit=4)
    next((tmp_path / "ai").iterdir()).unlink()
    assert take(MJ, tmp_path, limit=4).new == 1


@pytest.mark.parametrize("token", ["hf_SECRETSECRET\x0babc", "hf_sécret"])
@pytest.mark.parametrize("call", ["pin", "list", "download"])
def test_a_token_that_no_request_takes_is_not_shown(hub, monkeypatch, token, call):
    data = put(hub, MIDJOURNEY, images(1))
    monkeypatch.setenv("HF_TOKEN", token)
    calls = {
        "pin": lambda: hub_stream.resolve_revision(REPO),
        "list": lambda: hub_stream.list_archives(REPO, COMMIT, MIDJOURNEY),
        "download": lambda: next(hub_stream._download(REPO, COMMIT, hub_stream.ArchivePart(MIDJOURNEY, len(data)), 0)),
    }
    with pytest.raises(DataError) as caught:
        calls[call]()
    assert str(caught.value).endswith(f": {INVALID_LOGIN}")
    assert hub.asked("/resolve/") == []  # nor is it tried again


def test_nor_by_a_data_set_of_rows(monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    with pytest.raises(DataError) as caught:
        next(hub_rows.read_rows(SOURCES["human-action"], COMMIT, 0))
    assert str(caught.value).endswith(f": {INVALID_LOGIN}")


def test_a_full_disk_and_a_fault_of_our_own_are_not_the_connections():
    with pytest.raises(DataError, match=r"^a/b: the disk is full; make room"), hub_stream.translate_hub_errors("a/b"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyError, match="ours"), hub_stream.translate_hub_errors("a/b"):
        raise KeyError("ours")
