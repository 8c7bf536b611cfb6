"""Convert a trained member to one ONNX file: uint8 pixels [N, S, S, 3] in, float32 logit [N] out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxscript import ir
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ensemble.core.errors import ArtifactError, error_line
from ensemble.models.backbone import Member


def convert(member: Member, path: Path) -> None:
    """Write the member, mean and std inside, with a dynamic batch and a fixed size.

    Raises ArtifactError if the exporter or onnx.checker refuses it.
    """
    size = member.preprocess_config.size
    # Two images: the exporter would freeze a batch of one into the graph.
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    try:
        with _plain_attention(member.backbone):
            program: Any = torch.onnx.export(
                member.eval().cpu(),
                (example,),
                input_names=["pixels"],
                output_names=["logit"],
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1, max=65536)}},
                dynamo=True,
                verbose=False,
            )
        _flatten_positions(program.model)
        forget_paths(program.model)
        program.save(path, external_data=False)
        onnx.checker.check_model(str(path), full_check=True)
    except (RuntimeError, ValueError, TypeError, onnx.checker.ValidationError) as error:
        raise ArtifactError(f"the member cannot be converted to ONNX: {error_line(error, first=True)}") from error


def _flatten_positions(model: ir.Model) -> None:
    """Transpose [N, C, H, W] to [N, H, W, C] before a norm by way of [N, C, H * W]: the same values.

    OpenVINO keeps such activations channels last, and only in this form sees that no data has to move.
    """
    for node in list(model.graph):
        target, shape = node.outputs[0], node.outputs[0].shape
        for_norms = {user.op_type for user in target.consumers()} == {"LayerNormalization"}
        turned = node.op_type == "Transpose" and node.attributes["perm"].as_ints() == (0, 2, 3, 1)
        if not (for_norms and turned and shape):
            continue
        tape = ir.tape.Tape()
        flat = tape.op("Reshape", [node.inputs[0], tape.op("Constant", [], {"value_ints": [0, shape[3], -1]})])
        rows = tape.op("Transpose", [flat], {"perm": [0, 2, 1]})
        result = tape.op("Reshape", [rows, tape.op("Constant", [], {"value_ints": [0, *shape[1:]]})])
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, [target], [result])


def forget_paths(model: ir.Model) -> None:
    """Drop from every node the file and line of this machine that computed it; low_precision_files reads its scopes."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


def gflop(member: Member) -> float:
    """Billions of floating-point operations of one view's forward pass, a multiply-add counted as two."""
    size = member.preprocess_config.size
    # the CPU's fused attention is not counted, its plain form is
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        member.eval().cpu()(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    return float(counter.get_total_flops()) / 1e9


@contextmanager
def _plain_attention(network: Any) -> Iterator[None]:
    """Swin's fused attention cannot be traced; its plain form computes the same."""
    before = network.config._attn_implementation
    switchable = network.config.model_type != "timm_wrapper"  # timm chooses its own
    if switchable:
        network.set_attn_implementation("eager")
    try:
        yield
    finally:
        if switchable:
            network.set_attn_implementation(before)
