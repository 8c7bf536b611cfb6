"""Parameter groups, optimizers and the learning rate's course."""

import math
from typing import Any

import torch
from timm.optim import Lamb, Lion

from ensemble.core.recipe import Train
from ensemble.layers import layer_of
from ensemble.models.backbone import Member

# Parts of names of what transformers' networks keep free of weight decay beside 1-D parameters: position tables
# and learned tokens (ViT, BEiT, Swin), SwinV2's position network and temperature, ConvNeXt V2's response norm.
_UNDECAYED = (
    "position_embedding", "relative_position_bias_table", "continuous_position_bias_mlp",
    "cls_token", "register_tokens", "mask_token", "distillation_token", "logit_scale", ".grn.",
)  # fmt: skip


def parameter_groups(member: Member, train: Train) -> list[dict[str, Any]]:
    """Trainable parameters by depth and weight decay, from stem to head; each group has its own "lr_scale".

    lr_scale = layer_decay ** (L + 1 - depth), so that the head learns at `train.lr` (Clark et
    al. 2020, ELECTRA; Bao et al. 2021, BEiT); 1 without layer_decay.
    """
    depths = layer_of(member) if train.layer_decay is not None else {}
    deepest, decay = max(depths.values(), default=0), train.layer_decay or 1.0
    undecayed = _named_undecayed(member)
    found: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in member.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and name not in undecayed and not name.endswith(".bias")
            found.setdefault((depths.get(name, deepest), decays), []).append(parameter)
    groups = []
    for (depth, decays), parameters in sorted(found.items(), key=lambda item: item[0]):
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
    """Share 0..1 of the peak learning rate at `step` of 0..total-1, as transformers' schedules have it.

    warmup: share of `total` over which the rate rises linearly from 0. Then cosine or linear
    to 0 at `total`, or constant.
    """
    rising = math.ceil(total * warmup)
    if step < rising:
        return step / rising
    progress = min((step - rising) / max(total - rising, 1), 1.0)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if schedule == "linear" else 1.0


def set_lr(optimizer: torch.optim.Optimizer, base_lr: float, factor: float) -> None:
    """Give every group base_lr * factor * its lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = base_lr * factor * group["lr_scale"]


def _named_undecayed(member: Member) -> set[str]:
    """Names in the member of what its network itself keeps free of weight decay."""
    inner = getattr(member.backbone, "timm_model", None)
    if inner is None:
        return {name for name, _ in member.named_parameters() if any(part in name for part in _UNDECAYED)}
    listed = inner.no_weight_decay() if hasattr(inner, "no_weight_decay") else ()
    return {f"backbone.timm_model.{name}" for name in listed}
