"""A linear probe: logistic regression on frozen features, folded into the network's own last layer.

Features are computed once and kept in the user's cache, so that the next probe of the same
images, weights and views takes seconds, and a killed pass goes on.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ensemble.core import artifacts, feature_cache, metrics
from ensemble.core.errors import BackboneError
from ensemble.core.parallel import ordered_map
from ensemble.core.recipe import Recipe
from ensemble.data import dataset
from ensemble.images.canonical import Plan
from ensemble.models.backbone import Member
from ensemble.models.features import Embedder, embedder_of, head_of
from ensemble.training.data_loader import TrainDataset
from ensemble.training.validation import named_scores

FEATURES_VERSION = 1  # raised by hand when the same image and draw would give other features
C_GRID = np.logspace(-6, 1, 15)  # C; Radford et al. ("CLIP", 2021) search 1e-6 to 1e6, of which the rest overfits

Progress = Callable[[str, int], Callable[[int], object]]  # (title, images) -> what is told how many are done


@dataclass(frozen=True)
class _LinearHead:
    """weight: float64 [width] and bias, of features as the head sees them; how they were found and what they score."""

    weight: np.ndarray
    bias: float
    strength: float
    train_loss: float
    tune_logits: np.ndarray | None


def fit_probe(
    member: Member,
    recipe: Recipe,
    train: pd.DataFrame,
    tune: pd.DataFrame | None,
    plan: Plan | None,
    seed: int,
    device: str,
    progress: Progress,
    strength: float = 1.0,
) -> dict[str, float]:
    """Give `member` the head that a logistic regression finds; returns what it scores, as of one epoch.

    train, tune: rows of the data set. Each view of a train image is a row of the fit: the
    contract's own views, and `adapt.views` random ones. The strength is that with the least
    log-loss on tune, where views are averaged as everywhere; without tune rows it is the
    given one. In place of the worst cell, which needs other images than tune's, stands the
    AUROC. Features of all train rows are held in memory.
    """
    embedder = embedder_of(member, recipe.name, device)
    own, width = embedder.preprocess_config.count, embedder.width
    rows = np.empty((len(train), own + recipe.adapt.views, width), dtype=np.float32)
    tuned = np.empty((len(tune), own, width), dtype=np.float32) if tune is not None else None
    read = partial(_features, embedder, recipe, plan, seed)
    read(train, None, rows[:, :own], progress("features, train", len(train)))
    if tune is not None and tuned is not None:
        read(tune, None, tuned, progress("features, tune", len(tune)))
    for view in range(recipe.adapt.views):
        out = rows[:, own + view : own + view + 1]
        read(train, view, out, progress(f"features, random view {view + 1}", len(train)))
    if not (np.isfinite(rows).all() and (tuned is None or np.isfinite(tuned).all())):
        raise BackboneError("some features are not finite; choose another backbone")
    labels = np.repeat(train["label"].to_numpy(), rows.shape[1])
    tune_labels = tune["label"].to_numpy() if tune is not None else None
    strengths = C_GRID if tune is not None else np.array([strength])
    line = _fit(rows.reshape(-1, width), labels, tuned, tune_labels, strengths)
    _write_head(member, line, embedder)
    record = {"epoch": 1, "train_loss": line.train_loss, "strength": line.strength}
    if tune_labels is None or line.tune_logits is None:
        return record
    scores = named_scores(tune_labels, line.tune_logits)
    return {**record, **scores, "tune_score": scores.get(f"tune_{recipe.train.tune_score}", scores["tune_auroc"])}


def _features(
    embedder: Embedder,
    recipe: Recipe,
    plan: Plan | None,
    seed: int,
    part: pd.DataFrame,
    epoch: int | None,
    out: np.ndarray,
    done: Callable[[int], object],
) -> None:
    """Fill `out`, float32 [images, views, width], from the cache or by computing and keeping.

    epoch: of the random view, drawn as training draws it; None for the contract's own views.
    """
    data = TrainDataset(
        dataset.files(part),
        part["label"].to_numpy(),
        embedder.preprocess_config,
        recipe.augment if epoch is not None else None,
        seed,
        plan,
    )
    keys = _keys(recipe, part, plan, seed, epoch)
    space = artifacts.json_sha256(["probe", FEATURES_VERSION, embedder.sha256, recipe.backbone.model_dump(mode="json")])
    with feature_cache.opened(feature_cache.default_path()) as cache:
        known = feature_cache.known(cache, space)

        def load(row: int) -> np.ndarray | None:
            return None if keys[row] in known else data[epoch or 0, row]["pixels"]

        size = recipe.train.batch_size
        loads = ordered_map(load, range(len(data)), ahead=2 * size)
        for start in range(0, len(data), size):
            rows = range(start, min(start + size, len(data)))
            pixels = {row: loaded for row, loaded in zip(rows, loads, strict=False) if loaded is not None}
            if pixels:
                found = embedder.run(np.concatenate(list(pixels.values()))).reshape(len(pixels), *out.shape[1:])
                out[list(pixels)] = found
                feature_cache.write(cache, space, {keys[row]: out[row].tobytes() for row in pixels})
            kept = [row for row in rows if row not in pixels]
            for row, value in zip(kept, feature_cache.read(cache, space, [keys[row] for row in kept]), strict=True):
                out[row] = np.frombuffer(value, dtype=np.float32).reshape(out.shape[1:])
            done(len(rows))


def _keys(recipe: Recipe, part: pd.DataFrame, plan: Plan | None, seed: int, epoch: int | None) -> list[bytes]:
    """What each row's features are kept under: its file's SHA-256 and all that is drawn for it."""
    draw = {
        "plan": plan.to_dict() if plan is not None else None,
        "augment": recipe.augment.model_dump(mode="json") if epoch is not None else None,
    }
    drawn = plan is not None or epoch is not None
    return [
        bytes.fromhex(artifacts.json_sha256([digest, draw, [seed, epoch, row] if drawn else None]))
        for row, digest in enumerate(part["sha256"])
    ]


def _fit(
    rows: np.ndarray,
    labels: np.ndarray,
    tuned: np.ndarray | None,
    tune_labels: np.ndarray | None,
    strengths: np.ndarray,
) -> _LinearHead:
    """The line of the best strength, of the only one without tune rows.

    rows: float32 [N, width], changed in place; tuned: float32 [M, views, width].
    """
    scaler = StandardScaler(copy=False)
    rows = scaler.fit_transform(rows)
    if tuned is not None:
        tuned = ((tuned - scaler.mean_) / scaler.scale_).astype(np.float32)
    model = LogisticRegression(max_iter=500, warm_start=True)
    best, least = None, float("inf")
    for strength in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # what stops early is a little more regular
            model.set_params(C=strength).fit(rows, labels)
        train_loss = loss = metrics.log_loss(labels, metrics.sigmoid(model.decision_function(rows)))
        logits = None
        if tuned is not None and tune_labels is not None:
            logits = (tuned @ model.coef_[0] + model.intercept_[0]).mean(axis=1)
            loss = metrics.log_loss(tune_labels, metrics.sigmoid(logits))
        if loss < least:
            least = loss
            weight = model.coef_[0].astype(np.float64) / scaler.scale_
            bias = float(model.intercept_[0] - weight @ scaler.mean_)
            best = _LinearHead(weight, bias, float(strength), train_loss, logits)
    if best is None:
        raise BackboneError("no strength of the probe gives a finite tune score; choose another backbone")
    return best


def _write_head(member: Member, line: _LinearHead, embedder: Embedder) -> None:
    """Write the line into the head, half to each class; BackboneError where the head is more than that layer."""
    head = head_of(member)
    if head.bias is None:
        raise BackboneError("the classifier has no bias; use adapt.mode lora or full")
    weight = torch.from_numpy(line.weight)
    with torch.no_grad():
        for row, share in ((member.positive, 0.5), (1 - member.positive, -0.5)):
            head.weight[row] = (share * weight).view_as(head.weight[row])
            head.bias[row] = share * line.bias
        size = member.preprocess_config.size
        grey = np.full((1, size, size, 3), 128, dtype=np.uint8)
        logit = member(torch.from_numpy(grey).to(member.mean.device)).item()
    wanted = float(embedder.run(grey)[0] @ line.weight + line.bias)
    if not np.isclose(logit, wanted, rtol=1e-3, atol=1e-3):
        raise BackboneError("the classifier is more than its last linear layer; use adapt.mode lora or full")
