"""Edits of a network that transformers' or timm's configuration does not offer: stem stride, checkpointing."""

from typing import Any

from torch import nn

from ensemble.core.errors import BackboneError

STEM_STRIDE = "first_conv_stride"  # the key in config.json


def set_stem_stride(network: Any, stride: int | None = None) -> None:
    """Set the stride of the first convolution and write it into the network's config; None: the one written there.

    No weight changes its shape. timm and transformers do not read this key: a saved network that they open has its
    usual stride; `load_classifier` sets it again. BackboneError for a stem of patches, or a stride that would skip
    pixels.
    """
    stride = stride or getattr(network.config, STEM_STRIDE, None)
    if stride is None:
        return
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    family = getattr(network.config, "architecture", None) or network.config.model_type
    if first is None or first.kernel_size == first.stride:
        raise BackboneError(f"{family} starts with patches that do not overlap; remove backbone.stem_stride")
    if min(first.kernel_size) <= stride:
        raise BackboneError(
            f"{family} starts with a kernel of {min(first.kernel_size)} pixels, which a stride of {stride} would not "
            "overlap; choose a smaller backbone.stem_stride"
        )
    first.stride = (stride, stride)
    setattr(network.config, STEM_STRIDE, stride)


def enable_checkpointing(member: nn.Module) -> None:
    """Turn on gradient checkpointing; BackboneError where the network has none.

    Batch-norm statistics are then updated twice for each batch.
    """
    network: Any = member.backbone
    if not network.supports_gradient_checkpointing:
        raise BackboneError(f"{network.config.model_type} has no checkpointing; remove train.checkpointing")
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})
