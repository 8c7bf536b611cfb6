"""Low-rank adapters (Hu et al., "LoRA", 2021): put into a member before training, folded into its weights after."""

import re
from collections.abc import Sequence

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ensemble.core.errors import BackboneError, join_limited
from ensemble.core.recipe import Adapt
from ensemble.models.backbone import Member
from ensemble.models.features import called_layers, classifier_head


def add_lora(member: Member, adapt: Adapt) -> None:
    """Adapters on the layers of `adapt.targets`, in place; they and the head are all that is trained.

    Without targets: every linear layer and pointwise convolution inside the network's blocks
    (all of them, as in Dettmers et al., "QLoRA", 2023). BackboneError names the layers that
    exist where a target matches none.
    """
    head = classifier_head(member)
    called = {id(layer) for layer in called_layers(member)[0]}
    names = [
        name
        for name, layer in member.backbone.named_modules()
        if id(layer) in called and layer is not head and _can_adapt(layer)
    ]
    config = peft.LoraConfig(
        r=adapt.rank,
        lora_alpha=adapt.alpha,
        lora_dropout=adapt.dropout,
        target_modules=_chosen(names, adapt.targets),
    )
    peft.inject_adapter_in_model(config, member.backbone)
    head.requires_grad_(True)


def merge_lora(member: Member) -> None:
    """Fold the adapters into the weights and take them out: names and shapes as before `add_lora`."""
    adapted = [(name, layer) for name, layer in member.backbone.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        member.backbone.set_submodule(name, layer.get_base_layer())
    del member.backbone.peft_config
    member.requires_grad_(True)


def _can_adapt(layer: nn.Module) -> bool:
    """Linear layers and ungrouped 1x1 convolutions; peft cannot merge grouped ones."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size == (1, 1) and layer.groups == 1
    return isinstance(layer, nn.Linear)


def _chosen(names: Sequence[str], targets: Sequence[str] | None) -> list[str]:
    """Full names of the layers to adapt; what lies in a block has the block's number in its name."""
    if targets is None:
        found = [name for name in names if re.search(r"\.\d+\.", name)]
        unmatched = [] if found else ["attention and MLP layers"]
    else:
        found = [name for name in names if f".{name}".endswith(tuple(f".{target}" for target in targets))]
        unmatched = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unmatched:
        kinds = dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in names)
        raise BackboneError(
            f"adapt.targets match no layer: {join_limited(unmatched)}; the layers that can be adapted end in: "
            f"{join_limited(kinds, 12) or 'none, use adapt.mode full'}"
        )
    return found
