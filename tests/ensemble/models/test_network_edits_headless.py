import json
import shutil

import numpy as np
import pytest
import torch
from headless_layouts import HEADLESS, write_headless
from hub_layouts import change_weights
from safetensors.torch import load_file
from small_pool import one_thread

from ensemble.core.errors import BackboneError
from ensemble.core.recipe import Backbone, Image, Recipe, Train
from ensemble.models import backbone
from ensemble.models.features import make_embedder
from ensemble.models.torch_runner import torch_runner

SIZES = {"timm_dinov2": 518, "timm_dinov3": 256, "timm_siglip": 224, "dinov2": 224, "siglip": 224}


@pytest.fixture(scope="module", autouse=True)
def calm():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    return {name: write_headless(root / name, name) for name in HEADLESS}


def build(folder, size=None):
    train = Train(lr=1e-3, epochs=1, batch_size=4)
    recipe = Recipe(name="m", backbone=Backbone(checkpoint=str(folder)), image=Image(size=size), train=train)
    return backbone.build_member(recipe, folder)


def pixels_of(member, count=2):
    size = member.preprocess_config.size
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def logits(member, pixels):
    return torch_runner("m", member, torch.device("cpu")).run(pixels)


@pytest.mark.parametrize("name", HEADLESS)
def test_a_checkpoint_without_a_classifier_gets_one_and_opens_again(name, folders, tmp_path):
    given = load_file(folders[name] / "model.safetensors")
    member = build(folders[name])
    assert member.preprocess_config.size == SIZES[name]
    pixels = pixels_of(member)
    before = logits(member, pixels)
    assert make_embedder(member, name, "cpu").width == HEADLESS[name][1]

    backbone.save_classifier(member, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    body = {key.removeprefix("dinov2."): tensor for key, tensor in saved.items()}
    heads = {key for key in body if key not in given}
    assert heads <= {"head.weight", "head.bias", "classifier.weight", "classifier.bias"}
    assert len(heads) == 2
    assert all(torch.equal(body[key], given[key]) for key in body if key not in heads)
    assert all(key.startswith(("text_model.", "logit_", "vision_model.head.")) for key in set(given) - set(body))
    assert name == "siglip" or set(given) <= set(body)

    network, config = backbone.load_classifier(tmp_path)
    assert config.id2label == {0: "real", 1: "ai"}
    np.testing.assert_allclose(logits(backbone.Member(network, member.preprocess_config), pixels), before, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("siglip", lambda s: s.pop("vision_model.post_layernorm.bias"), "1 missing: vision_model.post_layernorm.bias"),
        ("siglip", lambda s: s.update({"vision_model.stray": torch.zeros(1)}), "1 unexpected: vision_model.stray"),
        ("dinov2", lambda s: s.update({"text_model.stray": torch.zeros(1)}), r"1 unexpected: .*text_model\.stray"),
        ("dinov2", lambda s: s.pop("layernorm.weight"), r"1 missing: dinov2\.layernorm\.weight"),
        ("timm_dinov3", lambda s: s.pop("reg_token"), r"1 missing: timm_model\.reg_token"),
        ("timm_siglip", lambda s: s.update({"text_model.x": torch.zeros(1)}), r"1 unexpected: .*text_model\.x"),
    ],
)
def test_nothing_else_of_it_may_be_dropped_or_missing(name, change, message, folders, tmp_path):
    with pytest.raises(BackboneError, match=message):
        build(change_weights(folders[name], tmp_path / "changed", change))


def test_a_family_without_a_classifier_in_transformers_is_sent_to_timm(folders, tmp_path):
    folder = shutil.copytree(folders["dinov2"], tmp_path / "dinov3")
    (folder / "config.json").write_text(json.dumps({"model_type": "dinov3_vit"}))
    with pytest.raises(BackboneError, match="no image classifier of dinov3_vit; use timm's checkpoint"):
        build(folder)


def test_dinov2_takes_other_sizes_with_the_positions_it_was_trained_with(folders):
    whole, half = build(folders["dinov2"]), build(folders["dinov2"], size=112)
    key = "dinov2.embeddings.position_embeddings"
    assert whole.backbone.state_dict()[key].shape == half.backbone.state_dict()[key].shape == (1, 37 * 37 + 1, 32)
    assert logits(half, pixels_of(half)).shape == (2,)
    assert json.loads((folders["dinov2"] / "config.json").read_text())["image_size"] == 518
