"""int8 members of a run of two small networks: a channel with a huge range takes the decisive ones with it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import PREPROCESS_CONFIG, run_cli
from small_nets import LAYERS, PIXELS, write_image_run, write_network

from ensemble.core import artifacts
from ensemble.data import dataset
from ensemble.images import decode as images
from ensemble.models.runner import Runner
from export.bundle import allowed_precisions, bundle, check_images, int8, low_precision_files
from export.bundle.int8 import write_int8
from export.bundle.low_precision_files import Layer, fewest_layers, read_layers
from export.runtimes import autotune, devices, libraries
from export.runtimes.runner import open_runner
from export.runtimes.settings import RuntimeConfig

if not allowed_precisions.runnable_configs(("int8",)):
    pytest.skip("this CPU has no instructions for int8", allow_module_level=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Its members: one that int8 does no harm, and two, which it breaks."""
    folder = tmp_path_factory.mktemp("int8") / "run"
    write_image_run(folder, {"one": 1.0, "two": 1000.0})
    return folder


@pytest.fixture(autouse=True)
def short_timings(monkeypatch):
    monkeypatch.setattr(autotune, "MIN_TIMING_SECONDS", 0.0)


@pytest.fixture
def copy(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(run, tmp_path / "run")


def export(run, *arguments):
    code, out, err = run_cli("export", "--run", run, *arguments)
    assert (code, err) == (0, "")
    folder = artifacts.bundle_path(run)
    return out, bundle.open_bundle(folder), artifacts.read_json(folder / "certificate.json", "")["precisions"]


def int8_members(values):
    return {
        runtime: set(may)
        for (runtime, precision), may in bundle.certified_precisions(values).items()
        if precision == "int8"
    }


@dataclass
class Exported:
    """A run whose int8 files were made, what `export` gave, and the files that were read before certifying and then."""

    run: Path
    out: str
    values: dict
    certificates: dict
    before_certifying: list
    certifying: list


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder, read, certifying = tmp_path_factory.mktemp("exported"), [], []
    decode, certify = images.decode, allowed_precisions.certify
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYEYES_CACHE", str(folder / "cache"))
        patch.setattr(autotune, "MIN_TIMING_SECONDS", 0.0)
        copy = shutil.copytree(run, folder / "run")
        out, values, _ = export(copy)
        assert int8_members(values) == {}
        assert "quantizing" not in out
        patch.setenv("MANYEYES_CACHE", str(folder / "another cache"))
        patch.setattr(images, "decode", lambda source, **rest: read.append(source) or decode(source, **rest))
        patch.setattr(allowed_precisions, "certify", lambda *rest: certifying.append(len(read)) or certify(*rest))
        out, values, certificates = export(copy, "--int8")
    return Exported(copy, out, values, certificates, read[: certifying[0]], read[certifying[0] :])


def test_a_member_that_int8_breaks_is_rescued_by_the_one_layer_that_breaks_it(exported, tmp_path):
    run, out, values, found = exported.run, exported.out, exported.values, exported.certificates
    assert int8_members(values) == {"openvino": {"one", "two"}, "onnxruntime": {"one", "two"}}
    assert "two: with all 3 layers in int8 AUROC moves by -" in out
    assert "two: kept in fp32 1 of 3 layers: reads; openvino int8 runs" in out
    assert "one: openvino int8 runs" in out
    assert "one: quantizing with nncf 3" in out
    for runtime in ("openvino", "onnxruntime"):
        made = found[f"{runtime} int8"]["files"]
        assert {name: made[name]["kept"] for name in made} == {"one": [], "two": ["reads"]}
        assert made["two"]["by"].startswith("nncf 3")
        assert made["two"]["calibrated_on"] == made["two"]["compared_on"] == 128
        assert set(made["two"]["times_fp32"]) == {"whole", "made"}

    output = tmp_path / "scores.csv"
    pictures = artifacts.read_parquet(artifacts.dataset_path(run), "")["root"][0]
    scored = {}
    for precision in ("fp32", "int8"):
        code, out, _ = run_cli(
            *("infer", "--onnx", "--run", run, "--input", pictures, "--output", output, "--device", "cpu"),
            *("--precision", precision),
        )
        assert code == 0
        assert f" {precision} on " in out
        scored[precision] = pd.read_csv(output)["target"]
        output.unlink()
    assert 0 < np.abs(scored["int8"] - scored["fp32"]).max() < 0.02


def test_without_the_search_its_certificate_fails_and_its_file_goes(copy, monkeypatch):
    monkeypatch.setattr(low_precision_files, "fewest_layers", lambda *arguments: None)
    out, values, found = export(copy, "--int8")
    assert int8_members(values) == {"openvino": {"one"}, "onnxruntime": {"one"}}
    assert found["openvino int8"]["members"]["two"]["failed"]
    assert "two: no part of its layers would rescue it" in out
    assert [name for name in values["files"] if "int8" in name] == ["members/one.int8.onnx"]
    assert not (artifacts.bundle_path(copy) / "members" / "two.int8.onnx").exists()
    assert "two" not in json.dumps(values["members"]["two"].get("made", {}))


def test_int8_files_that_were_made_are_kept(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    copy = shutil.copytree(exported.run, tmp_path / "run")
    made = {name: digest for name, digest in exported.values["files"].items() if "int8" in name}
    assert list(made) == ["members/one.int8.onnx", "members/two.int8.onnx"]
    for arguments in ([], ["--int8"]):
        out, values, found = export(copy, *arguments)
        assert "quantizing" not in out
        assert {name: digest for name, digest in values["files"].items() if "int8" in name} == made
        assert int8_members(values)["openvino"] == {"one", "two"}
        assert found["openvino int8"]["files"]["two"]["kept"] == ["reads"]


def test_no_held_out_image_is_read_until_the_certificate(exported):
    frame = artifacts.read_parquet(artifacts.dataset_path(exported.run), "")
    files = dict(zip(dataset.files(frame), frame["split"], strict=True))
    assert {files[path] for path in exported.before_certifying} == {"train"}
    assert {files[path] for path in exported.certifying} == {"heldout"}


def test_images_to_calibrate_by_are_balanced_and_no_others_are_compared_on(run):
    training = check_images.training_images(run)
    assert np.bincount(training.calibration.labels).tolist() == [64, 64]
    assert not set(training.calibration.ids) & set(training.comparison.ids)
    assert check_images.training_images(run).calibration.ids == training.calibration.ids


def test_too_few_training_images_are_refused_before_anything_is_made(tmp_path):
    write_image_run(tmp_path / "run", {"one": 1.0, "two": 1.0}, groups=63)
    code, _, err = run_cli("export", "--run", tmp_path / "run", "--int8")
    assert code == 2
    assert "int8 needs at least 256 images of the train split, half of them to calibrate by; leave out --int8" in err


def test_a_member_that_cannot_be_quantized_stays_fp32_and_the_others_do_not(copy, monkeypatch):
    def refuse(source, *rest):
        if source.name.startswith("two"):
            raise RuntimeError("an operation is unknown\nand more of it")
        by_nncf(source, *rest)

    by_nncf = int8._by_nncf
    monkeypatch.setattr(int8, "_by_nncf", refuse)
    out, values, _ = export(copy, "--int8")
    assert "two: stays fp32: two.fp32.onnx cannot be quantized: an operation is unknown" in out
    assert int8_members(values)["openvino"] == {"one"}


@pytest.fixture
def without_nncf(monkeypatch):
    monkeypatch.setitem(libraries.sys.modules, "nncf", None)


def test_where_nncf_is_absent_onnx_runtime_quantizes_and_rescues(copy, without_nncf):
    out, values, found = export(copy, "--int8")
    by = devices.version("onnxruntime")
    assert f"one: quantizing with {by}, by the ranges of its values on 128 training images" in out
    assert "two: kept in fp32 1 of 3 layers: reads; openvino int8 runs" in out
    assert int8_members(values) == {"openvino": {"one", "two"}, "onnxruntime": {"one", "two"}}
    assert {made["by"] for made in found["openvino int8"]["files"].values()} == {by}
    assert values["members"]["one"]["made"]["int8"]["by"] == by


@pytest.mark.parametrize("lacking", ["onnx", "VNNI"])
def test_what_int8_needs_is_named(copy, monkeypatch, lacking):
    if lacking == "onnx":
        monkeypatch.setattr(allowed_precisions.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(devices, "processor", lambda: ("an old CPU", frozenset({"avx2"})))
    code, _, err = run_cli("export", "--run", copy, "--int8")
    assert code == 2
    assert {
        "onnx": "int8 needs onnx; run: pip install 'manyeyes[int8]'",
        "VNNI": "this CPU has no instructions for int8 (VNNI or AMX)",
    }[lacking] in err


@pytest.mark.parametrize("arguments", [["--bundle", "DIR"], ["--bundle", "DIR", "--member", "one=DIR"]])
def test_int8_is_for_a_run(arguments):
    code, _, err = run_cli("export", "--int8", *arguments)
    assert code == 2
    assert "--int8 is calibrated on a run's training images: leave out --bundle and --member" in err


@pytest.mark.parametrize("with_nncf", [True, False])
def test_pixels_and_logits_keep_their_types_and_the_same_images_make_the_same_file(tmp_path, request, capfd, with_nncf):
    if not with_nncf:
        request.getfixturevalue("without_nncf")
    source = write_network(tmp_path / "network.onnx", 1.0)
    for name in ("a", "b"):
        write_int8(source, tmp_path / f"{name}.onnx", PIXELS)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    fp32 = open_runner("one", source, PREPROCESS_CONFIG, RuntimeConfig("onnxruntime")).run(PIXELS)
    for runtime in ("onnxruntime", "openvino"):
        logits = open_runner("one", tmp_path / "a.onnx", PREPROCESS_CONFIG, RuntimeConfig(runtime, "int8")).run(PIXELS)
        assert logits.dtype == np.float32
        assert 0 < np.abs(logits - fp32).max() < 0.02
    assert capfd.readouterr() == ("", "")


def test_batches_that_disagree_do_not_pass(run, tmp_path, monkeypatch):
    """As OpenVINO 2026.4 does for int8 products of few rows."""
    source = write_network(tmp_path / "network.onnx", 1.0)
    write_int8(source, tmp_path / "int8.onnx", PIXELS)
    second = low_precision_files.LowPrecisionFile(
        "one", source, tmp_path / "int8.onnx", PREPROCESS_CONFIG, RuntimeConfig("onnxruntime", "int8")
    )
    training = check_images.training_images(run)
    assert low_precision_files._passes(second, training)
    real = low_precision_files.LowPrecisionFile.runner

    def broken(self, batch=None):
        runner = real(self, batch)
        return low_precision_files.replace(runner, run=lambda pixels: runner.run(pixels) * (batch != 4))

    monkeypatch.setattr(low_precision_files.LowPrecisionFile, "runner", broken)
    assert not low_precision_files._passes(second, training)


@pytest.fixture
def forty():
    return [Layer(str(number), (str(number),)) for number in range(40)]


@pytest.mark.parametrize("bad", [{3}, {0, 39}, {7, 8, 9}, set(range(0, 40, 13))])
def test_the_fewest_layers_are_found_in_few_tries(forty, bad):
    tries = []

    def harm(part):
        return sum(0.001 + (int(layer.name) in bad) for layer in part)

    def passes(kept):
        tries.append(len(kept))
        return bad <= {int(layer.name) for layer in kept}

    assert {int(layer.name) for layer in fewest_layers(forty, harm, passes)} == bad
    assert len(tries) <= 8


def test_a_member_that_needs_all_its_layers_is_given_up(forty):
    assert fewest_layers(forty, len, lambda kept: False) is None
    assert fewest_layers(forty[:1], len, lambda kept: True) is None


def test_layers_cover_every_node_in_order(tmp_path):
    layers = read_layers(write_network(tmp_path / "network.onnx", 1.0))
    assert [layer.name for layer in layers] == list(LAYERS)
    assert [node for layer in layers for node in layer.nodes] == ["cast", *LAYERS, "mean", "sub"]


def emulated(name, path, preprocess_config, setting):
    """CUDA by NumPy, which computes in the types that the file says."""
    if setting.runtime != "cuda":
        return open_runner(name, path, preprocess_config, setting)
    from onnx.reference import ReferenceEvaluator
    from onnxscript import ir

    model = ir.load(path)
    model.graph.sort()  # the converter appends its casts, which only this evaluator minds
    evaluator = ReferenceEvaluator(ir.to_proto(model))

    def run(pixels):
        with np.errstate(over="ignore", invalid="ignore"):
            return evaluator.run(None, {"pixels": pixels})[0]

    return Runner(name, preprocess_config, run)


def test_fp16_is_rescued_where_a_layer_overflows(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(low_precision_files.runner, "open_runner", emulated)
    source, target = write_network(tmp_path / "network.onnx", 1e5), tmp_path / "half.onnx"
    second = low_precision_files.LowPrecisionFile(
        "two", source, target, PREPROCESS_CONFIG, RuntimeConfig("cuda", "fp16")
    )
    lines = []
    made = low_precision_files.make(second, check_images.training_images(run), lines.append)
    assert lines[0] == "two: with all 4 layers in fp16 logits are not finite; searching for layers to keep in fp32"
    assert made["kept"] == ["makes", "reads"]
    assert lines[1].startswith("two: kept in fp32 2 of 4 layers: makes, reads; cuda fp16 runs ")
    fp32 = open_runner("two", source, PREPROCESS_CONFIG, RuntimeConfig("onnxruntime")).run(PIXELS)
    assert 0 < np.abs(second.runner().run(PIXELS) - fp32).max() < 0.02
    low_precision_files.make(second, None, lines.append)  # as where there is no run: nothing is kept
    assert not np.isfinite(second.runner().run(PIXELS)).all()
