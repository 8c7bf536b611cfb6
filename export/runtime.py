"""What runs a member: ONNX Runtime or torch, each as a `Runner`. A device that was asked for is never replaced."""

import ctypes
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ensemble.contract import ImageContract
from ensemble.errors import ArtifactError, UnavailableError
from ensemble.score import Runner

if TYPE_CHECKING:
    import onnxruntime

    from ensemble.backbone import Member

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def onnx_runner(name: str, path: Path, contract: ImageContract, device: str) -> Runner:
    """An exported member in ONNX Runtime on `device`, cpu or cuda."""
    session = _session(path, device)

    def run(pixels: np.ndarray) -> np.ndarray:
        logits: np.ndarray = session.run(["logit"], {"pixels": np.ascontiguousarray(pixels)})[0]
        return logits

    return Runner(name, contract, run)


def torch_runner(name: str, member: "Member", device: str) -> Runner:
    """A torch member on `device`, cpu or cuda."""
    import torch

    from ensemble.torch_runner import torch_runner as runner

    return runner(name, member, torch.device(device))


def require_torch() -> None:
    """UnavailableError, saying what to do, where the training packages are not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "timm")):
        raise UnavailableError(
            "torch members need the training packages; run: pip install 'manyeyes[train]', or use --onnx"
        )


def choose_device(device: str, onnx: bool) -> str:
    """`auto` as cuda where a GPU and its provider are here, else cpu."""
    if device == "cpu":
        return "cpu"
    if not onnx:
        from ensemble.torch_runner import choose_device as choose

        return choose(device)
    found = _gpu_count() > 0
    if device == "cuda" and not found:
        raise UnavailableError("no NVIDIA GPU was found; use --device cpu, or check the driver with nvidia-smi")
    return "cuda" if found else "cpu"


def _session(path: Path, device: str) -> "onnxruntime.InferenceSession":
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; what matters of the rest is checked below
    if device == "cuda":
        if CUDA not in onnxruntime.get_available_providers():
            raise UnavailableError("this ONNX Runtime has no CUDA; run: pip install 'manyeyes[cuda]', or --device cpu")
        onnxruntime.preload_dlls()
    providers = [CUDA, CPU] if device == "cuda" else [CPU]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # its own exceptions share no public base
        line = str(error).strip().splitlines()[0]
        raise ArtifactError(f"{path} cannot be run: {line}; run export again") from None
    if session.get_providers()[0] != providers[0]:
        raise UnavailableError(
            "ONNX Runtime could not start CUDA; run: pip install 'manyeyes[cuda]', or use --device cpu"
        )
    return session


def _gpu_count() -> int:
    """NVIDIA GPUs by the driver's own count, without torch."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        count = ctypes.c_int(0)
        if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
            return count.value
    return 0
