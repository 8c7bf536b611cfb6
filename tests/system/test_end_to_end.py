"""The whole job through the command line, on tiles of real photographs, with two tiny members."""

import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import run_cli
from small_job import HOSTILE, ROOT, SHARES, TINY, manyeyes


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def called(*arguments, code=0):
    """As `manyeyes`, in this process: a new one takes seconds to load torch."""
    found, out, err = run_cli(*arguments)
    assert found == code, out + err
    return SimpleNamespace(stdout=out, stderr=err)


def infer(work, run, output, *arguments, command=called):
    done = command("infer", "--input", work / "data" / "test.csv", "--run", run, "--output", output, *arguments)
    return done, pd.read_csv(output, dtype={"id": str}, keep_default_na=False, na_values={"target": [""]})


def test_run_folder_holds_what_the_design_says(run):
    assert sorted(p.name for p in run.iterdir() if p.name != "work") == [
        "audit.json",
        "bundle",
        "dataset.parquet",
        "logs",
        "members",
        "stacker.json",
    ]
    assert {p.name for p in (run / "members" / "tiny_convnext").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "curves.png",
        "heldout.parquet",
        "history.json",
        "member.json",
    }
    assert {p.relative_to(run / "bundle").as_posix() for p in (run / "bundle").rglob("*") if p.is_file()} == {
        "bundle.json",
        "stacker.json",
        "certificate.json",
        "heldout.parquet",
        "members/tiny_convnext.fp32.onnx",
        "members/tiny_vit.fp32.onnx",
    }
    frame = pd.read_parquet(run / "dataset.parquet")
    assert (frame.groupby("group")["split"].nunique() == 1).all()
    held = pd.read_parquet(run / "members" / "tiny_vit" / "heldout.parquet")
    assert list(held.columns) == ["id", "label", "split", "fold", "logit"]
    assert set(held["id"]) == set(frame.loc[frame["split"] == "heldout", "id"])
    assert held["logit"].dtype == np.float32
    for path in run.rglob("*.json"):
        if path.name not in {"config.json", "preprocessor_config.json"}:
            version = 2 if path.name == "stacker.json" else 1
            assert json.loads(path.read_text())["format_version"] == version, path


def test_members_see_the_difference(run):
    held = pd.read_parquet(run / "members" / "tiny_convnext" / "heldout.parquet")
    ai, real = (held.loc[held["label"] == label, "logit"].mean() for label in (1, 0))
    assert ai > real


def test_members_open_with_from_pretrained(run):
    import transformers

    for name in TINY:
        network = transformers.AutoModelForImageClassification.from_pretrained(run / "members" / name)
        assert network.config.id2label == {0: "real", 1: "ai"}


def test_onnx_and_torch_agree_and_keep_ids_and_order(work, run, tmp_path):
    _, onnx = infer(work, run, tmp_path / "onnx.csv", "--onnx", "--members", command=manyeyes)
    _, torch = infer(work, run, tmp_path / "torch.csv", command=manyeyes)
    assert list(onnx.columns) == ["id", "target", "tiny_convnext", "tiny_vit"]
    assert list(torch.columns) == ["id", "target"]
    assert list(onnx["id"]) == HOSTILE + [f"t{number}" for number in range(9)]
    np.testing.assert_allclose(onnx["target"], torch["target"], atol=1e-4)
    assert onnx["target"].between(0, 1).all()
    assert onnx["target"].nunique() > 1


def test_folder_input_has_relative_paths_as_ids(work, run, tmp_path):
    called("infer", "--onnx", "--input", work / "data" / "images", "--run", run, "--output", tmp_path / "out.csv")
    ids = pd.read_csv(tmp_path / "out.csv", dtype=str)["id"]
    assert sorted(ids) == list(ids)
    assert "a b,c.png" in set(ids)


