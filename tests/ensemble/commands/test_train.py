"""Training through the command line: folds, interruptions, dry runs, and what is refused before it begins."""

import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from helpers import read_csv, run_cli
from small_job import ROOT, SHARES

from ensemble.core import artifacts
from ensemble.models import members
from ensemble.stacking.stacker import read_stacker_values
from ensemble.training import checkpoint, precision

CONVNEXT = (
    "backbone: {architecture: convnext, config: {patch_size: 4, hidden_sizes: [8, 16, 24, 32], depths: [1, 1, 1, 1]}}\n"
)
VIT = "backbone: {architecture: timm/vit_tiny_patch16_224, config: {patch_size: 8, depth: 1, embed_dim: 24}}\n"
RESNET = "backbone: {architecture: resnet, config: {embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1]}}\n"
TRAIN = "train: {lr: 3.0e-3, epochs: 1, batch_size: 16}\n"
DECAY = "train: {lr: 1e-3, epochs: 1, batch_size: 16, layer_decay: 0.8}\n"
IMAGE = "image: {size: 64, geometry: native_crops}\n"
EPOCHS = ("--set", "train.epochs=6")


@pytest.fixture(scope="module")
def data(work):
    return ("--data", work / "data" / "train.csv", "--group-column", "photo", *SHARES)


@pytest.fixture(scope="module")
def recipe(work):
    return work / "recipes" / "tiny_convnext.yaml"


@pytest.fixture(scope="module")
def plain(recipe, data, tmp_path_factory):
    """One member, trained without a break."""
    run = tmp_path_factory.mktemp("plain")
    assert run_cli("train", recipe, *data, *EPOCHS, "--run", run)[0] == 0
    return run


@pytest.fixture(scope="module")
def new_run(plain, tmp_path_factory):
    """Makes folders of runs whose data is audited."""

    def make():
        run = tmp_path_factory.mktemp("run")
        shutil.copy(artifacts.audit_path(plain), run)
        return run

    return make


@pytest.fixture(scope="module")
def folded(work, data, new_run):
    """Two members, trained with folds, and what was said."""
    run = new_run()
    code, out, err = run_cli("train-all", work / "recipes", *data, "--folds", 3, "--run", run)
    assert (code, err) == (0, "")
    return run, out


@pytest.fixture(scope="module")
def interrupted(recipe, data, new_run):
    """A run of which nothing but the unfinished training of a member is there."""
    run = new_run()
    path = artifacts.work_path(run, recipe.stem) / "fit" / "state.safetensors"
    kill(
        lambda: path.exists() and checkpoint.read(path)[1]["progress"]["step"] > 0, recipe, *data, *EPOCHS, "--run", run
    )
    assert not artifacts.members_path(run).exists()
    return run


@pytest.fixture
def broken(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def kill(when, *arguments, seconds=0.0):
    """SIGKILL a training that saves its state at every step, once `when` is true and `seconds` have gone."""
    command = [sys.executable, ROOT / "cli.py", "train", *arguments, "--save-every", "0"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not when() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(seconds)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def logits(run, name="tiny_convnext"):
    scores = artifacts.read_parquet(artifacts.member_path(run, name) / "heldout.parquet", "")
    return scores.set_index("id")["logit"].sort_index()


def largest_difference(one, other):
    one, other = logits(one), logits(other)
    common = one.index.intersection(other.index)
    assert len(common) >= 48
    return (one[common] - other[common]).abs().max()


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_recipes(folder, **texts):
    artifacts.ensure_folder(folder)
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text + ("" if "train:" in text else TRAIN) + IMAGE)
    return folder


def test_folds_score_every_row_once_by_weights_that_never_saw_it(folded):
    run, out = folded
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "").set_index("id")
    for name in ("tiny_convnext", "tiny_vit"):
        scores = artifacts.read_parquet(artifacts.member_path(run, name) / "heldout.parquet", "").set_index("id")
        assert sorted(scores.index) == sorted(frame.index)
        own = frame.loc[scores.index]
        assert scores["split"].equals(own["split"])
        assert scores["fold"].astype("Int16").equals(own["fold"])
        assert (scores["fold"].isna() == (scores["split"] == "heldout")).all()
        assert members.read_info(run, name)["folds"] == 3
    assert out.count("  fold 3/3, epoch 3/3: train loss ") == 2
    assert out.count("  refit, epoch ") >= 2


