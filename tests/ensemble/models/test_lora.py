import copy

import numpy as np
import pytest
import torch
from small_pool import one_thread

from ensemble.core.errors import BackboneError
from ensemble.core.recipe import Adapt, Backbone, Image, Recipe, Train
from ensemble.models import backbone
from ensemble.models.lora import add_lora, merge_lora
from ensemble.models.torch_runner import torch_runner
from ensemble.training.step import summed_loss

SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
# family -> (architecture, its settings, ends of the layers that are adapted by default)
FAMILIES = {
    "vit": ("timm/vit_tiny_patch16_224", {"depth": 2, "embed_dim": 24}, "qkv proj fc1 fc2"),
    "swin": ("swin", SWIN, "q_proj k_proj v_proj o_proj query key value dense fc1 fc2 reduction"),
    "swinv2": ("swinv2", SWIN, "query key value dense reduction 0 2"),
    "convnext": ("convnext", {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}, "pwconv1 pwconv2"),
    "efficientnet": ("timm/tf_efficientnet_lite0", {}, "conv_pw conv_pwl"),
    "beit": ("timm/beit_base_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 2}, "proj fc1 fc2"),
}


@pytest.fixture(scope="module", autouse=True)
def calm():
    with one_thread():
        yield


def build(family):
    torch.manual_seed(0)
    architecture, config, _ = FAMILIES[family]
    recipe = Recipe(
        name=family,
        backbone=Backbone(architecture=architecture, config=config),
        image=Image(size=32),
        train=Train(lr=1e-3, epochs=1, batch_size=2),
    )
    return backbone.build_member(recipe, None)


def lora(**values):
    return Adapt(mode="lora", rank=4, **values)


def pixels(count=4):
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def logits(member):
    return torch_runner("m", member, torch.device("cpu")).run(pixels())


def train(member, steps=2):
    """A rate high enough that two steps are seen."""
    member.train()
    trained = [p for p in member.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        summed_loss(member(torch.from_numpy(pixels())), torch.tensor([0.0, 1.0, 0.0, 1.0]), 0.0).backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()


def adapted(member):
    """Ends of the names of the layers that have an adapter."""
    return {name.split(".")[-4] for name, _ in member.named_parameters() if "lora_A" in name}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_and_head_are_trained_then_folded_into_an_ordinary_checkpoint(family, tmp_path):
    member = build(family)
    names, start = list(member.state_dict()), {k: v.clone() for k, v in member.state_dict().items()}
    plain = logits(member)
    add_lora(member, lora())
    np.testing.assert_allclose(logits(member), plain, atol=1e-6)  # an update begins at zero
    assert adapted(member) <= set(FAMILIES[family][2].split())
    trained = {name for name, p in member.named_parameters() if p.requires_grad}
    heads = {name for name in trained if "lora_" not in name}
    assert {name.rsplit(".", 2)[1] for name in heads} <= {"head", "classifier"}
    assert len(heads) == 2
    frozen = {k: p.clone() for k, p in member.named_parameters() if k not in trained}
    train(member)
    after = dict(member.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())

    unmerged = logits(member)
    assert np.abs(unmerged - plain).max() > 1e-3
    merge_lora(member)
    assert list(member.state_dict()) == names
    np.testing.assert_allclose(logits(member), unmerged, atol=1e-5)
    changed = {k for k, v in member.state_dict().items() if not torch.equal(v, start[k])}
    assert any(".weight" in key and key not in heads for key in changed)
    assert not hasattr(member.backbone, "peft_config")
    assert not any("lora" in type(m).__module__ for m in member.modules())
    assert all(p.requires_grad for p in member.parameters())

    backbone.save_classifier(member, tmp_path)
    network, _ = backbone.load_classifier(tmp_path)
    np.testing.assert_allclose(logits(backbone.Member(network, member.preprocess_config)), unmerged, atol=1e-5)


def test_taking_the_adapters_out_without_folding_them_would_show():
    member = build("vit")
    add_lora(member, lora())
    train(member)
    unmerged = logits(member)
    for name, layer in list(member.named_modules()):
        if hasattr(layer, "lora_A"):
            member.set_submodule(name, layer.get_base_layer())
    assert np.abs(logits(member) - unmerged).max() > 1e-4


def test_training_state_goes_to_another_member_by_its_names():
    first, second = build("vit"), build("vit")
    add_lora(first, lora())
    train(first)
    add_lora(second, lora())
    assert list(first.state_dict()) == list(second.state_dict())
    second.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(logits(second), logits(first))


def test_an_average_of_the_weights_can_be_folded_too():
    member = build("vit")
    add_lora(member, lora())
    averaged = torch.optim.swa_utils.AveragedModel(
        member, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    for _ in range(2):
        train(member, 1)
        averaged.update_parameters(member)
    expected = logits(copy.deepcopy(averaged.module))
    assert np.abs(expected - logits(member)).max() > 1e-4
    member.load_state_dict(averaged.module.state_dict())
    merge_lora(member)
    np.testing.assert_allclose(logits(member), expected, atol=1e-5)


def test_targets_are_ends_of_names():
    member = build("vit")
    add_lora(member, lora(targets=("attn.qkv", "1.mlp.fc1")))
    found = {name.split(".lora_A")[0] for name, _ in member.named_parameters() if "lora_A" in name}
    blocks = "backbone.timm_model.blocks"
    assert found == {f"{blocks}.0.attn.qkv", f"{blocks}.1.attn.qkv", f"{blocks}.1.mlp.fc1"}


@pytest.mark.parametrize("targets", [("query",), ("kv",), ("head",), ("qkv", "query")])
def test_targets_that_match_nothing_are_told_what_exists(targets):
    member = build("vit")
    with pytest.raises(BackboneError) as caught:
        add_lora(member, lora(targets=targets))
    assert str(caught.value) == (
        f"adapt.targets match no layer: {targets[-1]}; "
        "the layers that can be adapted end in: attn.qkv, attn.proj, mlp.fc1, mlp.fc2"
    )
    assert not any("lora" in name for name in member.state_dict())


def test_a_layer_whose_weights_are_read_without_calling_it_is_no_target():
    with pytest.raises(BackboneError, match=r"match no layer: qkv; .* end in: attn\.proj, mlp\.fc1, mlp\.fc2"):
        add_lora(build("beit"), lora(targets=("qkv",)))
