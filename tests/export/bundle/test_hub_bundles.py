"""push and pull by the real huggingface_hub against a loopback Hub."""

import re
import shutil

import pandas as pd
import pytest
from helpers import change_json, exported_run, write_bundle, write_csv, write_image, write_onnx, write_stacker
from hub_layouts import listing

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle
from export.bundle import hub_bundles as hub_names


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("exported"), cascade=True)


@pytest.fixture
def run(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "run")


def test_what_was_pushed_is_pulled_and_scores_the_same(hub, call, run, repo, tmp_path):
    assert f"7 of 7 files were new or changed -> {hub.url}/{repo}/commit/" in call("push", repo, "--run", run)
    listed = bundle.read_contents(run / "bundle")["files"]
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
    for changing in (("export", "--uncertified"), ("frontier", "--reset"), ("frontier", "--budget", "9")):
        refused = call(*changing, "--bundle", f"hf://{repo}", code=2)
        assert "get a folder of it first: pull USER/REPO" in refused
    assert "no such repository" in call("frontier", "--bundle", "hf://me/none", code=2)
    ids = [write_image(tmp_path / "images" / f"{value}.png", value).name for value in (0, 90, 200)]
    scores = ("--input", tmp_path / "images", "--output", tmp_path / "scores.csv")
    call("infer", "--bundle", f"hf://{repo}", *scores)
    submission = ("--scores", tmp_path / "scores.csv", "--output", tmp_path / "out.csv")
    submission += ("--sample", write_csv(tmp_path / "sample.csv", id=ids, target=["0.5"] * 3))
    assert "3 rows as in" in call("submit", "--bundle", f"hf://{repo}", *submission)
    assert "no such repository" in call("submit", "--bundle", "hf://me/none", *submission, code=2)
    assert "no such repository" in call("kaggle-kernel", tmp_path / "kaggle", "--bundle", "hf://me/none", code=2)


def test_unchanged_files_are_not_sent_again(hub, call, run, repo):
    call("push", repo, "--run", run)
    hub.received.clear()
    assert f"{repo} has all of it already" in call("push", repo, "--run", run)
    changed = write_onnx(run / "bundle" / "members" / "two.fp32.onnx", -3.0)
    bundle.write_bundle(run / "bundle", bundle.read_contents(run / "bundle")["members"])
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
    (run / "bundle" / "heldout.parquet").unlink()
    write_stacker(run, Stacker(("one",), (1.0,), 0.0))
    write_bundle(run)
    entries = {"one": bundle.read_contents(run / "bundle")["members"]["one"]}
    bundle.write_bundle(run / "bundle", entries)
    assert "3 of an earlier push deleted" in call("push", repo, "--run", run)
    there = hub.files(repo)
    assert "members/gone.fp32.onnx" not in there
    assert "heldout.parquet" not in there
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


def test_a_gitignore_there_that_keeps_files_out_is_told(hub, call, run, repo):
    hub.add(repo, {".gitignore": b"*.onnx"})
    said = call("push", repo, "--run", run, code=2)
    assert "its .gitignore kept out members/one.fp32.onnx, members/two.fp32.onnx, so nobody can use" in said


def test_what_another_pushed_meanwhile_is_not_overwritten(hub, call, run, repo):
    call("push", repo, "--run", run)
    found = hub.repos[repo]
    head = found.heads["main"]
    theirs = found.commit("main", {**found.commits[head], "theirs.txt": b"new"})
    found.heads["main"], found.moves = head, [theirs]
    said = call("push", repo, "--run", run, "--license", "mit", code=2)
    assert said == f"Error: {repo}: it was changed meanwhile; run the same command again\n"
    call("push", repo, "--run", run, "--license", "mit")
    assert "theirs.txt" in hub.files(repo)


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
        "push", repo, "--run", run, "--private", "--revision", "v3", code=2
    )
    assert set(found.heads) == {"main", "v2"}


def test_a_branch_that_moves_between_two_requests_mixes_no_files(hub, call, run, repo, tmp_path):
    call("push", repo, "--run", run)
    found = hub.repos[repo]
    first = found.heads["main"]
    write_onnx(run / "bundle" / "members" / "one.fp32.onnx", 1.0)
    bundle.write_bundle(run / "bundle", bundle.read_contents(run / "bundle")["members"])
    call("push", repo, "--run", run)
    second = found.heads["main"]
    for name in ("pull", "infer"):
        found.heads["main"], found.moves = first, [second, first, second]
        if name == "pull":
            assert first[:12] in call("pull", repo, tmp_path / "pulled")
            bundle.open_bundle(tmp_path / "pulled")
            assert (tmp_path / "pulled" / "bundle.json").read_bytes() == found.commits[first]["bundle.json"]
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
    bundle.write_bundle(run / "bundle", bundle.read_contents(run / "bundle")["members"])
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
            lambda files: files.update({"bundle.json": listing({"files": {"../x": ""}, "members": {}})}),
            "names files that",
        ),
        (
            lambda files: files.update({"bundle.json": listing({"files": {"members/": ""}, "members": {}})}),
            "names files that",
        ),
        (lambda files: files.update({"bundle.json": listing({})}), "its bundle.json lacks what one has"),
        (lambda files: files.update({"bundle.json": listing({"files": 3, "members": 4})}), "its bundle.json lacks"),
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


def test_the_card_names_the_licence_of_a_checkpoint_that_the_hub_tells(hub, call, run, repo):
    hub.add("org/told", {}, licence="mit")
    for name, checkpoint in (("one", "org/told"), ("two", "org/gone")):
        recipe = {"backbone": {"checkpoint": checkpoint}}
        change_json(artifacts.member_path(run, name) / "member.json", recipe=recipe, hub_checkpoint=checkpoint)
    call("push", repo, "--run", run)
    card = hub.files(repo)["README.md"].decode()
    assert "| one | 0.5000 | [org/told](https://huggingface.co/org/told) | mit |" in card
    assert "| two | 0.2500 | [org/gone](https://huggingface.co/org/gone) | see its page |" in card


def test_scores_that_are_looked_up_by_id_travel_too_and_that_is_said(hub, call, run, repo, tmp_path):
    folder = run / "bundle"
    artifacts.write_parquet(artifacts.external_path(folder, "other"), pd.DataFrame({"id": ["a"], "logit": [0.5]}))
    bundle.write_bundle(folder, bundle.read_contents(folder)["members"], externals=["other"])
    said = call("push", repo, "--bundle", folder)
    assert "externals/other.parquet: ids and scores of images, which whoever may read" in said
    call("pull", repo, tmp_path / "pulled")
    assert (tmp_path / "pulled" / "externals" / "other.parquet").is_file()


def test_a_full_disk_leaves_nothing_half(run, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ArtifactError, match="No space left on device; choose another place"):
        hub_names._copy(run / "bundle", tmp_path / "pulled")
    assert not list(tmp_path.glob("*pulled*"))


def test_uncertified_bundles_are_pushed_on_demand_and_the_card_says_so(hub, call, run, repo):
    precisions = {"openvino bf16": {"members": ["one"], "certified": False}}
    bundle.write_bundle(run / "bundle", bundle.read_contents(run / "bundle")["members"], precisions=precisions)
    said = call("push", repo, "--run", run, code=2)
    assert "lets members run at openvino bf16 without a certificate; certify it first: python cli.py export" in said
    assert repo not in hub.repos
    call("push", repo, "--run", run, "--uncertified")
    assert b"- openvino bf16: one; **not certified**" in hub.files(repo)["README.md"]