def test_the_refit_trains_as_long_as_the_folds_chose(folded):
    run, out = folded
    history = artifacts.read_json(artifacts.member_path(run, "tiny_convnext") / "history.json", "")
    *parts, refit = history["parts"]
    assert [part["title"] for part in parts] == ["fold 1/3", "fold 2/3", "fold 3/3"]
    assert refit["title"] == "refit"
    assert len(refit["epochs"]) == sorted(part["best"] for part in parts)[1]
    assert not any(line.endswith("best") for line in out.splitlines() if line.startswith("  refit"))


def test_folds_are_stacked_scored_exported_and_used(folded, work, tmp_path):
    run, _ = folded
    code, out, err = run_cli("stack", "--run", run)
    assert (code, err) == (0, "")
    assert out.startswith("On 48 held-out images in 4 groups; the stack fitted on other rows")
    assert read_stacker_values(artifacts.stacker_path(run), "")["fitted_rows"] == {"images": 48, "groups": 4}
    assert run_cli("export", "--run", run)[0] == 0
    target = {}
    for way in ((), ("--onnx",)):
        output = tmp_path / "submission.csv"
        assert run_cli("infer", "--run", run, "--input", work / "data" / "test.csv", "--output", output, *way)[0] == 0
        target[way] = read_csv(output)["target"].astype(float)
    assert len(target[()]) == 12
    np.testing.assert_allclose(target[()], target[("--onnx",)], atol=1e-5)


def test_a_member_has_its_curves_and_logs(folded):
    run, _ = folded
    picture = artifacts.member_path(run, "tiny_vit") / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    for part in ("fold-1", "fold-2", "fold-3", "refit"):
        assert len(list((run / "logs" / "tiny_vit" / part).glob("events.*"))) == 1


def test_members_with_and_without_folds_are_no_stack(folded, work, data, tmp_path):
    run = shutil.copytree(folded[0], tmp_path / "run")
    assert run_cli("train", work / "recipes" / "tiny_vit.yaml", *data, "--run", run)[0] == 0
    code, _, err = run_cli("stack", "--run", run)
    assert code == 2
    assert "different folds (tiny_convnext with 3, tiny_vit without); train them alike" in err
    code, _, err = run_cli("stack", "--run", run, "--members", "tiny_convnext")
    assert code == 2
    assert "member 'tiny_convnext' was trained on another data set or split" in err
    assert run_cli("stack", "--run", run, "--members", "tiny_vit")[0] == 0
    code, out, _ = run_cli("train-all", work / "recipes", *data, "--folds", 3, "--run", run)
    assert code == 0
    assert "[1/2] tiny_convnext: unchanged, not trained again" in out
    assert run_cli("stack", "--run", run)[0] == 0


def test_a_killed_epoch_goes_on_to_the_unbroken_result(broken, plain, folded, recipe, data):
    code, out, err = run_cli("train", recipe, *data, *EPOCHS, "--run", broken)
    assert (code, err) == (0, "")
    assert "[1/1] tiny_convnext: going on with its training on cpu" in out
    assert largest_difference(broken, plain) <= 1e-5
    assert largest_difference(broken, folded[0]) > 1e-3  # another training
    assert not artifacts.work_path(broken, recipe.stem).exists()


