import json
import shutil

import numpy as np
import pandas as pd
import pytest
from helpers import SCALES, change_json, exported_run, run_cli, write_bundle, write_csv, write_image, write_stacker
from pictures import HOSTILE_NAMES
from small_members import small_member

from ensemble.core import artifacts, metrics
from ensemble.core.metrics import sigmoid
from ensemble.data.dataset import dataset_sha256
from ensemble.models import external
from ensemble.stacking.stacker import Stacker

VALUES = [10, 120, 60, 200, 110, 160, 90, 240, 150, 100, 30, 130]  # brightness; the odd ones are ai
IDS = [*HOSTILE_NAMES, "x", "y"]
GENERATORS = ["none", "gan", "none", "diffusion"] * 3


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def run(exported, tmp_path):
    """A run whose rows name generators, with images and photos.csv beside it."""
    shutil.copytree(exported, tmp_path / "run")
    path = artifacts.dataset_path(tmp_path / "run")
    frame = pd.read_parquet(path)
    kinds = np.where(frame.index % 4 == 1, "gan", "diffusion")
    artifacts.write_parquet(path, frame.assign(generator=np.where(frame["label"] == 1, kinds, "none")))
    for number, value in enumerate(VALUES):
        write_image(tmp_path / "images" / f"{number}.png", value)
    write_csv(
        tmp_path / "photos.csv",
        id=IDS,
        path=[f"images/{number}.png" for number in range(12)],
        label=[str(number % 2) for number in range(12)],
        group=[f"p{number // 4}" for number in range(12)],
        generator=GENERATORS,
    )
    return tmp_path / "run"


def evaluate(run, *options, data=None):
    return run_cli("evaluate", "--data", data or run.parent / "photos.csv", "--run", run, "--onnx", *options)


def record_of(run, name="photos"):
    return artifacts.read_json(artifacts.evaluation_path(run, name) / "evaluation.json", "")


def ok(done):
    assert (done[0], done[2]) == (0, ""), done[1] + done[2]
    return done[1]