def test_unreadable_image_is_listed_and_the_others_scored(work, run, tmp_path):
    data = shutil.copytree(work / "data", tmp_path / "data")
    (data / "images" / "t3.png").write_bytes((data / "images" / "t3.png").read_bytes()[:200])
    arguments = ("--input", data / "test.csv", "--run", run, "--onnx")
    done = manyeyes("infer", *arguments, "--output", tmp_path / "out.csv", code=1)
    assert "1 images could not be read" in done.stderr
    frame = pd.read_csv(tmp_path / "out.csv", dtype={"id": str})
    assert list(frame.loc[frame["target"].isna(), "id"]) == ["t3"]
    errors = pd.read_csv(tmp_path / "out.errors.csv")
    assert list(errors["id"]) == ["t3"]
    assert "t3.png" in errors["error"][0]
    called("infer", *arguments, "--output", tmp_path / "filled.csv", "--fill", "0.5", code=1)
    filled = pd.read_csv(tmp_path / "filled.csv", dtype={"id": str})
    assert filled.set_index("id")["target"]["t3"] == 0.5
    for path in (data / "images").iterdir():
        path.write_bytes(b"not an image")
    called("infer", *arguments, "--output", tmp_path / "none.csv", code=2)


def train_again(work, run, recipes, *arguments, code=0):
    data = ("--data", work / "data" / "train.csv", "--group-column", "photo")
    return called("train-all", recipes, *data, *SHARES, "--run", run, *arguments, code=code)


def test_second_run_trains_nothing_and_a_changed_recipe_only_its_member(work, copy, tmp_path):
    done = train_again(work, copy, work / "recipes")
    assert done.stdout.count("unchanged, not trained again") == 2
    recipes = shutil.copytree(work / "recipes", tmp_path / "recipes")
    text = (recipes / "tiny_vit.yaml").read_text()
    (recipes / "tiny_vit.yaml").write_text("# a comment changes nothing\n" + text)
    assert train_again(work, copy, recipes).stdout.count("unchanged, not trained again") == 2
    (recipes / "tiny_vit.yaml").write_text(text.replace("epochs: 3", "epochs: 1"))
    done = train_again(work, copy, recipes)
    assert "tiny_convnext: unchanged" in done.stdout
    assert "tiny_vit: training" in done.stdout
    stale = called("infer", "--input", work / "data" / "test.csv", "--run", copy, "--onnx", code=2)
    assert "changed since the stack was fitted" in stale.stderr
    called("stack", "--run", copy)
    done, _ = infer(work, copy, tmp_path / "out.csv", "--onnx")
    assert "exporting first" in done.stdout
    assert "tiny_convnext: unchanged, taken over" in done.stdout
    assert "tiny_vit: largest difference" in done.stdout


def test_new_threshold_exports_no_member_again(work, copy, tmp_path):
    values = json.loads((copy / "stacker.json").read_text())
    (copy / "stacker.json").write_text(json.dumps({**values, "threshold": 0.7}))
    done, _ = infer(work, copy, tmp_path / "out.csv", "--onnx")
    assert done.stdout.count("unchanged, taken over") == 2
    assert json.loads((copy / "bundle" / "stacker.json").read_text())["threshold"] == 0.7


def test_a_network_that_cannot_be_built_is_told_before_any_is_trained(work, tmp_path):
    recipes = shutil.copytree(work / "recipes", tmp_path / "recipes")
    bad = "backbone: {architecture: convnext, config: {no_such_setting_depths: 1, depths: [1]}}\n"
    (recipes / "broken.yaml").write_text(bad + "train: {lr: 1.0e-3, epochs: 1, batch_size: 16}\n")
    run = tmp_path / "run"
    done = train_again(work, run, recipes, "--set", "train.epochs=1", code=2)
    assert done.stderr.startswith("Error: broken: convnext cannot be built: ")
    assert not (run / "members").exists()


def test_one_changed_byte_in_the_bundle_is_found(work, copy, tmp_path):
    path = copy / "bundle" / "members" / "tiny_vit.fp32.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = called("infer", "--input", work / "data" / "test.csv", "--run", copy, "--onnx", code=2)
    assert "tiny_vit.fp32.onnx is damaged" in done.stderr
    assert "export --force" in done.stderr
    called("export", "--run", copy, "--force")
    infer(work, copy, tmp_path / "out.csv", "--onnx")


def test_bundle_scores_alone_and_predictor_keeps_rows_and_index(work, run, tmp_path):
    from export import Predictor

    _, expected = infer(work, run, tmp_path / "out.csv", "--onnx")
    bundle = shutil.copytree(run / "bundle", tmp_path / "elsewhere")
    frame = expected[["id"]].iloc[::-1]
    for source in (bundle, run):
        predictor = Predictor.load(source)
        scored = predictor.predict(frame, images=work / "data" / "images")
        assert list(scored.index) == list(frame.index)
        np.testing.assert_allclose(scored["target"], expected["target"][::-1], atol=1e-6)
        assert predictor.device in {"cpu", "cuda"}
        assert predictor.to("cpu").device == "cpu"
        assert predictor.errors.empty


