"""int8 members of a run of two small networks: a channel with a huge range takes the decisive ones with it."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from helpers import CONTRACT, run_cli, save_graph
from onnx import numpy_helper
from small_nets import LAYERS, write_image_run, write_network

from ensemble import artifacts, dataset, images
from ensemble.score import Runner
from export import bundle, evidence, hardware, int8, libraries, precisions, second_files
from export.int8 import write_int8
from export.layers import PRODUCTS, Layer, fewest, read_layers
from export.runtime import open_runner
from export.setting import Setting

if not precisions.computed(("int8",)):
    pytest.skip("this CPU has no instructions for int8", allow_module_level=True)

PIXELS = np.repeat(np.arange(0, 256, 2, dtype=np.uint8), 192).reshape(-1, 8, 8, 3)
PIXELS[:, 0, :2] = [[0], [255]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Its members: one that int8 does no harm, and two, which it breaks."""
    folder = tmp_path_factory.mktemp("int8") / "run"
    write_image_run(folder, {"one": 1.0, "two": 1000.0})
    return folder


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
    return {runtime: set(may) for (runtime, precision), may in bundle.may_run(values).items() if precision == "int8"}


@pytest.fixture
def exported(copy):
    return copy, *export(copy, "--int8")


def test_a_member_that_int8_breaks_is_rescued_by_the_one_layer_that_breaks_it(exported, tmp_path):
    run, out, values, found = exported
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
    monkeypatch.setattr(second_files, "fewest", lambda *arguments: None)
    out, values, found = export(copy, "--int8")
    assert int8_members(values) == {"openvino": {"one"}, "onnxruntime": {"one"}}
    assert found["openvino int8"]["members"]["two"]["failed"]
    assert "two: no part of its layers would rescue it" in out
    assert [name for name in values["files"] if "int8" in name] == ["members/one.int8.onnx"]
    assert not (artifacts.bundle_path(copy) / "members" / "two.int8.onnx").exists()
    assert "two" not in json.dumps(values["members"]["two"].get("made", {}))


def test_int8_is_made_when_asked_for_and_then_kept(copy):
    out, values, _ = export(copy)
    assert int8_members(values) == {}
    assert "quantizing" not in out
    _, values, _ = export(copy, "--int8")
    made = {name: digest for name, digest in values["files"].items() if "int8" in name}
    assert list(made) == ["members/one.int8.onnx", "members/two.int8.onnx"]
    for arguments in ([], ["--int8"]):
        out, values, found = export(copy, *arguments)
        assert "quantizing" not in out
        assert {name: digest for name, digest in values["files"].items() if "int8" in name} == made
        assert int8_members(values)["openvino"] == {"one", "two"}
        assert found["openvino int8"]["files"]["two"]["kept"] == ["reads"]


def test_no_held_out_image_is_read_until_the_certificate(copy, monkeypatch):
    read, certifying = [], []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda source, **rest: read.append(source) or decode(source, **rest))
    certify = precisions._certify
    monkeypatch.setattr(precisions, "_certify", lambda *arguments: certifying.append(list(read)) or certify(*arguments))
    export(copy, "--int8")
    frame = artifacts.read_parquet(artifacts.dataset_path(copy), "")
    files = dict(zip(dataset.files(frame), frame["split"], strict=True))
    assert {files[path] for path in certifying[0]} == {"train"}
    assert {files[path] for path in read[len(certifying[0]) :]} == {"heldout"}


def test_images_to_calibrate_by_are_balanced_and_no_others_are_compared_on(run):
    training = evidence.training(run)
    assert np.bincount(training.calibration.labels).tolist() == [64, 64]
    assert not set(training.calibration.ids) & set(training.comparison.ids)
    assert evidence.training(run).calibration.ids == training.calibration.ids


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
    by = hardware.version("onnxruntime")
    assert f"one: quantizing with {by}, by the ranges of its values on 128 training images" in out
    assert "two: kept in fp32 1 of 3 layers: reads; openvino int8 runs" in out
    assert int8_members(values) == {"openvino": {"one", "two"}, "onnxruntime": {"one", "two"}}
    assert {made["by"] for made in found["openvino int8"]["files"].values()} == {by}
    assert values["members"]["one"]["made"]["int8"]["by"] == by


