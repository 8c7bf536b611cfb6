import numpy as np
import pytest
import torch
import transformers
from pictures import noise
from PIL import Image
from small_members import small_member
from torch import nn

from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.evaluation import heatmaps
from ensemble.images import preprocess
from ensemble.models.backbone import LABEL_MAPS, Member

# family -> the layer found, as its network names it, and its side for 32 pixels
LAYERS = {
    "timm/test_efficientnet": ("timm_model.bn2", 1),
    "timm/test_convnext": ("timm_model.stages", 1),
    "timm/test_vit": ("timm_model.blocks.5.norm1", 4),
    "timm/swin_tiny_patch4_window7_224": ("timm_model.norm", 8),
    "vit": ("vit.layers.1.layernorm_before", 2),
    "swin": ("swin.layernorm", 8),
    "swinv2": ("swinv2.layernorm", 8),
    "convnext": ("convnext.encoder.stages.1", 4),
    "dinov2": ("dinov2.layernorm", 2),
    "dinov2_with_registers": ("dinov2_with_registers.layernorm", 2),
    "clip": ("vision_model.encoder.layers.1", 2),
}
SIZES = {"timm/test_efficientnet": 64, "timm/test_convnext": 64, "timm/test_vit": 64}
GREY = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


class Bright(nn.Module):
    """Finds bright squares: a mean over 4 x 4 pixels, what is over 0.8 of white kept, summed over places."""

    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(3, 2, 4, stride=4)
        nn.init.constant_(self.look.weight, 1 / 48)
        nn.init.constant_(self.look.bias, -0.8)
        self.keep = nn.ReLU()

    def forward(self, pixel_values):
        found = self.keep(self.look(pixel_values)).mean(dim=(1, 2, 3))
        scores = torch.stack((torch.full_like(found, 1e-4), found), dim=1)
        return transformers.modeling_outputs.ImageClassifierOutput(logits=scores)


class Opaque(nn.Module):
    """The same without a layer that has places."""

    def __init__(self):
        super().__init__()
        self.inner = [Bright()]  # a list hides it from modules()

    def forward(self, pixel_values):
        return self.inner[0](pixel_values)


def planted(corner, size=(96, 64)):
    """Dark grey with a white square of 12 pixels at (left, top), which lies on the 4-pixel grid."""
    image = Image.new("RGB", size, (60, 60, 60))
    image.paste((255, 255, 255), (*corner, corner[0] + 12, corner[1] + 12))
    return image


def hottest(heat):
    """(x, y) of the middle of all places at least half as hot as the hottest."""
    rows, columns = np.nonzero(heat >= 0.5)
    return columns.mean(), rows.mean()


@pytest.mark.parametrize("family", LAYERS)
def test_every_family_has_a_map_of_the_images_shape(family):
    member = small_member(family, SIZES.get(family, 32)).eval()
    heat = heatmaps.heatmaps(member, noise(1, 90, 60))
    assert heat.shape == (60, 90)
    assert heat.dtype == np.float32
    assert np.isfinite(heat).all()
    assert heat.min() >= 0
    assert heat.max() in (0, 1)


@pytest.mark.parametrize(("family", "expected"), LAYERS.items(), ids=LAYERS)
def test_the_last_layer_with_places_is_found(family, expected):
    member = small_member(family, SIZES.get(family, 32)).eval()
    size = member.preprocess_config.size
    layer, layout = heatmaps._last_layer(member, torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8))
    names = {module: name for name, module in member.backbone.named_modules()}
    assert (names[layer], layout.side) == (expected[0], max(expected[1], 2))


@pytest.mark.parametrize("corner", [(12, 8), (72, 40), (48, 24)])
@pytest.mark.parametrize(
    ("preprocess_config", "network"),
    [
        (PreprocessConfig(size=64, **GREY), Bright),
        (PreprocessConfig(size=64, **GREY, geometry="native_crops", count=4), Bright),
        (PreprocessConfig(size=64, **GREY), Opaque),
        (PreprocessConfig(size=32, **GREY, geometry="native_crops", count=9), Opaque),
    ],
    ids=["squash", "crops", "covered", "covered-crops"],
)
def test_the_hottest_place_is_the_planted_square_wherever_it_is(corner, preprocess_config, network):
    heat = heatmaps.heatmaps(Member(network(), preprocess_config), planted(corner))
    x, y = hottest(heat)
    assert (x, y) == pytest.approx((corner[0] + 6, corner[1] + 6), abs=5)


def test_the_map_of_another_place_is_another():
    member = Member(Bright(), PreprocessConfig(size=64, **GREY))
    one, two = (heatmaps.heatmaps(member, planted(corner)) for corner in ((12, 8), (72, 40)))
    assert one[14, 18] > 0.9
    assert two[14, 18] == 0


def test_nothing_bright_leaves_the_map_empty():
    member = Member(Bright(), PreprocessConfig(size=64, **GREY))
    assert heatmaps.heatmaps(member, Image.new("RGB", (40, 30))).max() == 0


