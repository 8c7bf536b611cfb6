"""push and pull take nothing of the owner's away, waste no hours, and show no stranger's control characters."""

import os
import shutil
import time
from pathlib import Path

import pytest
from helpers import exported_run, write_bundle, write_image, write_stacker
from hub_api import TOKEN
from hub_client import client
from hub_layouts import listing
from hub_state import Fault

from ensemble.core.errors import join_limited
from ensemble.core.hub_download import INVALID_LOGIN, explain_error
from ensemble.stacking.stacker import Stacker
from export import Predictor
from export.bundle import bundle
from export.bundle import hub_bundles as hub_names


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def run(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "run")


@pytest.mark.parametrize("name", ["stacker.json", "certificate.json"])
def test_an_empty_file_there_is_not_taken_for_ours(name, hub, call, run, repo, tmp_path):
    call("push", repo, "--run", run)
    hub.add(repo, {**hub.files(repo), name: b""})
    assert "1 of 6 files were new or changed" in call("push", repo, "--run", run)
    assert hub.files(repo)[name] == (run / "bundle" / name).read_bytes()
    call("pull", repo, tmp_path / "pulled")


def test_a_pull_mends_single_files_and_leaves_all_others(hub, call, run, repo, tmp_path):
    call("push", repo, "--run", run)
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    call("pull", repo, link)
    (folder / "members" / "mine.txt").write_text("mine")
    (folder / "members" / "one.fp32.onnx").write_bytes(b"damaged")
    (folder / "stacker.json").unlink()
    whole = folder / "members" / "two.fp32.onnx"
    before = whole.stat().st_ino
    assert f"-> {link}" in call("pull", repo, link)
    bundle.open_bundle(folder)
    assert (folder / "members" / "mine.txt").read_text() == "mine"
    assert whole.stat().st_ino == before
    assert link.is_symlink()
    assert not list(folder.rglob(".*"))
    assert "is what is in" in call("pull", repo, link)


def test_a_push_deletes_only_what_a_push_writes(hub, call, run, repo):
    owners = ["members/README.md", "members/notes.onnx", "members/a b.fp32.onnx", "members/old/notes.md"]
    owners += ["externals/notes.csv", "externals/more/x.parquet", "members/old/deep/config.json"]
    ours = ["members/old.fp32.onnx", "members/old.int8-symmetric.onnx", "externals/old.parquet"]
    ours += [f"members/old/{name}.json" for name in ("config", "preprocessor_config", "member")]
    ours += ["members/old/model.safetensors", "members/old/model.safetensors.index.json"]
    call("push", repo, "--run", run)
    hub.add(repo, {**hub.files(repo), **dict.fromkeys([*owners, *ours], b"x")})
    assert f"{len(ours)} of an earlier push deleted" in call("push", repo, "--run", run)
    assert set(hub.files(repo)) >= set(owners)
    assert not set(hub.files(repo)) & set(ours)


@pytest.mark.parametrize(
    ("given", "token", "message"),
    [
        ([], "", "you are not logged in; run: hf auth login, with a token that may write"),
        ([], "sécret", INVALID_LOGIN),
        (["--license", "forbidden"], TOKEN, "the Hub refuses the head of its card, README.md: "),
    ],
    ids=["nobody", "token", "licence"],
)
def test_what_a_push_would_fail_of_is_told_before_hours_of_export(given, token, message, hub, call, run, repo):
    shutil.rmtree(run / "bundle")
    said = call("push", repo, "--run", run, *given, code=2, token=token)
    assert said.startswith(f"Error: {repo}: {message}")
    assert said.count("\n") == 1
    assert not token or token not in said
    assert repo not in hub.repos
    assert not (run / "bundle").exists()


def test_a_card_that_the_hub_refuses_is_told_before_a_file_is_sent(hub, call, run, repo):
    hub.add(repo, {"README.md": b"---\nlicense: forbidden\n---\n# Mine\n"})
    said = call("push", repo, "--run", run, code=2)
    assert "the Hub refuses the head of its card, README.md: " in said
    assert not hub.received


def test_of_what_is_no_bundle_nothing_is_downloaded(hub, call, repo, tmp_path):
    hub.add(repo, {"config.json": b"{}", "model.safetensors": b"weights"})
    write_image(tmp_path / "images" / "a.png")
    for command in (["infer", "--input", tmp_path / "images"], ["bench"]):
        said = call(*command, "--bundle", f"hf://{repo}", code=2)
        assert f"{repo} holds no bundle (no bundle.json); a single classifier scores by:" in said
        assert not hub.sent


