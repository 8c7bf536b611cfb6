"""An exported member in int8, as pairs of QuantizeLinear and DequantizeLinear in an ONNX file. Needs onnx."""

import contextlib
import io
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.core.errors import ArtifactError, UnavailableError
from export.bundle.precision_search import PRODUCTS
from export.runtimes import devices, libraries

# a bound of these before the next product is the bound of its 8 bits
BOUNDS = ("Clip", "Relu")
SUM_PRODUCTS = ("Gemm", "MatMul")


def quantizer(symmetric: bool) -> str:
    """Name and version of the library that `write_int8` quantizes with here."""
    if symmetric:
        return devices.version("onnxruntime")
    try:
        libraries.load_nncf()
    except UnavailableError:
        return devices.version("onnxruntime")
    return f"nncf {metadata.version('nncf')}"


def write_int8(
    source: Path, target: Path, pixels: np.ndarray, kept: Collection[str] = (), symmetric: bool = False
) -> None:
    """Quantize an fp32 file by the ranges that its values have on `pixels`, uint8 [N, S, S, 3].

    Weights are int8 with a scale a channel, activations 8 bits with a scale a tensor; nodes that
    are named in `kept` and what is no product stay fp32. Pixels and logits keep their types.
    symmetric: as TensorRT wants it, activations in int8 without zero points, and biases in fp32.
    NNCF quantizes where it is installed; for TensorRT, and elsewhere, ONNX Runtime's own tools.
    """
    target.unlink(missing_ok=True)  # it may be a link to the older bundle's
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars
        try:
            if quantizer(symmetric).startswith("nncf"):
                _by_nncf(source, target, pixels, sorted(kept))
            else:
                _by_onnxruntime(source, target, pixels, sorted(kept), symmetric)
        except Exception as error:  # ONNX Runtime's own share no public base
            raise ArtifactError(f"{source.name} cannot be quantized: {libraries.runtime_error_line(error)}") from error


def _by_nncf(source: Path, target: Path, pixels: np.ndarray, kept: list[str]) -> None:
    import onnx

    nncf = libraries.load_nncf()
    model = onnx.load(source)
    name = model.graph.input[0].name
    images = nncf.Dataset([{name: pixels[row : row + 1]} for row in range(len(pixels))])
    scope = nncf.IgnoredScope(names=kept) if kept else None
    onnx.save(nncf.quantize(model, images, subset_size=len(pixels), ignored_scope=scope), target)


def _by_onnxruntime(source: Path, target: Path, pixels: np.ndarray, kept: list[str], symmetric: bool) -> None:
    """Its calibration adds the least and the largest of each value to the graph, so that no value itself is kept."""
    libraries.load_onnxruntime()
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    model = onnx.load(source)
    add_pre_process_metadata(model)  # else it advises, on standard error, what fusing of operators would do
    # the sums of a MatMul go on in fp32, to what is no product; so do all for TensorRT, which fuses by its own rules
    unbounded = PRODUCTS if symmetric else SUM_PRODUCTS
    quantization.quantize_static(
        model,
        target,
        _Images(model.graph.input[0].name, pixels),
        op_types_to_quantize=[*PRODUCTS, *(() if symmetric else BOUNDS)],
        nodes_to_exclude=kept,
        per_channel=True,
        activation_type=quantization.QuantType.QInt8 if symmetric else quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": symmetric,
            "OpTypesToExcludeOutputQuantization": list(unbounded),
            "QuantizeBias": False,
        },
    )


class _Images:
    """A CalibrationDataReader of one image a time: that class is a base for what has `get_next`."""

    def __init__(self, name: str, pixels: np.ndarray) -> None:
        self.batches: Iterator[dict[str, Any]] = ({name: pixels[row : row + 1]} for row in range(len(pixels)))

    def get_next(self) -> dict[str, Any] | None:
        """The next image, None after the last."""
        return next(self.batches, None)
