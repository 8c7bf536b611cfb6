"""A linear probe: logistic regression on frozen features, written into the network's own last layer.

Features are computed once and stored in the user's cache: the next probe of the same images, weights and views
takes seconds, and an interrupted pass is continued.
"""

import warnings
from collections.abc import Callable
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
from ensemble.data import dataset
from ensemble.models.backbone import Member
from ensemble.models.features import Embedder, classifier_head, make_embedder
from ensemble.training.data_loader import TrainDataset
from ensemble.training.loop import FitConfig
from ensemble.training.validation import named_scores

FEATURES_VERSION = 1  # raised by hand when the same image and random draw would give other features
C_GRID = np.logspace(-6, 1, 15)  # Radford et al. ("CLIP", 2021) search 1e-6 to 1e6; above 10 it overfits here

Scoring = Callable[[str, int], Callable[[int], object]]  # `LiveProgress.on_scoring`


def fit_probe(member: Member, config: FitConfig, scoring: Scoring) -> dict[str, float]:
    """Give `member` the head that a logistic regression finds; returns its scores as the record of one epoch.

    Each view of a train image is a row of the fit: the views of the preprocessing, and `adapt.views` random ones. C
    is the one with the least log-loss on the tune rows, where views are averaged as everywhere; without tune rows it
    is `config.C`. Where the recipe chooses by the worst cell, which needs other images than the tune rows, the AUROC
    is reported instead. The features of all train rows are held in memory.
    """
    recipe, train, tune = config.recipe, config.train, config.tune
    embedder = make_embedder(member, recipe.name, config.processes.device_type)
    own, width = embedder.preprocess_config.count, embedder.width
    features = np.empty((len(train), own + recipe.adapt.views, width), dtype=np.float32)
    tune_features = np.empty((len(tune), own, width), dtype=np.float32) if tune is not None else None
    read = partial(_read_features, embedder, config)
    read(train, None, features[:, :own], scoring("features, train", len(train)))
    if tune is not None and tune_features is not None:
        read(tune, None, tune_features, scoring("features, tune", len(tune)))
    for view in range(recipe.adapt.views):
        out = features[:, own + view : own + view + 1]
        read(train, view, out, scoring(f"features, random view {view + 1}", len(train)))
    if not (np.isfinite(features).all() and (tune_features is None or np.isfinite(tune_features).all())):
        raise BackboneError("some features are not finite; choose another backbone")
    labels = np.repeat(train["label"].to_numpy(), features.shape[1])
    tune_labels = tune["label"].to_numpy() if tune is not None else None
    grid = C_GRID if tune is not None else np.array([config.C])
    weight, bias, scores, tune_logits = _fit(features.reshape(-1, width), labels, tune_features, tune_labels, grid)
    _write_head(member, weight, bias, embedder)
    record = {"epoch": 1, **scores}
    if tune_labels is None or tune_logits is None:
        return record
    scores = named_scores(tune_labels, tune_logits)
    return {**record, **scores, "tune_score": scores.get(f"tune_{recipe.train.tune_score}", scores["tune_auroc"])}