def test_data_are_scored_printed_and_written(run):
    out = ok(evaluate(run, "--name", "first"))
    frame = pd.read_parquet(artifacts.evaluation_path(run, "first") / "scores.parquet")
    assert len(frame) == 7 * 12
    clean = frame[frame["cell"] == "clean"].set_index("id").loc[IDS]
    bright = np.array(VALUES) / 255 - 0.5
    for name, scale in SCALES.items():
        np.testing.assert_allclose(clean[f"logit:{name}"], scale * bright, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(clean["logit"], 0.1 + 1.5 * bright, rtol=1e-4)
    record = record_of(run, "first")
    auroc = metrics.auroc(clean["label"].to_numpy(), sigmoid(clean["logit"].to_numpy()))
    assert record["cells"]["clean"]["auroc"]["value"] == pytest.approx(auroc)
    assert record["rows"] == {"images": 12, "real": 6, "ai": 6, "groups": 3, "unreadable": []}
    assert (record["track"], record["stacker"]["threshold"], record["trained"]) == ("inductive", 0.5, 0)
    assert f"AUROC {auroc:.4f}" in out
    assert "12 images in 7 cells make 84" in out
    assert "the full grid of 31 cells" in out
    assert f"the worst degradation is {record['worst']['cell']!r}" in out
    assert "by generator, each against all reals" in out
    headlines = [line for line in out.splitlines() if line.startswith("first,")]
    assert len(headlines) == 3
    assert all(line.startswith("first, inductive track") for line in headlines)


def test_the_same_command_again_scores_nothing_anew_and_says_the_same(run):
    first, again = ok(evaluate(run)), ok(evaluate(run))
    assert "make 84 (84 are scored already)" in again
    assert first.partition("\n\n")[2] == again.partition("\n\n")[2]


def test_cells_by_name_and_a_limit(run):
    ok(evaluate(run, "--cells", "blur 2,jpeg 30", "--limit", "5"))
    record = record_of(run, "photos-5")
    assert list(record["cells"]) == ["clean", "blur 2", "jpeg 30"]
    assert record["rows"]["images"] == 5
    assert abs(record["rows"]["real"] - record["rows"]["ai"]) == 1


def test_a_generator_left_out_is_told_from_training_without_it(run):
    out = ok(evaluate(run, "--grid", "none", "--leave-out", "generator"))
    lines = {line["generator"]: line for line in record_of(run)["leave_out"]}
    assert {name: (line["images"], line["rows"] > 0, line["known"]) for name, line in lines.items()} == {
        "gan": (3, True, True),
        "diffusion": (3, True, True),
    }
    assert lines["gan"]["without"]["value"] is not None
    assert "AT THE STACKER ONLY; the members were trained" in out
    assert f"--hold-out generator=gan --run {run}-without-gan" in out


def test_generators_are_asked_for_before_anything_is_scored(run):
    data = write_csv(run.parent / "t.csv", path=["images/0.png", "images/1.png"], label=["0", "1"])
    code, out, err = evaluate(run, "--leave-out", "generator", data=data)
    assert code == 2
    assert "the images name no generators" in err
    assert "cells" not in out


def test_a_stress_set_of_one_class(run, tmp_path):
    data = write_csv(tmp_path / "reals.csv", path=[f"images/{number}.png" for number in range(12)], label=["real"] * 12)
    code, _, err = evaluate(run, data=data)
    assert code == 2
    assert "all images are real" in err
    assert "--stress" in err
    out = ok(evaluate(run, "--stress", "--grid", "none", data=data))
    wrong = np.mean(sigmoid(0.1 + 1.5 * (np.array(VALUES) / 255 - 0.5)) >= 0.5)
    assert f"FPR: reals called ai, at the frozen threshold 0.5: {wrong:.4f} [" in out
    assert "AUROC" not in out
    assert "balanced accuracy" not in out
    code, _, err = evaluate(run, "--stress")
    assert code == 2
    assert "these are of both" in err


def test_unreadable_images_are_listed_and_the_exit_code_says_so(run):
    (run.parent / "images" / "3.png").write_bytes(b"")
    code, out, err = evaluate(run, "--grid", "none")
    assert code == 1
    assert "11 images (6 real, 5 ai), in 3 groups" in out
    assert "1 images could not be read" in err
    assert "3.png: the file is empty" in err
    assert [line["id"] for line in record_of(run)["rows"]["unreadable"]] == [IDS[3]]


def trained_on(run, number):
    path = artifacts.dataset_path(run)
    frame = pd.read_parquet(path)
    frame.loc[0, "sha256"] = artifacts.file_sha256(run.parent / "images" / f"{number}.png")
    artifacts.write_parquet(path, frame)
    for name in SCALES:
        change_json(artifacts.member_path(run, name) / "member.json", data_sha256=dataset_sha256(frame))
    write_stacker(run)
    write_bundle(run)


def test_the_runs_own_images_are_no_test(run):
    trained_on(run, 5)
    code, _, err = evaluate(run)
    assert code == 2
    assert err.count("\n") == 1 + IDS[5].count("\n")
    assert f"1 of 12 images were in this run's training, so scores on them are no test ({IDS[5]})" in err
    out = ok(evaluate(run, "--grid", "none", "--allow-trained"))
    assert "1 of these images were in the run's own training: THIS IS NO TEST." in out
    assert record_of(run)["trained"] == 1


def select_record(run, test):
    folder = run.parent / "selected"
    artifacts.write_json(folder / "selection.json", {"test": str(test)})
    write_csv(folder / "selection.csv", id=["a"], test_id=["elsewhere"])
    path = artifacts.dataset_path(run)
    artifacts.write_parquet(path, pd.read_parquet(path).assign(root=str(folder)))


def test_a_test_that_training_was_selected_for_is_transductive(run):
    select_record(run, run.parent / "images")
    code, _, err = evaluate(run)
    assert code == 2
    assert "selected to resemble these very images" in err
    assert "--track transductive" in err
    out = ok(evaluate(run, "--track", "transductive"))
    assert "photos-transductive, transductive track: 12 images" in out
    assert ", inductive track" not in out
    assert record_of(run, "photos-transductive")["track"] == "transductive"


def test_selection_for_another_test_leaves_the_track_inductive(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    select_record(run, tmp_path / "elsewhere")
    assert "photos, inductive track" in ok(evaluate(run, "--grid", "none"))


def test_a_benchmark_is_recognised_and_scored_by_source(run, tmp_path):
    for generator in ("Midjourney", "ADM"):
        for number, value in enumerate(VALUES):
            kind = "ai" if number % 2 else "nature"
            write_image(tmp_path / "GenImage" / generator / "val" / kind / f"{number}.png", value)
    out = ok(evaluate(run, "--grid", "none", data=tmp_path / "GenImage"))
    assert "recognised as GenImage" in out
    assert {part["name"] for part in record_of(run, "GenImage")["by_source"]} == {"Midjourney", "ADM"}
    assert "24 images (12 real, 12 ai), each a group of its own" in out


def test_a_bundle_alone_needs_an_output_and_says_what_is_not_known(run, tmp_path):
    arguments = ["evaluate", "--data", tmp_path / "photos.csv", "--model", run / "bundle", "--grid", "none"]
    code, _, err = run_cli(*arguments)
    assert code == 2
    assert "--output" in err
    out = ok(run_cli(*arguments, "--output", tmp_path / "out"))
    assert "is not known here" in out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]["images"] == 12


def test_a_classifiers_folder_is_scored_by_its_own_threshold(run, tmp_path):
    member = small_member("resnet")
    member.backbone.save_pretrained(tmp_path / "tiny")
    artifacts.write_json(tmp_path / "tiny" / "member.json", {"contract": member.preprocess_config.to_dict()})
    places = ["--data", tmp_path / "photos.csv", "--model", tmp_path / "tiny", "--output", tmp_path / "out"]
    out = ok(run_cli("evaluate", *places, "--grid", "none", "--device", "cpu"))
    assert ", by tiny; threshold 0.5" in out
    frame = pd.read_parquet(tmp_path / "out" / "scores.parquet")
    np.testing.assert_allclose(frame["logit"], frame["logit:tiny"])


def test_a_member_known_by_its_scores_alone_is_refused(run):
    scores = pd.Series([0.0], index=["a"])
    external.write_external(run, external.External("clip", scores, scores))
    write_stacker(run, Stacker(("one", "two", "clip"), (1.0, 1.0, 1.0), 0.0))
    code, _, err = evaluate(run)
    assert code == 2
    assert "clip was trained elsewhere and only its scores are known" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cells", "jpg 5"], "no cell is called 'jpg 5'; did you mean"),
        (["--data", "nowhere"], "no data at nowhere"),
        (["--run", "nowhere"], "nowhere"),
        (["--limit", "1"], "--limit"),
        (["--leave-out", "source"], "--leave-out"),
        (["--stress", "--leave-out", "generator"], "--stress is for images of one class"),
    ],
)
def test_wrong_use_is_one_line(run, options, message):
    code, _, err = evaluate(run, *options)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["images/0.png"]}, "needs a column label"),
        ({"path": ["images/0.png"], "label": ["1"]}, "all images are ai"),
        ({"path": [], "label": []}, "has no rows"),
    ],
)
def test_data_that_cannot_be_judged_are_refused(run, tmp_path, columns, message):
    code, _, err = evaluate(run, data=write_csv(tmp_path / "t.csv", **columns))
    assert code == 2
    assert message in err
    assert not (run / "evaluations").exists()


def test_a_run_without_a_stacker_or_with_an_old_bundle_says_what_to_run(run):
    shutil.rmtree(run / "bundle")
    assert "python cli.py export --run" in evaluate(run)[2]
    artifacts.stacker_path(run).unlink()
    assert "python cli.py stack --run" in evaluate(run)[2]