@pytest.mark.parametrize("lacking", ["onnx", "VNNI"])
def test_what_int8_needs_is_named(copy, monkeypatch, lacking):
    if lacking == "onnx":
        monkeypatch.setattr(precisions.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(hardware, "processor", lambda: ("an old CPU", frozenset({"avx2"})))
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
    fp32 = open_runner("one", source, CONTRACT, Setting("onnxruntime")).run(PIXELS)
    for runtime in ("onnxruntime", "openvino"):
        logits = open_runner("one", tmp_path / "a.onnx", CONTRACT, Setting(runtime, "int8")).run(PIXELS)
        assert logits.dtype == np.float32
        assert 0 < np.abs(logits - fp32).max() < 0.02
    assert capfd.readouterr() == ("", "")


def tensorrt_refuses(path):
    """What of an int8 file TensorRT would refuse or run at fp32, by NVIDIA's notes on explicit quantization."""
    import onnx

    graph = onnx.load(path).graph
    values = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    found = set()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = values[node.input[2]]
            found |= {f"zero points {zero.dtype}"} if zero.dtype != np.int8 else set()
            found |= {"zero points beside 0"} if zero.any() else set()
            found |= {f"{node.op_type} of {node.domain}"} if node.domain else set()
        if node.op_type not in PRODUCTS:
            continue
        left, weight, *bias = (makers.get(name) for name in node.input)
        if left is None or left.op_type != "DequantizeLinear":
            continue  # kept
        if weight.input[0] in values and values[weight.input[1]].size != values[weight.input[0]].shape[-1]:
            found.add("weights of one scale")
        if any(bias):
            found.add("a quantized bias")
    return found


@pytest.mark.parametrize("with_nncf", [True, False])
def test_a_file_for_tensorrt_is_symmetric_and_one_for_cpus_is_not(tmp_path, request, with_nncf):
    if not with_nncf:
        request.getfixturevalue("without_nncf")
    source = write_network(tmp_path / "network.onnx", 1.0)
    for symmetric in (True, False):
        write_int8(source, tmp_path / f"{symmetric}.onnx", PIXELS, ["last", "mean", "sub"], symmetric)
    assert tensorrt_refuses(tmp_path / "True.onnx") == set()
    assert "zero points uint8" in tensorrt_refuses(tmp_path / "False.onnx")
    fp32 = open_runner("one", source, CONTRACT, Setting("onnxruntime")).run(PIXELS)
    logits = open_runner("one", tmp_path / "True.onnx", CONTRACT, Setting("onnxruntime", "int8")).run(PIXELS)
    assert 0 < np.abs(logits - fp32).max() < 0.04  # of 256 values half are not used where none is negative


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"per_channel": False}, "weights of one scale"),
        ({"extra_options": {"QuantizeBias": True}}, "a quantized bias"),
        ({"activation_type": "QUInt8"}, "zero points uint8"),
        ({"extra_options": {"ActivationSymmetric": False}}, "zero points beside 0"),
    ],
)
def test_every_rule_of_tensorrt_is_looked_at(tmp_path, monkeypatch, changes, refused):
    from onnxruntime import quantization

    real = quantization.quantize_static

    def other(*arguments, **options):
        changed = {
            name: getattr(quantization.QuantType, value, value) if isinstance(value, str) else value
            for name, value in changes.items()
        }
        changed["extra_options"] = options["extra_options"] | changes.get("extra_options", {})
        real(*arguments, **options | changed)

    monkeypatch.setattr(quantization, "quantize_static", other)
    source = write_biased(tmp_path / "network.onnx")
    write_int8(source, tmp_path / "int8.onnx", PIXELS, (), symmetric=True)
    assert refused in tensorrt_refuses(tmp_path / "int8.onnx")
    monkeypatch.undo()
    write_int8(source, tmp_path / "int8.onnx", PIXELS, (), symmetric=True)
    assert tensorrt_refuses(tmp_path / "int8.onnx") == set()


def write_biased(path):
    """A Gemm with a bias, whose inputs are all positive."""
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    values = {
        "flat": np.array([0, 192]),
        "w": rng.normal(size=(192, 8)),
        "b": rng.normal(size=8),
        "axes": np.array([1]),
    }
    constants = {k: v if v.dtype.kind == "i" else v.astype(np.float32) for k, v in values.items()}
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["floats", "flat"], ["rows"], "rows"),
        helper.make_node("Gemm", ["rows", "w", "b"], ["sums"], "gemm"),
        helper.make_node("ReduceMean", ["sums", "axes"], ["logit"], "mean", keepdims=0),
    ]
    return save_graph(path, nodes, constants)