def _read_features(
    embedder: Embedder,
    config: FitConfig,
    rows: pd.DataFrame,
    epoch: int | None,
    out: np.ndarray,
    done: Callable[[int], object],
) -> None:
    """Fill `out`, float32 [images, views, width], from the cache, or compute the features and cache them.

    epoch: of the random view, drawn as training draws it; None for the views of the preprocessing.
    """
    recipe = config.recipe
    data = TrainDataset(
        dataset.files(rows),
        rows["label"].to_numpy(),
        embedder.preprocess_config,
        recipe.augment if epoch is not None else None,
        config.seed,
        config.reader.plan,
    )
    draw = {
        "plan": data.plan.to_dict() if data.plan is not None else None,
        "augment": data.augment.model_dump(mode="json") if data.augment is not None else None,
    }
    drawn = data.plan is not None or epoch is not None
    # of each file's SHA-256 and of all that is drawn for it
    keys = [
        bytes.fromhex(artifacts.json_sha256([digest, draw, [config.seed, epoch, row] if drawn else None]))
        for row, digest in enumerate(rows["sha256"])
    ]
    space = artifacts.json_sha256(["probe", FEATURES_VERSION, embedder.sha256, recipe.backbone.model_dump(mode="json")])
    with feature_cache.open_cache(feature_cache.default_path()) as cache:
        known = feature_cache.cached_keys(cache, space)

        def load(row: int) -> np.ndarray | None:
            return None if keys[row] in known else data[epoch or 0, row]["pixels"]

        size = recipe.train.batch_size
        loads = ordered_map(load, range(len(data)), ahead=2 * size)
        for start in range(0, len(data), size):
            batch = range(start, min(start + size, len(data)))
            pixels = {row: loaded for row, loaded in zip(batch, loads, strict=False) if loaded is not None}
            if pixels:
                computed = embedder.run(np.concatenate(list(pixels.values()))).reshape(len(pixels), *out.shape[1:])
                out[list(pixels)] = computed
                feature_cache.write(cache, space, {keys[row]: out[row].tobytes() for row in pixels})
            cached = [row for row in batch if row not in pixels]
            values = feature_cache.read(cache, space, [keys[row] for row in cached])
            for row, value in zip(cached, values, strict=True):
                out[row] = np.frombuffer(value, dtype=np.float32).reshape(out.shape[1:])
            done(len(batch))


def _fit(
    features: np.ndarray,
    labels: np.ndarray,
    tune_features: np.ndarray | None,
    tune_labels: np.ndarray | None,
    grid: np.ndarray,
) -> tuple[np.ndarray, float, dict[str, float], np.ndarray | None]:
    """The head with the C of `grid` that scores best on the tune rows, or on the train rows without them.

    Returns its weight float64 [width] and bias, for features as it sees them, its train loss and strength, and the
    tune logits [M]. features: float32 [N, width], changed in place; tune_features: float32 [M, views, width].
    """
    scaler = StandardScaler(copy=False)
    features = scaler.fit_transform(features)
    if tune_features is not None:
        tune_features = ((tune_features - scaler.mean_) / scaler.scale_).astype(np.float32)
    model = LogisticRegression(max_iter=500, warm_start=True)
    best, least = None, float("inf")
    for c in grid:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # what stops early is a little more regular
            model.set_params(C=c).fit(features, labels)
        train_loss = loss = metrics.log_loss(labels, metrics.sigmoid(model.decision_function(features)))
        logits = None
        if tune_features is not None and tune_labels is not None:
            logits = (tune_features @ model.coef_[0] + model.intercept_[0]).mean(axis=1)
            loss = metrics.log_loss(tune_labels, metrics.sigmoid(logits))
        if loss < least:
            least = loss
            weight = model.coef_[0].astype(np.float64) / scaler.scale_
            bias = float(model.intercept_[0] - weight @ scaler.mean_)
            best = weight, bias, {"train_loss": train_loss, "strength": float(c)}, logits
    if best is None:
        raise BackboneError("no strength of the probe gives a finite tune score; choose another backbone")
    return best


def _write_head(member: Member, weight: np.ndarray, bias: float, embedder: Embedder) -> None:
    """Write the fitted line into the head, half to each class; BackboneError where the head is more than one layer."""
    head = classifier_head(member)
    if head.bias is None:
        raise BackboneError("the classifier has no bias; use adapt.mode lora or full")
    with torch.no_grad():
        for row, share in ((member.positive, 0.5), (1 - member.positive, -0.5)):
            head.weight[row] = (share * torch.from_numpy(weight)).view_as(head.weight[row])
            head.bias[row] = share * bias
        size = member.preprocess_config.size
        grey = np.full((1, size, size, 3), 128, dtype=np.uint8)
        logit = member(torch.from_numpy(grey).to(member.mean.device)).item()
    expected = float(embedder.run(grey)[0] @ weight + bias)
    if not np.isclose(logit, expected, rtol=1e-3, atol=1e-3):
        raise BackboneError("the classifier is more than its last linear layer; use adapt.mode lora or full")
