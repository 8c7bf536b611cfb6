"""Processor, GPU and installed runtime libraries of this machine. No torch, no NumPy."""

import ctypes
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

ONNX_RUNTIME = ("onnxruntime-gpu", "onnxruntime")  # the second where the first has no wheel
LIBRARIES: Mapping[str, Sequence[Sequence[str]]] = {
    "torch": [("torch",)],
    "openvino": [("openvino",)],
    "tensorrt": [ONNX_RUNTIME, ("tensorrt",)],
}
# flags in /proc/cpuinfo
NATIVE_BF16 = {"amx_bf16", "avx512_bf16"}
NATIVE_INT8 = {"amx_int8", "avx512_vnni", "avx_vnni"}
# CUdevice_attribute in cuda.h: the two parts of the compute capability
NAME_BYTES, MAJOR, MINOR = 256, 75, 76


def version(runtime: str) -> str:
    """Names and versions of the libraries behind a runtime; empty if none is installed."""
    installed = []
    for names in LIBRARIES.get(runtime, [ONNX_RUNTIME]):
        for name in names:
            with suppress(metadata.PackageNotFoundError):
                installed.append(f"{name} {metadata.version(name)}")
                break
    return ", ".join(installed)


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


def has_native(instructions: set[str]) -> bool:
    """Whether the processor has one of these instruction sets; True where the system does not list them."""
    flags = processor()[1]
    return flags is None or bool(flags & instructions)


def find_gpu() -> tuple[str, tuple[int, int]]:
    """Name and compute capability (major, minor) of the first NVIDIA GPU, asked of its driver; "" if there is none."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        with suppress(OSError):
            driver = ctypes.CDLL(library)
            count, name = ctypes.c_int(0), ctypes.create_string_buffer(NAME_BYTES)
            if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
                break
            driver.cuDeviceGetName(name, NAME_BYTES, 0)
            major, minor = ctypes.c_int(0), ctypes.c_int(0)
            driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, 0)
            driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, 0)
            return name.value.decode("utf-8", "replace") or "NVIDIA GPU", (major.value, minor.value)
    return "", (0, 0)
