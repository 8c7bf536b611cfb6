"""Which layers a network really calls, and which of them is its head."""

import torch
from torch import nn

from ensemble.backbone import Member
from ensemble.errors import BackboneError


def called_layers(member: Member) -> tuple[list[nn.Module], int]:
    """The linear layers and convolutions in the order one image calls them, and the number of logits.

    A layer whose weights are read without calling it, as some attentions do, is not among them.
    """
    called: list[nn.Module] = []
    layers = [m for m in member.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [m.register_forward_pre_hook(lambda module, _: called.append(module)) for m in layers]
    size, device = member.contract.size, member.mean.device
    training = member.training
    try:
        with torch.inference_mode():
            logits = member.eval().backbone(pixel_values=torch.zeros(1, 3, size, size, device=device)).logits
    finally:
        member.train(training)
        for hook in hooks:
            hook.remove()
    return called, logits.shape[-1]


def head_of(member: Member) -> nn.Module:
    """The linear layer that gives the logits: the last one called that has as many outputs."""
    called, logits = called_layers(member)
    for layer in reversed(called):
        if getattr(layer, "out_features", getattr(layer, "out_channels", None)) == logits:
            return layer
    raise BackboneError("the network's last linear layer was not found; choose another checkpoint")
