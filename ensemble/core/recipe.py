"""A recipe: what describes one member, typed and frozen. `recipe_files` reads it from YAML.

Neither NumPy nor torch is imported here, so that every recipe of a folder is known to be
right before anything is downloaded or decoded.
"""

import json
from hashlib import sha256
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ensemble.core.preprocess_config import CROP_COUNTS

DEGRADATIONS = ("jpeg", "webp", "blur", "resize", "noise", "crop")
PROBE_TRAIN = {"lr": 1e-3, "epochs": 1, "batch_size": 32}  # a probe reads the batch size alone


class Section(BaseModel):
    """Part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Backbone(Section):
    """Where the network and its weights come from: a checkpoint, or an architecture."""

    checkpoint: str | None = None  # Hub id "org/name", or a folder in the same layout
    architecture: str | None = None  # "timm/NAME", or a transformers model type such as "swin"
    config: dict[str, Any] = Field(default_factory=dict)  # the architecture's own settings
    weights: str | None = None  # for an architecture: a state dict, FILE or package:MODULE/FILE
    weights_match: Literal["name", "order"] = "name"  # by parameter name, or by position
    drop_path: float | None = Field(None, ge=0, lt=1)  # stochastic depth rate
    stem_stride: int | None = Field(None, ge=1, le=4)  # of the first convolution; 1 keeps the finest traces
    head_init_scale: float = Field(1.0, gt=0)  # the new head's weights are drawn this much smaller

    @model_validator(mode="after")
    def _one_source(self) -> "Backbone":
        if (self.checkpoint is None) == (self.architecture is None):
            raise ValueError("give either checkpoint or architecture")
        if self.checkpoint is not None and (self.config or self.weights):
            raise ValueError("config and weights belong to an architecture; a checkpoint has its own")
        return self


class Image(Section):
    """What differs from the checkpoint's own image contract; None keeps the checkpoint's."""

    size: int | None = Field(None, ge=16, le=2048)
    geometry: Literal["squash", "center_crop", "native_crops"] | None = None
    filter: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] | None = None
    crop_pct: float | None = Field(None, gt=0, le=1)
    count: int | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    background: tuple[int, int, int] | None = None

    @model_validator(mode="after")
    def _crop_count(self) -> "Image":
        if self.count is not None and self.count not in CROP_COUNTS:
            raise ValueError(f"count must be one of {', '.join(map(str, CROP_COUNTS))}")
        return self


class Adapt(Section):
    """What of the network is trained."""

    mode: Literal["full", "lora", "probe"] = "full"  # all of it; low-rank updates; a head on frozen features
    rank: int = Field(8, gt=0)  # lora: of each update
    alpha: float = Field(16.0, gt=0)  # lora: updates are scaled by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1)  # lora: on each update's input
    targets: tuple[str, ...] | None = None  # lora: layers by the end of their names; None: attention and MLP layers
    views: int = Field(1, ge=1, le=64)  # probe: augmented views of each training image beside the plain ones


class Augment(Section):
    """Random changes of training images, drawn alike for both classes.

    Degradations that have a range take part: `chain` of them are drawn and applied in
    random order, to a share `chance` of the images.
    """

    flip: bool = True  # left-right, half the time
    quarter_turns: bool = False  # 0, 90, 180 or 270 degrees
    chance: float = Field(0.5, ge=0, le=1)
    chain: tuple[int, int] = (1, 1)  # fewest and most degradations of one image
    jpeg: tuple[int, int] | None = None  # qualities 1..100
    webp: tuple[int, int] | None = None  # qualities 1..100
    blur: tuple[float, float] | None = None  # Gaussian sigma in pixels
    resize: tuple[float, float] | None = None  # factor of both sides, with a random filter
    noise: tuple[float, float] | None = None  # Gaussian sigma, as a share of the range 0..1
    crop: tuple[float, float] | None = None  # share of each side that is kept

    @model_validator(mode="after")
    def _ranges(self) -> "Augment":
        limits = dict.fromkeys(("jpeg", "webp"), (1, 100)) | {
            "blur": (0, 20), "resize": (0.05, 8), "noise": (0, 1), "crop": (0.05, 1), "chain": (1, len(DEGRADATIONS)),
        }  # fmt: skip
        for name, (least, most) in limits.items():
            given = getattr(self, name)
            if given is not None and not least <= given[0] <= given[1] <= most:
                raise ValueError(f"{name} must be [lowest, highest] within {least}..{most}")
        return self

    @property
    def degradations(self) -> tuple[str, ...]:
        """Names of those that take part."""
        return tuple(name for name in DEGRADATIONS if getattr(self, name) is not None)


class Train(Section):
    """How the member is fine-tuned. The effective batch is batch_size * accumulate, on any number of devices."""

    lr: float = Field(gt=0, lt=1)  # peak learning rate, of the head
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)  # images that go through the network at once
    accumulate: int = Field(1, gt=0)  # batches an optimizer step
    optimizer: Literal["adamw", "sgd", "lamb", "lion"] = "adamw"
    weight_decay: float = Field(0.05, ge=0)  # not of biases and normalisation layers
    layer_decay: float | None = Field(None, gt=0, le=1)  # lr falls by this factor a layer, from head to stem
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    warmup: float = Field(0.1, ge=0, lt=1)  # share of all steps
    clip: float = Field(1.0, gt=0)  # largest gradient norm
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    ema: float | None = Field(None, gt=0, lt=1)  # decay of the weights' moving average; horizon <= a tenth of the steps
    tune_score: Literal["auroc", "log_loss", "balanced_accuracy", "worst_cell"] = "auroc"  # chooses the epoch
    patience: int | None = Field(None, gt=0)  # epochs without a better tune score before training stops
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool | None = None  # None: for convolutional networks
    checkpointing: bool = False  # activations are computed again in the backward pass: slower, less memory
    compile: bool = False  # torch.compile
    seed: int | None = Field(None, ge=0)  # in place of the run's, for several members of one backbone
    gpus: int = Field(1, ge=1)  # with --engine ray, on a cluster that has GPUs; the same member comes of any number


class Recipe(Section):
    """One member: its backbone, image contract overrides, adaptation, augmentation and training."""

    name: str
    backbone: Backbone
    image: Image = Image()
    adapt: Adapt = Adapt()
    augment: Augment = Augment()
    train: Train

    @model_validator(mode="before")
    @classmethod
    def _a_probe_needs_no_training(cls, values: Any) -> Any:
        if (
            isinstance(values, dict)
            and isinstance(values.get("adapt"), dict)
            and values["adapt"].get("mode") == "probe"
        ):
            given = values.get("train") or {}
            return {**values, "train": {**PROBE_TRAIN, **given} if isinstance(given, dict) else given}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if self.train.layer_decay is not None and self.adapt.mode != "full":
            raise ValueError(f"train.layer_decay is for adapt.mode full, not {self.adapt.mode}")
        if self.adapt.targets is not None and self.adapt.mode != "lora":
            raise ValueError(f"adapt.targets is for adapt.mode lora, not {self.adapt.mode}")
        return self

    def values(self) -> dict[str, Any]:
        """What decides the member, JSON-ready: neither its name nor the number of GPUs."""
        return self.model_dump(mode="json", exclude={"name": True, "train": {"gpus"}})

    @property
    def sha256(self) -> str:
        """Hash of `values`; the file's comments do not enter."""
        return sha256(json.dumps(self.values(), sort_keys=True).encode()).hexdigest()