def test_a_file_for_tensorrt_is_searched_by_cuda_and_timed_by_itself(run, tmp_path, monkeypatch):
    """ONNX Runtime's CPU stands in for both."""
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    asked = []

    def opened(name, path, contract, setting):
        asked.append((path.name, str(setting)))
        return open_runner(name, path, contract, Setting("onnxruntime", batch=setting.batch))

    monkeypatch.setattr(second_files.runtime, "open_runner", opened)
    folder = tmp_path / "bundle"
    source = write_network(folder / "members" / "two.fp32.onnx", 1000.0)
    entry = {"file": "members/two.fp32.onnx", "contract": CONTRACT.to_dict()}
    lines = []
    setting = Setting("tensorrt", "int8", 64)
    made = second_files.add(folder, "two", entry, [setting], evidence.training(run), lines.append)
    assert made["int8-symmetric"] == "members/two.int8-symmetric.onnx"
    assert made["made"]["int8-symmetric"]["kept"] == ["reads"]
    assert any(line.startswith("two: kept in fp16 1 of 3 layers: reads; tensorrt int8 runs ") for line in lines)
    assert tensorrt_refuses(folder / made["int8-symmetric"]) == set()
    by_tensorrt = {each for each in asked if each[1].startswith("tensorrt")}
    assert by_tensorrt == {(source.name, "tensorrt fp32"), ("two.int8-symmetric.onnx", "tensorrt int8")}
    assert asked.count(("two.int8-symmetric.onnx", "tensorrt int8")) == 2  # before the search, and after it
    assert bundle.member_file(made, setting) == made["int8-symmetric"]
    assert not bundle.has_file(made, Setting("openvino", "int8"))


def test_batches_that_disagree_do_not_pass(run, tmp_path, monkeypatch):
    """As OpenVINO 2026.4 does for int8 products of few rows."""
    source = write_network(tmp_path / "network.onnx", 1.0)
    write_int8(source, tmp_path / "int8.onnx", PIXELS)
    second = second_files.Second("one", source, tmp_path / "int8.onnx", CONTRACT, Setting("onnxruntime", "int8"))
    training = evidence.training(run)
    assert second_files._passes(second, training)
    real = second_files.Second.runner

    def broken(self, batch=None):
        runner = real(self, batch)
        return second_files.replace(runner, run=lambda pixels: runner.run(pixels) * (batch != 4))

    monkeypatch.setattr(second_files.Second, "runner", broken)
    assert not second_files._passes(second, training)


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

    assert {int(layer.name) for layer in fewest(forty, harm, passes)} == bad
    assert len(tries) <= 8


def test_a_member_that_needs_all_its_layers_is_given_up(forty):
    assert fewest(forty, len, lambda kept: False) is None
    assert fewest(forty[:1], len, lambda kept: True) is None


def test_layers_cover_every_node_in_order(tmp_path):
    layers = read_layers(write_network(tmp_path / "network.onnx", 1.0))
    assert [layer.name for layer in layers] == list(LAYERS)
    assert [node for layer in layers for node in layer.nodes] == ["cast", *LAYERS, "mean", "sub"]


def emulated(name, path, contract, setting):
    """CUDA by NumPy, which computes in the types that the file says."""
    if setting.runtime != "cuda":
        return open_runner(name, path, contract, setting)
    from onnx.reference import ReferenceEvaluator
    from onnxscript import ir

    model = ir.load(path)
    model.graph.sort()  # the converter appends its casts, which only this evaluator minds
    evaluator = ReferenceEvaluator(ir.to_proto(model))

    def run(pixels):
        with np.errstate(over="ignore", invalid="ignore"):
            return evaluator.run(None, {"pixels": pixels})[0]

    return Runner(name, contract, run)


def test_fp16_is_rescued_where_a_layer_overflows(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(second_files.runtime, "open_runner", emulated)
    source, target = write_network(tmp_path / "network.onnx", 1e5), tmp_path / "half.onnx"
    second = second_files.Second("two", source, target, CONTRACT, Setting("cuda", "fp16"))
    lines = []
    made = second_files._make(second, evidence.training(run), lines.append)
    assert lines[0] == "two: with all 4 layers in fp16 logits are not finite; searching for layers to keep in fp32"
    assert made["kept"] == ["makes", "reads"]
    assert lines[1].startswith("two: kept in fp32 2 of 4 layers: makes, reads; cuda fp16 runs ")
    fp32 = open_runner("two", source, CONTRACT, Setting("onnxruntime")).run(PIXELS)
    assert 0 < np.abs(second.runner().run(PIXELS) - fp32).max() < 0.02
    second_files._make(second, None, lines.append)  # as where there is no run: nothing is kept
    assert not np.isfinite(second.runner().run(PIXELS)).all()
