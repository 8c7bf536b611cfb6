"""push and pull by the real huggingface_hub against a loopback Hub."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, exported_run, write_bundle, write_csv, write_image, write_onnx, write_stacker
from hub_client import environment
from hub_state import Fault

from ensemble import artifacts
from ensemble.stack import Stacker
from export import bundle

PIECE = 3 << 20


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("exported"), cascade=True)


@pytest.fixture
def run(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "run")


def large_bundle(folder, sizes, seed=0):
    """The bundle with files of these sizes in place of its members', which nothing could run."""
    rng = np.random.default_rng(seed)
    entries = bundle.contents(folder)["members"]
    for entry, size in zip(entries.values(), sizes, strict=True):
        (folder / entry["file"]).write_bytes(rng.bytes(size))
    bundle.write_bundle(folder, entries)
    return folder


def killed_when(reached, command, hub, home):
    """Run a command and kill it once `reached()`."""
    with subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *map(str, command)],
        env=environment(hub.url, home),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=home,
    ) as process:
        deadline = time.monotonic() + 120
        while not reached():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    hub.wait, known = 0.0, None
    while known != (known := (dict(hub.received), dict(hub.sent))):  # what was on its way arrives
        time.sleep(0.5)


def test_what_was_pushed_is_pulled_and_scores_the_same(hub, call, run, repo, tmp_path):
    assert f"7 of 7 files were new or changed -> {hub.url}/{repo}/commit/" in call("push", repo, "--run", run)
    listed = bundle.contents(run / "bundle")["files"]
    assert set(hub.files(repo)) == {".gitattributes", "README.md", "bundle.json", *listed}
    assert len(hub.repos[repo].messages) == 1
    target = tmp_path / "pulled"
    assert f"-> {target}" in call("pull", repo, target)
    bundle.open_bundle(target)
    images = [write_image(tmp_path / "images" / f"{value}.png", value).stem for value in (0, 90, 200)]
    table = write_csv(tmp_path / "test.csv", id=images)
    scores = []
    for number, source in enumerate((run / "bundle", target, f"hf://{repo}", f"hf://{repo}@main")):
        output = tmp_path / f"{number}.csv"
        call("infer", "--bundle", source, "--input", table, "--images", tmp_path / "images", "--output", output)
        scores.append(output.read_bytes())
    assert scores[1:] == scores[:1] * 3
    assert len(pd.read_csv(tmp_path / "0.csv")) == 3


def test_a_bundle_on_the_hub_is_named_wherever_a_bundle_is(call, run, repo, tmp_path, tiles):
    call("push", repo, "--run", run)
    assert "no such repository" in call("bench", "--bundle", "hf://me/none", code=2)
    evaluated = ("--data", tiles, "--grid", "none", "--output", tmp_path / "evaluated")
    assert "AUROC" in call("evaluate", "--model", f"hf://{repo}", *evaluated)
    refused = call("export", "--bundle", f"hf://{repo}", "--uncertified", code=2)
    assert "get a folder of it first: pull USER/REPO" in refused


def test_unchanged_files_are_not_sent_again(hub, call, run, repo):
    call("push", repo, "--run", run)
    hub.received.clear()
    assert f"{repo} has all of it already" in call("push", repo, "--run", run)
    changed = write_onnx(run / "bundle" / "members" / "two.fp32.onnx", -3.0)
    bundle.write_bundle(run / "bundle", bundle.contents(run / "bundle")["members"])
    assert "of 7 files were new or changed" in call("push", repo, "--run", run)
    assert set(hub.received) == {artifacts.file_sha256(changed)}
    assert len(hub.repos[repo].messages) == 2


def test_what_is_gone_here_goes_there_and_the_owners_own_stays(hub, call, run, repo):
    call("push", repo, "--run", run)
    found = hub.repos[repo]
    own = found.commits[found.heads["main"]]
    card = own["README.md"].decode().replace("license: unknown", "license: mit\ndatasets: [me/mine]")
    files = {**own, "notes/members.txt": b"mine", "README.md": card.encode() + b"\nMine too.\n"}
    found.commit("main", {**files, "members/gone.fp32.onnx": b"left by an older push"})
    (run / "bundle" / "members" / "two.fp32.onnx").unlink()
    write_stacker(run, Stacker(("one",), (1.0,), 0.0))
    write_bundle(run)
    entries = {"one": bundle.contents(run / "bundle")["members"]["one"]}
    bundle.write_bundle(run / "bundle", entries)
    assert "2 of an earlier push deleted" in call("push", repo, "--run", run)
    there = hub.files(repo)
    assert "members/gone.fp32.onnx" not in there
    assert "members/two.fp32.onnx" not in there
    assert there["notes/members.txt"] == b"mine"
    assert there["README.md"].decode().endswith("<!-- manyeyes push: end -->\n\nMine too.\n")
    assert b"license: mit" in there["README.md"]
    assert b"me/mine" in there["README.md"]


