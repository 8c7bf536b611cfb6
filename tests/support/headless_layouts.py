"""Checkpoints without a classifier as local folders in the Hub's layout, tiny, with random weights."""

import json
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from hub_layouts import IMAGENET
from safetensors.torch import save_file

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
COMMON = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255, "resample": 3}
SIZES: dict[str, Any] = {"depth": 1, "embed_dim": 32, "num_heads": 2}
TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
# name -> (the Hub repository it stands for, features that enter the head)
HEADLESS = {
    "timm_dinov2": ("timm/vit_small_patch14_dinov2.lvd142m", 32),
    "timm_dinov3": ("timm/vit_small_patch16_dinov3.lvd1689m", 32),
    "timm_siglip": ("timm/vit_base_patch16_siglip_224.webli", 32),
    "dinov2": ("facebook/dinov2-small", 64),
    "siglip": ("google/siglip-base-patch16-224", 32),
}


def write_headless(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    source = HEADLESS[name][0].split("/")[1]
    if name.startswith("timm_"):
        return _write_timm(folder, source)
    return {"dinov2": _write_dinov2, "siglip": _write_siglip}[name](folder)


def _write_timm(folder: Path, name: str) -> Path:
    network = timm.create_model(name, pretrained=False, num_classes=0, **SIZES)
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    values = {
        "architecture": name.split(".")[0],
        "num_classes": 0,
        "num_features": network.num_features,
        "global_pool": network.global_pool,
        "model_args": SIZES,
        "pretrained_cfg": timm.get_pretrained_cfg(name).to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def _write_dinov2(folder: Path) -> Path:
    """Trained at 518, its processor crops to 224; the weights' names have no prefix."""
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=518, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    values = {
        "architectures": ["Dinov2Model"],
        "hidden_size": 32,
        "image_size": 518,
        "model_type": "dinov2",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "out_features": ["stage1"],
        "out_indices": [1],
        "patch_size": 14,
        "stage_names": ["stem", "stage1"],
        "torch_dtype": "float32",
        "transformers_version": "4.31.0.dev0",
    }
    (folder / "config.json").write_text(json.dumps(values))
    crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}}
    processor = {"image_processor_type": "BitImageProcessor", **COMMON, **IMAGENET, **crop}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _write_siglip(folder: Path) -> Path:
    """Two towers; the image tower's names have the prefix vision_model."""
    text = {"model_type": "siglip_text_model", "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 16}
    values = {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {**TOWER, **text},
        "torch_dtype": "float32",
        "vision_config": {**TOWER, **vision},
    }
    config = transformers.SiglipConfig(text_config=values["text_config"], vision_config=values["vision_config"])
    transformers.SiglipModel(config).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    size = {"size": {"height": 224, "width": 224}}
    processor = {"image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor", **COMMON, **HALF}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, **size}))
    return folder
