"""Which layers a network really calls, and which of them is its head."""

import torch
from torch import nn

from ensemble.backbone import Member
from ensemble.core.errors import BackboneError

Layer = nn.Linear | nn.Conv2d


def called_layers(member: Member) -> tuple[list[Layer], int]:
    """The linear layers and convolutions in the order one image calls them, and the number of logits.

    A layer whose weights are read without calling it, as some attentions do, is not among them.
    """
    called: list[Layer] = []
    layers = [m for m in member.modules() if isinstance(m, Layer)]
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


def head_of(member: Member) -> Layer:
    """The linear layer that gives the logits: the last one called that has as many outputs."""
    called, logits = called_layers(member)
    for layer in reversed(called):
        if logits == (layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels):
            return layer
    raise BackboneError("the network's last linear layer was not found; choose another checkpoint")
