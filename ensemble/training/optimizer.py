"""Parameter groups with layer-wise learning rate decay, optimizers, learning rate schedules."""

import math
from pathlib import Path
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import Lamb, Lion

from ensemble.core.errors import BackboneError
from ensemble.core.recipe import Recipe, Train
from ensemble.models.backbone import Member, build_member
from ensemble.models.features import classifier_head
from ensemble.models.lora import add_lora
from ensemble.models.network_edits import enable_checkpointing

# Matchers in timm's form. What no pattern matches belongs to the head, also the last norm, as in the authors' own
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


def parameter_depths(member: Member) -> dict[str, int]:
    """Depth of every parameter by its name in the member: 0 stem and embeddings, 1..L blocks, L+1 head.

    A timm network is grouped by its own matcher, block by block; most of them count the last norm with the last
    block. ConvNeXt's authors count three blocks as one layer: their decay of 0.8 is 0.8 ** (1/3) = 0.93 here. Raises
    BackboneError for an unknown family.
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


# Parts of the names of parameters without weight decay in transformers' networks, beside 1-D ones: position tables
# and learned tokens (ViT, BEiT, Swin), SwinV2's position network and temperature, ConvNeXt V2's response norm.
_UNDECAYED = (
    "position_embedding", "relative_position_bias_table", "continuous_position_bias_mlp",
    "cls_token", "register_tokens", "mask_token", "distillation_token", "logit_scale", ".grn.",
)  # fmt: skip


def parameter_groups(member: Member, train: Train) -> list[dict[str, Any]]:
    """Trainable parameters by depth and weight decay, from stem to head; each group has its own "lr_scale".

    lr_scale = layer_decay ** (L + 1 - depth), so that the head learns at `train.lr` (Clark et al. 2020, ELECTRA; Bao
    et al. 2021, BEiT); 1 without layer_decay.
    """
    depths = parameter_depths(member) if train.layer_decay is not None else {}
    deepest, decay = max(depths.values(), default=0), train.layer_decay or 1.0
    undecayed = _named_undecayed(member)
    by_depth: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in member.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in undecayed and not name.endswith(".bias")
            by_depth.setdefault((depths.get(name, deepest), decays), []).append(parameter)
    groups = []
    for (depth, decays), parameters in sorted(by_depth.items(), key=lambda item: item[0]):
        scale = decay ** (deepest - depth)
        weight_decay = train.weight_decay if decays else 0.0
        groups.append({"params": parameters, "lr": train.lr * scale, "weight_decay": weight_decay, "lr_scale": scale})
    return groups


def make_optimizer(member: Member, train: Train) -> torch.optim.Optimizer:
    """The recipe's optimizer over `parameter_groups`; the member is already on its device."""
    groups = parameter_groups(member, train)
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, momentum=0.9, nesterov=True)
    if train.optimizer == "lamb":
        return Lamb(groups, lr=train.lr, max_grad_norm=None)  # train.clip alone clips
    if train.optimizer == "lion":
        return Lion(groups, lr=train.lr)
    fused = all(parameter.device.type in {"cpu", "cuda"} for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=train.lr, fused=fused)


def lr_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Share 0..1 of the peak learning rate at `step` of 0..total-1, as in transformers' schedules.

    warmup: share of `total` over which the rate rises linearly from 0. Then it falls to 0 at `total`, by a cosine or
    linearly, or is constant.
    """
    warmup_steps = math.ceil(total * warmup)
    if step < warmup_steps:
        return step / warmup_steps
    progress = min((step - warmup_steps) / max(total - warmup_steps, 1), 1.0)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if schedule == "linear" else 1.0


def set_lr(optimizer: torch.optim.Optimizer, base_lr: float, factor: float) -> None:
    """Give every group base_lr * factor * its lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = base_lr * factor * group["lr_scale"]


def _named_undecayed(member: Member) -> set[str]:
    """Names of the parameters that the network itself exempts from weight decay."""
    inner = getattr(member.backbone, "timm_model", None)
    if inner is None:
        return {name for name, _ in member.named_parameters() if any(part in name for part in _UNDECAYED)}
    listed = inner.no_weight_decay() if hasattr(inner, "no_weight_decay") else ()
    return {f"backbone.timm_model.{name}" for name in listed}


def prepare_for_training(member: Member, recipe: Recipe) -> None:
    """Add LoRA adapters and gradient checkpointing to a newly built member, as the recipe says, in place."""
    if recipe.adapt.mode == "lora":
        add_lora(member, recipe.adapt)
    if recipe.train.checkpointing:
        enable_checkpointing(member)


def check_network(recipe: Recipe, checkpoint: Path | None) -> None:
    """Build the network once: BackboneError for what can only be checked on the network."""
    member = build_member(recipe, checkpoint)
    if recipe.adapt.mode == "probe":
        classifier_head(member)
        return
    prepare_for_training(member, recipe)
    parameter_groups(member, recipe.train)