def test_a_large_image_is_shown_smaller():
    member = Member(Bright(), PreprocessConfig(size=64, **GREY))
    image = Image.new("RGB", (1536, 768))
    image.paste((255, 255, 255), (1200, 480, 1440, 720))
    heat = heatmaps.heatmaps(member, image)
    assert heat.shape == (256, 512)
    assert hottest(heat) == pytest.approx((1320 / 3, 600 / 3), abs=8)


@pytest.mark.parametrize("size", [(1200, 1), (1, 1200), (1, 1), (3000, 40)])
@pytest.mark.parametrize("geometry", ["squash", "native_crops"])
def test_a_thin_image_has_a_map(geometry, size):
    heat = heatmaps.heatmaps(
        Member(Bright(), PreprocessConfig(size=16, **GREY, geometry=geometry)), Image.new("RGB", size, (255, 255, 255))
    )
    assert heat.shape[::-1] == heatmaps.shrink(Image.new("RGB", size)).size
    assert heat.max() == 1


def test_frozen_weights_are_explained_as_others():
    member = small_member("vit").eval()
    before = heatmaps.heatmaps(member, noise(4))
    assert (heatmaps.heatmaps(member.requires_grad_(False), noise(4)) == before).all()


def test_a_line_on_the_spectrum_is_explained_by_covering():
    config = transformers.TimmWrapperConfig(
        architecture="dct_spectrum", pretrained_cfg={"input_size": [3, 64, 64]}, model_args={"block": 8}, **LABEL_MAPS
    )
    network = transformers.AutoModelForImageClassification.from_config(config)
    member = Member(network, PreprocessConfig(size=64, **GREY)).eval()
    assert heatmaps._last_layer(member, torch.zeros(1, 64, 64, 3, dtype=torch.uint8)) is None
    heat = heatmaps.heatmaps(member, noise(2, 64, 64))
    assert (heat.shape, heat.max()) == ((64, 64), 1)


def test_explaining_leaves_the_member_as_it_was():
    member = small_member("convnext").eval()
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    before = member(pixels)
    heatmaps.heatmaps(member, noise(3))
    assert torch.equal(member(pixels), before)
    assert not any(module._forward_hooks for module in member.modules())
    assert all(parameter.grad is None for parameter in member.parameters())


def test_the_overlay_has_colour_only_where_it_is_hot():
    image = noise(6, 96, 64)
    heat = np.zeros((64, 96), dtype=np.float32)
    heat[20:40, 30:60] = 1
    laid = np.asarray(heatmaps.overlay(image, heat)).astype(int)
    grey = np.asarray(image.convert("L"))
    assert laid.shape == (64, 96, 3)
    assert (laid[heat == 0] == grey[heat == 0][:, None]).all()
    assert (np.ptp(laid[heat > 0], axis=1) > 0).all()


def test_a_coarse_map_keeps_the_mean():
    heat = np.random.default_rng(0).random((64, 128)).astype(np.float32)
    cells = heatmaps.downsample(heat, 16)
    assert cells.shape == (8, 16)
    assert cells.mean() == pytest.approx(heat.mean(), abs=1e-3)
    assert heatmaps.downsample(heat[:1, :5], 16).shape == (1, 5)


@pytest.mark.parametrize(
    "preprocess_config",
    [
        PreprocessConfig(size=64, **GREY),
        PreprocessConfig(size=64, **GREY, geometry="center_crop", crop_pct=0.8),
        PreprocessConfig(size=64, **GREY, geometry="native_crops", count=5),
        PreprocessConfig(size=64, **GREY, geometry="native_crops", count=9),
    ],
    ids=lambda preprocess_config: f"{preprocess_config.geometry}-{preprocess_config.count}",
)
@pytest.mark.parametrize("size", [(200, 120), (90, 160), (50, 40), (100, 64), (64, 33)])
def test_a_view_shows_the_box_that_is_said(preprocess_config, size):
    width, height = size
    ramp = np.zeros((height, width, 3), dtype=np.uint8)  # red says x, green says y
    ramp[..., 0], ramp[..., 1] = np.arange(width), np.arange(height)[:, None]
    views = preprocess.to_pixels(Image.fromarray(ramp), preprocess_config).astype(float)
    for view, (left, top, right, bottom) in zip(views, preprocess.view_boxes(size, preprocess_config), strict=True):
        x = left + (np.arange(64) + 0.5) * (right - left) / 64 - 0.5
        y = top + (np.arange(64) + 0.5) * (bottom - top) / 64 - 0.5
        within_x, within_y = (x > 2) & (x < width - 3), (y > 2) & (y < height - 3)  # not reflected
        np.testing.assert_allclose(view[32, within_x, 0], x[within_x], atol=1)
        np.testing.assert_allclose(view[within_y, 32, 1], y[within_y], atol=1)
