"""Data sets on Kaggle, through the real kagglehub; its HTTP edge is a loopback server."""

import sys

import pytest
from dataset_server import Hub, serve
from fetch_cases import images, picture, zipped
from helpers import read_csv

from ensemble.core.errors import DataError, UnavailableError
from ensemble.fetch import kaggle as fetch_kaggle
from ensemble.fetch.catalogue import ImageSource, load_catalogue
from ensemble.fetch.fetch import fetch

kaggle_env = pytest.importorskip("kagglesdk.kaggle_env")
FLICKR, REALART = (load_catalogue()[name] for name in ("flickr30k", "realart"))
TOKENS = "KAGGLE_API_TOKEN KAGGLE_USERNAME KAGGLE_KEY KAGGLE_API_ENVIRONMENT KAGGLE_KERNEL_RUN_TYPE".split()


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    for name in TOKENS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("KAGGLE_API_TOKEN", "secret")
    monkeypatch.setattr(fetch_kaggle, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(fetch_kaggle, "BLOCK_BYTES", 1 << 14)
    with serve(Hub()) as hub:
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, hub.endpoint)
        yield hub


def take(source, folder, limit=0):
    return fetch(source, folder, limit)


def originals(folder):
    return list(read_csv(folder / "data.csv")["original"])


def test_images_keep_their_bytes(kaggle, tmp_path):
    files = {"captions.txt": b"x", **images(5, "Images")}
    kaggle.kaggle[FLICKR.kaggle] = zipped(files)
    outcome = take(FLICKR, tmp_path / "out")
    rows = read_csv(tmp_path / "out" / "data.csv")
    assert {row.original: (tmp_path / "out" / row.path).read_bytes() for row in rows.itertuples()} == images(
        5, "Images"
    )
    assert set(rows["label"] + rows["source"] + rows["generator"]) == {"0flickr30k"}
    assert (outcome.counts, outcome.exhausted, outcome.tally.passed) == ({0: 5}, True, {"not images": 1})


def test_only_what_is_wanted_is_downloaded(kaggle, tmp_path):
    kaggle.kaggle[FLICKR.kaggle] = data = zipped(images(300, "Images"))
    outcome = take(FLICKR, tmp_path / "out", limit=20)
    directory = 300 * 70
    assert outcome.counts == {0: 20}
    assert outcome.downloaded_bytes < 20 * 3300 + directory + 3 * fetch_kaggle.BLOCK_BYTES < len(data) / 5
    assert not (tmp_path / "out" / ".partial").exists()


def test_both_classes_are_told_by_folder_and_share_the_limit(kaggle, tmp_path):
    files = images(10, "AiArtData/AiArtData") | images(10, "RealArt/RealArt") | images(1, "other")
    kaggle.kaggle[REALART.kaggle] = zipped(files)
    outcome = take(REALART, tmp_path / "out", limit=6)
    assert outcome.counts == {0: 3, 1: 3}
    assert originals(tmp_path / "out") == [
        *(f"AiArtData/AiArtData/{number}.png" for number in range(3)),
        *(f"RealArt/RealArt/{number}.png" for number in range(3)),
    ]
    assert take(REALART, tmp_path / "out").counts == {0: 10, 1: 10}


def test_a_fetch_goes_on_with_what_is_missing(kaggle, tmp_path):
    kaggle.kaggle[FLICKR.kaggle] = zipped(images(200, "Images"))
    take(FLICKR, tmp_path / "out", limit=100)
    outcome = take(FLICKR, tmp_path / "out", limit=110)
    assert (outcome.new, outcome.counts) == (10, {0: 110})
    assert outcome.downloaded_bytes < 10 * 3300 + 200 * 70 + 3 * fetch_kaggle.BLOCK_BYTES
    kaggle.seen.clear()
    assert take(FLICKR, tmp_path / "out", limit=110).new == 0
    assert kaggle.seen == []


def test_a_dropped_connection_is_tried_again(kaggle, tmp_path):
    kaggle.kaggle[FLICKR.kaggle] = zipped(images(20, "Images"))
    kaggle.drops[f"{FLICKR.kaggle}/archive.zip"] = [0, 10, 100]
    assert take(FLICKR, tmp_path / "out").counts == {0: 20}


def test_a_connection_that_stays_down_says_how_to_go_on(kaggle, tmp_path):
    kaggle.kaggle[FLICKR.kaggle] = zipped(images(20, "Images"))
    kaggle.drops[f"{FLICKR.kaggle}/archive.zip"] = [0] * 50
    with pytest.raises(DataError, match=r"Kaggle cannot be reached .* to go on"):
        take(FLICKR, tmp_path / "out")


def test_without_ranges_the_whole_zip_is_downloaded_once_and_removed(kaggle, tmp_path):
    kaggle.kaggle[FLICKR.kaggle] = data = zipped(images(20, "Images"))
    kaggle.ranges = False
    assert take(FLICKR, tmp_path / "out", limit=5).counts == {0: 5}
    assert kaggle.sent == {f"{FLICKR.kaggle}/archive.zip": len(data)}
    assert not (tmp_path / "out" / ".partial").exists()


def test_hostile_files_are_counted_and_never_written(kaggle, tmp_path):
    files = images(2, "Images") | {"../evil.png": picture(1), "/abs.png": picture(2)}
    kaggle.kaggle[FLICKR.kaggle] = zipped(files, {"Images/link.png": "/etc/passwd"})
    outcome = take(FLICKR, tmp_path / "out")
    assert (outcome.counts, sum(outcome.tally.refused.values())) == ({0: 2}, 3)
    assert not list(tmp_path.rglob("evil*")) + list(tmp_path.rglob("abs*")) + list(tmp_path.rglob("link*"))


def test_a_zip_that_is_none_is_said(kaggle, tmp_path):
    kaggle.kaggle[FLICKR.kaggle] = b"<html>sorry</html>" * 100
    with pytest.raises(DataError, match="adityajn105/flickr30k: not a ZIP, or a damaged one"):
        take(FLICKR, tmp_path / "out")


def test_without_credentials_it_says_where_to_get_them(kaggle, tmp_path, monkeypatch):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with pytest.raises(DataError) as caught:
        take(FLICKR, tmp_path / "out")
    for part in ("kaggle.json", "KAGGLE_USERNAME and KAGGLE_KEY", "KAGGLE_API_TOKEN", f"terms at {FLICKR.url}"):
        assert part in str(caught.value)
    assert kaggle.seen == []


def test_kaggle_json_is_enough(kaggle, tmp_path, monkeypatch):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    kaggle.kaggle[FLICKR.kaggle] = zipped(images(2, "Images"))
    (tmp_path / "kaggle.json").write_text('{"username": "me", "key": "secret"}')
    assert take(FLICKR, tmp_path / "out").counts == {0: 2}
    (tmp_path / "kaggle.json").write_text("{")
    with pytest.raises(DataError, match="Invalid Kaggle credentials file"):
        take(FLICKR, tmp_path / "other")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, r"Kaggle refuses \(403\): accept its terms at https://www.kaggle.com/datasets/adityajn105/flickr30k"),
        (404, r"Kaggle has no such data set \(404\)"),
        (500, "Kaggle answers 500; run the same command again later"),
    ],
)
def test_what_kaggle_refuses_is_explained(kaggle, tmp_path, status, message):
    kaggle.refuse = status
    with pytest.raises(DataError, match=message):
        take(FLICKR, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_kagglehub_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"needs kagglehub; run: pip install 'manyeyes\[fetch\]'"):
        take(ImageSource("x", "x", "zip", kaggle="a/b", label=1, url="u", licence="l"), tmp_path / "out")
