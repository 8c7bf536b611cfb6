"""Images -> unit vectors: what a classifier computes just before its last layer.

Which layers a network really calls, and which of them is its head.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ensemble.core import artifacts, feature_cache
from ensemble.core.errors import BackboneError, ImageError, join_limited
from ensemble.core.parallel import ordered_map
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.core.recipe import Backbone, Recipe, Train, load_recipes, recipes_folder
from ensemble.data.files import expand_user
from ensemble.images import decode, near_duplicates, preprocess
from ensemble.models.backbone import Member, build_member
from ensemble.models.checkpoints import check_source, locate_checkpoint
from ensemble.models.members import load_member

Layer = nn.Linear | nn.Conv2d


def called_layers(member: Member) -> tuple[list[Layer], int]:
    """The linear layers and convolutions in the order one image calls them, and the number of logits.

    A layer whose weights are read without calling it, as some attentions do, is not among them.
    """
    called: list[Layer] = []
    layers = [m for m in member.modules() if isinstance(m, Layer)]
    hooks = [m.register_forward_pre_hook(lambda module, _: called.append(module)) for m in layers]
    size, device = member.preprocess_config.size, member.mean.device
    training = member.training
    try:
        with torch.inference_mode():
            logits = member.eval().backbone(pixel_values=torch.zeros(1, 3, size, size, device=device)).logits
    finally:
        member.train(training)
        for hook in hooks:
            hook.remove()
    return called, logits.shape[-1]


def classifier_head(member: Member) -> Layer:
    """The linear layer that gives the logits: the last one called that has as many outputs."""
    called, logits = called_layers(member)
    for layer in reversed(called):
        if logits == (layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels):
            return layer
    raise BackboneError("the network's last linear layer was not found; choose another checkpoint")


DEFAULT_RECIPE = "efficientnet_lite0"  # of recipes/quick: its weights come with a package


@dataclass(frozen=True)
class Embedder:
    """run: uint8 pixels [N, S, S, 3] -> float32 features [N, width], not yet of length 1.

    sha256: of the weights below the last layer and of the image contract.
    """

    name: str
    preprocess_config: PreprocessConfig
    width: int
    sha256: str
    run: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Features:
    """Of the M files that could be read, in their order: what selection needs to know.

    rows: int64 [M], positions among the files given. vectors: float32 [M, D] of length 1.
    thumbs: uint8 [M, 32, 32, 3] and hashes: uint64 [M], see `groups`. pixels: uint8 [M, 32],
    SHA-256 of the decoded pixels. errors: why the others could not be read, by position.
    """

    rows: np.ndarray
    vectors: np.ndarray
    thumbs: np.ndarray
    hashes: np.ndarray
    pixels: np.ndarray
    errors: dict[int, str]


def find_embedder(name: str | None) -> Recipe | tuple[Path, str]:
    """What `name` means: a recipe (of a YAML file or a checkpoint), or (run, member).

    name: "RUN:MEMBER", a recipe's YAML file, a checkpoint's folder or its Hub id "org/name";
    None: the quick EfficientNet-Lite0. Raises for what is known to fail without reading weights.
    """
    path = recipes_folder() / "quick" / f"{DEFAULT_RECIPE}.yaml" if name is None else expand_user(name)
    if path.suffix.lower() in {".yaml", ".yml"}:
        recipe = load_recipes([path])[0]
        check_source(recipe.backbone)
        if recipe.backbone.architecture is not None and recipe.backbone.weights is None:
            raise BackboneError(
                f"{path} starts from random weights, which see no likeness; name a member trained by it as RUN:MEMBER"
            )
        return recipe
    if (path / "member.json").is_file() and path.parent == artifacts.members_path(path.parent.parent):
        return path.parent.parent, path.name
    if path.is_dir() and artifacts.members_path(path).is_dir():
        members = artifacts.list_members(path)
        raise BackboneError(
            f"{path} is a run; name a member of it: --embedder {path}:{members[0]} ({join_limited(members)})"
        )
    run, colon, member = str(path).rpartition(":")
    if colon and not path.exists():
        return Path(run), artifacts.list_members(Path(run), (member,))[0]
    backbone = Backbone(checkpoint=str(path))
    check_source(backbone)
    # a recipe cannot be without `train`, which nothing here reads
    return Recipe(name=str(name), backbone=backbone, train=Train(lr=1e-4, epochs=1, batch_size=1))


def load_embedder(name: str | None, device: str) -> Embedder:
    """An embedder by the names of `find_embedder`, on "cpu" or "cuda", in float32.

    A member sees images by its own contract, a recipe's or checkpoint's network sees them whole.
    """
    found = find_embedder(name)
    if isinstance(found, Recipe):
        # The whole image in one view: what it shows, not its traces.
        whole = found.image.model_copy(update={"geometry": "squash", "count": None})
        found = found.model_copy(update={"image": whole})
        checkpoint = found.backbone.checkpoint
        member = build_member(found, locate_checkpoint(checkpoint) if checkpoint is not None else None)
    else:
        member = load_member(*found)
    return make_embedder(member, name or DEFAULT_RECIPE, device)


def make_embedder(member: Member, name: str, device: str) -> Embedder:
    """The features that enter the last linear layer of a member; maps and tokens are averaged."""
    member.eval().to(device)
    head = classifier_head(member)
    caught: list[torch.Tensor] = []

    def catch(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        caught[:] = inputs[:1]

    spatial = isinstance(head, nn.Conv2d)

    def run(pixels: np.ndarray) -> np.ndarray:
        hook = head.register_forward_pre_hook(catch)
        try:
            with torch.inference_mode():
                member(torch.from_numpy(pixels).to(device))
        finally:
            hook.remove()  # the member may be trained and saved afterwards
        features = caught.pop().float()
        if features.ndim > 2:
            features = features.flatten(2).mean(2) if spatial else features.flatten(1, -2).mean(1)
        return features.cpu().numpy()

    size = member.preprocess_config.size
    width = run(np.zeros((1, size, size, 3), dtype=np.uint8)).shape[-1]
    return Embedder(name, member.preprocess_config, width, _identity(member, head), run)


def _identity(member: Member, head: nn.Module) -> str:
    """Hash of all that decides the features: a recipe's head is drawn anew each time, and does not."""
    own = {id(tensor) for tensor in head.parameters()}
    digest = sha256(artifacts.json_sha256(member.preprocess_config.to_dict()).encode())
    for key, tensor in sorted(member.backbone.state_dict(keep_vars=True).items()):
        if id(tensor) not in own:
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _DecodedFile:
    """One file: its SHA-256, and (views, thumbnail, pixels' SHA-256) unless its features are kept already."""

    key: bytes
    seen: tuple[np.ndarray, np.ndarray, bytes] | None = None


