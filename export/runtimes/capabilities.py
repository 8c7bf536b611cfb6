"""Which (runtime, precision) this machine cannot run, and why. No torch."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field

from ensemble.core.parallel import available_cores
from export.runtimes import devices, openvino_session
from export.runtimes.libraries import load_onnxruntime
from export.runtimes.onnx_session import CUDA_REMEDY, tensorrt_loads
from export.runtimes.settings import ON_GPU, PRECISIONS

NO_INT8 = "this CPU has no instructions for int8 (VNNI or AMX); use fp32, or a machine that has them"


@dataclass(frozen=True)
class Machine:
    """Name of its processor, the cores that this process may use, and name of its GPU ("" for none).

    unsupported: why a (runtime, precision) cannot be computed here, and what to do; all others can.
    """

    cpu: str
    cores: int
    gpu: str = ""
    unsupported: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def where(self, runtime: str) -> str:
        """The processor or GPU that a runtime uses, in words."""
        return self.gpu if runtime in ON_GPU else f"{self.cores} core{'s' * (self.cores > 1)} of {self.cpu}"


def available() -> Machine:
    """This machine. A runtime counts as available when its library loads."""
    gpu, capability = devices.find_gpu()
    reasons = {
        "torch": dict.fromkeys(PRECISIONS[1:], "torch members are run at fp32; for less export a bundle")
        if importlib.util.find_spec("torch")
        else _all_unsupported("torch is not installed; run: pip install 'manyeyes[train]'"),
        "onnxruntime": dict.fromkeys(("bf16", "fp16"), "its CPU provider computes in fp32 and int8")
        | _int8_unsupported(),
        "openvino": _openvino_unsupported(),
        "cuda": _cuda_unsupported(gpu),
        "tensorrt": _tensorrt_unsupported(gpu, capability),
    }
    unsupported = {
        (runtime, precision): reason
        for runtime, by_precision in reasons.items()
        for precision, reason in by_precision.items()
    }
    return Machine(devices.processor()[0], available_cores(), gpu, unsupported)


def _all_unsupported(reason: str) -> dict[str, str]:
    return dict.fromkeys(PRECISIONS, reason)


def _int8_unsupported() -> dict[str, str]:
    # without them 8-bit products are sums of 16 bits, which may overflow
    return {} if devices.has_native(devices.NATIVE_INT8) else {"int8": NO_INT8}


def _openvino_unsupported() -> dict[str, str]:
    supported = openvino_session.cpu_capabilities()
    if not supported:
        return _all_unsupported("OpenVINO is not installed, or has no wheel for this system; use --runtime onnxruntime")
    computed = {"bf16": openvino_session.native_bf16(), "fp16": "FP16" in supported}
    unsupported = {key: f"this CPU has no {key}; use --precision fp32" for key, known in computed.items() if not known}
    return unsupported | (_int8_unsupported() if "INT8" in supported else {"int8": NO_INT8})


def _cuda_unsupported(gpu: str, provider: str = "CUDAExecutionProvider") -> dict[str, str]:
    if not gpu:
        return _all_unsupported("no NVIDIA GPU was found; use --device cpu, or check the driver with nvidia-smi")
    if provider not in load_onnxruntime().get_available_providers():
        return _all_unsupported(f"this ONNX Runtime has no {provider}; {CUDA_REMEDY}")
    why = "ONNX Runtime's CUDA provider runs fp32 and fp16; use --precision fp16, or --runtime tensorrt"
    return dict.fromkeys(("bf16", "int8"), why)


def _tensorrt_unsupported(gpu: str, capability: tuple[int, int]) -> dict[str, str]:
    if reason := _cuda_unsupported(gpu, "TensorrtExecutionProvider").get("fp32"):
        return _all_unsupported(reason)
    if not tensorrt_loads():
        return _all_unsupported("TensorRT is not installed; run: pip install tensorrt, or use --runtime cuda")
    return {} if capability >= (8, 0) else {"bf16": "this GPU has no bf16; use --precision fp16"}
