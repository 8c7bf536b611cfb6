import pytest
import torch
import transformers
from small_members import small_member

from ensemble.core.errors import BackboneError
from ensemble.core.recipe import Recipe
from ensemble.models import backbone
from ensemble.models.network_edits import enable_checkpointing, set_stem_stride
from ensemble.models.torch_runner import torch_runner

PIXELS = torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def recipe_of(**values):
    return Recipe.model_validate(
        {"name": "small", "backbone": values, "image": {"size": 64}, "train": {"lr": 0.1, "epochs": 1, "batch_size": 2}}
    )


def logits(network, preprocess_config):
    return torch_runner("small", backbone.Member(network, preprocess_config), torch.device("cpu")).run(PIXELS.numpy())


RESNET = {
    "architecture": "resnet",
    "config": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"},
}


@pytest.mark.parametrize("source", [{"architecture": "timm/test_efficientnet"}, RESNET], ids=["timm", "transformers"])
def test_a_finer_stem_survives_saving(source, tmp_path):
    member = backbone.build_member(recipe_of(**source, stem_stride=1), None)
    first = next(m for m in member.backbone.modules() if isinstance(m, torch.nn.Conv2d))
    sizes = []
    first.register_forward_hook(lambda _, given, out: sizes.append((given[0].shape[-1], out.shape[-1])))
    expected = logits(member.backbone, member.preprocess_config)
    assert sizes == [(64, 64)]  # stock stems halve it
    backbone.save_classifier(member, tmp_path)
    network, _ = backbone.load_classifier(tmp_path)
    assert (logits(network, member.preprocess_config) == expected).all()
    # fine-tuned again from the saved folder, the stem stays as it was
    again = backbone.build_member(recipe_of(checkpoint=str(tmp_path)), tmp_path)
    assert next(m for m in again.backbone.modules() if isinstance(m, torch.nn.Conv2d)).stride == (1, 1)
    stock = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert (logits(stock, member.preprocess_config) != expected).all()  # as the docstring warns


@pytest.mark.parametrize("family", ["vit", "swin", "convnext", "timm/test_vit", "timm/test_convnext"])
def test_a_stem_of_patches_is_refused(family):
    with pytest.raises(BackboneError, match=r"starts with patches that do not overlap; remove backbone\.stem_stride"):
        set_stem_stride(small_member(family).backbone, 1)


def test_a_stride_that_skips_pixels_is_refused():
    with pytest.raises(BackboneError, match=r"^test_efficientnet starts with a kernel of 3 pixels.* stride of 3 would"):
        set_stem_stride(small_member("timm/test_efficientnet").backbone, 3)


@pytest.mark.parametrize("family", ["timm/test_efficientnet", "vit"])
def test_a_new_head_can_start_small(family):
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2} if family == "vit" else {}
    heads = []
    for scale in (1.0, 0.001):
        torch.manual_seed(0)
        made = backbone.build_member(recipe_of(architecture=family, config=config, head_init_scale=scale), None)
        inner = getattr(made.backbone, "timm_model", made.backbone)
        heads.append(inner.classifier.weight.detach())
        assert inner.classifier.weight.requires_grad
    torch.testing.assert_close(heads[1], heads[0] * 0.001)
    assert heads[0].abs().max() > 0


def gradients(member):
    """The gradients of one batch, and how often the first block computed its first product."""
    calls = []
    block = next(m for name, m in member.named_modules() if name.endswith(("layers.0", "blocks.0")))
    product = next(m for m in block.modules() if isinstance(m, torch.nn.Linear))
    hook = product.register_forward_pre_hook(lambda *_: calls.append(1))
    member.train().zero_grad()
    member(PIXELS[:, :32, :32]).square().sum().backward()
    hook.remove()
    return [parameter.grad for parameter in member.parameters()], len(calls)


@pytest.mark.parametrize("family", ["vit", "swinv2", "timm/test_vit"])
def test_checkpointing_computes_again_and_changes_no_gradient(family):
    member = small_member(family)
    if family == "timm/test_vit":
        member.backbone.timm_model.set_input_size(img_size=32)
    expected, once = gradients(member)
    enable_checkpointing(member)
    found, twice = gradients(member)
    torch.testing.assert_close(found, expected)
    assert (once, twice) == (1, 2)


def test_checkpointing_a_family_without_it_is_refused():
    with pytest.raises(BackboneError, match=r"^convnext has no checkpointing; remove train\.checkpointing$"):
        enable_checkpointing(small_member("convnext"))