def test_with_hf_hub_offline_a_pull_takes_what_is_cached(hub, hub_child, call, run, repo, tmp_path, monkeypatch):
    call("push", repo, "--run", run)
    call("pull", repo, tmp_path / "first")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with client(hub.url, hub_child.home) as offline:
        assert offline("pull", repo, tmp_path / "second")[0] == 0
        bundle.open_bundle(tmp_path / "second")
        code, _, err = offline("pull", "me/other", tmp_path / "third")
        assert code == 2
        assert err == (
            "Error: me/other: HF_HUB_OFFLINE is set and it is not in the cache; unset it, or name a local folder\n"
        )


def cache_of(hub, home, repo, kept, trees):
    """huggingface_hub's cache after a fetch of all files of a repository that kept one file of them."""
    from huggingface_hub import snapshot_download

    place = snapshot_download(repo, cache_dir=home / "hub", endpoint=hub.url, token=TOKEN)
    for path in Path(place).rglob("*"):
        if path.is_file() and path.name != kept:
            path.unlink()
    if not trees:  # as versions before 2 leave it
        shutil.rmtree(Path(place).parents[1] / "trees")


@pytest.mark.parametrize("trees", [True, False])
@pytest.mark.parametrize("url", ["offline", "http://127.0.0.1:9"])
def test_what_half_a_cache_lacks_is_not_blamed_on_its_owner(
    url, trees, hub, call, run, repo, tmp_path, tiles, monkeypatch
):
    call("push", repo, "--run", run)
    other = f"{repo}-other"
    hub.add(other, {"config.json": b"{}", "model.safetensors": b"weights", "bundle.json": b"{}"})
    home = tmp_path / "home"
    cache_of(hub, home, repo, "bundle.json", trees)
    cache_of(hub, home, other, "config.json", trees)
    message = "the Hub cannot be reached"
    if url == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        url, message = hub.url, "HF_HUB_OFFLINE is set and it is not in the cache"
    scored = ("--input", tiles, "--output", tmp_path / "scores.csv")
    with client(url, home) as child:
        child("fetch")  # modules are loaded
        for command in (
            ["infer", "--bundle", f"hf://{repo}", *scored],
            ["infer", "--bundle", f"hf://{other}", *scored],
            ["infer", "--model", f"hf://{other}", *scored],
            ["infer", "--model", f"hf://{repo}", *scored],
            ["export", "--member", f"a={other}", "--bundle", tmp_path / "made"],
            ["pull", other, run / "bundle"],
            ["pull", repo, tmp_path / "pulled"],
        ):
            begun = time.monotonic()
            code, _, err = child(*command)
            assert code == 2
            assert err.startswith(f"Error: {other if any(other in str(word) for word in command) else repo}: {message}")
            assert err.count("\n") == 1
            assert time.monotonic() - begun < 15


def test_what_the_hub_does_not_list_is_not_blamed_on_its_owner(hub, hub_child, call, run, repo, tmp_path):
    call("push", repo, "--run", run)
    cache_of(hub, hub_child.home, repo, "bundle.json", trees=False)
    hub.faults.append(Fault("GET .*/tree/", 403, 99))
    assert call("pull", repo, tmp_path / "pulled", code=2).startswith(f"Error: {repo}: your token has no right")


def test_a_predictor_that_moves_stays_the_same_model(run, tmp_path, monkeypatch):
    other = shutil.copytree(run, tmp_path / "other")
    write_stacker(other, Stacker(("two", "one"), (5.0, 5.0), 3.0))
    write_bundle(other)
    found = iter([run / "bundle", other / "bundle"])
    monkeypatch.setattr(hub_names, "locate", lambda source: next(found))
    predictor = Predictor.load("hf://me/a")
    first = predictor._ensemble
    assert predictor.to("cpu")._ensemble.stacker == first.stacker
    assert Predictor.load("hf://me/a")._ensemble.stacker != first.stacker  # what the Hub has by now


def test_names_that_strangers_chose_move_no_cursor(hub, call, repo, tmp_path):
    hub.add(repo, {"bundle.json": listing({"files": {"x\n\x1b[2Jok": "0"}, "members": {}})})
    said = call("pull", repo, tmp_path / "pulled", code=2)
    assert said.count("\n") == 1
    assert "\x1b" not in said
    assert join_limited(["a\nError: b\x1b[2J\u202e", "é 写真"]) == r"a\nError: b\x1b[2J\u202e, é 写真"
    assert os.linesep not in join_limited(["\r\n"])


def test_a_token_that_no_header_takes_is_not_shown():
    for error in (UnicodeEncodeError("ascii", "Bearer é", 7, 8, "x"), OSError("Illegal header value b'Bearer x\\x01'")):
        assert explain_error(error) == INVALID_LOGIN
