"""Changes of a built network that its own configuration does not offer.

Checkpoints that were published without a classifier, where transformers' config and files differ for it.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ensemble.core.errors import BackboneError

STEM_STRIDE = "first_conv_stride"  # the key in config.json


def set_stem_stride(network: Any, stride: int | None = None) -> None:
    """Give the first convolution another stride, noted in the network's config; None: the one noted there.

    No weight changes its shape. Neither timm nor transformers reads the note: opened by them
    alone, the saved network has its stock stride, and only `load_classifier` gives it back.
    Raises BackboneError for a stem of patches, or a stride that would skip pixels.
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


@torch.no_grad()
def scale_head(network: nn.Module, head: frozenset[str], scale: float) -> None:
    """Multiply the head's parameters, named in `head` (ConvNeXt's head_init_scale is 0.001)."""
    for name, parameter in network.named_parameters():
        if name in head:
            parameter.mul_(scale)


def enable_checkpointing(member: nn.Module) -> None:
    """Let a member compute activations again in the backward pass; BackboneError where the network cannot.

    Batch-norm statistics take in each batch twice then.
    """
    network: Any = member.backbone
    if not network.supports_gradient_checkpointing:
        raise BackboneError(f"{network.config.model_type} has no checkpointing; remove train.checkpointing")
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# Of an image-text model: what a classifier of images has no place for.
UNUSED_WEIGHTS = {"siglip": ("text_model.", "logit_scale", "logit_bias", "vision_model.head.")}
# They resize the positions they were trained with in their own forward, whatever the image's size.
RESIZE_POSITIONS = {"dinov2", "dinov2_with_registers"}


def check_classifier(config: Any) -> None:
    """BackboneError for a family, such as dinov3_vit, that transformers makes no classifier of."""
    if config.model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        raise BackboneError(
            f"transformers makes no image classifier of {config.model_type}; use timm's checkpoint of the same weights,"
            " such as timm/vit_small_patch16_dinov3.lvd1689m"
        )


def set_image_size(config: Any, size: int) -> None:
    """The contract's size, where a family's config keeps it."""
    if config.model_type == "siglip":
        # its classifier averages the tokens, so the pooling head would be dead weight
        config.vision_config.image_size, config.vision_config.vision_use_head = size, False
    elif hasattr(config, "image_size") and config.model_type not in RESIZE_POSITIONS:
        config.image_size = size


def unused_weights(config: Any, names: Collection[str]) -> frozenset[str]:
    """Those of a file's weights that belong to another tower than the image network's."""
    prefixes = UNUSED_WEIGHTS.get(config.model_type)
    return frozenset(name for name in names if prefixes and name.startswith(prefixes))
