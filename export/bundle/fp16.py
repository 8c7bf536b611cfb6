"""Convert an exported member to fp16, for ONNX Runtime's CUDA provider. Needs onnx."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

# fp16 overflows at 65,504, which sums over many values reach
KEPT_FP32 = ("LayerNormalization", "ReduceMean", "Softmax")


def write_fp16(source: Path, target: Path, excluded: Collection[str] = ()) -> None:
    """Write an fp32 file with weights and arithmetic in fp16, except KEPT_FP32 and the nodes named in `excluded`.

    Input and output types stay: uint8 pixels, float32 logits.
    """
    import onnx
    from onnxruntime.transformers import float16

    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *KEPT_FP32]
    model = float16.convert_float_to_float16(
        onnx.load(source), keep_io_types=True, op_block_list=blocked, node_block_list=sorted(excluded)
    )
    _simplify_casts(model.graph)
    target.unlink(missing_ok=True)  # it may be a link to the older bundle's
    onnx.save(model, target)


def _simplify_casts(graph: Any) -> None:
    """Keep one of a tensor's equal casts, which the converter adds for each reader, and connect fp32 nodes directly.

    Between two fp32 nodes it casts to fp16 and back, which rounds.
    """
    first: dict[str, Any] = {}
    nodes = [node for node in graph.node if first.setdefault(node.output[0], node) is node]
    to_fp16 = {node.output[0]: node for node in nodes if node.name.endswith("_cast_to_fp16_node")}
    to_fp32 = [node for node in nodes if node.name.endswith("_cast_to_fp32_node") and node.input[0] in to_fp16]
    exact = {node.output[0]: to_fp16[node.input[0]].input[0] for node in to_fp32}
    remaining = [node for node in nodes if node.output[0] not in exact]
    for node in remaining:
        node.input[:] = [exact.get(name, name) for name in node.input]
    read = {name for node in remaining for name in node.input}
    del graph.node[:]
    graph.node.extend(n for n in remaining if n.output[0] not in to_fp16 or n.output[0] in read)
