"""Builds, loads and saves networks of timm and transformers, with their preprocessing, through one loader.

A Hub checkpoint is first downloaded to a local folder. Only the classifier head may differ from the checkpoint;
anything else is an error.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ensemble.core.errors import BackboneError, join_limited
from ensemble.core.names import LABELS
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.core.recipe import Backbone, Recipe
from ensemble.models import processor
from ensemble.models import spectrum as _spectrum  # noqa: F401 our own architectures join timm's
from ensemble.models.checkpoints import check_source, weights_file
from ensemble.models.network_edits import set_stem_stride

LABEL_MAPS: dict[str, Any] = {
    "num_labels": len(LABELS),
    "id2label": dict(enumerate(LABELS)),
    "label2id": {name: index for index, name in enumerate(LABELS)},
}
# Prefixes of the weights of an image-text model that an image classifier does not use, by model type.
UNUSED_WEIGHTS = {"siglip": ("text_model.", "logit_scale", "logit_bias", "vision_model.head.")}
# Model types that resize their position embeddings in `forward`, to any image size.
RESIZE_POSITIONS = {"dinov2", "dinov2_with_registers"}


class Member(nn.Module):
    """A backbone with its mean and std inside: uint8 pixels [N, S, S, 3] -> float32 logit [N].

    The logit is z(positive) - z(negative). This module is trained, exported and compared with its export.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: nn.Module, preprocess_config: PreprocessConfig, positive: int = 1) -> None:
        super().__init__()
        self.backbone = backbone
        self.preprocess_config = preprocess_config
        self.positive = positive
        self.memory_format = torch.preserve_format  # of activations: uint8 pixels come channels last
        self.register_buffer("mean", torch.tensor(preprocess_config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess_config.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [N, S, S, 3], RGB -> float32 [N]."""
        x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=self.memory_format)
        scores = self.backbone(pixel_values=(x / 255.0 - self.mean) / self.std).logits
        return (scores[:, self.positive] - scores[:, 1 - self.positive]).float()


def build_member(recipe: Recipe, checkpoint: Path | None) -> Member:
    """The recipe's network with a new two-class head, ready to be trained.

    checkpoint: the local folder of `recipe.backbone.checkpoint`, from `locate_checkpoint`; None for an architecture.
    BackboneError if weights do not fit, or the network does not take inputs of the image size.
    """
    if checkpoint is not None:
        config = load_config(checkpoint)
        preprocess_config = _with_overrides(processor.from_checkpoint(checkpoint, config), recipe)
        network = _from_checkpoint(checkpoint, config, recipe.backbone, preprocess_config)
    else:
        network, preprocess_config = _from_architecture(recipe)
    set_stem_stride(network, recipe.backbone.stem_stride)
    head = _head_names(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in head:
                parameter.mul_(recipe.backbone.head_init_scale)
    member = Member(network, preprocess_config)
    _check_forward(member)
    return member


def load_classifier(folder: Path) -> tuple[nn.Module, Any]:
    """A finished two-class classifier and its config, exactly as saved; nothing may mismatch."""
    config = load_config(folder)
    network, info = _from_pretrained(folder, config)
    _check_weights(folder, info, extra=_buffers(network))
    set_stem_stride(network)
    return network.eval(), config


def _from_pretrained(folder: Path, config: Any, ignore_mismatched_sizes: bool = False) -> tuple[nn.Module, Any]:
    """The network of a local checkpoint, and which of its weights are missing, unexpected or of another size."""
    with _quiet_transformers(folder):
        return transformers.AutoModelForImageClassification.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            output_loading_info=True,
        )


def save_classifier(member: Member, folder: Path) -> None:
    """Write config.json, model.safetensors and the processor, so that `from_pretrained` opens it."""
    network: Any = member.backbone
    with _quiet_transformers(folder):
        network.save_pretrained(folder)
    if network.config.model_type == "timm_wrapper":
        # transformers reads a timm checkpoint's pixels from pretrained_cfg in its config.json
        path = folder / "config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values["pretrained_cfg"] = processor.to_timm(member.preprocess_config, values["pretrained_cfg"])
    else:
        path = folder / "preprocessor_config.json"
        values = processor.to_processor(member.preprocess_config)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_config(folder: Path) -> Any:
    """A checkpoint's config.json. Python that it names is never run, and what it names elsewhere is not fetched."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if config.model_type == "timm_wrapper":
            processor.check_timm(config)
    except Exception as error:  # anybody may have written it
        raise BackboneError(f"{folder}: config.json cannot be used: {processor.load_error_line(error)}") from None
    return config


def _from_checkpoint(folder: Path, config: Any, backbone: Backbone, preprocess_config: PreprocessConfig) -> nn.Module:
    if config.model_type not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:  # dinov3_vit, for example
        raise BackboneError(
            f"transformers makes no image classifier of {config.model_type}; use timm's checkpoint of the same weights,"
            " such as timm/vit_small_patch16_dinov3.lvd1689m"
        )
    config = copy.deepcopy(config)
    _configure(config, backbone, preprocess_config)
    network, info = _from_pretrained(folder, config, ignore_mismatched_sizes=True)
    head = _head_names(network)
    prefixes = UNUSED_WEIGHTS.get(config.model_type, ())
    unused = {name for name in info["unexpected_keys"] if name.startswith(prefixes)}
    _check_weights(folder, info, head, _buffers(network) | unused)
    for name, parameter in network.named_parameters():
        if name not in head:
            continue
        if name.endswith("bias"):  # a new head even where a two-class checkpoint would have fitted
            nn.init.zeros_(parameter)
        else:
            nn.init.trunc_normal_(parameter, std=0.02)  # as ViT, Swin and ConvNeXt draw theirs
    return network


def _from_architecture(recipe: Recipe) -> tuple[nn.Module, PreprocessConfig]:
    backbone = recipe.backbone
    check_source(backbone)
    kind, _, name = (backbone.architecture or "").partition("/")
    try:
        if kind == "timm":
            import timm

            pretrained = timm.get_pretrained_cfg(name).to_dict()
            config = transformers.TimmWrapperConfig(
                architecture=name, pretrained_cfg=pretrained, model_args=dict(backbone.config), **LABEL_MAPS
            )
        else:
            config = transformers.AutoConfig.for_model(kind, **backbone.config, **LABEL_MAPS)
        preprocess_config = _with_overrides(processor.from_config(config), recipe)
        _configure(config, backbone, preprocess_config)
        network = transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    except BackboneError:
        raise
    except Exception as error:  # the recipe's `config` reaches constructors that check it each in its own way
        raise BackboneError(f"{backbone.architecture} cannot be built: {processor.load_error_line(error)}") from None
    if backbone.weights is not None:
        _load_weights(network, backbone)
    return network, preprocess_config


def _configure(config: Any, backbone: Backbone, preprocess_config: PreprocessConfig) -> None:
    """Two labels, drop path and input size, where each family's config keeps them."""
    for key in ("id2label", "label2id"):
        setattr(config, key, dict(LABEL_MAPS[key]))
    if config.model_type == "timm_wrapper":
        pretrained = dict(config.pretrained_cfg)
        arguments = dict(config.model_args or {})
        if backbone.drop_path is not None:
            arguments["drop_path_rate"] = backbone.drop_path
        if preprocess_config.size != pretrained["input_size"][-1] and pretrained.get("fixed_input_size"):
            arguments["img_size"] = preprocess_config.size
        pretrained["input_size"] = [3, preprocess_config.size, preprocess_config.size]
        config.pretrained_cfg, config.model_args = pretrained, arguments or None
        return
    if backbone.drop_path is not None:
        if not hasattr(config, "drop_path_rate"):
            raise BackboneError(f"{config.model_type} has no drop path; remove backbone.drop_path")
        config.drop_path_rate = backbone.drop_path
    if config.model_type == "siglip":
        # its classifier averages the tokens, so the pooling head would be dead weight
        config.vision_config.image_size, config.vision_config.vision_use_head = preprocess_config.size, False
    elif hasattr(config, "image_size") and config.model_type not in RESIZE_POSITIONS:
        config.image_size = preprocess_config.size


def _with_overrides(preprocess_config: PreprocessConfig, recipe: Recipe) -> PreprocessConfig:
    """The checkpoint's preprocessing with the recipe's `image` values in place of its own."""
    changes = {key: value for key, value in recipe.image.model_dump().items() if value is not None}
    try:
        return replace(preprocess_config, **changes)
    except ValueError as error:
        raise BackboneError(f"the recipe's image settings do not fit together: {error}") from None


def _head_names(network: Any) -> frozenset[str]:
    """Names of the classifier's parameters: those outside the backbone, timm's by its own account."""
    if network.config.model_type == "timm_wrapper":
        named = network.timm_model.pretrained_cfg.get("classifier") or ()
        prefixes = tuple(f"timm_model.{name}." for name in ([named] if isinstance(named, str) else named))
    else:
        prefixes = ("classifier.",)
    names = frozenset(name for name, _ in network.named_parameters() if name.startswith(prefixes))
    if not names:
        raise BackboneError(
            f"{network.config.model_type}: the classifier head was not found; choose another checkpoint"
        )
    return names


def _check_weights(
    source: Path, info: Mapping[str, Any], head: frozenset[str] = frozenset(), extra: frozenset[str] = frozenset()
) -> None:
    """BackboneError listing every key that does not fit: only `head` may be missing or of another shape.

    Keys named in `extra` may be unexpected: older files store tables that are computed now.
    """
    mismatched = {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]}
    problems = []
    for kind, keys in (
        ("missing", set(info["missing_keys"]) - head),
        ("unexpected", set(info["unexpected_keys"]) - extra),
        ("of another shape", mismatched - head),
        ("broken", set(info.get("error_msgs", ()))),
    ):
        if keys:
            problems.append(f"{len(keys)} {kind}: {join_limited(sorted(keys), 4)}")
    if problems:
        raise BackboneError(f"{source}: the weights do not fit the network beyond its head ({'; '.join(problems)})")


def _buffers(network: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in network.named_buffers())


def _load_weights(network: Any, backbone: Backbone) -> None:
    path = weights_file(backbone.weights or "")
    with _quiet_transformers(path):
        if path.suffix == ".safetensors":
            given = load_file(path)
        else:
            # weights_only: tensors and nothing else, so a hostile file cannot run code
            given = torch.load(path, map_location="cpu", weights_only=True)
    inner = network.timm_model if hasattr(network, "timm_model") else network
    own = inner.state_dict()
    prefix = "timm_model." if inner is not network else ""
    head = {name.removeprefix(prefix) for name in _head_names(network)}
    if backbone.weights_match == "order":
        if len(own) != len(given):
            raise BackboneError(f"{path}: {len(given)} tensors cannot match {len(own)} by order")
        given = dict(zip(own, given.values(), strict=True))
    body = {name for name in own if name not in head}
    missing, unexpected = body - set(given), set(given) - set(own)
    shapes = {name for name in body & set(given) if given[name].shape != own[name].shape}
    _check_weights(path, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": shapes})
    inner.load_state_dict({name: given[name] if name in body else own[name] for name in own})


def _check_forward(member: Member) -> None:
    size = member.preprocess_config.size
    member.eval()
    try:
        with torch.inference_mode():
            logit = member(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise BackboneError(
            f"the network does not take {size}x{size} pixels: {processor.load_error_line(error)}"
        ) from None
    if logit.shape != (1,):
        raise BackboneError(f"the network gives {tuple(logit.shape)} for one image, not one logit")


@contextmanager
def _quiet_transformers(folder: Path) -> Iterator[None]:
    """transformers without its reports and bars: we list what does not fit ourselves, in one line."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # a damaged or hostile file may raise anything
        raise BackboneError(f"{folder}: cannot be loaded: {processor.load_error_line(error)}") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
