"""Exported members in ONNX Runtime, by its CPU, CUDA or TensorRT provider."""

import contextlib
import ctypes
import importlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, UnavailableError
from ensemble.core.parallel import available_cores
from export.runtimes.devices import find_gpu, version
from export.runtimes.libraries import load_onnxruntime, out_of_memory, runtime_error_line
from export.runtimes.settings import ON_GPU, RuntimeConfig

Run = Callable[[np.ndarray], np.ndarray]  # uint8 [N, S, S, 3] -> float32 [N]


PROVIDERS = {
    "onnxruntime": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
CUDA_REMEDY = "run: pip install 'manyeyes[cuda]', or use --device cpu"
REMEDIES = {"cuda": CUDA_REMEDY, "tensorrt": "run: pip install tensorrt, or use --runtime cuda"}


def pad_batch(pixels: np.ndarray, batch: int) -> np.ndarray:
    """1 to `batch` images as a contiguous array of exactly `batch`, the last image repeated."""
    missing = batch - len(pixels)
    return np.ascontiguousarray(np.concatenate([pixels, pixels[-1:].repeat(missing, axis=0)]) if missing else pixels)


def open_session(path: Path, size: int, config: RuntimeConfig) -> Run:
    """A function from pixels uint8 [N, size, size, 3] to float32 logits [N], in a session of its own."""
    session = _session(path, size, config)
    run_gpu = _run_on_gpu(session, size, config.batch) if config.runtime in ON_GPU else None

    def run_cpu(part: np.ndarray) -> Any:
        return session.run(["logit"], {"pixels": np.ascontiguousarray(part)})[0]

    def run(pixels: np.ndarray) -> np.ndarray:
        logits = np.empty(len(pixels), dtype=np.float32)
        for start in range(0, len(pixels), config.batch):
            part = pixels[start : start + config.batch]
            logits[start : start + len(part)] = (run_gpu or run_cpu)(part)
        return logits

    return run


def providers(path: Path, size: int, config: RuntimeConfig) -> list[tuple[str, dict[str, str]]]:
    """A session's providers with their options: the config's first, then those that run what it does not support."""
    cpu = (PROVIDERS["onnxruntime"], dict[str, str]())
    # the first run of each shape tries convolutions, so all batches have one shape
    cuda = (PROVIDERS["cuda"], {"device_id": "0", "use_tf32": "0"})
    if config.runtime == "onnxruntime":
        return [cpu]
    if config.runtime == "cuda":
        return [cuda, cpu]
    shape = f"pixels:{config.batch}x{size}x{size}x3"
    folder = engine_folder(path, config)
    trt_options = {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder.parent),
        # layers of an int8 file that are not quantized are computed in fp16; its own scales need no calibration table
        "trt_int8_enable": str(int(config.precision == "int8")),
        "trt_fp16_enable": str(int(config.precision in ("fp16", "int8"))),
        "trt_bf16_enable": str(int(config.precision == "bf16")),
        "trt_layer_norm_fp32_fallback": "1",
        **{f"trt_profile_{which}_shapes": shape for which in ("min", "opt", "max")},
    }
    return [(PROVIDERS["tensorrt"], trt_options), cuda, cpu]


def engine_folder(path: Path, config: RuntimeConfig) -> Path:
    """The cache folder of TensorRT's engine for a file, precision, batch, GPU and library versions."""
    key = [artifacts.file_sha256(path), find_gpu(), version("tensorrt"), config.precision, config.batch]
    return artifacts.cache_path() / "engines" / artifacts.json_sha256(key)[:32]


def engine_is_built(path: Path, config: RuntimeConfig) -> bool:
    """Whether the engine is in the cache, so that opening the session takes seconds and not minutes."""
    return any(engine_folder(path, config).glob("*.engine"))


def tensorrt_loads() -> bool:
    """Whether the TensorRT that this ONNX Runtime was built for can be loaded."""
    onnxruntime = load_onnxruntime()
    _preload(onnxruntime)
    for provider in (Path(onnxruntime.__file__).parent / "capi").glob("*onnxruntime_providers_tensorrt.*"):
        named = re.search(rb"libnvinfer\.so\.\d+|nvinfer_\d+\.dll", provider.read_bytes())
        with contextlib.suppress(OSError):
            return named is not None and bool(ctypes.CDLL(named[0].decode()))
    return False


def _preload(onnxruntime: Any) -> None:
    """Load the libraries of NVIDIA's Python packages, where they are installed; the session reports what is missing."""
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # TF32 products are less exact than fp32
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
    with contextlib.suppress(ImportError):
        importlib.import_module("tensorrt")  # preload_dlls does not search its folder


def _session(path: Path, size: int, config: RuntimeConfig) -> Any:
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; what matters of the rest is checked below
    options.intra_op_num_threads = config.threads or available_cores()
    # a thread that waits by spinning takes the core from those that decode
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    requested = providers(path, size, config)
    if config.runtime in ON_GPU:
        _preload(onnxruntime)
    if config.runtime == "tensorrt":
        artifacts.ensure_folder(Path(requested[0][1]["trt_engine_cache_path"]))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it continues without a provider
            session = onnxruntime.InferenceSession(path, options, providers=requested)
    except Exception as error:  # its own exceptions share no public base
        if out_of_memory(error):
            raise
        raise ArtifactError(f"{path} cannot be run: {runtime_error_line(error)}; run export again") from None
    if session.get_providers()[0] != requested[0][0]:
        raise UnavailableError(f"ONNX Runtime could not start {config.runtime}; {REMEDIES[config.runtime]}")
    session.disable_fallback()
    return session


def _run_on_gpu(session: Any, size: int, batch: int) -> Run:
    """Run a batch, padded to one shape, through an input and an output tensor that stay on the GPU (IO binding)."""
    make = load_onnxruntime().OrtValue.ortvalue_from_shape_and_type
    input_value = make([batch, size, size, 3], np.uint8, "cuda", 0)
    output_value = make([batch], np.float32, "cuda", 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input("pixels", input_value)
    binding.bind_ortvalue_output("logit", output_value)

    def run_batch(part: np.ndarray) -> Any:
        input_value.update_inplace(pad_batch(part, batch))
        binding.synchronize_inputs()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return output_value.numpy()[: len(part)]

    return run_batch
