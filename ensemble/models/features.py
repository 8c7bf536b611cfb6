"""Feature vectors of images: what a classifier computes just before its last layer, scaled to length 1.

Also finds the layers that a network calls, and which of them is its head.
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
    """A feature extractor. run: uint8 pixels [N, S, S, 3] -> float32 features [N, width], not yet of length 1.

    sha256: of the weights below the last layer and of the preprocessing.
    """

    name: str
    preprocess_config: PreprocessConfig
    width: int
    sha256: str
    run: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Features:
    """Features of the M files that could be read, in their order.

    rows: int64 [M], positions among the files given. vectors: float32 [M, D] of length 1. thumbs: uint8 [M, 32, 32, 3]
    and hashes: uint64 [M], see `near_duplicates`. pixels: uint8 [M, 32], SHA-256 of the decoded pixels. errors: why the
    others could not be read, by position.
    """

    rows: np.ndarray
    vectors: np.ndarray
    thumbs: np.ndarray
    hashes: np.ndarray
    pixels: np.ndarray
    errors: dict[int, str]


def find_embedder(name: str | None) -> Recipe | tuple[Path, str]:
    """The recipe (of a YAML file or a checkpoint) or the (run, member) that `name` means.

    name: "RUN:MEMBER", a recipe's YAML file, a checkpoint's folder or its Hub id "org/name"; None: the quick
    EfficientNet-Lite0. Raises for what is known to fail without reading weights.
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

    A member has its own preprocessing; a recipe's or checkpoint's network gets the whole image in one view.
    """
    source = find_embedder(name)
    if isinstance(source, Recipe):
        whole = source.image.model_copy(update={"geometry": "squash", "count": None})
        checkpoint = source.backbone.checkpoint
        folder = locate_checkpoint(checkpoint) if checkpoint is not None else None
        member = build_member(source.model_copy(update={"image": whole}), folder)
    else:
        member = load_member(*source)
    return make_embedder(member, name or DEFAULT_RECIPE, device)


def make_embedder(member: Member, name: str, device: str) -> Embedder:
    """The features that enter the last linear layer of a member; maps and tokens are averaged."""
    member.eval().to(device)
    head = classifier_head(member)
    spatial = isinstance(head, nn.Conv2d)

    def run(pixels: np.ndarray) -> np.ndarray:
        head_inputs: list[torch.Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, inputs: head_inputs.append(inputs[0]))
        try:
            with torch.inference_mode():
                member(torch.from_numpy(pixels).to(device))
        finally:
            hook.remove()  # the member may be trained and saved afterwards
        features = head_inputs.pop().float()
        if features.ndim > 2:
            features = features.flatten(2).mean(2) if spatial else features.flatten(1, -2).mean(1)
        return features.cpu().numpy()

    size = member.preprocess_config.size
    width = run(np.zeros((1, size, size, 3), dtype=np.uint8)).shape[-1]
    return Embedder(name, member.preprocess_config, width, _features_sha256(member, head), run)


def _features_sha256(member: Member, head: nn.Module) -> str:
    """Hash of all that decides the features; the head does not, and a recipe's is random."""
    own = {id(tensor) for tensor in head.parameters()}
    digest = sha256(artifacts.json_sha256(member.preprocess_config.to_dict()).encode())
    for key, tensor in sorted(member.backbone.state_dict(keep_vars=True).items()):
        if id(tensor) not in own:
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# of one file: its SHA-256, and (views, thumbnail, SHA-256 of the pixels), or None where the cache has its features
_Decoded = tuple[bytes, tuple[np.ndarray, np.ndarray, bytes] | None]


def embed_images(
    files: Sequence[Path],
    embedder: Embedder,
    cache: Path | None = None,
    batch_size: int = 16,
    workers: int | None = None,
    title: str = "embed",
) -> Features:
    """Features of image files, each read once, with a bar that shows the time left.

    The vectors of an image's views are averaged, then scaled to length 1. Files are decoded ahead on threads. cache: a
    file of `feature_cache`; features in it are not computed again, so an interrupted run continues.
    """
    thumb = ("thumb", "u1", (near_duplicates.THUMBNAIL_SIDE, near_duplicates.THUMBNAIL_SIDE, 3))
    columns = [thumb, ("hash", "<u8"), ("pixels", "u1", 32), ("vector", "<f4", embedder.width)]  # as in the cache
    records = np.empty(len(files), dtype=columns)
    rows: list[int] = []
    errors: dict[int, str] = {}
    batch: list[_Decoded] = []
    config = embedder.preprocess_config
    with feature_cache.open_cache(cache) if cache is not None else nullcontext() as opened:
        known = feature_cache.cached_keys(opened, embedder.sha256) if opened is not None else set()
        results = ordered_map(lambda file: _decode_file(file, config, known), files, workers, 2 * batch_size)
        for row, result in enumerate(tqdm(results, title, len(files), unit="image", leave=False, disable=None)):
            if isinstance(result, str):
                errors[row] = result
            else:
                rows.append(row)
                batch.append(result)
            if batch and (len(batch) == batch_size or row == len(files) - 1):
                _embed_batch(batch, embedder, opened, records[len(rows) - len(batch) : len(rows)])
                batch = []
    records = records[: len(rows)]
    if not np.isfinite(records["vector"]).all():
        raise BackboneError(f"{embedder.name}: some features are not finite; choose another embedder")
    vectors, thumbs, hashes, pixels = (records[name] for name in ("vector", "thumb", "hash", "pixels"))
    return Features(np.array(rows, dtype=np.int64), vectors, thumbs, hashes, pixels, errors)


def _decode_file(file: Path, config: PreprocessConfig, known: set[bytes]) -> _Decoded | str:
    try:
        data = file.read_bytes()
        key = sha256(data).digest()
        if key in known:
            return key, None
        image = decode.decode(data, name=str(file))
        views = preprocess.to_pixels(image, config)
    except OSError as error:
        return f"{file}: {error.strerror}"
    except ImageError as error:
        return str(error)
    pixels = sha256(str(image.size).encode() + image.convert("RGBA").tobytes()).digest()
    return key, (views, near_duplicates.thumbnail(image), pixels)


def _embed_batch(batch: Sequence[_Decoded], embedder: Embedder, cache: Any, records: np.ndarray) -> None:
    """Fill the records of a batch: from the cache, or computed and stored in it."""
    cached = [i for i, (_, decoded) in enumerate(batch) if decoded is None]
    if cached:
        values = feature_cache.read(cache, embedder.sha256, [batch[i][0] for i in cached])
        records[cached] = [np.frombuffer(value, records.dtype)[0] for value in values]
    new = [(i, key, decoded) for i, (key, decoded) in enumerate(batch) if decoded is not None]
    if new:
        pixels = np.concatenate([views for _, _, (views, _, _) in new])
        features = embedder.run(pixels).reshape(len(new), -1, embedder.width).mean(axis=1)
        vectors = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        for (i, _, (_, thumb, digest)), vector in zip(new, vectors, strict=True):
            records[i] = (thumb, near_duplicates.perceptual_hash(thumb), np.frombuffer(digest, np.uint8), vector)
        if cache is not None:
            feature_cache.write(cache, embedder.sha256, {key: records[i].tobytes() for i, key, _ in new})
