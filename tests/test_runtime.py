import re

import numpy as np
import pytest
from helpers import CONTRACT, write_onnx

from ensemble.errors import ArtifactError, UnavailableError
from export import runtime

without_gpu = pytest.mark.skipif(runtime._gpu_count() > 0, reason="a GPU is here")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_onnx(tmp_path_factory.mktemp("runtime") / "tiny.onnx", 4)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_model_runs_at_any_batch_size(model, count):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    runner = runtime.onnx_runner("tiny", model, CONTRACT, "cpu")
    logits = runner.run(pixels)
    assert (logits.dtype, logits.shape) == (np.float32, (count,))
    np.testing.assert_allclose(logits, 4 * (pixels.mean(axis=(1, 2, 3)) / 255 - 0.5), rtol=1e-4, atol=1e-6)


def test_pixels_need_not_lie_in_order(model):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4, 3), dtype=np.uint8).transpose(2, 0, 1, 3)
    runner = runtime.onnx_runner("tiny", model, CONTRACT, "cpu")
    np.testing.assert_array_equal(runner.run(pixels), runner.run(pixels.copy()))


@pytest.mark.parametrize("onnx", [True, False])
@without_gpu
def test_cuda_without_a_gpu_is_refused_and_auto_is_the_cpu(onnx):
    with pytest.raises(UnavailableError, match=r"; use --device cpu, or check the driver"):
        runtime.choose_device("cuda", onnx)
    assert runtime.choose_device("auto", onnx) == "cpu"


@pytest.mark.parametrize("onnx", [True, False])
def test_the_cpu_is_there_for_the_asking(onnx):
    assert runtime.choose_device("cpu", onnx) == "cpu"


@without_gpu
def test_a_session_never_falls_back_to_the_cpu(model):
    with pytest.raises(UnavailableError, match="CUDA"):
        runtime.onnx_runner("tiny", model, CONTRACT, "cuda")


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_damaged_file_is_refused_by_name(model, tmp_path, cut):
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(model.read_bytes()[:cut])
    with pytest.raises(ArtifactError, match=rf"^{re.escape(str(damaged))} cannot be run: .*; run export again$"):
        runtime.onnx_runner("tiny", damaged, CONTRACT, "cpu")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ArtifactError, match=r"gone\.onnx cannot be run: .*; run export again"):
        runtime.onnx_runner("tiny", tmp_path / "gone.onnx", CONTRACT, "cpu")