def test_a_repository_that_holds_something_else_loses_nothing(hub, call, run, repo):
    hub.add(repo, {"members/other.bin": b"not ours", "README.md": b"# Mine\n"})
    call("push", repo, "--run", run)
    assert hub.files(repo)["members/other.bin"] == b"not ours"
    assert hub.files(repo)["README.md"].endswith(b"\n\n# Mine\n")


def test_branches_and_private_repositories(hub, call, run, repo, tmp_path):
    call("push", repo, "--run", run, "--private", "--revision", "v2", "--message", "Second")
    found = hub.repos[repo]
    assert found.private
    assert set(found.heads) == {"main", "v2"}
    assert found.messages == ["Second"]
    assert "bundle.json" not in hub.files(repo)
    assert f"{repo} holds no bundle" in call("pull", repo, tmp_path / "main", code=2)
    call("pull", f"{repo}@v2", tmp_path / "second")
    bundle.open_bundle(tmp_path / "second")
    hub.repos[repo].private = False
    assert "is there and public; make it private in its settings" in call(
        "push", repo, "--run", run, "--private", code=2
    )


def test_a_killed_push_repeated_sends_only_what_is_missing(hub, call, run, repo, tmp_path):
    folder = large_bundle(run / "bundle", (PIECE, 2 * PIECE))
    first, second = (artifacts.file_sha256(folder / f"members/{name}.fp32.onnx") for name in ("one", "two"))
    hub.wait = 0.3
    killed_when(lambda: hub.received[second], ["push", repo, "--bundle", folder], hub, tmp_path)
    assert hub.repos[repo].messages == []  # nothing half is ever seen
    assert hub.received[first] == PIECE
    before = hub.received[second]
    assert before < 2 * PIECE
    hub.received.clear()
    call("push", repo, "--bundle", folder)
    assert hub.received[first] == 0
    assert hub.received[second] == 2 * PIECE
    bundle_on_hub = hub.files(repo)
    assert bundle_on_hub["members/two.fp32.onnx"] == (folder / "members" / "two.fp32.onnx").read_bytes()


