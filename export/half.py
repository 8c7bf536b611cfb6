"""An exported member in half precision, for the CUDA provider. Needs onnx."""

from pathlib import Path
from typing import Any

# half precision overflows at 65,504, which sums over many values reach
KEPT_FP32 = ("LayerNormalization", "ReduceMean", "Softmax")


def write_half(source: Path, target: Path) -> None:
    """An fp32 file with weights and arithmetic in fp16, but for KEPT_FP32; pixels and logits keep their types."""
    import onnx
    from onnxruntime.transformers import float16

    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *KEPT_FP32]
    model = float16.convert_float_to_float16(onnx.load(source), keep_io_types=True, op_block_list=blocked)
    _join_casts(model.graph)
    target.unlink(missing_ok=True)  # it may be a link to the older bundle's
    onnx.save(model, target)


def _join_casts(graph: Any) -> None:
    """Keep the first of the casts that the converter adds for each reader of one tensor: they have one name."""
    first: dict[str, Any] = {}
    for node in graph.node:
        first.setdefault(node.output[0], node)
    kept = [node for node in graph.node if first[node.output[0]] is node]
    del graph.node[:]
    graph.node.extend(kept)
