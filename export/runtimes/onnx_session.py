"""ONNX Runtime sessions: its CPU, CUDA and TensorRT providers.

What every runtime does with a pile of images: batches, the last one filled up where a shape is fixed.
"""

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


def padded(pixels: np.ndarray, batch: int) -> np.ndarray:
    """1 to `batch` images as a contiguous array of just `batch`, its last image repeated."""
    missing = batch - len(pixels)
    return np.ascontiguousarray(np.concatenate([pixels, pixels[-1:].repeat(missing, axis=0)]) if missing else pixels)


PROVIDERS = {
    "onnxruntime": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
CUDA_REMEDY = "run: pip install 'manyeyes[cuda]', or use --device cpu"
REMEDIES = {"cuda": CUDA_REMEDY, "tensorrt": "run: pip install tensorrt, or use --runtime cuda"}


def open_session(path: Path, size: int, setting: RuntimeConfig) -> Run:
    """Pixels uint8 [N, size, size, 3] -> float32 logits [N], in a session of its own."""
    session = _session(path, size, setting)
    if setting.runtime in ON_GPU:
        return _bound(session, size, setting.batch)

    def run(pixels: np.ndarray) -> np.ndarray:
        logits = np.empty(len(pixels), dtype=np.float32)
        for start in range(0, len(pixels), setting.batch):
            part = np.ascontiguousarray(pixels[start : start + setting.batch])
            logits[start : start + len(part)] = session.run(["logit"], {"pixels": part})[0]
        return logits

    return run


def providers(path: Path, size: int, setting: RuntimeConfig) -> list[tuple[str, dict[str, str]]]:
    """What a session is asked for, with options: the setting's provider, then those it leaves nodes to."""
    cpu = (PROVIDERS["onnxruntime"], dict[str, str]())
    # the first run of each shape tries convolutions, so all batches have one shape
    cuda = (PROVIDERS["cuda"], {"device_id": "0", "use_tf32": "0"})
    if setting.runtime == "onnxruntime":
        return [cpu]
    if setting.runtime == "cuda":
        return [cuda, cpu]
    shape = f"pixels:{setting.batch}x{size}x{size}x3"
    folder = engine_folder(path, setting)
    options = {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder.parent),
        # in int8 what is no product, and what was kept, is computed in fp16; the file's own scales need no table
        "trt_int8_enable": str(int(setting.precision == "int8")),
        "trt_fp16_enable": str(int(setting.precision in ("fp16", "int8"))),
        "trt_bf16_enable": str(int(setting.precision == "bf16")),
        "trt_layer_norm_fp32_fallback": "1",
        **{f"trt_profile_{which}_shapes": shape for which in ("min", "opt", "max")},
    }
    return [(PROVIDERS["tensorrt"], options), cuda, cpu]


def engine_folder(path: Path, setting: RuntimeConfig) -> Path:
    """Where TensorRT keeps its engine of a file at this precision and batch, on this GPU, by these libraries."""
    key = [artifacts.file_sha256(path), find_gpu(), version("tensorrt"), setting.precision, setting.batch]
    return artifacts.cache_path() / "engines" / artifacts.json_sha256(key)[:32]


def engine_is_built(path: Path, setting: RuntimeConfig) -> bool:
    """Whether opening a TensorRT session takes seconds, not minutes."""
    return any(engine_folder(path, setting).glob("*.engine"))


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
    """Load the libraries of NVIDIA's Python packages, where they are; what is missing is told by the session."""
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # products in TF32 are not fp32
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
    with contextlib.suppress(ImportError):
        importlib.import_module("tensorrt")  # it lies outside the folders that are searched


def _session(path: Path, size: int, setting: RuntimeConfig) -> Any:
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; what matters of the rest is checked below
    options.intra_op_num_threads = setting.threads or available_cores()
    # a thread that waits by spinning takes the core from those that decode
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = providers(path, size, setting)
    if setting.runtime in ON_GPU:
        _preload(onnxruntime)
    if setting.runtime == "tensorrt":
        artifacts.ensure_folder(Path(wanted[0][1]["trt_engine_cache_path"]))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it goes on without a provider
            session = onnxruntime.InferenceSession(path, options, providers=wanted)
    except Exception as error:  # its own exceptions share no public base
        if out_of_memory(error):
            raise
        raise ArtifactError(f"{path} cannot be run: {runtime_error_line(error)}; run export again") from None
    if session.get_providers()[0] != wanted[0][0]:
        raise UnavailableError(f"ONNX Runtime could not start {setting.runtime}; {REMEDIES[setting.runtime]}")
    session.disable_fallback()
    return session


def _bound(session: Any, size: int, batch: int) -> Run:
    """Batches of one shape through two tensors that stay on the GPU."""
    make = load_onnxruntime().OrtValue.ortvalue_from_shape_and_type
    given = make([batch, size, size, 3], np.uint8, "cuda", 0)
    found = make([batch], np.float32, "cuda", 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input("pixels", given)
    binding.bind_ortvalue_output("logit", found)

    def run(pixels: np.ndarray) -> np.ndarray:
        logits = np.empty(len(pixels), dtype=np.float32)
        for start in range(0, len(pixels), batch):
            part = pixels[start : start + batch]
            given.update_inplace(padded(part, batch))
            binding.synchronize_inputs()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            logits[start : start + len(part)] = found.numpy()[: len(part)]
        return logits

    return run
