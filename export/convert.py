"""A trained member -> one ONNX file: uint8 pixels [N, S, S, 3] in, float32 logit [N] out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch

from ensemble.backbone import Member
from ensemble.errors import ArtifactError


def convert(member: Member, path: Path) -> None:
    """Write the member, mean and std inside, with a dynamic batch and a fixed size.

    Raises ArtifactError if the exporter or onnx.checker refuses it.
    """
    size = member.contract.size
    # Two images: the exporter would freeze a batch of one into the graph.
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    try:
        with _plain_attention(member.backbone):
            torch.onnx.export(
                member.eval().cpu(),
                (example,),
                path,
                input_names=["pixels"],
                output_names=["logit"],
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1, max=65536)}},
                external_data=False,
                dynamo=True,
                verbose=False,
            )
        onnx.checker.check_model(str(path), full_check=True)
    except (RuntimeError, ValueError, TypeError, onnx.checker.ValidationError) as error:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ArtifactError(f"the member cannot be converted to ONNX: {line}") from error


@contextmanager
def _plain_attention(network: Any) -> Iterator[None]:
    """Swin's fused attention cannot be traced; its plain form computes the same."""
    before = network.config._attn_implementation
    switch = network.config.model_type != "timm_wrapper"  # timm chooses its own
    if switch:
        network.set_attn_implementation("eager")
    try:
        yield
    finally:
        if switch:
            network.set_attn_implementation(before)
