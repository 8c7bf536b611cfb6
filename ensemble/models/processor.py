"""The preprocessing of a checkpoint: read from its own processor, and written back in that form."""

import inspect
import math
from pathlib import Path
from typing import Any

import timm
import transformers
from PIL import Image

from ensemble.core.errors import BackboneError, error_line, join_limited
from ensemble.core.preprocess_config import FILTERS, PreprocessConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def from_checkpoint(folder: Path, config: Any) -> PreprocessConfig:
    """The preprocessing of a checkpoint folder: its processor's, or for timm its config's."""
    try:
        if config.model_type == "timm_wrapper":
            return from_config(config)
        # The PIL form: the torchvision one resizes differently.
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
        return _from_processor(processor)
    except Exception as error:  # anybody may have written it
        raise BackboneError(
            f"{folder}: its preprocessor_config.json does not say how images are prepared ({load_error_line(error)}); "
            "add the checkpoint's own, with size, image_mean and image_std"
        ) from None


def load_error_line(error: Exception) -> str:
    """Why a library could not load a checkpoint, in one line."""
    if "trust_remote_code" in str(error):
        return "it needs Python code of its own, which is never run here; choose another checkpoint"
    return error_line(error, first=True)


def check_timm(config: Any) -> None:
    """Raise BackboneError for a timm config that names a network, or weights, elsewhere than in timm itself."""
    name, arguments = config.architecture, set(config.model_args or {})
    if not isinstance(name, str) or ":" in name:  # hf-hub:NAME and local-dir:PATH
        raise BackboneError(f"architecture {name!r} is not one of timm's own")
    if wrong := arguments & set(inspect.signature(timm.create_model).parameters):  # checkpoint_path, say
        raise BackboneError(f"model_args may not hold {join_limited(sorted(wrong))}")


def from_config(config: Any) -> PreprocessConfig:
    """The preprocessing of a network without a processor: timm's pretrained_cfg, else ImageNet's usual."""
    if config.model_type == "timm_wrapper":
        return _from_timm(config.pretrained_cfg)
    size = getattr(config, "image_size", None) or 224
    return PreprocessConfig(size=_side(size), mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _from_timm(values: dict[str, Any]) -> PreprocessConfig:
    size, crop_pct = _side(values["input_size"][1:]), values.get("crop_pct") or 0.875
    mode, filter_name = values.get("crop_mode") or "center", values.get("interpolation") or "bicubic"
    if filter_name not in FILTERS:
        raise BackboneError(f"timm's interpolation {filter_name!r} is not known; set image.filter in the recipe")
    if mode not in {"center", "squash"} or (mode == "squash" and crop_pct != 1.0):
        raise BackboneError(f"timm's crop mode {mode!r} at {crop_pct} is not known; set image.geometry in the recipe")
    return PreprocessConfig(
        size=size,
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
        geometry="squash" if mode == "squash" else "center_crop",
        filter=filter_name,
        crop_pct=crop_pct,
    )


def _from_processor(processor: Any) -> PreprocessConfig:
    size: dict[str, Any] = dict(processor.size)
    common: dict[str, Any] = {
        "mean": tuple(processor.image_mean),
        "std": tuple(processor.image_std),
        "filter": Image.Resampling(int(processor.resample)).name.lower(),
    }
    if not processor.do_normalize or not processor.do_rescale:
        raise ValueError("it does not rescale and normalise")
    if not math.isclose(processor.rescale_factor, 1 / 255):
        raise ValueError(f"rescale_factor {processor.rescale_factor} is not 1/255")
    short: Any = size.get("shortest_edge")
    crops = getattr(processor, "do_center_crop", False)
    crop = _side([processor.crop_size["height"], processor.crop_size["width"]]) if crops else 0
    if not processor.do_resize:
        if not crops:
            raise ValueError("it neither resizes nor crops, so inputs would differ in size")
        return PreprocessConfig(size=crop, geometry="native_crops", **common)
    if "ConvNext" in type(processor).__name__:
        # transformers squashes ConvNeXt inputs at 384 and above, and crops below
        if short >= 384:
            return PreprocessConfig(size=short, geometry="squash", **common)
        return PreprocessConfig(size=short, geometry="center_crop", crop_pct=processor.crop_pct, **common)
    if crops:
        if short is None:
            raise ValueError("it squashes and then crops")
        return PreprocessConfig(size=crop, geometry="center_crop", crop_pct=crop / short, **common)
    if short is not None:
        raise ValueError("it keeps the aspect ratio, so inputs would differ in size")
    return PreprocessConfig(size=_side([size["height"], size["width"]]), geometry="squash", **common)


def _side(size: Any) -> int:
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if sides[0] != sides[1]:
        raise ValueError(f"inputs of {sides[0]}x{sides[1]} are not square")
    return int(sides[0])


def to_processor(preprocess_config: PreprocessConfig) -> dict[str, Any]:
    """preprocessor_config.json for transformers; native_crops become one centre crop, since it has no more."""
    values: dict[str, Any] = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess_config.mean),
        "image_std": list(preprocess_config.std),
        "resample": int(Image.Resampling[preprocess_config.filter.upper()]),
    }
    square = {"height": preprocess_config.size, "width": preprocess_config.size}
    if preprocess_config.geometry == "squash":
        return {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": square, **values}
    short = {"shortest_edge": preprocess_config.short_side}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": preprocess_config.geometry == "center_crop",
        "size": short,
        "do_center_crop": True,
        "crop_size": square,
        **values,
    }


def to_timm(preprocess_config: PreprocessConfig, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """timm's pretrained_cfg with these values; native_crops become one centre crop, since it has no more."""
    return {
        **pretrained_cfg,
        "input_size": [3, preprocess_config.size, preprocess_config.size],
        "mean": list(preprocess_config.mean),
        "std": list(preprocess_config.std),
        "interpolation": preprocess_config.filter,
        "crop_pct": preprocess_config.crop_pct,
        "crop_mode": "squash" if preprocess_config.geometry == "squash" else "center",
    }
