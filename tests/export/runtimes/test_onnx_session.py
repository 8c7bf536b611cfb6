"""What CUDA and TensorRT are asked for, by a stand-in for the session: that they then compute is for a GPU to show."""

import numpy as np
import pytest
from helpers import PREPROCESS_CONFIG, write_onnx

from ensemble.core import artifacts
from ensemble.core.errors import UnavailableError
from export.runtimes import onnx_session
from export.runtimes import runner as runtime
from export.runtimes.libraries import load_onnxruntime
from export.runtimes.settings import RuntimeConfig

CUDA, TENSORRT, CPU = (f"{name}ExecutionProvider" for name in ("CUDA", "Tensorrt", "CPU"))


class Value:
    """As OrtValue on a device: one block of memory, updated in place."""

    def __init__(self, shape, kind, device, number):
        self.data, self.device = np.zeros(shape, kind), (device, number)

    def update_inplace(self, data):
        assert data.flags.c_contiguous
        assert (data.shape, data.dtype) == (self.data.shape, self.data.dtype)
        self.data[...] = data

    def numpy(self):
        return self.data.copy()


class Binding:
    def __init__(self, log):
        self.bound, self.log = {}, log

    def bind_ortvalue_input(self, name, value):
        self.bound[name] = value

    bind_ortvalue_output = bind_ortvalue_input

    def synchronize_inputs(self):
        self.log.append("inputs")

    def synchronize_outputs(self):
        self.log.append("outputs")


class Session:
    """Gives each image's first pixel; `starts` says which providers come up."""

    starts = (TENSORRT, CUDA, CPU)

    def __init__(self, path, options, providers):
        self.providers, self.log, self.fallback = dict(providers), [], True
        self.options = options
        Session.made.append(self)

    def get_providers(self):
        return [name for name in self.providers if name in self.starts]

    def disable_fallback(self):
        self.fallback = False

    def io_binding(self):
        self.binding = Binding(self.log)
        return self.binding

    def run_with_iobinding(self, binding):
        self.log.append("run")
        binding.bound["logit"].data[...] = binding.bound["pixels"].data[:, 0, 0, 0]


@pytest.fixture
def model(tmp_path):
    return write_onnx(tmp_path / "tiny.onnx", 4)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A machine whose ONNX Runtime is a stand-in."""
    onnxruntime = load_onnxruntime()
    monkeypatch.setattr(Session, "made", [], raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", Value)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("noise"))
    monkeypatch.setattr(onnx_session, "find_gpu", lambda: ("NVIDIA H100", (9, 0)))
    monkeypatch.setattr(onnx_session, "version", lambda runtime: f"{runtime} 1")
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "")  # so that it is gone again afterwards
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")


def opened(model, setting):
    return runtime.open_runner("tiny", model, PREPROCESS_CONFIG, setting), Session.made[-1]


@pytest.mark.parametrize("setting", [RuntimeConfig("cuda", batch=4), RuntimeConfig("tensorrt", batch=4)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 4, 5, 9])
def test_a_gpu_gets_batches_of_one_shape_and_waits_for_each(model, setting, count):
    runner, session = opened(model, setting)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, count, 3), dtype=np.uint8).transpose(2, 0, 1, 3)
    np.testing.assert_array_equal(runner.run(pixels), pixels[:, 0, 0, 0].astype(np.float32))
    assert session.log == ["inputs", "run", "outputs"] * -(-count // 4)
    assert {value.device for value in session.binding.bound.values()} == {("cuda", 0)}
    assert not session.fallback


@pytest.mark.parametrize(
    ("precision", "on"), [("fp32", set()), ("fp16", {"fp16"}), ("bf16", {"bf16"}), ("int8", {"int8", "fp16"})]
)
def test_tensorrt_has_one_profile_and_keeps_its_engine_in_the_cache(model, tmp_path, precision, on):
    _, session = opened(model, RuntimeConfig("tensorrt", precision, batch=64))
    assert list(session.providers) == [TENSORRT, CUDA, CPU]
    options = session.providers[TENSORRT]
    shapes = {options[f"trt_profile_{which}_shapes"] for which in ("min", "opt", "max")}
    assert shapes == {"pixels:64x8x8x3"}
    assert {kind for kind in ("fp16", "bf16", "int8") if options[f"trt_{kind}_enable"] == "1"} == on
    assert not [name for name in options if "calibration" in name]  # the file has its scales
    assert options["trt_engine_cache_enable"] == "1"
    folder = onnx_session.engine_folder(model, RuntimeConfig("tensorrt", precision, batch=64))
    assert options["trt_engine_cache_path"] == str(folder)
    assert folder.parent == artifacts.cache_path() / "engines"
    assert folder.is_dir()


def test_fp32_products_are_not_made_in_tf32(model, monkeypatch):
    import os

    _, session = opened(model, RuntimeConfig("cuda"))
    assert session.providers[CUDA]["use_tf32"] == "0"
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


def test_an_engine_is_of_one_file_precision_batch_gpu_and_version(model, tmp_path, monkeypatch):
    setting = RuntimeConfig("tensorrt")
    folders = [onnx_session.engine_folder(model, setting)]
    folders += [onnx_session.engine_folder(model, RuntimeConfig("tensorrt", "fp16"))]
    folders += [onnx_session.engine_folder(model, RuntimeConfig("tensorrt", batch=9))]
    folders += [onnx_session.engine_folder(write_onnx(tmp_path / "other.onnx", 3), setting)]
    monkeypatch.setattr(onnx_session, "find_gpu", lambda: ("NVIDIA L4", (8, 9)))
    folders += [onnx_session.engine_folder(model, setting)]
    monkeypatch.setattr(onnx_session, "version", lambda runtime: f"{runtime} 2")
    folders += [onnx_session.engine_folder(model, setting)]
    assert len(set(folders)) == len(folders)
    assert onnx_session.engine_folder(model, setting) == folders[-1]


def test_an_engine_counts_as_built_when_it_lies_there(model):
    setting = RuntimeConfig("tensorrt")
    assert not onnx_session.engine_is_built(model, setting)
    opened(model, setting)
    assert not onnx_session.engine_is_built(model, setting)
    (onnx_session.engine_folder(model, setting) / "one.engine").touch()
    assert onnx_session.engine_is_built(model, setting)


@pytest.mark.parametrize(
    ("name", "starts", "message"),
    [
        ("cuda", (CPU,), "could not start cuda; run: pip install 'manyeyes[cuda]', or use --device cpu"),
        ("tensorrt", (CUDA, CPU), "could not start tensorrt; run: pip install tensorrt, or use --runtime cuda"),
        ("tensorrt", (CPU,), "could not start tensorrt; run: pip install tensorrt, or use --runtime cuda"),
    ],
)
def test_a_provider_that_did_not_start_is_no_silent_cpu(model, monkeypatch, capsys, name, starts, message):
    monkeypatch.setattr(Session, "starts", starts)
    with pytest.raises(UnavailableError) as caught:
        opened(model, RuntimeConfig(name))
    assert str(caught.value) == f"ONNX Runtime {message}"
    assert capsys.readouterr() == ("", "")


def test_the_cpu_uses_the_cores_it_may_and_does_not_spin(model, monkeypatch):
    monkeypatch.setattr(onnx_session, "available_cores", lambda: 7)
    for threads, expected in ((0, 7), (3, 3)):
        _, session = opened(model, RuntimeConfig("onnxruntime", threads=threads))
        assert session.options.intra_op_num_threads == expected
        assert session.options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
        assert list(session.providers) == [CPU]
