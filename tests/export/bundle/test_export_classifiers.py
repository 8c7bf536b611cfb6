"""Bundles of classifiers fine-tuned elsewhere: two tiny checkpoints as the Hub stores them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, run_cli, write_csv
from pictures import encoded, noise
from small_members import small_member

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, BackboneError
from ensemble.core.metrics import auroc, sigmoid
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.images import decode, preprocess
from ensemble.models import backbone
from ensemble.models.classifier import read_classifiers
from ensemble.models.torch_runner import torch_runner
from ensemble.stacking.stacker import read_stacker_values
from export import Predictor
from export.bundle import bundle, convert, export
from export.bundle.fp16 import write_fp16
from export.bundle.int8 import write_int8
from export.bundle.low_precision_files import read_layers
from export.runtimes.runner import open_runner
from export.runtimes.settings import RuntimeConfig

OPS = ("MatMul", "Gemm", "LayerNormalization", "Softmax")
NAMES = {"vit": ("Human", "Fake"), "conv": ("AI", "photo")}  # in the order of the outputs


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A transformers ViT and one of timm whose logits are far enough apart to compare."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, (name, family) in enumerate({"vit": "vit", "conv": "timm/test_vit"}.items()):
        member = small_member(family, 32, seed)
        with torch.no_grad():
            for parameter in member.parameters():
                parameter.mul_(3)
        backbone.save_classifier(member, folder / name)
        relabel(folder / name, *NAMES[name])
    return folder


def relabel(folder, *names):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    if values["model_type"] == "timm_wrapper":
        values["label_names"] = list(names)
    values["id2label"] = {str(index): name for index, name in enumerate(names)}
    values["label2id"] = {name: index for index, name in enumerate(names)}
    path.write_text(json.dumps(values))


def members(checkpoints):
    return ["--member", f"a={checkpoints / 'vit'}", "--member", f"b={checkpoints / 'conv'}"]


@pytest.fixture(scope="module")
def made(checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "two"
    code, out, err = run_cli("export", *members(checkpoints), "--bundle", folder)
    assert (code, err) == (0, "")
    return folder, out


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "two")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """60 pictures; ai has less contrast. One cannot be read."""
    folder = tmp_path_factory.mktemp("labelled")
    for number in range(60):
        picture = noise(number) if number % 2 else noise(number).point(lambda value: 64 + value // 2)
        (folder / f"{number:02}.png").write_bytes(encoded(picture))
    (folder / "60.png").write_bytes(b"no image")
    labels = ["real" if number % 2 else "ai" for number in range(61)]
    return write_csv(folder / "some.csv", id=[f"{number:02}" for number in range(61)], label=labels)


def expected_logits(checkpoints, files):
    """Straight from the checkpoints: z(AI-made) - z(the other)."""
    preprocess_config = PreprocessConfig(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    pixels = np.concatenate([preprocess.to_pixels(decode.decode(file), preprocess_config) for file in files])
    columns = []
    for name, sign in (("vit", 1), ("conv", -1)):
        network, _ = backbone.load_classifier(checkpoints / name)
        member = backbone.Member(network, preprocess_config, positive=1)
        columns.append(sign * torch_runner(name, member, torch.device("cpu")).run(pixels))
    return np.stack(columns, axis=1)


def scores(folder, files):
    return Predictor.load(folder, device="cpu").predict(pd.DataFrame({"path": list(map(str, files))}))["target"]


def test_they_weigh_alike_and_ai_means_ai_whatever_the_order_of_labels(made, checkpoints, labelled):
    folder, out = made
    files = [labelled.parent / f"{number:02}.png" for number in range(6)]
    logits = expected_logits(checkpoints, files)
    assert np.abs(logits).max() > 0.05
    np.testing.assert_allclose(scores(folder, files), sigmoid(logits.mean(axis=1)), atol=1e-4)
    stacker = bundle.bundle_stacker(folder)
    assert (stacker.members, stacker.coef, stacker.method) == (("a", "b"), (0.5, 0.5), "mean")
    assert "in onnxruntime, " in out
    assert ", on 14 generated pictures" in out
    certificates = artifacts.read_json(folder / "certificate.json", "")["members"]
    assert certificates["a"]["checked_on"] == "14 generated pictures"
    assert certificates["a"]["fp32"]["onnxruntime"]["max_abs_difference"] <= 1e-3
    assert list(folder.parent.iterdir()) == [folder]  # no work is left


def test_operations_are_counted_a_multiply_add_as_two(made):
    entries = bundle.open_bundle(made[0])["members"]
    # 4 patches and a class token of 8 values, through two layers of attention and of 16 hidden values
    tokens, width, hidden = 5, 8, 16
    patches, head = 4 * 3 * 16 * 16 * width, width * 2
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
    assert entries["a"]["gflop"] == pytest.approx(2 * (patches + 2 * layer + head) / 1e9, rel=1e-6)
    assert entries["b"]["gflop"] > 0


def test_no_file_names_a_folder_of_the_machine_that_exported_it(made, tmp_path):
    exported = made[0] / "members" / "a.fp32.onnx"
    lower = {kind: tmp_path / f"{kind}.onnx" for kind in ("fp16", "int8", "int8-symmetric")}
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    write_fp16(exported, lower["fp16"])
    write_int8(exported, lower["int8"], pixels)
    write_int8(exported, lower["int8-symmetric"], pixels, symmetric=True)
    for file in (exported, *lower.values()):
        for folder in (ROOT, Path(torch.__file__).parents[1], made[0].parent, tmp_path):
            assert str(folder).encode() not in file.read_bytes()
    assert any(layer.name.startswith("backbone.") for layer in read_layers(exported))


@pytest.fixture
def converting(made, monkeypatch):
    """Converting is copying what was converted before: the same weights, in no time."""
    monkeypatch.setattr(convert, "convert", lambda member, path: shutil.copyfile(made[0] / "members" / path.name, path))


def test_the_same_again_converts_nothing_and_a_changed_checkpoint_only_itself(copy, checkpoints, tmp_path, converting):
    other = shutil.copytree(checkpoints, tmp_path / "checkpoints")
    (other / "conv" / "config.json").write_text((other / "conv" / "config.json").read_text() + "\n")
    code, out, _ = run_cli("export", *members(other), "--bundle", copy)
    assert code == 0
    assert "a: unchanged, taken over" in out
    assert "b: converting" in out
    assert run_cli("export", *members(other), "--bundle", copy)[1].count("unchanged, taken over") == 2
    assert run_cli("export", *members(other), "--bundle", copy, "--force")[1].count("converting") == 2


def test_a_file_whose_logits_are_others_is_not_kept(checkpoints, tmp_path, made, monkeypatch):
    monkeypatch.setattr(convert, "convert", lambda member, path: shutil.copyfile(made[0] / "members/b.fp32.onnx", path))
    code, _, err = run_cli("export", *members(checkpoints), "--bundle", tmp_path / "two")
    assert code == 2
    assert err.startswith("Error: a in onnxruntime: the exported file's logits differ from the member's by ")
    assert not (tmp_path / "two").exists()


def test_what_was_finished_before_a_kill_is_kept(checkpoints, tmp_path, monkeypatch, converting):
    real = convert.convert

    def dies_on_the_second(member, path):
        if path.name.startswith("b."):
            raise KeyboardInterrupt
        real(member, path)

    monkeypatch.setattr(convert, "convert", dies_on_the_second)
    folder = tmp_path / "deep" / "two"
    assert run_cli("export", *members(checkpoints), "--bundle", folder)[0] != 0
    assert not folder.exists()
    monkeypatch.setattr(convert, "convert", real)
    folder.mkdir()  # an empty folder becomes the bundle
    code, out, _ = run_cli("export", *members(checkpoints), "--bundle", folder)
    assert code == 0
    assert "a: unchanged, taken over" in out
    assert list(folder.parent.iterdir()) == [folder]


def test_a_stack_is_fitted_on_labelled_images_and_scored_out_of_fold(copy, checkpoints, labelled):
    code, out, err = run_cli("export", *members(checkpoints), "--bundle", copy, "--stack-on", labelled)
    assert (code, err) == (0, "")
    assert out.count("unchanged, taken over") == 2
    assert "1 of 61 images could not be read and were left out of the stack" in out
    assert "Scoring 60 images by 2 members at fp32" in out
    assert "On 60 held-out images in 60 groups; the stack out of fold" in out
    files = [labelled.parent / f"{number:02}.png" for number in range(60)]
    logits, labels = expected_logits(checkpoints, files), np.arange(60) % 2 == 0
    stored = read_stacker_values(copy / "stacker.json", "")
    assert stored["kind"] == "logistic"
    assert stored["threshold_rule"] == "balanced_accuracy"
    assert stored["scores"]["a"]["auroc"]["value"] == pytest.approx(auroc(labels, logits[:, 0]), abs=1e-3)
    np.testing.assert_allclose(scores(copy, files), bundle.bundle_stacker(copy).target(logits), atol=1e-3)
    # what a cascade is fitted on goes into the bundle, stays when it is certified anew, and goes with the stack
    rows = pd.read_parquet(copy / "heldout.parquet")
    assert sorted(rows["label"]) == sorted(labels.astype(int))
    assert rows["group"].nunique() == 60
    np.testing.assert_allclose(np.sort(rows["logit a"]), np.sort(logits[:, 0]), atol=1e-3)
    assert run_cli("export", "--bundle", copy, "--certify-on", labelled)[0] == 0
    pd.testing.assert_frame_equal(pd.read_parquet(copy / "heldout.parquet"), rows)
    assert run_cli("export", *members(checkpoints), "--bundle", copy)[0] == 0
    assert not (copy / "heldout.parquet").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: relabel(folder, "one", "two"), "cannot tell which of one, two means AI-made; name it with --p"),
        (lambda folder: relabel(folder, "ai", "real", "art"), "two classes are needed, found 3: ai, art, real"),
        (lambda folder: (folder / "config.json").unlink(), "is no image classifier: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json cannot be used"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"?"), "cannot be loaded"),
        (lambda folder: shutil.rmtree(folder), "nor a model on the Hub, which is written USER/REPO"),
    ],
)
def test_what_is_no_two_class_classifier_is_refused_in_one_line(checkpoints, tmp_path, change, message):
    folder = shutil.copytree(checkpoints / "vit", tmp_path / "broken")
    change(folder)
    code, _, err = run_cli("export", "--member", f"a={folder}", "--bundle", tmp_path / "two")
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert str(folder) in err
    assert not (tmp_path / "two").exists()


def test_the_positive_class_can_be_named(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "vit", tmp_path / "silent")
    relabel(folder, "LABEL_0", "LABEL_1")
    # one whose own names say enough needs no class of that name
    both = {"silent": folder, "clear": checkpoints / "conv"}
    for name, positive in (("label_0", 0), ("LABEL_1", 1)):
        assert [found.positive for found in read_classifiers(both, name)] == [positive, 0]
    with pytest.raises(BackboneError, match="no class is called 'lable_1'; the classes are AI, photo"):
        read_classifiers({"clear": checkpoints / "conv"}, "lable_1")
    assert read_classifiers({"clear": checkpoints / "conv"}, "photo")[0].positive == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--member", "a=x"], "say where with --bundle DIR"),
        (["--member", "a=x", "--member", "a=y", "--bundle", "z"], "'a' is given more than once"),
        (["--member", "target=x", "--bundle", "z"], "'target' cannot be a member's name"),
        (["--member", "x", "--bundle", "z"], "'x': write NAME=FOLDER or NAME=USER/REPO"),
    ],
)
def test_wrong_use_is_told_before_anything_is_loaded(arguments, message):
    code, _, err = run_cli("export", *arguments)
    assert code == 2
    assert message in err


def test_a_folder_that_is_no_bundle_is_left_alone(checkpoints, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="is there and is no bundle; name a new folder with --bundle"):
        export.export_classifiers({"a": str(checkpoints / "vit")}, tmp_path / "mine", print)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_half_precision_keeps_types_of_pixels_and_logits_and_what_overflows(made, checkpoints, labelled, tmp_path):
    """The CUDA provider's file, run by the CPU's: its arithmetic on a GPU is for the certificate there."""
    import onnx

    files = [labelled.parent / f"{number:02}.png" for number in range(8)]
    preprocess_config = PreprocessConfig(size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    pixels = np.concatenate([preprocess.to_pixels(decode.decode(file), preprocess_config) for file in files])
    expected = expected_logits(checkpoints, files)
    for column, name in enumerate("ab"):
        source, target = made[0] / "members" / f"{name}.fp32.onnx", tmp_path / f"{name}.fp16.onnx"
        write_fp16(source, target)
        assert target.stat().st_size < source.stat().st_size
        logits = open_runner(name, target, preprocess_config, RuntimeConfig("onnxruntime")).run(pixels)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected[:, column], atol=0.01 * np.abs(expected[:, column]).max())
        assert not np.array_equal(logits, expected[:, column].astype(np.float32))
        graph = onnx.load(target).graph
        casts = {node.output[0]: node.attribute[0].i for node in graph.node if node.op_type == "Cast"}
        read = {kind: {casts.get(node.input[0]) for node in graph.node if node.op_type == kind} for kind in OPS}
        fp32 = onnx.TensorProto.FLOAT
        assert read["LayerNormalization"] == read["Softmax"] == {fp32}
        assert read["MatMul"] | read["Gemm"]
        assert fp32 not in read["MatMul"] | read["Gemm"]