def embed_images(
    files: Sequence[Path],
    embedder: Embedder,
    cache: Path | None = None,
    batch_size: int = 16,
    workers: int | None = None,
    title: str = "embed",
) -> Features:
    """Features of image files, each read once, with a bar that shows the time left.

    Vectors of an image's views are averaged, then scaled to length 1. Files are decoded ahead
    on threads. With `cache`, a file of `feature_cache`, features that it holds are not computed
    again, and an interrupted run goes on. In memory stay 3 KiB and `width` floats an image.
    """
    found = np.empty(len(files), dtype=_record(embedder.width))
    rows: list[int] = []
    errors: dict[int, str] = {}
    batch: list[_DecodedFile] = []
    with feature_cache.open_cache(cache) if cache is not None else nullcontext() as kept:
        known = feature_cache.cached_keys(kept, embedder.sha256) if kept is not None else set()
        looks = ordered_map(
            lambda file: _decode_file(file, embedder.preprocess_config, known), files, workers, 2 * batch_size
        )
        bar = tqdm(looks, title, len(files), unit="image", leave=False, disable=None)
        for row, look in enumerate(bar):
            if isinstance(look, str):
                errors[row] = look
            else:
                rows.append(row)
                batch.append(look)
            if batch and (len(batch) == batch_size or row == len(files) - 1):
                found[len(rows) - len(batch) : len(rows)] = _embed_batch(batch, embedder, kept)
                batch = []
    found = found[: len(rows)]
    if not np.isfinite(found["vector"]).all():
        raise BackboneError(f"{embedder.name}: some features are not finite; choose another embedder")
    places = np.array(rows, dtype=np.int64)
    return Features(places, found["vector"], found["thumb"], found["hash"], found["pixels"], errors)


def _record(width: int) -> np.dtype[np.void]:
    """One image's features, in memory and in the cache."""
    side = near_duplicates.THUMBNAIL_SIDE
    return np.dtype([("thumb", "u1", (side, side, 3)), ("hash", "<u8"), ("pixels", "u1", 32), ("vector", "<f4", width)])


def _decode_file(file: Path, preprocess_config: PreprocessConfig, known: set[bytes]) -> _DecodedFile | str:
    try:
        data = file.read_bytes()
        key = sha256(data).digest()
        if key in known:
            return _DecodedFile(key)
        image = decode.decode(data, name=str(file))
        views = preprocess.to_pixels(image, preprocess_config)
    except OSError as error:
        return f"{file}: {error.strerror}"
    except ImageError as error:
        return str(error)
    pixels = sha256(str(image.size).encode() + image.convert("RGBA").tobytes()).digest()
    return _DecodedFile(key, (views, near_duplicates.thumbnail(image), pixels))


def _embed_batch(batch: Sequence[_DecodedFile], embedder: Embedder, cache: Any) -> np.ndarray:
    """The records of a batch: computed, and kept, or read from the cache."""
    found = np.empty(len(batch), dtype=_record(embedder.width))
    old = [place for place, look in enumerate(batch) if look.seen is None]
    if old:
        values = feature_cache.read(cache, embedder.sha256, [batch[place].key for place in old])
        found[old] = [np.frombuffer(value, found.dtype)[0] for value in values]
    fresh = [(place, look.key, look.seen) for place, look in enumerate(batch) if look.seen is not None]
    if fresh:
        pixels = np.concatenate([views for _, _, (views, _, _) in fresh])
        features = embedder.run(pixels).reshape(len(fresh), -1, embedder.width).mean(axis=1)
        vectors = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        for (place, _, (_, thumb, digest)), vector in zip(fresh, vectors, strict=True):
            found[place] = (thumb, near_duplicates.perceptual_hash(thumb), np.frombuffer(digest, np.uint8), vector)
        if cache is not None:
            feature_cache.write(cache, embedder.sha256, {key: found[place].tobytes() for place, key, _ in fresh})
    return found