def test_a_killed_fold_goes_on_to_the_unbroken_result(new_run, folded, recipe, data):
    run, arguments = new_run(), (recipe, *data, "--folds", 3)
    work = artifacts.work_path(run, recipe.stem)
    kill((work / "fold-2" / "state.safetensors").exists, *arguments, "--run", run)
    assert (work / "fold-1" / "done.json").exists()
    code, out, err = run_cli("train", *arguments, "--run", run)
    assert (code, err) == (0, "")
    assert "[1/1] tiny_convnext: going on with its training on cpu" in out
    assert "fold 1/3" not in out
    assert len(logits(run)) == 96
    assert largest_difference(run, folded[0]) <= 1e-5


@pytest.mark.slow
def test_a_kill_at_any_moment_changes_nothing(new_run, folded, recipe, data):
    rng = np.random.default_rng(0)
    arguments = (recipe, *data, "--folds", 3)
    for _ in range(15):
        run = new_run()
        for _ in range(rng.integers(1, 3)):
            folder = artifacts.work_path(run, recipe.stem)
            kill((folder / "work.json").exists, *arguments, "--run", run, seconds=rng.uniform(0, 0.6))
        assert run_cli("train", *arguments, "--run", run)[0] == 0
        assert largest_difference(run, folded[0]) <= 1e-5


def test_a_changed_recipe_is_told_and_the_work_kept(broken, recipe, data):
    before = files(artifacts.work_path(broken, recipe.stem))
    changed = (recipe, *data, *EPOCHS, "--run", broken, "--set", "train.lr=1e-3", "--set", "train.clip=2")
    code, out, err = run_cli("train", *changed)
    assert code == 2
    assert err == (
        "Error: tiny_convnext: its training was interrupted, and since then train.lr 0.003 became 0.001, "
        "train.clip 1.0 became 2.0; set it back to go on, or add --fresh to train anew\n"
    )
    assert "training on" not in out
    assert files(artifacts.work_path(broken, recipe.stem)) == before
    code, out, _ = run_cli("train", *changed, "--fresh")
    assert code == 0
    assert "[1/1] tiny_convnext: training on cpu" in out
    assert members.read_info(broken, "tiny_convnext")["recipe"]["train"]["lr"] == 1e-3


def test_a_dry_run_tells_rows_steps_time_and_memory(work, data, tmp_path):
    run = tmp_path / "deep" / "run"
    code, out, err = run_cli("train-all", work / "recipes", *data, "--run", run, "--dry-run")
    assert (code, err) == (0, "")
    head, *rows = (line.split() for line in out.splitlines()[-5:-1])
    assert head == ["member", "rows", "steps", "time", "memory"]
    assert [row[:3] for row in rows[:2]] == [["tiny_convnext", "36", "9"], ["tiny_vit", "36", "9"]]
    assert all(row[-1] == "GiB" for row in rows[:2])
    assert rows[2][0] == "all"
    assert "nothing was trained or written" in out
    assert str(run) not in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_leaves_a_trained_run_as_it_is(plain, work, recipe, data):
    before = files(plain)
    code, out, _ = run_cli("train", recipe, *data, *EPOCHS, "--run", plain, "--dry-run", "--folds", 3)
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()[-3:-2]] == [["tiny_convnext", "36", "54"]]
    code, out, _ = run_cli("train-all", work / "recipes", *data, *EPOCHS, "--run", plain, "--dry-run")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[-4:-2]] == [
        ["tiny_convnext", "unchanged"],
        ["tiny_vit", "36"],
    ]
    assert files(plain) == before
    code, out, _ = run_cli("train", recipe, *data, *EPOCHS, "--run", plain)
    assert code == 0
    assert "unchanged, not trained again" in out


