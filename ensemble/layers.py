"""How deep each parameter of a member lies, for learning rates that fall from the head to the stem."""

from typing import Any

from timm.models import group_parameters

from ensemble.core.errors import BackboneError
from ensemble.models.backbone import Member

# Matchers in timm's form. What no pattern names is the head, and with it the last norm, as in the authors' own
# fine-tuning code (BEiT's and ConvNeXt's optim_factory.py, SimMIM's optimizer.py for Swin).
_PLAIN = {
    "stem": r"\w+\.(?:embeddings|pre_layrnorm|shared_position_bias)\.",
    "blocks": r"\w+\.(?:encoder\.)?layers?\.(\d+)\.",
}
_SWIN = {
    "stem": r"\w+\.embeddings\.",
    "blocks": [
        (r"\w+\.encoder\.layers\.(\d+)\.blocks\.(\d+)\.", None),
        (r"\w+\.encoder\.layers\.(\d+)\.downsample\.", (99999,)),  # with the block before it, as in SimMIM
    ],
}
_CONVNEXT = {
    "stem": r"\w+\.embeddings\.",
    "blocks": [
        (r"\w+\.encoder\.stages\.(\d+)\.downsampling_layer\.", (0,)),  # with the block after it, as in timm
        (r"\w+\.encoder\.stages\.(\d+)\.layers\.(\d+)\.", None),
    ],
}
_MATCHERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("beit", "clip", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers"), _PLAIN),
    **dict.fromkeys(("siglip", "vit"), _PLAIN),
    **dict.fromkeys(("swin", "swinv2"), _SWIN),
    **dict.fromkeys(("convnext", "convnextv2"), _CONVNEXT),
}


def layer_of(member: Member) -> dict[str, int]:
    """Depth of every parameter by its name in the member: 0 stem and embeddings, 1..L blocks, L+1 head.

    A timm network is grouped by its own matcher, block by block; most of timm's count the
    last norm with the last block. ConvNeXt's authors count three blocks as one layer: their
    decay of 0.8 is 0.8 ** (1/3) = 0.93 here. Raises BackboneError for a family that is not known.
    """
    network: Any = member.backbone
    prefix, inner = "backbone.", network
    if network.config.model_type == "timm_wrapper":
        prefix, inner = "backbone.timm_model.", network.timm_model
        family = f"timm/{network.config.architecture}"
        matcher = inner.group_matcher(coarse=False) if hasattr(inner, "group_matcher") else None
    else:
        family = network.config.model_type
        matcher = _MATCHERS.get(family)
    if matcher is None:
        raise BackboneError(
            f"layer_decay is not known for {family}; known: {', '.join(sorted(_MATCHERS))} and most of timm's; "
            "remove train.layer_decay"
        )
    return {prefix + name: depth for name, depth in group_parameters(inner, matcher, reverse=True).items()}
