"""What of a built network is trained, as the recipe says, and whether it can be."""

from pathlib import Path

from ensemble.core.recipe import Recipe
from ensemble.models.backbone import Member, build_member
from ensemble.models.features import head_of
from ensemble.models.lora import add_lora
from ensemble.models.network_edits import enable_checkpointing
from ensemble.optimize import parameter_groups


def adapt(member: Member, recipe: Recipe) -> None:
    """Make a newly built member ready to be trained by gradients, in place."""
    if recipe.adapt.mode == "lora":
        add_lora(member, recipe.adapt)
    if recipe.train.checkpointing:
        enable_checkpointing(member)


def check_network(recipe: Recipe, checkpoint: Path | None) -> None:
    """Build the network and let it go: BackboneError for what only the network can tell."""
    member = build_member(recipe, checkpoint)
    if recipe.adapt.mode == "probe":
        head_of(member)
        return
    adapt(member, recipe)
    parameter_groups(member, recipe.train)