REFUSED = {
    "layer decay of an unknown family": (RESNET + DECAY, (),
        "bad: layer_decay is not known for resnet; known: beit, clip, convnext, convnextv2, "),
    "LoRA targets that match nothing": (CONVNEXT + "adapt: {mode: lora, targets: [query]}\n", (),
        "bad: adapt.targets match no layer: query; the layers that can be adapted end in: pwconv1, pwconv2"),
    "checkpointing of a family without it": (RESNET, ("--set", "train.checkpointing=true"),
        "bad: resnet has no checkpointing; remove train.checkpointing"),
    "another stride of a patch stem": (VIT.replace("{", "{stem_stride: 1, ", 1), (),
        "bad: vit_tiny_patch16_224 starts with patches that do not overlap; remove backbone.stem_stride"),
    "more folds than groups": (CONVNEXT, ("--folds", 9),
        "--folds 9: there are only 4 groups with ai images to train on; use --folds 4 or fewer, or add images"),
    "fp16 on a CPU": (CONVNEXT, ("--device", "cpu", "--set", "train.precision=fp16"),
        "train.precision fp16 needs a GPU; set it to "),
    "an unknown tracker": (CONVNEXT, ("--report-to", "tensorbord"),
        "no tracker 'tensorbord'; it is none, or some of: "),
}  # fmt: skip


@pytest.fixture(scope="module")
def scratch(new_run):
    return new_run()


def refused(run, folder, data, *options):
    """The one line on stderr; nothing was trained."""
    code, out, err = run_cli("train-all", folder, *data, "--run", run, *options)
    assert code == 2
    assert err.startswith("Error: ")
    assert err.endswith("\n")
    assert "training on" not in out
    assert not artifacts.members_path(run).exists()
    return err.removeprefix("Error: ").splitlines()


@pytest.mark.parametrize(("text", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_said_before_any_training(scratch, data, tmp_path, text, options, message):
    (line,) = refused(scratch, write_recipes(tmp_path, bad=text), data, *options)
    assert line.startswith(message)


def test_the_problems_of_all_recipes_come_together(scratch, data, tmp_path):
    texts = {"good": CONVNEXT, "one": RESNET + DECAY, "two": CONVNEXT + "adapt: {mode: lora, targets: [query]}\n"}
    lines = refused(scratch, write_recipes(tmp_path, **texts), data)
    assert [line.partition(":")[0] for line in lines] == ["one", "two"]
    assert refused(scratch, tmp_path, data, "--dry-run") == lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_said_before_the_data_is_read(scratch, recipe, data):
    (line,) = refused(scratch, recipe, data, "--device", "cuda")
    assert line == "no CUDA device was found by torch; use --device cpu, or check the driver"


def test_bf16_where_the_cpu_lacks_it_is_refused(scratch, recipe, data, monkeypatch):
    monkeypatch.setattr(precision, "BF16_ON_CPU", ())
    (line,) = refused(scratch, recipe, data, "--device", "cpu", "--set", "train.precision=bf16")
    assert line == "train.precision bf16: this CPU does not compute in bf16; set it to fp32, or auto"


def test_a_disk_that_is_too_small_is_said(scratch, recipe, data, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(free=2**20))
    (line,) = refused(scratch, recipe, data)
    assert line.startswith("training needs about 0.1 GiB on the disk of ")
    assert line.endswith("make room, or choose another --run")


def test_a_probe_and_adapters_are_members_like_others(new_run, work, data, tmp_path):
    run, folder = new_run(), tmp_path / "recipes"
    write_recipes(folder, lora=CONVNEXT + "adapt: {mode: lora, rank: 2}\n", probe=VIT + "adapt: {mode: probe}\n")
    code, out, err = run_cli("train-all", folder, *data, "--run", run, "--report-to", "none")
    assert (code, err) == (0, "")
    assert out.count("  epoch 1/1: train loss ") == 2
    assert not (run / "logs").exists()
    for name in ("lora", "probe"):
        network, info = transformers.AutoModelForImageClassification.from_pretrained(
            artifacts.member_path(run, name), output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert network.config.id2label == {0: "real", 1: "ai"}
    assert run_cli("stack", "--run", run)[0] == 0
    output = tmp_path / "scores.csv"
    arguments = ("--run", run, "--input", work / "data" / "test.csv", "--output", output, "--members")
    assert run_cli("infer", *arguments)[0] == 0
    assert list(pd.read_csv(output)) == ["id", "target", "lora", "probe"]
