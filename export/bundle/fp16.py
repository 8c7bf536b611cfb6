"""An exported member in half precision, for the CUDA provider. Needs onnx."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

# half precision overflows at 65,504, which sums over many values reach
KEPT_FP32 = ("LayerNormalization", "ReduceMean", "Softmax")


def write_half(source: Path, target: Path, kept: Collection[str] = ()) -> None:
    """An fp32 file with weights and arithmetic in fp16, but for KEPT_FP32 and the nodes that are named in `kept`.

    Pixels and logits keep their types.
    """
    import onnx
    from onnxruntime.transformers import float16

    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *KEPT_FP32]
    model = float16.convert_float_to_float16(
        onnx.load(source), keep_io_types=True, op_block_list=blocked, node_block_list=sorted(kept)
    )
    _join_casts(model.graph)
    _skip_round_trips(model.graph)
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


def _skip_round_trips(graph: Any) -> None:
    """Hand what one node computes in fp32 to another in fp32 as it is: the converter rounds it to fp16 in between."""
    to_half = {node.output[0]: node for node in graph.node if node.name.endswith("_cast_to_fp16_node")}
    back = [node for node in graph.node if node.name.endswith("_cast_to_fp32_node") and node.input[0] in to_half]
    exact = {node.output[0]: to_half[node.input[0]].input[0] for node in back}
    left = [node for node in graph.node if node.output[0] not in exact]
    for node in left:
        node.input[:] = [exact.get(name, name) for name in node.input]
    read = {name for node in left for name in node.input}
    kept = [node for node in left if node.output[0] not in to_half or node.output[0] in read]
    del graph.node[:]
    graph.node.extend(kept)
