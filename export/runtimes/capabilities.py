"""What this machine has to run members, and what it lacks. No torch."""

import ctypes
import importlib.util
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from ensemble.core.parallel import available_cores
from export.runtimes.libraries import load_onnxruntime
from export.runtimes.settings import ON_GPU, PRECISIONS, RUNTIMES

ONNX_RUNTIME = ("onnxruntime-gpu", "onnxruntime")  # the second where the first has no wheel
LIBRARIES: Mapping[str, Sequence[Sequence[str]]] = {
    "torch": [("torch",)],
    "openvino": [("openvino",)],
    "tensorrt": [ONNX_RUNTIME, ("tensorrt",)],
}
# flags in /proc/cpuinfo
NATIVE_BF16 = {"amx_bf16", "avx512_bf16"}
NATIVE_INT8 = {"amx_int8", "avx512_vnni", "avx_vnni"}
NO_INT8 = "this CPU has no instructions for int8 (VNNI or AMX); use fp32, or a machine that has them"
CUDA_REMEDY = "run: pip install 'manyeyes[cuda]', or use --device cpu"
NAME_LENGTH, MAJOR, MINOR = 256, 75, 76  # cuda.h: CUdevice_attribute


@dataclass(frozen=True)
class Machine:
    """Its processor, the cores that this process may use, and its GPU ("" for none).

    lacks: why a (runtime, precision) cannot be computed here, and what to do; all others can.
    """

    cpu: str
    cores: int
    gpu: str = ""
    lacks: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def where(self, runtime: str) -> str:
        """The part of it that a runtime uses, in words."""
        return self.gpu if runtime in ON_GPU else f"{self.cores} core{'s' * (self.cores > 1)} of {self.cpu}"


def available() -> Machine:
    """What is here. A runtime counts as here when its library loads."""
    cpu, flags = processor()
    gpu, capability = find_gpu()
    reasons = {
        "torch": _torch_lacks(),
        "onnxruntime": _onnxruntime_lacks(flags),
        "openvino": _openvino_lacks(flags),
        "cuda": _cuda_lacks(gpu),
        "tensorrt": _tensorrt_lacks(gpu, capability),
    }
    lacks = {
        (runtime, precision): reasons[runtime].get(precision) or reasons[runtime].get("all")
        for runtime in RUNTIMES
        for precision in PRECISIONS
    }
    return Machine(cpu, available_cores(), gpu, {key: reason for key, reason in lacks.items() if reason})


def version(runtime: str) -> str:
    """Names and versions of the libraries behind a runtime; empty if none is installed."""
    found = [_installed(names) for names in LIBRARIES.get(runtime, [ONNX_RUNTIME])]
    return ", ".join(filter(None, found))


def _installed(names: Sequence[str]) -> str:
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return ""


def processor(file: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str] | None]:
    """Name of the processor, and its instruction sets (None where the system does not list them)."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    plain = platform.processor() or platform.machine() or "an unnamed processor"
    return name[1].strip() if name else plain, frozenset(flags[1].split()) if flags else None


def find_gpu() -> tuple[str, tuple[int, int]]:
    """Name and compute capability of the first NVIDIA GPU by the driver's own word; "" if there is none."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        with suppress(OSError):
            return _first_gpu(ctypes.CDLL(library))
    return "", (0, 0)


def _first_gpu(driver: ctypes.CDLL) -> tuple[str, tuple[int, int]]:
    count, name = ctypes.c_int(0), ctypes.create_string_buffer(NAME_LENGTH)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "", (0, 0)
    driver.cuDeviceGetName(name, NAME_LENGTH, 0)
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, 0)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, 0)
    return name.value.decode("utf-8", "replace") or "NVIDIA GPU", (major.value, minor.value)


def _torch_lacks() -> dict[str, str]:
    if importlib.util.find_spec("torch") is None:
        return {"all": "torch is not installed; run: pip install 'manyeyes[train]'"}
    return dict.fromkeys(PRECISIONS[1:], "torch members are run at fp32; for less export a bundle")


def _onnxruntime_lacks(flags: frozenset[str] | None) -> dict[str, str]:
    lacks = dict.fromkeys(("bf16", "fp16"), "its CPU provider computes in fp32 and int8")
    return lacks | _int8_lacks(flags)


def _int8_lacks(flags: frozenset[str] | None) -> dict[str, str]:
    # without them 8-bit products are sums of 16 bits, which may overflow
    return {"int8": NO_INT8} if flags is not None and not flags & NATIVE_INT8 else {}


def _openvino_lacks(flags: frozenset[str] | None) -> dict[str, str]:
    from export.runtimes.openvino_session import capabilities

    found = capabilities()
    if not found:
        return {"all": "OpenVINO is not installed, or has no wheel for this system; use --runtime onnxruntime"}
    lacks = {
        precision: f"this CPU has no {precision}; use --precision fp32"
        for precision in ("bf16", "fp16")
        if precision.upper() not in found
    }
    # OpenVINO also names bf16 where AVX-512 can only imitate it, which is slower than fp32
    if flags is not None and not flags & NATIVE_BF16:
        lacks["bf16"] = "this CPU has no bf16; use --precision fp32"
    if "INT8" not in found:
        lacks["int8"] = NO_INT8
    return lacks | _int8_lacks(flags)


def _cuda_lacks(gpu: str, provider: str = "CUDAExecutionProvider") -> dict[str, str]:
    if not gpu:
        return {"all": "no NVIDIA GPU was found; use --device cpu, or check the driver with nvidia-smi"}
    if provider not in load_onnxruntime().get_available_providers():
        return {"all": f"this ONNX Runtime has no {provider}; {CUDA_REMEDY}"}
    why = "ONNX Runtime's CUDA provider runs fp32 and fp16; use --precision fp16, or --runtime tensorrt"
    return dict.fromkeys(("bf16", "int8"), why)


def _tensorrt_lacks(gpu: str, capability: tuple[int, int]) -> dict[str, str]:
    if reason := _cuda_lacks(gpu, "TensorrtExecutionProvider").get("all"):
        return {"all": reason}
    from export.runtimes.onnx_session import tensorrt_loads

    if not tensorrt_loads():
        return {"all": "TensorRT is not installed; run: pip install tensorrt, or use --runtime cuda"}
    return {} if capability >= (8, 0) else {"bf16": "this GPU has no bf16; use --precision fp16"}
