"""Our pixels against those of the checkpoints' own preprocessors, which are built here without a network."""

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import transformers
from hub_layouts import CONVNEXT_EXTRACTOR, LAYOUTS
from pictures import noise
from timm.data import create_transform, resolve_data_config

from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.images import preprocess
from ensemble.models import processor

ODD_SIZES = ((1, 1), (37, 1), (17, 333), (224, 224), (401, 500))
EVEN_SIZES = ((256, 256), (300, 300), (1, 1), (512, 256), (300, 600))
VIT = "vit_base_patch16_clip_384.laion2b_ft_in1k"
TIMM_CENTER_CROP = "resnet18.tv_in1k"


def write_processor(folder, model_type, values):
    """A checkpoint folder without weights; its processor in the form given."""
    config = transformers.AutoConfig.for_model(model_type)
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return config


def processor_pair(folder, model_type, values):
    """The contract we read and the function it must equal."""
    preprocess_config = processor.from_checkpoint(folder, write_processor(folder, model_type, values))
    official = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    return preprocess_config, lambda image: official(image, return_tensors="np")["pixel_values"][0]


def timm_pair(folder, name):
    values = timm.get_pretrained_cfg(name).to_dict()
    config = transformers.TimmWrapperConfig(architecture=name.split(".")[0], pretrained_cfg=values)
    transform = create_transform(**resolve_data_config(pretrained_cfg=values), is_training=False)
    return processor.from_checkpoint(folder, config), lambda image: transform(image).numpy()


def listed_pair(folder, name):
    layout = LAYOUTS[name]
    if layout.model_type == "timm":
        return timm_pair(folder, VIT)
    return processor_pair(folder, layout.model_type, layout.processor)


def difference(preprocess_config, reference, pictures) -> float:
    """The largest difference after normalisation, over all pictures."""
    largest = []
    for picture in pictures:
        scaled = preprocess.to_pixels(picture, preprocess_config)[0].astype(np.float32) / 255
        ours = (scaled - np.float32(preprocess_config.mean)) / np.float32(preprocess_config.std)
        largest.append(np.abs(ours.transpose(2, 0, 1) - reference(picture)).max())
    return float(max(largest))


@pytest.fixture(scope="module")
def pictures(photos):
    return [*photos[:3], *(noise(i, *size) for i, size in enumerate(ODD_SIZES))]


LISTED = {  # size, and the mean of red
    "swin_tiny": (224, 0.485),
    "swin_base": (224, 0.485),
    "swinv2_tiny": (256, 0.485),
    "convnext_large_384": (384, 0.485),
    "vit_base_clip_384": (384, 0.48145466),
}


def test_all_five_are_compared():
    assert set(LISTED) == set(LAYOUTS)


@pytest.mark.parametrize("name", LISTED)
def test_the_listed_checkpoints_see_their_own_pixels(tmp_path, pictures, name):
    preprocess_config, reference = listed_pair(tmp_path, name)
    assert (preprocess_config.size, preprocess_config.mean[0]) == LISTED[name]
    assert (preprocess_config.geometry, preprocess_config.filter) == ("squash", "bicubic")
    assert difference(preprocess_config, reference, pictures) < 1e-5


def test_convnext_below_384_crops(tmp_path):
    values = {**CONVNEXT_EXTRACTOR, "resample": 3, "size": 224}
    preprocess_config, reference = processor_pair(tmp_path, "convnext", values)
    assert (preprocess_config.geometry, preprocess_config.size, preprocess_config.crop_pct) == (
        "center_crop",
        224,
        0.875,
    )
    # transformers and torchvision differ where an odd number of pixels is cut away
    assert difference(preprocess_config, reference, [noise(i, *size) for i, size in enumerate(EVEN_SIZES)]) < 1e-5


def test_a_timm_model_with_a_center_crop(tmp_path, pictures):
    preprocess_config, reference = timm_pair(tmp_path, TIMM_CENTER_CROP)
    assert (preprocess_config.geometry, preprocess_config.crop_pct, preprocess_config.filter) == (
        "center_crop",
        0.875,
        "bilinear",
    )
    assert difference(preprocess_config, reference, pictures) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"filter": "bilinear"},
        {"geometry": "center_crop"},
        {"mean": (0.5, 0.5, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_comparison_detects_a_wrong_contract(tmp_path, photos, change):
    preprocess_config, reference = listed_pair(tmp_path, "swin_tiny")
    assert difference(replace(preprocess_config, **change), reference, photos[:1]) > 0.01


PREPROCESS_CONFIGS = {
    "squash": PreprocessConfig(size=96, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), filter="bilinear"),
    "center_crop": PreprocessConfig(
        size=224, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), geometry="center_crop", crop_pct=0.875, filter="lanczos"
    ),
}


@pytest.mark.parametrize("geometry", PREPROCESS_CONFIGS)
def test_a_processor_we_write_says_the_same_contract(tmp_path, pictures, geometry):
    preprocess_config = PREPROCESS_CONFIGS[geometry]
    read, reference = processor_pair(tmp_path, "swin", processor.to_processor(preprocess_config))
    assert read == preprocess_config
    even = [noise(i, *size) for i, size in enumerate(EVEN_SIZES)]
    assert difference(read, reference, pictures if geometry == "squash" else even) < 1e-5


@pytest.mark.parametrize("geometry", PREPROCESS_CONFIGS)
@pytest.mark.parametrize("name", [VIT, TIMM_CENTER_CROP])
def test_a_timm_config_we_write_says_the_same_contract(tmp_path, geometry, name):
    values = processor.to_timm(PREPROCESS_CONFIGS[geometry], timm.get_pretrained_cfg(name).to_dict())
    config = transformers.TimmWrapperConfig(architecture=name.split(".")[0], pretrained_cfg=values)
    config.save_pretrained(tmp_path)
    read = processor.from_checkpoint(tmp_path, transformers.AutoConfig.from_pretrained(tmp_path))
    assert read == PREPROCESS_CONFIGS[geometry]
