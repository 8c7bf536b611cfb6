"""Quantize an exported member to int8, by QuantizeLinear and DequantizeLinear nodes in ONNX. Needs onnx."""

import contextlib
import io
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from ensemble.core.errors import ArtifactError, UnavailableError
from export.runtimes import devices, libraries

# the bounds of these activations become the range of the 8 bits
BOUNDS = ("Clip", "Relu")
SUM_PRODUCTS = ("Gemm", "MatMul")
PRODUCTS = ("Conv", "ConvTranspose", *SUM_PRODUCTS)


def quantizer(symmetric: bool) -> str:
    """Name and version of the library that `write_int8` quantizes with here."""
    if not symmetric:
        with contextlib.suppress(UnavailableError):
            libraries.load_nncf()
            return f"nncf {metadata.version('nncf')}"
    return devices.version("onnxruntime")


def write_int8(
    source: Path, target: Path, pixels: np.ndarray, excluded: Collection[str] = (), symmetric: bool = False
) -> None:
    """Quantize an fp32 file, calibrated by the ranges of its values on `pixels`, uint8 [N, S, S, 3].

    Weights are int8 with a scale for each channel, activations 8 bits with a scale for each tensor; nodes
    named in `excluded` and nodes that are not in PRODUCTS stay fp32. Input and output types stay.
    symmetric: as TensorRT needs it, activations in int8 without zero points, and biases in fp32.
    NNCF quantizes where it is installed; for TensorRT, and without NNCF, ONNX Runtime's own tools.
    """
    target.unlink(missing_ok=True)  # it may be a link to the older bundle's
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        try:
            if quantizer(symmetric).startswith("nncf"):
                _by_nncf(source, target, pixels, sorted(excluded))
            else:
                _by_onnxruntime(source, target, pixels, sorted(excluded), symmetric)
        except Exception as error:  # ONNX Runtime's own share no public base
            raise ArtifactError(f"{source.name} cannot be quantized: {libraries.runtime_error_line(error)}") from error


def _by_nncf(source: Path, target: Path, pixels: np.ndarray, excluded: list[str]) -> None:
    import onnx

    nncf = libraries.load_nncf()
    model = onnx.load(source)
    name = model.graph.input[0].name
    images = nncf.Dataset([{name: pixels[row : row + 1]} for row in range(len(pixels))])
    scope = nncf.IgnoredScope(names=excluded) if excluded else None
    onnx.save(nncf.quantize(model, images, subset_size=len(pixels), ignored_scope=scope), target)


def _by_onnxruntime(source: Path, target: Path, pixels: np.ndarray, excluded: list[str], symmetric: bool) -> None:
    """Its calibration computes minimum and maximum of each tensor in the graph, so that no tensor is stored."""
    libraries.load_onnxruntime()
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(source)
    name = model.graph.input[0].name
    batches = ({name: pixels[row : row + 1]} for row in range(len(pixels)))
    add_pre_process_metadata(model)  # else it advises, on standard error, to fuse operators
    # outputs of a MatMul stay fp32 for the nodes after it; for TensorRT all do, since it fuses by its own rules
    unquantized_outputs = PRODUCTS if symmetric else SUM_PRODUCTS
    quantization.quantize_static(
        model,
        target,
        SimpleNamespace(get_next=lambda: next(batches, None)),  # as a CalibrationDataReader
        op_types_to_quantize=[*PRODUCTS, *(() if symmetric else BOUNDS)],
        nodes_to_exclude=excluded,
        per_channel=True,
        activation_type=quantization.QuantType.QInt8 if symmetric else quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": symmetric,
            "OpTypesToExcludeOutputQuantization": list(unquantized_outputs),
            "QuantizeBias": False,
        },
    )
