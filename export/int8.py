"""An exported member in int8, as pairs of QuantizeLinear and DequantizeLinear in an ONNX file. Needs nncf and onnx."""

import contextlib
import io
from collections.abc import Collection
from pathlib import Path

import numpy as np

from ensemble.errors import ArtifactError
from export.libraries import load_nncf


def write_int8(source: Path, target: Path, pixels: np.ndarray, kept: Collection[str] = ()) -> None:
    """Quantize an fp32 file by the ranges that its values have on `pixels`, uint8 [N, S, S, 3].

    Weights are int8 with a scale a channel, activations 8 bits with a scale a tensor; nodes that
    are named in `kept` and what is no product stay fp32. Pixels and logits keep their types.
    """
    nncf = load_nncf()
    import onnx

    model = onnx.load(source)
    name = model.graph.input[0].name
    images = nncf.Dataset([{name: pixels[row : row + 1]} for row in range(len(pixels))])
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        try:
            quantized = nncf.quantize(
                model,
                images,
                subset_size=len(pixels),
                ignored_scope=nncf.IgnoredScope(names=sorted(kept)) if kept else None,
            )
        except (RuntimeError, ValueError) as error:
            line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ArtifactError(f"{source.name} cannot be quantized: {line}") from error
    target.unlink(missing_ok=True)  # it may be a link to the older bundle's
    onnx.save(quantized, target)
