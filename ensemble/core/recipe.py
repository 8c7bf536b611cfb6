"""Recipes: the typed configuration of one member (pydantic), and its YAML files.

Neither NumPy nor torch is imported here, so that all recipes of a folder are checked before anything is downloaded
or decoded.
"""

import difflib
import json
from collections.abc import Hashable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ensemble.core.errors import RecipeError, error_line, join_limited
from ensemble.core.names import RESERVED, is_member_name
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
    """Overrides of the checkpoint's own preprocessing; None keeps the checkpoint's."""

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
    """One member: its backbone, preprocessing overrides, adaptation, augmentation and training."""

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


def load_recipes(paths: Sequence[Path], overrides: Sequence[str] = (), seen_in: str = "recipes") -> list[Recipe]:
    """Read and check recipe files, each with `overrides` ("train.lr=1e-5") applied.

    All problems of all files come in one RecipeError.
    """
    if not paths:
        raise RecipeError(f"no recipe (*.yaml) in {seen_in}; name a folder or file that holds one")
    changes, problems = _parse_overrides(overrides)
    recipes = []
    found: dict[str, list[Path]] = {}  # a wrong --set is the same problem in every file
    for path in paths:
        try:
            values = _read_yaml(path)
            for keys, value in changes:
                _set_value(values, keys, value)
            recipes.append(_build_recipe(path.stem, values))
        except (RecipeError, OSError) as error:
            for line in str(error).splitlines():
                found.setdefault(line, []).append(path)
    problems += [f"{join_limited(files, 1)}: {line}" for line, files in found.items()]
    names = [recipe.name for recipe in recipes]
    problems += [f"two recipes are named {name!r}" for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise RecipeError("\n".join(problems))
    return recipes


def find_recipes(folder: Path) -> list[Path]:
    """Every YAML file directly in `folder`, by name; a file stands for itself."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise RecipeError(f"no recipe at {folder}; name a YAML file, or a folder of them such as {recipes_folder()}")
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in {".yaml", ".yml"} and p.is_file())


def recipes_folder() -> Path:
    """The recipes that come with manyeyes: of this checkout, or inside the installed package."""
    here = Path(__file__).resolve().parent.parent
    return next((p for p in (here.parent / "recipes", here / "recipes") if p.is_dir()), here / "recipes")


def _build_recipe(name: str, values: dict[str, Any]) -> Recipe:
    if not is_member_name(name):
        raise RecipeError(
            f"the file name {name!r} becomes the member's name: use letters, digits, - and _, "
            f"and none of {', '.join(sorted(RESERVED))}"
        )
    if "name" in values:
        raise RecipeError("name: the file's own name is the member's name; remove this key")
    try:
        return Recipe.model_validate({"name": name, **values})
    except ValidationError as error:
        raise RecipeError("\n".join(_explain_error(e) for e in error.errors())) from None


def _explain_error(error: Mapping[str, Any]) -> str:
    """One pydantic error as 'train.lr: what is wrong', with the nearest valid key for a typo."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in error["loc"][:-1]:
            section = section.model_fields[part].annotation
        valid = [name for name in section.model_fields if name != "name"]
        near = difflib.get_close_matches(str(error["loc"][-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing"
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    return f"{where}: {message}" + ("" if isinstance(given, Mapping | Section) else f" (got {given!r})")


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(problem=f"the key {key!r} is given twice")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        # the loader above is yaml.SafeLoader with one check more
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)  # noqa: S506
    except FileNotFoundError:
        raise RecipeError("no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"not valid YAML: {error_line(error)}") from None
    if not isinstance(values, dict):
        raise RecipeError("a recipe is a mapping with the keys backbone, image, adapt, augment, train")
    return values


def _parse_overrides(overrides: Sequence[str]) -> tuple[list[tuple[list[str], Any]], list[str]]:
    changes, problems = [], []
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            problems.append(f"--set {text}: write it as key=value, for example train.lr=1e-5")
            continue
        try:
            changes.append((key.strip().split("."), yaml.safe_load(raw)))
        except yaml.YAMLError as error:
            problems.append(f"--set {text}: {error_line(error)}")
    return changes, problems


def _set_value(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {'.'.join(keys)}: {key} is not a section")
        values = inner
    values[keys[-1]] = value
