import pytest
import timm.optim
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from small_members import small_member

from ensemble.core.recipe import Train
from ensemble.training.optimizer import lr_factor, make_optimizer, parameter_groups, set_lr

TRAIN = Train(lr=0.1, epochs=1, batch_size=1)
DECAYED = TRAIN.model_copy(update={"layer_decay": 0.5})


def rates(member, groups):
    """lr and weight decay by the parameter's name in the network."""
    names = {id(parameter): name.removeprefix("backbone.") for name, parameter in member.named_parameters()}
    found = [(names[id(p)], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
    assert len(found) == len({name for name, *_ in found})  # none twice
    return {name.removeprefix("timm_model."): (lr, decay) for name, lr, decay in found}


@pytest.mark.parametrize(
    ("family", "blocks", "first", "middle", "head"),
    [
        ("vit", 2, "vit.embeddings.cls_token", ("vit.layers.0.mlp.fc1.weight", 1), "classifier.weight"),
        (
            "swin", 3, "swin.embeddings.patch_embeddings.projection.weight",
            ("swin.encoder.layers.1.blocks.0.mlp.fc1.weight", 2), "swin.layernorm.weight",
        ),
        (
            "swinv2", 3, "swinv2.embeddings.norm.weight",
            ("swinv2.encoder.layers.0.downsample.reduction.weight", 1), "classifier.bias",
        ),
        (
            "convnext", 3, "convnext.embeddings.patch_embeddings.weight",
            ("convnext.encoder.stages.1.downsampling_layer.1.weight", 2), "convnext.layernorm.bias",
        ),
        ("timm/test_efficientnet", 5, "conv_stem.weight", ("blocks.1.0.conv_exp.weight", 2), "classifier.weight"),
        ("timm/mobilenetv2_035", 17, "bn1.weight", ("blocks.2.1.conv_pw.weight", 5), "classifier.bias"),
        ("timm/test_vit", 6, "pos_embed", ("blocks.3.attn.qkv.weight", 4), "head.weight"),
    ],
)  # fmt: skip
def test_rates_fall_from_head_to_stem(family, blocks, first, middle, head):
    member = small_member(family)
    found = rates(member, parameter_groups(member, DECAYED))
    assert set(found) == {
        name.removeprefix("backbone.").removeprefix("timm_model.") for name, _ in member.named_parameters()
    }
    assert found[head][0] == 0.1
    assert found[first][0] == pytest.approx(0.1 * 0.5 ** (blocks + 1), rel=1e-12)
    name, depth = middle
    assert found[name][0] == pytest.approx(0.1 * 0.5 ** (blocks + 1 - depth), rel=1e-12)


def test_without_layer_decay_all_learn_alike_even_in_an_unknown_family():
    groups = parameter_groups(small_member("resnet"), TRAIN)
    assert [(g["lr"], g["lr_scale"], g["weight_decay"]) for g in groups] == [(0.1, 1, 0), (0.1, 1, 0.05)]


@pytest.mark.parametrize(
    ("family", "spared", "decayed"),
    [
        ("vit", ("embeddings.cls_token", "position_embeddings", "layernorm.weight", "fc1.bias"), "classifier.weight"),
        ("swin", ("relative_position_bias_table", "embeddings.norm.weight"), "downsample.reduction.weight"),
        ("swinv2", ("logit_scale", "continuous_position_bias_mlp.0.weight"), "query.weight"),
        ("convnextv2", ("grn.weight", "grn.bias"), "dwconv.weight"),
        ("timm/test_vit", ("cls_token", "pos_embed"), "qkv.weight"),
        ("timm/swin_tiny_patch4_window7_224", ("relative_position_bias_table",), "qkv.weight"),
        ("timm/test_efficientnet", ("bn1.weight",), "conv_stem.weight"),
    ],
)
def test_weight_decay_spares_norms_biases_and_what_the_network_names(family, spared, decayed):
    member = small_member(family)
    found = rates(member, parameter_groups(member, TRAIN))
    for ending, expected in [*((name, 0) for name in spared), (decayed, 0.05)]:
        matches = [decay for name, (_, decay) in found.items() if name.endswith(ending)]
        assert set(matches) == {expected}, ending


def test_frozen_parameters_have_no_group():
    member = small_member("vit")
    for name, parameter in member.named_parameters():
        parameter.requires_grad = name.startswith("backbone.classifier.")
    found = rates(member, parameter_groups(member, DECAYED))
    assert found == {"classifier.weight": (0.1, 0.05), "classifier.bias": (0.1, 0)}


@pytest.mark.parametrize(("name", "kind"), [
    ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("lamb", timm.optim.Lamb), ("lion", timm.optim.Lion),
])  # fmt: skip
def test_optimizer_takes_a_step_with_each_group_at_its_rate(name, kind):
    member = small_member("vit")
    optimizer = make_optimizer(member, DECAYED.model_copy(update={"optimizer": name}))
    assert isinstance(optimizer, kind)
    set_lr(optimizer, 0.2, 0.5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.0125, 0.025, 0.05, 0.1])
    before = [parameter.detach().clone() for parameter in member.parameters()]
    member(torch.randint(0, 255, (2, 32, 32, 3), dtype=torch.uint8)).square().mean().backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, member.parameters(), strict=True))
    optimizer.load_state_dict(optimizer.state_dict())
    assert [group["lr_scale"] for group in optimizer.param_groups][-1] == 1


def theirs(schedule, steps, total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warm = transformers.TrainingArguments(warmup_steps=warmup, report_to="none").get_warmup_steps(total)
    follow = transformers.get_scheduler(schedule, optimizer, warm, total)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        follow.step()
    return values


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0.0), (7, 0.0), (50, 0.1), (33, 0.25), (3, 0.9)])
def test_schedule_is_that_of_transformers(schedule, total, warmup):
    ours = [lr_factor(step, total, warmup, schedule) for step in range(total)]
    assert ours == pytest.approx(theirs(schedule, total, total, warmup), abs=1e-12)
    other = theirs("linear" if schedule == "cosine" else "cosine", total, total, warmup)
    if total > 7:
        assert ours != pytest.approx(other, abs=1e-3)


@given(st.integers(0, 200), st.integers(2, 100), st.floats(0, 0.5), st.sampled_from(["cosine", "linear", "constant"]))
def test_factor_stays_a_share_and_ends_low(step, total, warmup, schedule):
    assert 0 <= lr_factor(step, total, warmup, schedule) <= 1
    assert lr_factor(total + step, total, warmup, schedule) == (1 if schedule == "constant" else 0)
