"""Checkpoints that were published without a classifier, where transformers' config and files differ for it."""

from collections.abc import Collection
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ensemble.core.errors import BackboneError

# Of an image-text model: what a classifier of images has no place for.
LEFT_OUT = {"siglip": ("text_model.", "logit_scale", "logit_bias", "vision_model.head.")}
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


def left_out(config: Any, names: Collection[str]) -> frozenset[str]:
    """Those of a file's weights that belong to another tower than the image network's."""
    prefixes = LEFT_OUT.get(config.model_type)
    return frozenset(name for name in names if prefixes and name.startswith(prefixes))
