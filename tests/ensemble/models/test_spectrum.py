import numpy as np
import pytest
import timm
import torch
from scipy.fft import dctn

from ensemble.core.errors import BackboneError
from ensemble.core.recipe import Recipe
from ensemble.models import backbone
from ensemble.models.spectrum import FAINT, FAINTEST, LUMA, Spectrum, dct_basis
from ensemble.models.torch_runner import torch_runner
from export.bundle.certificate import certify_fp32
from export.bundle.convert import convert
from export.runtimes.runner import open_runner
from export.runtimes.settings import RuntimeConfig

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 3, 44, 44)).astype(np.float32) / 255


def features(pixels, block=8, stride=9):
    with torch.inference_mode():
        return Spectrum(block, stride).forward_features(torch.from_numpy(pixels.copy())).numpy()


def recipe_of(size=64, **config):
    values = {"architecture": "timm/dct_spectrum", "config": config}
    train = {"lr": 0.1, "epochs": 1, "batch_size": 2}
    return Recipe.model_validate({"name": "spectrum", "backbone": values, "image": {"size": size}, "train": train})


def test_features_are_logs_of_a_block_transform_of_luma():
    grey = 255 * np.tensordot(np.array(LUMA), PIXELS, axes=(0, 1))
    blocks = [grey[:, y : y + 8, x : x + 8] for y in range(0, 37, 9) for x in range(0, 37, 9)]
    size = np.abs(np.stack([dctn(block, axes=(1, 2), norm="ortho") for block in blocks]))
    both = np.stack((np.log(size.mean(axis=0) + FAINTEST), np.log(size + FAINT).mean(axis=0)), axis=1)
    expected = ((both + both.swapaxes(2, 3)) / 2)[:, :, *np.triu_indices(8)]
    np.testing.assert_allclose(features(PIXELS), expected, atol=1e-4)


def test_the_basis_keeps_lengths():
    basis = dct_basis(32)
    torch.testing.assert_close(basis @ basis.T, torch.eye(32), atol=1e-6, rtol=0)


TURNS = [lambda p: p[..., ::-1], lambda p: p[..., ::-1, :], lambda p: np.rot90(p, axes=(2, 3))]


@pytest.mark.parametrize("turn", TURNS, ids=["left-right", "upside down", "quarter turn"])
def test_turned_pictures_are_alike_where_blocks_fit_the_sides(turn):
    np.testing.assert_allclose(features(turn(PIXELS)), features(PIXELS), atol=1e-4)
    assert np.abs(features(turn(PIXELS), stride=10) - features(PIXELS, stride=10)).max() > 0.01  # blocks do not fit


def test_it_is_saved_opened_exported_and_certified(tmp_path):
    def runner(network):
        return torch_runner("m", backbone.Member(network, member.preprocess_config), torch.device("cpu"))

    pixels = np.random.default_rng(1).integers(0, 256, (14, 64, 64, 3), dtype=np.uint8)
    member = backbone.build_member(recipe_of(block=16, stride=7), None)
    expected = runner(member.backbone).run(pixels)
    backbone.save_classifier(member, tmp_path / "saved")
    network, config = backbone.load_classifier(tmp_path / "saved")
    assert config.id2label == {0: "real", 1: "ai"}
    np.testing.assert_array_equal(runner(network).run(pixels), expected)
    convert(member, tmp_path / "m.onnx")
    found = certify_fp32(
        runner(network).run(pixels),
        open_runner("m", tmp_path / "m.onnx", member.preprocess_config, RuntimeConfig("onnxruntime")),
        pixels,
    )
    assert found["max_abs_difference"] < 1e-4


def test_timm_builds_it_by_name():
    network = timm.create_model("dct_spectrum", num_classes=2, block=8)
    assert network.num_features == network.head.in_features == 72
    assert network(torch.zeros(1, 3, 40, 50)).shape == (1, 2)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (recipe_of(size=16), "the network does not take 16x16 pixels"),
        (recipe_of(stride=0), "dct_spectrum cannot be built: a spectrum is taken of red, green and blue"),
        (recipe_of(blocks=4), "unexpected keyword argument 'blocks'"),
    ],
    ids=["too small", "no stride", "unknown setting"],
)
def test_what_cannot_be_is_told(recipe, message):
    with pytest.raises(BackboneError, match=message):
        backbone.build_member(recipe, None)
