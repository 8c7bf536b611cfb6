import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import PREPROCESS_CONFIG, run_python, write_onnx
from hypothesis import given
from hypothesis import strategies as st

from ensemble.core.errors import ArtifactError, UnavailableError
from export.runtimes import openvino_session
from export.runtimes import runner as runtime
from export.runtimes.devices import find_gpu
from export.runtimes.libraries import openvino_core
from export.runtimes.settings import TORCH_BATCH, RuntimeConfig

without_gpu = pytest.mark.skipif(bool(find_gpu()[0]), reason="a GPU is here")
SETTINGS = [
    RuntimeConfig("onnxruntime"),
    RuntimeConfig("onnxruntime", batch=3),
    RuntimeConfig("openvino"),
    RuntimeConfig("openvino", batch=1, streams=2, threads=2),
    RuntimeConfig("openvino", batch=3, streams=2, threads=2),
]
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.runtime}-{s.batch}-{s.streams}")
every_runtime = pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[2]], ids=str)
QUIET = """
import os, pathlib, socket, sys

class Refused(socket.socket):
    def __init__(self, *arguments, **options):
        raise AssertionError("a socket was opened")

socket.socket = Refused
from ensemble.core.preprocess_config import PreprocessConfig
from export.runtimes.runner import open_runner
from export.runtimes.settings import RuntimeConfig
import numpy as np

config = PreprocessConfig(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
for name in ("openvino", "onnxruntime"):
    runner = open_runner("tiny", pathlib.Path(sys.argv[1]), config, RuntimeConfig(name))
    print(runner.run(np.full((3, 8, 8, 3), 255, dtype=np.uint8)).tolist())
"""
QUANTIZED = """
from export.bundle.int8 import write_int8

target = pathlib.Path(sys.argv[2])
write_int8(pathlib.Path(sys.argv[1]), target, np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
print(len(target.read_bytes()) > 0)
"""
INTERRUPTED = """
import os, pathlib, signal, sys, threading
from ensemble.core.preprocess_config import PreprocessConfig
from export.runtimes.runner import open_runner
from export.runtimes.settings import RuntimeConfig

config = PreprocessConfig(size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
runners = [open_runner("tiny", pathlib.Path(sys.argv[1]), config, RuntimeConfig("openvino"))]
thread = threading.Thread(target=runners.clear)
thread.start()
thread.join()
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_onnx(tmp_path_factory.mktemp("runtime") / "tiny.onnx", 4)


def opened(model, setting):
    return runtime.open_runner("tiny", model, PREPROCESS_CONFIG, setting)


@pytest.fixture(scope="module")
def runners(model):
    return {setting: opened(model, setting) for setting in SETTINGS}


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def brightness_logits(pixels):
    return 4 * (pixels.mean(axis=(1, 2, 3), dtype=np.float64) / 255 - 0.5)


@every_setting
@given(count=st.integers(0, 11), seed=st.integers(0, 99))
def test_any_number_of_images_is_scored_in_order(runners, setting, count, seed):
    pixels = images(count, seed)
    logits = runners[setting].run(pixels)
    assert (logits.dtype, logits.shape) == (np.float32, (count,))
    np.testing.assert_allclose(logits, brightness_logits(pixels), rtol=1e-4, atol=1e-6)


@every_setting
def test_a_row_does_not_depend_on_its_companions(runners, setting):
    pixels = images(11)
    whole = runners[setting].run(pixels)
    alone = np.concatenate([runners[setting].run(pixels[row : row + 1]) for row in range(11)])
    np.testing.assert_array_equal(whole, alone)
    np.testing.assert_array_equal(runners[setting].run(pixels), whole)


def test_the_runtimes_agree_and_another_file_does_not(runners, tmp_path):
    pixels = images(7)
    first, *others = (runner.run(pixels) for runner in runners.values())
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-5)
    changed = opened(write_onnx(tmp_path / "other.onnx", 4.01), SETTINGS[2]).run(pixels)
    assert np.abs(changed - first).max() > 1e-4


@every_setting
def test_pixels_need_not_lie_in_order_nor_be_writable(runners, setting):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4, 3), dtype=np.uint8).transpose(2, 0, 1, 3)
    frozen = pixels.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(runners[setting].run(pixels), runners[setting].run(frozen))


@without_gpu
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("cuda", "run: pip install 'manyeyes[cuda]', or use --device cpu"),
        ("tensorrt", "run: pip install tensorrt, or use --runtime cuda"),
    ],
)
def test_a_session_never_falls_back_to_the_cpu(model, capfd, name, remedy):
    with pytest.raises(UnavailableError) as caught:
        opened(model, RuntimeConfig(name))
    assert str(caught.value) == f"ONNX Runtime could not start {name}; {remedy}"
    assert capfd.readouterr().out == ""


@pytest.mark.skipif("BF16" in openvino_session.cpu_capabilities(), reason="this CPU may compute in bf16")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_is_not_granted_is_refused(model, precision):
    with pytest.raises(UnavailableError) as caught:
        opened(model, RuntimeConfig("openvino", precision))
    assert str(caught.value) == (
        f"OpenVINO would run tiny.onnx at f32 instead of {precision}: this CPU has no {precision}; use --precision fp32"
    )


@every_runtime
@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_damaged_file_is_refused_by_name(model, tmp_path, setting, cut):
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(model.read_bytes()[:cut])
    with pytest.raises(ArtifactError, match=rf"^{re.escape(str(damaged))} cannot be run: .+; run export again$"):
        opened(damaged, setting)


@every_runtime
def test_a_missing_file_is_refused_by_name(tmp_path, setting):
    with pytest.raises(ArtifactError, match=r"gone\.onnx cannot be run: .+; run export again$"):
        opened(tmp_path / "gone.onnx", setting)


NO_MEMORY = "Exception from src/core.cpp:97:\nCheck 'found' failed at src/x.cpp:9:\nFailed to allocate memory.\n\n"


@pytest.mark.parametrize("error", [RuntimeError(NO_MEMORY), MemoryError("Failed to allocate memory")])
@pytest.mark.parametrize(("batch", "remedy"), [(8, "give a smaller --batch-size"), (1, "free some memory, or")])
@pytest.mark.parametrize("when", ["opening", "running"])
def test_a_failure_of_the_runtime_is_one_line_that_says_what_to_do(model, monkeypatch, error, batch, remedy, when):
    def fail(*arguments):
        raise error

    how = fail if when == "opening" else lambda *arguments: fail
    monkeypatch.setattr(openvino_session, "open_model", how)
    with pytest.raises(UnavailableError) as caught:
        opened(model, RuntimeConfig("openvino", batch=batch)).run(images(1))
    told = f"tiny: openvino fp32 failed at batch {batch}: Failed to allocate memory; {remedy}"
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("message", "kind", "told"),
    [
        ("", ArtifactError, "cannot be run: RuntimeError; run export again"),
        ("CUDA failure 2: out of memory", UnavailableError, "failed at batch 8: CUDA failure 2: out of memory; give a"),
    ],
)
def test_want_of_memory_is_not_a_damaged_file(model, monkeypatch, message, kind, told):
    def fail(*arguments, **options):
        raise RuntimeError(message)

    monkeypatch.setattr("onnxruntime.InferenceSession", fail)
    monkeypatch.setattr(openvino_session, "openvino_core", lambda: SimpleNamespace(read_model=fail))
    for name in ("onnxruntime", "openvino"):
        with pytest.raises(kind) as caught:
            opened(model, RuntimeConfig(name))
        assert told in str(caught.value)


@every_runtime
def test_a_hostile_file_name_is_only_a_name(model, tmp_path, setting):
    odd = tmp_path / "é 写真 'a,b'.onnx"
    odd.write_bytes(model.read_bytes())
    assert opened(odd, setting).run(images(1)).shape == (1,)


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """Run a script in a process whose home is tmp_path, and which reaches no other machine."""

    def start(script, *arguments):
        for variable in set(os.environ) - {"PATH", "LD_LIBRARY_PATH", "SYSTEMROOT"}:
            monkeypatch.delenv(variable)  # some quiet a library, such as those of CI services
        for variable in ("HOME", "USERPROFILE", "XDG_CACHE_HOME", "TMPDIR"):
            monkeypatch.setenv(variable, str(tmp_path))
        for variable in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(variable, "http://127.0.0.1:9")
        return run_python("-c", script, *arguments)

    return start


def test_nothing_is_sent_and_nothing_written_at_home(at_home, model, tmp_path):
    result = at_home(QUIET, model)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "[2.0, 2.0, 2.0]\n[2.0, 2.0, 2.0]\n"
    assert list(tmp_path.iterdir()) == []


def test_quantizing_sends_nothing_and_writes_nothing_at_home(at_home, model, tmp_path, tmp_path_factory):
    target = tmp_path_factory.mktemp("quantized") / "int8.onnx"
    result = at_home(QUIET + QUANTIZED, model, target)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "[2.0, 2.0, 2.0]\n[2.0, 2.0, 2.0]\nTrue\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "nncf"])
def test_a_plain_import_does_write_at_home(at_home, tmp_path, name):
    at_home(f"import {name}")
    assert list(tmp_path.iterdir()) != [], f"{name} has no telemetry any more: export/libraries.py can go"


def test_threads_are_the_cores_that_this_process_may_use(model, monkeypatch):
    asked, core = [], openvino_core()

    def compile_model(model, device, options):
        asked.append(options["INFERENCE_NUM_THREADS"])
        return core.compile_model(model, device, options)

    told = SimpleNamespace(read_model=core.read_model, compile_model=compile_model)
    monkeypatch.setattr(openvino_session, "openvino_core", lambda: told)
    monkeypatch.setattr(openvino_session, "available_cores", lambda: 1)
    opened(model, RuntimeConfig("openvino"))
    opened(model, RuntimeConfig("openvino", threads=2))
    assert asked == ["1", "2"]


@pytest.mark.parametrize(("batch", "sizes"), [(None, [16, 16, 8]), (30, [30, 10])])
def test_a_torch_member_runs_some_images_at_a_time(batch, sizes):
    import torch

    from ensemble.models.torch_runner import torch_runner

    seen = []

    class Mean(torch.nn.Module):
        preprocess_config = PREPROCESS_CONFIG

        def forward(self, pixels):
            seen.append(len(pixels))
            return pixels.float().mean(dim=(1, 2, 3))

    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    logits = torch_runner("mean", Mean(), "cpu", batch=batch or TORCH_BATCH).run(pixels)
    assert seen == sizes
    np.testing.assert_allclose(logits, pixels.mean(axis=(1, 2, 3)), rtol=1e-5)


def test_a_ctrl_c_after_a_model_was_dropped_in_another_thread_is_an_interrupt(model):
    """OpenVINO takes the main thread's signal stack away with its plugin, wherever that ends."""
    assert run_python("-c", INTERRUPTED, model).stdout == "interrupted\n"
