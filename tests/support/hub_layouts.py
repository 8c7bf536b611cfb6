"""The five listed checkpoints as local folders in the Hub's layout, with random weights."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from ensemble.core import artifacts

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
# As the Hub stores them, some in the form of transformers 4.
VIT_EXTRACTOR = {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor", **IMAGENET}
CONVNEXT_EXTRACTOR = {**VIT_EXTRACTOR, "feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.875}


@dataclass(frozen=True)
class Layout:
    """recipe: its file in recipes/; millions: parameters with two labels."""

    recipe: str
    millions: float
    model_type: str
    config: dict[str, Any]
    processor: dict[str, Any]


LAYOUTS = {
    "swin_tiny": Layout(
        "swin_tiny",
        27.52,
        "swin",
        {"image_size": 224, "num_labels": 1000},
        {**VIT_EXTRACTOR, "resample": 3, "size": 224},
    ),
    "swin_base": Layout(
        "swin_base",
        86.75,
        "swin",
        {
            "image_size": 224,
            "embed_dim": 128,
            "depths": [2, 2, 18, 2],
            "num_heads": [4, 8, 16, 32],
            "num_labels": 21841,
        },
        {**VIT_EXTRACTOR, "resample": 3, "size": 224},
    ),
    "swinv2_tiny": Layout(
        "swinv2_tiny",
        27.58,
        "swinv2",
        {"image_size": 256, "window_size": 8, "num_labels": 1000},
        {**VIT_EXTRACTOR, "resample": 3, "size": {"height": 256, "width": 256}},
    ),
    "convnext_large_384": Layout(
        "convnext_large_384",
        196.23,
        "convnext",
        {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3], "num_labels": 1000},
        {**CONVNEXT_EXTRACTOR, "resample": 3, "size": 384},
    ),
    "vit_base_clip_384": Layout("vit_base_clip_384", 86.09, "timm", {}, {}),
}

TINY_SWIN = Layout(
    "swin_tiny",
    0.01,
    "swin",
    {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 12,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
        "num_labels": 3,
    },
    {**VIT_EXTRACTOR, "resample": 3, "size": 32},
)


def write_checkpoint(folder: Path, layout: Layout) -> Path:
    """config.json, weights and processor as on the Hub; Swins with the index tables older files hold."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    if layout.model_type == "timm":
        return _write_timm(folder, "vit_base_patch16_clip_384.laion2b_ft_in1k")
    config = transformers.AutoConfig.for_model(layout.model_type, **layout.config)
    network = transformers.AutoModelForImageClassification.from_config(config)
    network.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    tables = {
        name.replace("relative_position_bias.relative_position_index", "self.relative_position_index"): table
        for name, table in network.named_buffers()
        if name.endswith(("relative_position_index", "relative_coords_table"))
    }
    save_file(
        {**state, **{n: t.contiguous() for n, t in tables.items()}}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(layout.processor))
    return folder


def change_weights(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a checkpoint, its weights changed in place by `change`."""
    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors", {"format": "pt"})
    return target


def _write_timm(folder: Path, name: str) -> Path:
    network = timm.create_model(name, pretrained=False)
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    config = {
        "architecture": name.split(".")[0],
        "num_classes": network.num_classes,
        "num_features": network.num_features,
        "global_pool": "token",
        "pretrained_cfg": timm.get_pretrained_cfg(name).to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def listing(values):
    """A bundle.json that anybody could write."""
    values = {"format_version": 1, **values}
    return json.dumps({**values, "digest": artifacts.json_sha256(values)}).encode()