def test_a_killed_pull_repeated_fetches_only_what_is_missing(hub, call, run, repo, tmp_path):
    folder = large_bundle(run / "bundle", (PIECE // 4, 3 * PIECE), seed=1)
    call("push", repo, "--bundle", folder)
    one, two = "members/one.fp32.onnx", "members/two.fp32.onnx"
    hub.wait = 0.3
    command = ["pull", repo, tmp_path / "pulled"]
    killed_when(lambda: hub.sent[two] >= PIECE and hub.sent[one] == PIECE // 4, command, hub, tmp_path)
    assert not (tmp_path / "pulled").exists()
    hub.sent.clear()
    with_same_cache = environment(hub.url, tmp_path)
    again = [sys.executable, str(ROOT / "cli.py"), *map(str, command)]
    subprocess.run(again, env=with_same_cache, check=True, cwd=tmp_path, capture_output=True)
    assert hub.sent[two] == 3 * PIECE
    assert hub.sent[one] == 0
    bundle.open_bundle(tmp_path / "pulled")


@pytest.mark.parametrize("kind", ["PUT /lfs/", "GET /.*/resolve/.*two"])
def test_a_cut_connection_heals_by_itself(kind, hub, call, run, repo, tmp_path):
    folder = large_bundle(run / "bundle", (PIECE, 8 * PIECE), seed=len(kind))
    hub.faults.append(Fault(kind))
    call("push", repo, "--bundle", folder)
    call("pull", repo, tmp_path / "pulled")
    assert hub.faults[0].times == 0
    assert (tmp_path / "pulled" / "members" / "two.fp32.onnx").read_bytes() == (
        folder / "members" / "two.fp32.onnx"
    ).read_bytes()
    if kind.startswith("GET"):
        # what was cut off in the middle went on near there: the client counts in pieces of 10 MiB
        assert 8 * PIECE <= hub.sent["members/two.fp32.onnx"] < 9 * PIECE


def test_a_branch_that_moves_between_two_requests_mixes_no_files(hub, call, run, repo, tmp_path):
    call("push", repo, "--run", run)
    found = hub.repos[repo]
    first = found.heads["main"]
    write_onnx(run / "bundle" / "members" / "one.fp32.onnx", 1.0)
    bundle.write_bundle(run / "bundle", bundle.contents(run / "bundle")["members"])
    call("push", repo, "--run", run)
    second = found.heads["main"]
    for name in ("pull", "infer"):
        found.heads["main"], found.moves = first, [second, first, second]
        if name == "pull":
            assert first[:12] in call("pull", repo, tmp_path / "pulled")
            bundle.open_bundle(tmp_path / "pulled")
        else:
            write_image(tmp_path / "images" / "a.png")
            call("infer", "--bundle", f"hf://{repo}", "--input", tmp_path / "images", "--output", tmp_path / "out.csv")


def test_pull_replaces_no_other_bundle_unasked(hub, call, run, repo, tmp_path):
    call("push", repo, "--run", run)
    target = tmp_path / "a b, é <b>" / "bundle"
    call("pull", repo, target)
    assert "is what is in" in call("pull", repo, target)
    (target / "stacker.json").write_text("{}")
    assert "->" in call("pull", repo, target)  # the same bundle, mended
    bundle.open_bundle(target)
    write_onnx(run / "bundle" / "members" / "one.fp32.onnx", 1.5)
    bundle.write_bundle(run / "bundle", bundle.contents(run / "bundle")["members"])
    call("push", repo, "--run", run)
    assert "holds another bundle; name another folder, or replace it with --force" in call("pull", repo, target, code=2)
    call("pull", repo, target, "--force")
    assert (target / "bundle.json").read_bytes() == (run / "bundle" / "bundle.json").read_bytes()
    shutil.rmtree(target)
    (target / "mine").mkdir(parents=True)
    assert "is there and is no bundle; name another folder" in call("pull", repo, target, "--force", code=2)
    assert (target / "mine").is_dir()


def test_a_cached_file_that_was_damaged_is_fetched_again(hub, hub_child, call, run, repo, tmp_path):
    call("push", repo, "--run", run)
    call("pull", repo, tmp_path / "one")
    name = "members/one.fp32.onnx"
    (cached,) = hub_child.home.glob(f"hub/models--{repo.replace('/', '--')}/snapshots/*/{name}")
    cached.write_bytes(bytes(cached.stat().st_size))
    hub.sent.clear()
    call("pull", repo, tmp_path / "two")
    assert set(hub.sent) == {name}
    bundle.open_bundle(tmp_path / "two")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda files: files.update({"stacker.json": b"{}"}),
            "does not hold what its bundle.json lists (stacker.json)",
        ),
        (
            lambda files: files.pop("members/one.fp32.onnx"),
            "does not hold what its bundle.json lists (members/one.fp32",
        ),
        (lambda files: files.update({"bundle.json": b"{}"}), "cannot be used"),
        (
            lambda files: files.update(
                {"bundle.json": json.dumps({"format_version": 1, "files": {"../x": ""}}).encode()}
            ),
            "",
        ),
    ],
)
def test_a_repository_that_is_not_what_its_list_says_is_refused(change, message, hub, call, run, repo, tmp_path):
    call("push", repo, "--run", run)
    found = hub.repos[repo]
    files = dict(found.commits[found.heads["main"]])
    change(files)
    found.commit("main", files)
    said = call("pull", repo, tmp_path / "pulled", code=2)
    assert re.fullmatch(rf"Error: {repo} [^\n]*\n", said)
    assert message in said
    assert not (tmp_path / "pulled").exists()


def test_uncertified_bundles_are_pushed_on_demand_and_the_card_says_so(hub, call, run, repo):
    precisions = {"openvino bf16": {"members": ["one"], "certified": False}}
    bundle.write_bundle(run / "bundle", bundle.contents(run / "bundle")["members"], precisions=precisions)
    said = call("push", repo, "--run", run, code=2)
    assert "lets members run at openvino bf16 without a certificate; certify it first: python cli.py export" in said
    assert repo not in hub.repos
    call("push", repo, "--run", run, "--uncertified")
    assert b"- openvino bf16: one; **not certified**" in hub.files(repo)["README.md"]
