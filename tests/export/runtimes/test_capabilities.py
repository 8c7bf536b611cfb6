import ctypes
import sys
from importlib import metadata

import pytest

from export.runtimes import capabilities, devices, openvino_session

CPUINFO = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 {}\n\nprocessor\t: 1\nmodel name\t: another\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CPUINFO.format("amx_bf16"), ("AMD EPYC", {"fpu", "avx2", "amx_bf16"})),
        ("processor : 0\n", ("", None)),
        (None, ("", None)),
    ],
)
def test_the_processor_names_itself(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    name, flags = devices.processor(tmp_path / "cpuinfo")
    assert name.startswith(expected[0])
    assert name != ""
    assert flags == expected[1]


class Driver:
    """As libcuda, with one GPU or none."""

    def __init__(self, count, starts=0):
        self.count, self.starts = count, starts

    def cuInit(self, flags):  # noqa: N802
        return self.starts

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = self.count
        return 0

    def cuDeviceGetName(self, name, length, device):  # noqa: N802
        name.value = b"NVIDIA H100"

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        value._obj.value = {75: 9, 76: 0}[attribute]


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (Driver(1), ("NVIDIA H100", (9, 0))),
        (Driver(0), ("", (0, 0))),
        (Driver(1, starts=100), ("", (0, 0))),
        (None, ("", (0, 0))),
    ],
)
def test_the_driver_says_which_gpu_is_here(monkeypatch, driver, expected):
    def load(name):
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert devices.find_gpu() == expected


@pytest.mark.parametrize(
    ("flags", "names", "lacking"),
    [
        ("avx2", {"FP32", "INT8"}, {"bf16", "fp16", "int8"}),
        ("avx2 avx_vnni", {"FP32", "INT8"}, {"bf16", "fp16"}),
        ("avx512f avx512_vnni", {"FP32", "INT8"}, {"bf16", "fp16"}),
        ("avx512f avx512_vnni", {"FP32"}, {"bf16", "fp16", "int8"}),
        ("avx512f", {"FP32", "BF16"}, {"bf16", "fp16", "int8"}),  # imitated there
        ("avx512f avx512_bf16", {"FP32", "BF16"}, {"fp16", "int8"}),
        ("avx512f amx_bf16 amx_int8", {"FP32", "BF16", "FP16", "INT8"}, set()),
        (None, {"FP32", "FP16", "INT8"}, {"bf16"}),
        (None, set(), {"fp32", "bf16", "fp16", "int8"}),
    ],
)
def test_openvino_counts_for_what_the_cpu_really_multiplies_in(monkeypatch, flags, names, lacking):
    flags = None if flags is None else frozenset(flags.split())
    monkeypatch.setattr(openvino_session, "cpu_capabilities", lambda: frozenset(names))
    monkeypatch.setattr(devices, "processor", lambda: ("a CPU", flags))
    found = capabilities.available().unsupported
    assert {precision for runtime, precision in found if runtime == "openvino"} == lacking


def test_where_openvino_is_not_installed_it_has_no_capabilities(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(openvino_session, "openvino_core", openvino_session.openvino_core.__wrapped__)
    openvino_session.cpu_capabilities.cache_clear()
    assert openvino_session.cpu_capabilities() == frozenset()
    openvino_session.cpu_capabilities.cache_clear()


@pytest.mark.parametrize(
    ("gpu", "providers", "loads", "capability", "cuda", "tensorrt"),
    [
        ("", [], False, 0, "no NVIDIA GPU was found", "no NVIDIA GPU was found"),
        ("H100", [], False, 9, "has no CUDAExecutionProvider; run: pip", "has no TensorrtExecutionProvider"),
        ("H100", ["CUDA", "Tensorrt"], False, 9, None, "TensorRT is not installed; run: pip install tensorrt"),
        ("H100", ["CUDA", "Tensorrt"], True, 9, None, None),
    ],
)
def test_a_gpu_runtime_is_here_when_its_library_loads(monkeypatch, gpu, providers, loads, capability, cuda, tensorrt):
    monkeypatch.setattr(devices, "find_gpu", lambda: (gpu, (capability, 0)))
    names = [f"{name}ExecutionProvider" for name in providers]
    monkeypatch.setattr(capabilities.load_onnxruntime(), "get_available_providers", lambda: names)
    monkeypatch.setattr("export.runtimes.capabilities.tensorrt_loads", lambda: loads)
    unsupported = capabilities.available().unsupported
    for runtime, expected in (("cuda", cuda), ("tensorrt", tensorrt)):
        found = unsupported.get((runtime, "fp32"))
        assert found is expected is None or expected in found
        assert bool(unsupported.get((runtime, "int8"))) == (runtime == "cuda" or tensorrt is not None)


def test_versions_are_those_of_the_packages(monkeypatch):
    installed = {"openvino": "2026.4", "onnxruntime": "1.31", "tensorrt": "10.9"}

    def found(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", found)
    assert devices.version("openvino") == "openvino 2026.4"
    assert devices.version("onnxruntime") == devices.version("cuda") == "onnxruntime 1.31"
    assert devices.version("tensorrt") == "onnxruntime 1.31, tensorrt 10.9"
    assert devices.version("torch") == ""
