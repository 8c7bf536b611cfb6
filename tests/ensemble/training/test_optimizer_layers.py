import re
from collections import Counter

import pytest
import torch
import transformers
from hub_layouts import LAYOUTS
from small_members import SMALL, small_member

from ensemble.core.errors import BackboneError
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.models.backbone import LABEL_MAPS, Member
from ensemble.training.optimizer import parameter_depths

UNKNOWN = "resnet"
BLOCK = re.compile(r"\.(?:layers?|stages|blocks|downsample|downsampling_layer)\.\d")
STEM = re.compile(r"embed|stem|cls_token|bn1|pre_layrnorm|shared_position_bias")


@pytest.mark.parametrize("family", sorted(set(SMALL) - {UNKNOWN}))
def test_every_parameter_has_its_depth_stem_first_and_head_last(family):
    member = small_member(family)
    depths = parameter_depths(member)
    assert set(depths) == {name for name, _ in member.named_parameters()}
    last = max(depths.values())
    assert sorted(set(depths.values())) == list(range(last + 1))
    for name, depth in depths.items():
        assert bool(STEM.search(name) and not BLOCK.search(name)) == (depth == 0), name
        if depth == last:
            assert not BLOCK.search(name), name
    assert {name for name in depths if "classifier" in name or ".head.fc" in name} <= {
        name for name, depth in depths.items() if depth == last
    }


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("swin_tiny", 2 + 2 + 6 + 2),
        ("swin_base", 2 + 2 + 18 + 2),
        ("swinv2_tiny", 2 + 2 + 6 + 2),
        ("convnext_large_384", 3 + 3 + 27 + 3),
        ("vit_base_clip_384", 12),
    ],
)
def test_listed_networks_have_a_depth_a_block(name, blocks):
    layout = LAYOUTS[name]
    if layout.model_type == "timm":
        config = transformers.TimmWrapperConfig(architecture="vit_base_patch16_clip_384", **LABEL_MAPS)
    else:
        config = transformers.AutoConfig.for_model(layout.model_type, **{**layout.config, **LABEL_MAPS})
    with torch.device("meta"):
        network = transformers.AutoModelForImageClassification.from_config(config)
    member = Member(network, PreprocessConfig(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    depths = parameter_depths(member)
    assert set(depths) == {name for name, _ in member.named_parameters()}
    assert sorted(set(depths.values())) == list(range(blocks + 2))
    blockwise = [depths[name] for name, _ in member.named_parameters() if BLOCK.search(name)]
    assert blockwise == sorted(blockwise)
    assert set(blockwise) == set(range(1, blocks + 1))


def sizes(member, moved=()):
    """Parameters of each depth; those of `moved` are counted with the head."""
    depths, found = parameter_depths(member), Counter()
    for name, parameter in member.named_parameters():
        found[max(depths.values()) if name in moved else depths[name]] += parameter.numel()
    return found


def test_timm_and_transformers_agree_on_one_network():
    ours, theirs = small_member("swin"), small_member("timm/swin_tiny_patch4_window7_224")
    # timm counts the last norm with the last block, and joins patches before a stage, not after the one before
    norm = {f"backbone.timm_model.norm.{kind}" for kind in ("weight", "bias")}
    merging = sum(p.numel() for name, p in ours.named_parameters() if "downsample" in name)
    expected = sizes(ours)
    expected[1] -= merging
    expected[2] += merging
    assert sizes(theirs, norm) == expected
    assert sizes(theirs) != expected


def test_unknown_family_says_which_are_known():
    with pytest.raises(
        BackboneError,
        match=r"^layer_decay is not known for resnet; known: beit, .*swinv2, vit .*remove train\.layer_decay$",
    ):
        parameter_depths(small_member(UNKNOWN))