def test_predictor_takes_any_two_class_classifier_by_its_label_names(work, run, tmp_path):
    from ensemble.core.errors import BackboneError
    from export import Predictor

    frame = pd.DataFrame({"path": [str(path) for path in sorted((work / "data" / "images").iterdir())]})
    alone = Predictor.load(run / "members" / "tiny_convnext").predict(frame)["target"]
    reversed_labels = shutil.copytree(run / "members" / "tiny_convnext", tmp_path / "reversed")
    config = json.loads((reversed_labels / "config.json").read_text())
    config |= {"id2label": {"0": "Fake", "1": "Human"}, "label2id": {"Fake": 0, "Human": 1}}
    (reversed_labels / "config.json").write_text(json.dumps(config))
    turned = Predictor.load(reversed_labels).predict(frame)["target"]
    np.testing.assert_allclose(turned, 1 - alone, atol=1e-6)

    config |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    (reversed_labels / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="cannot tell which of LABEL_0, LABEL_1"):
        Predictor.load(reversed_labels)
    named = Predictor.load(reversed_labels, positive="LABEL_1").predict(frame)["target"]
    np.testing.assert_allclose(named, alone, atol=1e-6)


def test_bare_name_never_reaches_the_network():
    from ensemble.core.errors import BackboneError
    from export import Predictor

    with pytest.raises(BackboneError, match="for a model on the Hub write hf:"):
        Predictor.load("some/detector")


def test_same_seed_gives_the_same_member(work, run, tmp_path):
    again = tmp_path / "again"
    train_again(work, again, work / "recipes" / "tiny_vit.yaml")
    first, second = (
        pd.read_parquet(folder / "members" / "tiny_vit" / "heldout.parquet")["logit"] for folder in (run, again)
    )
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_killed_training_goes_on_with_what_is_finished(work, tmp_path):
    run = tmp_path / "run"
    command = ["train-all", work / "recipes", "--data", work / "data" / "train.csv", "--group-column", "photo"]
    arguments = [*map(str, command), *SHARES, "--run", str(run)]
    with subprocess.Popen([sys.executable, str(ROOT / "cli.py"), *arguments], stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (run / "members" / "tiny_convnext" / "member.json").is_file():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not (run / "members" / "tiny_vit").exists()
    done = manyeyes(*arguments)
    assert "tiny_convnext: unchanged" in done.stdout
    assert "tiny_vit: training" in done.stdout
    assert sorted(p.name for p in (run / "members").iterdir()) == sorted(TINY)


def test_export_that_fails_keeps_the_older_bundle_and_what_was_converted(copy, monkeypatch):
    from ensemble.core.errors import ArtifactError
    from export.bundle import convert as converting
    from export.bundle import export

    before = (copy / "bundle" / "bundle.json").read_bytes()
    convert = converting.convert
    converted = []

    def fails_on_the_second(member, path):
        if converted:
            raise ArtifactError("no space left")
        converted.append(path)
        convert(member, path)

    monkeypatch.setattr(converting, "convert", fails_on_the_second)
    monkeypatch.setattr(export.bundle, "CONVERTER_VERSION", export.bundle.CONVERTER_VERSION + 1)
    with pytest.raises(ArtifactError, match="no space left"):
        export.export_run(copy, print)
    assert (copy / "bundle" / "bundle.json").read_bytes() == before
    monkeypatch.setattr(converting, "convert", convert)
    said = []
    export.export_run(copy, said.append)
    assert said[0] == "tiny_convnext: unchanged, taken over"
    assert said[1] == "tiny_vit: converting"
    assert said[2].startswith("tiny_vit: largest difference of a logit ")


def test_the_audit_page_takes_a_run_for_its_swap_test(work, run, tmp_path):
    page = tmp_path / "audit.html"
    data = (work / "data" / "train.csv", "--group-column", "photo")
    done = called("audit", *data, "--html", page, "--run", run)
    assert "no shortcut found" in done.stdout
    assert "Scored by the mean logit of tiny_convnext, tiny_vit." in page.read_text(encoding="utf-8")
