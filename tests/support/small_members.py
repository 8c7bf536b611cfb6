"""Members of a few thousand random weights, one a family."""

import timm
import torch
import transformers
from helpers import change_json, write_run, write_stacker

from ensemble.core import artifacts
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.models.backbone import LABEL_MAPS, Member, save_classifier

PLAIN = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {
    "beit": {**PLAIN, "intermediate_size": 16, "patch_size": 16, "use_shared_relative_position_bias": True},
    "clip": {"vision_config": {**PLAIN, "intermediate_size": 16, "image_size": 32, "patch_size": 16}},
    "convnext": {"hidden_sizes": [4, 8], "depths": [1, 2], "num_stages": 2},
    "convnextv2": {"hidden_sizes": [4, 8], "depths": [1, 2], "num_stages": 2},
    "data2vec-vision": {**PLAIN, "intermediate_size": 16, "patch_size": 16, "use_relative_position_bias": True},
    "deit": {**PLAIN, "intermediate_size": 16, "patch_size": 16, "architectures": ["DeiTForImageClassification"]},
    "dinov2": {**PLAIN, "patch_size": 16},
    "dinov2_with_registers": {**PLAIN, "patch_size": 16},
    "resnet": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"},
    "siglip": {"vision_config": {**PLAIN, "intermediate_size": 16, "image_size": 32, "patch_size": 16}},
    "swin": {"patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4},
    "swinv2": {"patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4},
    "vit": {**PLAIN, "intermediate_size": 16, "patch_size": 16},
    "timm/test_convnext": {},
    "timm/test_efficientnet": {},
    "timm/test_vit": {},
    "timm/mobilenetv2_035": {},
    "timm/swin_tiny_patch4_window7_224": {
        "img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4
    },
}  # fmt: skip


def small_member(family, size=32, seed=0):
    torch.manual_seed(seed)
    kind, _, name = family.partition("/")
    if kind == "timm":
        config = transformers.TimmWrapperConfig(
            architecture=name,
            pretrained_cfg=timm.get_pretrained_cfg(name).to_dict(),
            model_args=SMALL[family] or None,
            **LABEL_MAPS,
        )
    else:
        own = {} if "vision_config" in SMALL[family] else {"image_size": size}
        config = transformers.AutoConfig.for_model(kind, **own, **SMALL[family], **LABEL_MAPS)
    network = transformers.AutoModelForImageClassification.from_config(config)
    return Member(network, PreprocessConfig(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))


def write_networks(run):
    """A run of two tiny networks, `one` and `two`, and their stacker."""
    write_run(run)
    for seed, (name, family) in enumerate({"one": "convnext", "two": "vit"}.items()):
        folder, member = artifacts.member_path(run, name), small_member(family, seed=seed)
        save_classifier(member, folder)
        written = ("config.json", "model.safetensors", "heldout.parquet")
        files = {file: artifacts.file_sha256(folder / file) for file in written}
        change_json(folder / "member.json", contract=member.preprocess_config.to_dict(), files=files)
    write_stacker(run)
    return run
