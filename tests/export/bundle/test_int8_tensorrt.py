"""int8 files for TensorRT: what they hold, and how they are made. That TensorRT then runs them is for a GPU to show."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import PREPROCESS_CONFIG, run_cli, save_graph
from onnx import numpy_helper
from small_nets import PIXELS, write_image_run, write_network

from ensemble.core.errors import UnavailableError
from export.bundle import allowed_precisions, bundle, check_images, low_precision_files
from export.bundle.int8 import PRODUCTS, write_int8
from export.runtimes import autotune, libraries
from export.runtimes.capabilities import Machine
from export.runtimes.runner import open_runner
from export.runtimes.runtime_selection import choose_configs
from export.runtimes.settings import RuntimeConfig, RuntimeOptions

vnni = pytest.mark.skipif(
    not allowed_precisions.runnable_configs(("int8",)), reason="this CPU has no instructions for int8"
)


@pytest.fixture(autouse=True)
def short_timings(monkeypatch):
    monkeypatch.setattr(autotune, "MIN_TIMING_SECONDS", 0.0)


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
def test_a_file_for_tensorrt_is_symmetric_and_one_for_cpus_is_not(tmp_path, monkeypatch, with_nncf):
    if not with_nncf:
        monkeypatch.setitem(libraries.sys.modules, "nncf", None)
    source = write_network(tmp_path / "network.onnx", 1.0)
    for symmetric in (True, False):
        write_int8(source, tmp_path / f"{symmetric}.onnx", PIXELS, ["last", "mean", "sub"], symmetric)
    assert tensorrt_refuses(tmp_path / "True.onnx") == set()
    assert "zero points uint8" in tensorrt_refuses(tmp_path / "False.onnx")


@vnni
def test_a_file_for_tensorrt_gives_nearly_the_same_logits(tmp_path):
    source = write_network(tmp_path / "network.onnx", 1.0)
    write_int8(source, tmp_path / "int8.onnx", PIXELS, ["last", "mean", "sub"], symmetric=True)
    fp32 = open_runner("one", source, PREPROCESS_CONFIG, RuntimeConfig("onnxruntime")).run(PIXELS)
    logits = open_runner("one", tmp_path / "int8.onnx", PREPROCESS_CONFIG, RuntimeConfig("onnxruntime", "int8")).run(
        PIXELS
    )
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


@vnni
def test_a_file_for_tensorrt_is_searched_by_cuda_and_timed_by_itself(tmp_path, monkeypatch):
    """ONNX Runtime's CPU stands in for both."""
    write_image_run(tmp_path / "run", {"one": 1.0, "two": 1.0})
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    asked = []

    def opened(name, path, preprocess_config, setting):
        asked.append((path.name, str(setting)))
        return open_runner(name, path, preprocess_config, RuntimeConfig("onnxruntime", batch=setting.batch))

    monkeypatch.setattr(low_precision_files.runner, "open_runner", opened)
    folder = tmp_path / "bundle"
    source = write_network(folder / "members" / "two.fp32.onnx", 1000.0)
    entry = {"file": "members/two.fp32.onnx", "contract": PREPROCESS_CONFIG.to_dict()}
    lines = []
    setting = RuntimeConfig("tensorrt", "int8", 64)
    made = low_precision_files.add_files(
        folder, "two", entry, [setting], check_images.training_images(tmp_path / "run"), lines.append
    )
    assert made["int8-symmetric"] == "members/two.int8-symmetric.onnx"
    assert made["made"]["int8-symmetric"]["kept"] == ["reads"]
    assert "two: building TensorRT engines of its files, to time them; that takes minutes" in lines
    assert any(line.startswith("two: kept in fp16 1 of 3 layers: reads; tensorrt int8 runs ") for line in lines)
    assert tensorrt_refuses(folder / made["int8-symmetric"]) == set()
    by_tensorrt = {each for each in asked if each[1].startswith("tensorrt")}
    assert by_tensorrt == {(source.name, "tensorrt fp32"), ("two.int8-symmetric.onnx", "tensorrt int8")}
    assert asked.count(("two.int8-symmetric.onnx", "tensorrt int8")) == 2  # before the search, and after it
    assert bundle.model_file(made, setting) == made["int8-symmetric"]
    assert not bundle.has_model_file(made, RuntimeConfig("openvino", "int8"))


def test_help_says_how_tensorrt_is_made_to_run_int8():
    assert "`infer --precision int8` runs them" in " ".join(run_cli("export", "--help")[1].split())
    allowed = {("tensorrt", precision): frozenset({"one"}) for precision in ("fp16", "int8")}
    for asked, taken in (("auto", "fp16"), ("int8", "int8")):
        settings, _ = choose_configs(
            {"one": {}}, allowed, RuntimeOptions("tensorrt", asked), Machine("a CPU", 2, "a GPU")
        )
        assert settings["one"].precision == taken


@vnni
def test_where_tensorrt_fails_export_goes_on_without_its_files(tmp_path, monkeypatch):
    write_image_run(tmp_path / "run", {"one": 1.0, "two": 1.0})
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    computed = allowed_precisions.runnable_configs
    more = [RuntimeConfig("tensorrt", "int8", batch=64)]
    monkeypatch.setattr(
        allowed_precisions, "runnable_configs", lambda some: computed(some) + (more if "int8" in some else [])
    )

    def opened(name, path, preprocess_config, setting):
        if setting.runtime == "tensorrt":
            raise UnavailableError(f"{name}: {setting} failed at batch 64: enqueue failed; free some memory")
        here = replace(setting, runtime="onnxruntime") if setting.runtime == "cuda" else setting
        return open_runner(name, path, preprocess_config, here)

    monkeypatch.setattr(low_precision_files.runner, "open_runner", opened)
    code, out, err = run_cli("export", "--run", tmp_path / "run", "--int8")
    assert (code, err) == (0, "")
    assert "one: stays fp32: tensorrt fp32 failed at batch 64: enqueue failed; free some memory\n" in out
    values = bundle.open_bundle(tmp_path / "run" / "bundle")
    assert "tensorrt" not in {runtime for runtime, _ in bundle.certified_precisions(values)}
    assert all("int8" in entry and "int8-symmetric" not in entry for entry in values["members"].values())
    assert not list((tmp_path / "run" / "bundle" / "members").glob("*symmetric*"))
