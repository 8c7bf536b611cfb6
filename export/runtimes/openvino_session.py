"""Exported members in OpenVINO, on the CPU."""

from collections.abc import Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.core.errors import ArtifactError, UnavailableError
from ensemble.core.parallel import available_cores
from export.runtimes import devices
from export.runtimes.libraries import load_openvino, openvino_core, out_of_memory, runtime_error_line
from export.runtimes.onnx_session import Run, pad_batch
from export.runtimes.settings import RuntimeConfig

TYPES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}


def open_model(path: Path, size: int, config: RuntimeConfig) -> Run:
    """A function from pixels uint8 [N, size, size, 3] to float32 logits [N]; `config.streams` batches run in parallel.

    Every batch has the same shape, so that a row's logit does not depend on the other rows.
    """
    openvino = load_openvino()
    threads = config.threads or available_cores()
    # int8 is in the file's own nodes: this is the precision of its other layers
    other_layers = "bf16" if native_bf16() else "fp32"
    precision = TYPES[other_layers if config.precision == "int8" else config.precision]
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        # a model compiled once for several streams gives other bits in some processes (seen with SwinV2)
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(max(1, threads // config.streams)),
        # pinned threads would share their cores with those that decode
        "ENABLE_CPU_PINNING": "NO",
    }
    try:
        core = openvino_core()
        model = core.read_model(path)
        model.reshape([config.batch, size, size, 3])
        streams = [core.compile_model(model, "CPU", options) for _ in range(config.streams)]
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise ArtifactError(f"{path} cannot be run: {runtime_error_line(error)}; run export again") from None
    granted = streams[0].get_property("INFERENCE_PRECISION_HINT")
    if granted.to_string() != precision:
        raise UnavailableError(
            f"OpenVINO would run {path.name} at {granted.to_string()} instead of {config.precision}: "
            f"this CPU has no {config.precision}; use --precision fp32"
        )
    return _run([openvino.AsyncInferQueue(stream, 1) for stream in streams], config.batch)


@cache
def cpu_capabilities() -> frozenset[str]:
    """OpenVINO's names of what its CPU plugin computes in: FP32, INT8, BF16, FP16; empty where it is not installed."""
    try:
        return frozenset(openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    except (ImportError, RuntimeError):
        return frozenset()


def native_bf16() -> bool:
    """Whether OpenVINO computes in bf16 here; it also names BF16 where AVX-512 only imitates it, slower than fp32."""
    return "BF16" in cpu_capabilities() and devices.has_native(devices.NATIVE_BF16)


def _run(queues: Sequence[Any], batch: int) -> Run:
    def run(pixels: np.ndarray) -> np.ndarray:
        logits = np.empty(len(pixels), dtype=np.float32)

        def store(request: Any, start: int) -> None:
            part = logits[start : start + batch]
            part[:] = request.get_output_tensor().data[: len(part)]

        starts = range(0, len(pixels), batch)
        # referenced until the queues are done
        parts = [pad_batch(pixels[start : start + batch], batch) for start in starts]
        for queue in queues:
            queue.set_callback(store)
        try:
            for start, part, queue in zip(starts, parts, cycle(queues), strict=False):
                queue.start_async([part], start, share_inputs=True)
        finally:
            for queue in queues:
                queue.wait_all()
        return logits

    return run
