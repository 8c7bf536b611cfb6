"""The five full-size classifiers with random weights, as folders in the Hub's layout, and JPEGs to score with them."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
import transformers

from ensemble.fetch.demo_data import packaged_photos

LABELS = {0: "real", 1: "ai"}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,  # bicubic
}
CONVNEXT = {**PROCESSOR, "image_processor_type": "ConvNextImageProcessor", "crop_pct": 0.875}
SIZES = ((512, 384), (256, 256))  # of the JPEGs, width and height


@dataclass(frozen=True)
class Kind:
    """model_type: transformers' name, or timm/NAME; processor: preprocessor_config.json, which timm has none of."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)


def _square(side: int) -> dict[str, Any]:
    return {**PROCESSOR, "size": {"height": side, "width": side}}


FULL = {
    "swin_tiny": Kind("swin", {"image_size": 224}, _square(224)),
    "swinv2_tiny": Kind("swinv2", {"image_size": 256, "window_size": 8}, _square(256)),
    "vit_base_clip_384": Kind("timm/vit_base_patch16_clip_384.laion2b_ft_in1k"),
    "swin_base": Kind(
        "swin",
        {"image_size": 224, "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
        _square(224),
    ),
    "convnext_large_384": Kind(
        "convnext",
        {"image_size": 384, "hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3]},
        {**CONVNEXT, "size": {"shortest_edge": 384}},
    ),
}
# The same families and geometries, small: to try the scripts, not to time anything.
QUICK = {
    "swin": Kind("swin", {"image_size": 224, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]}, _square(224)),
    "vit": Kind("timm/vit_tiny_patch16_384.augreg_in21k_ft_in1k"),
    "convnext": Kind(
        "convnext",
        {"image_size": 384, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]},
        {**CONVNEXT, "size": {"shortest_edge": 384}},
    ),
}
KINDS = {**FULL, **QUICK}


def write_classifier(folder: Path, kind: Kind) -> Path:
    """config.json, model.safetensors and the processor, as `save_pretrained` leaves them; kept if it is there."""
    if (folder / "done").is_file():
        return folder
    torch.manual_seed(0)
    labels = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    family, _, name = kind.model_type.partition("/")
    if family == "timm":
        pretrained = timm.get_pretrained_cfg(name).to_dict()
        config = transformers.TimmWrapperConfig(architecture=name.split(".")[0], pretrained_cfg=pretrained, **labels)
    else:
        config = transformers.AutoConfig.for_model(family, **kind.config, **labels)
    network = transformers.AutoModelForImageClassification.from_config(config)
    for parameter in network.parameters():
        # Layer scales and biases start near zero, so that all images would get the same logit.
        if parameter.ndim < 2:
            parameter.data += 0.2 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    if kind.processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(kind.processor), encoding="utf-8")
    (folder / "done").touch()
    return folder


def write_photos(folder: Path, count: int) -> list[Path]:
    """`count` JPEGs at quality 90, crops of photographs from installed packages, both SIZES in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    photos = [
        photo for photo in packaged_photos().values() if photo.width >= SIZES[0][0] and photo.height >= SIZES[0][1]
    ]
    draw, files = np.random.default_rng(0), []
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        photo = photos[number % len(photos)]
        left, top = draw.integers(0, (photo.width - width + 1, photo.height - height + 1))
        files.append(folder / f"{number:05}.jpg")
        photo.crop((left, top, left + width, top + height)).save(files[-1], quality=90)
    return files


def float_graph(bundle: Path, name: str) -> Path:
    """A member's graph from where its normalised float pixels enter, written beside the bundle once."""
    target = bundle.parent / "float" / f"{name}.onnx"
    if not target.is_file():
        graph = (model := onnx.load(bundle / "members" / f"{name}.fp32.onnx")).graph
        makers = {output: node for node in graph.node for output in node.output}
        entry = next(node for node in graph.node if node.op_type == "Conv").input[0]
        waiting = [entry]
        while waiting:  # what makes the pixels from bytes goes
            if node := makers.get(waiting.pop()):
                waiting += node.input
                graph.node.remove(node)
        for node in graph.node:  # the batch size is read from the input
            node.input[:] = [entry if each == "pixels" else each for each in node.input]
        [size] = {axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim[1:3]}
        del graph.input[:]
        graph.input.append(onnx.helper.make_tensor_value_info(entry, onnx.TensorProto.FLOAT, ["batch", 3, size, size]))
        target.parent.mkdir(exist_ok=True)
        onnx.save(model, target.with_suffix(".tmp"))
        os.replace(target.with_suffix(".tmp"), target)
    return target
