from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from headless_layouts import write_headless
from pictures import encoded, write_files
from PIL import Image as Picture
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small_pool import one_thread

from ensemble.core import artifacts, metrics
from ensemble.core.errors import BackboneError
from ensemble.core.recipe import Adapt, Augment, Backbone, Image, Recipe, Train
from ensemble.data import dataset
from ensemble.images.canonical import CanonicalPlan
from ensemble.models import backbone
from ensemble.models.features import make_embedder
from ensemble.models.runner import score_images
from ensemble.models.torch_runner import torch_runner
from ensemble.training import linear_probe
from ensemble.training.data_loader import TrainDataset
from ensemble.training.distributed import ProcessGroup
from ensemble.training.loop import FitConfig
from ensemble.training.validation import RowReader

CONVNEXT = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "patch_size": 4}
TRAIN, TUNE = 24, 16
ALL = TRAIN + TUNE + 2 * TRAIN  # passes of a fit with two random views
CROPS = Image(size=32, geometry="native_crops", count=4)


@pytest.fixture(scope="module", autouse=True)
def calm():
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    """24 train and 16 tune images of noise: ai is reddish, real is bluish."""
    root = tmp_path_factory.mktemp("images")
    rows = []
    for number in range(TRAIN + TUNE):
        label = number % 2
        shift = np.array([25, 0, -25]) * (1 if label else -1)
        noise = np.random.default_rng(number).integers(-90, 91, (48, 48, 3)) + 125 + shift
        write_files(root, f"{number}.png", data=encoded(Picture.fromarray(noise.clip(0, 255).astype(np.uint8))))
        digest = artifacts.file_sha256(root / f"{number}.png")
        rows.append([str(root), f"{number}.png", label, "train" if number < TRAIN else "tune", digest])
    return pd.DataFrame(rows, columns=["root", "path", "label", "split", "sha256"])


def recipe_of(**changes):
    values = {
        "name": "m",
        "backbone": Backbone(architecture="convnext", config=CONVNEXT),
        "image": CROPS,
        "adapt": Adapt(mode="probe", views=2),
        "augment": Augment(jpeg=(70, 100)),
        "train": Train(lr=1e-3, epochs=1, batch_size=8),
    }
    return Recipe(**{**values, **changes})


def build(recipe):
    torch.manual_seed(0)
    return backbone.build_member(recipe, None)


def quiet(title, total):
    return lambda count: None


def fit(member, recipe, frame, plan=None, seed=0, progress=quiet):
    train, tune = frame[frame["split"] == "train"], frame[frame["split"] == "tune"]
    config = FitConfig(recipe, train, tune, RowReader(plan, seed), 1, Path(), seed, ProcessGroup())
    return linear_probe.fit_probe(member, config, progress)


@pytest.fixture
def reads(monkeypatch):
    """Rows that had to be read and computed."""
    seen = []
    original = TrainDataset.__getitem__
    monkeypatch.setattr(TrainDataset, "__getitem__", lambda self, row: seen.append(row) or original(self, row))
    return seen


def test_the_scores_are_those_of_the_member_itself(frame, tmp_path):
    recipe = recipe_of()
    member = build(recipe)
    scores = fit(member, recipe, frame)
    assert scores["epoch"] == 1
    assert scores["tune_auroc"] > 0.99
    assert scores["tune_score"] == scores["tune_auroc"]
    assert scores["train_loss"] < 0.5
    assert scores["strength"] in linear_probe.C_GRID

    tune = frame[frame["split"] == "tune"]
    folder = tmp_path / "saved"
    folder.mkdir()
    backbone.save_classifier(member, folder)
    network, _ = backbone.load_classifier(folder)
    runner = torch_runner("m", backbone.Member(network, member.preprocess_config), torch.device("cpu"))
    logits, _ = score_images(dataset.files(tune), [runner])
    labels = tune["label"].to_numpy()
    assert metrics.auroc(labels, logits[:, 0]) == scores["tune_auroc"]
    assert metrics.log_loss(labels, metrics.sigmoid(logits[:, 0])) == pytest.approx(scores["tune_log_loss"], abs=1e-4)
    assert not any(module._forward_pre_hooks for module in member.modules())


def test_logits_are_the_regressions_decisions_and_would_not_be_without_the_scale(frame, monkeypatch):
    fitted = []

    class Watched(LogisticRegression):
        def __init__(self, C=1.0, max_iter=100, warm_start=False):  # noqa: N803
            super().__init__(C=C, max_iter=max_iter, warm_start=warm_start)
            fitted.append(self)

    monkeypatch.setattr(linear_probe, "LogisticRegression", Watched)
    monkeypatch.setattr(linear_probe, "C_GRID", np.array([0.01]))
    recipe = recipe_of()
    member = build(recipe)
    fit(member, recipe, frame)
    train, tune = (frame[frame["split"] == split] for split in ("train", "tune"))
    embedder = make_embedder(member, "m", "cpu")
    seen = []
    for augment, epoch in ((None, 0), (recipe.augment, 0), (recipe.augment, 1)):
        data = TrainDataset(dataset.files(train), train["label"].to_numpy(), member.preprocess_config, augment)
        seen += [embedder.run(data[epoch, row]["pixels"]) for row in range(len(data))]
    scaler = StandardScaler().fit(np.concatenate(seen).astype(np.float64))
    data = TrainDataset(dataset.files(tune), tune["label"].to_numpy(), member.preprocess_config)
    pixels = np.concatenate([data[0, row]["pixels"] for row in range(len(data))])
    wanted = fitted[-1].decision_function(scaler.transform(embedder.run(pixels)))

    def worst():
        return np.abs(torch_runner("m", member, torch.device("cpu")).run(pixels) - wanted).max()

    assert worst() < 1e-4
    with torch.no_grad():
        unscaled = torch.from_numpy(fitted[-1].coef_[0]) / 2
        member.backbone.classifier.weight.copy_(torch.stack([-unscaled, unscaled]))
    assert worst() > 1e-2


def test_the_strength_is_that_of_the_least_tune_loss():
    rng = np.random.default_rng(0)
    labels, tune_labels = rng.integers(0, 2, 60), rng.integers(0, 2, 40)
    rows, tuned = ((rng.normal(size=(len(y), 30)) + 0.5 * y[:, None]) * 7 + 100 for y in (labels, tune_labels))
    weight, bias, scores, tune_logits = linear_probe._fit(
        rows.astype(np.float32), labels, tuned[:, None].astype(np.float32), tune_labels, linear_probe.C_GRID
    )
    losses = []
    for strength in linear_probe.C_GRID:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000)).fit(rows, labels)
        losses.append(metrics.log_loss(tune_labels, model.predict_proba(tuned)[:, 1]))
    assert linear_probe.C_GRID[np.argmin(losses)] == scores["strength"]
    assert 0 < np.argmin(losses) < len(losses) - 1
    logits = tuned @ weight + bias
    np.testing.assert_allclose(tune_logits, logits, atol=1e-3)
    assert metrics.log_loss(tune_labels, metrics.sigmoid(logits)) == pytest.approx(min(losses), abs=1e-3)


def test_without_tune_rows_the_given_strength_is_taken(frame):
    recipe = recipe_of()
    train = frame[frame["split"] == "train"]
    config = FitConfig(recipe, train, None, RowReader(None, 0), 1, Path(), 0, ProcessGroup(), C=0.01)
    record = linear_probe.fit_probe(build(recipe), config, quiet)
    assert record["strength"] == 0.01
    assert not [name for name in record if name.startswith("tune")]


def test_the_tune_score_is_the_recipes(frame):
    recipe = recipe_of(train=Train(lr=1e-3, epochs=1, batch_size=8, tune_score="log_loss"))
    scores = fit(build(recipe), recipe, frame)
    assert scores["tune_score"] == scores["tune_log_loss"] != scores["tune_auroc"]


def test_kept_features_are_not_computed_again(frame, reads):
    recipe = recipe_of()
    first, second = build(recipe), build(recipe)
    scores = fit(first, recipe, frame)
    assert len(reads) == ALL
    reads.clear()
    with torch.no_grad():
        second.backbone.classifier.weight.add_(1)  # a head is drawn anew each time
    assert fit(second, recipe, frame) == scores
    assert reads == []
    assert torch.equal(first.backbone.classifier.weight, second.backbone.classifier.weight)


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ("nothing", 0),
        ("one more view", TRAIN),
        ("augmentation", 2 * TRAIN),
        ("seed", 2 * TRAIN),
        ("one file", 3),
        ("the image contract", ALL),
        ("weights", ALL),
    ],
)
def test_what_changes_is_computed_again_and_nothing_else(change, count, frame, reads):
    recipe, seed = recipe_of(), 0
    fit(build(recipe), recipe, frame)
    reads.clear()
    if change == "one more view":
        recipe = recipe_of(adapt=Adapt(mode="probe", views=3))
    elif change == "augmentation":
        recipe = recipe_of(augment=Augment(jpeg=(50, 100)))
    elif change == "the image contract":
        recipe = recipe_of(image=Image(size=32))
    elif change == "seed":
        seed = 1
    elif change == "one file":
        frame = frame.assign(sha256=["f" * 64, *frame["sha256"][1:]])
    member = build(recipe)
    if change == "weights":
        with torch.no_grad():
            next(member.backbone.convnext.parameters()).add_(0.01)
    fit(member, recipe, frame, seed=seed)
    assert len(reads) == count


def test_a_canonical_plan_draws_anew_for_each_row_and_seed(frame, reads):
    recipe, plan = recipe_of(), CanonicalPlan(40, (), (80, 90))
    for seed, count in ((0, ALL), (0, 0), (1, ALL)):
        reads.clear()
        fit(build(recipe), recipe, frame, plan, seed)
        assert len(reads) == count


def test_a_stopped_pass_goes_on(frame, reads):
    recipe = recipe_of()
    whole = fit(build(recipe), recipe, frame)
    artifacts.cache_path().joinpath("features.sqlite").unlink()
    reads.clear()

    def stopped(title, total):
        def done(count):
            raise KeyboardInterrupt

        return done

    with pytest.raises(KeyboardInterrupt):
        fit(build(recipe), recipe, frame, progress=stopped)
    reads.clear()
    assert fit(build(recipe), recipe, frame) == whole
    assert len(reads) == ALL - 8  # a batch was kept


def test_progress_counts_the_images_of_each_pass(frame):
    told = {}

    def progress(title, total):
        told[title] = [total, 0]
        return lambda count: told[title].__setitem__(1, told[title][1] + count)

    recipe = recipe_of()
    fit(build(recipe), recipe, frame, progress=progress)
    assert list(told.values()) == [[n, n] for n in (TRAIN, TUNE, TRAIN, TRAIN)]


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("swin", {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}),
        ("timm/vit_tiny_patch16_224", {"depth": 1, "embed_dim": 24, "global_pool": "avg"}),
        ("timm/convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}),
    ],
)
def test_any_family_takes_the_line_into_its_head(architecture, config, frame):
    recipe = recipe_of(backbone=Backbone(architecture=architecture, config=config), image=Image(size=32))
    member = build(recipe)
    scores = fit(member, recipe, frame)
    assert scores["tune_auroc"] > 0.8
    tune = frame[frame["split"] == "tune"]
    logits, _ = score_images(dataset.files(tune), [torch_runner("m", member, torch.device("cpu"))])
    assert metrics.auroc(tune["label"].to_numpy(), logits[:, 0]) == scores["tune_auroc"]


def test_a_backbone_without_a_classifier_is_a_probe(frame, tmp_path):
    folder = write_headless(tmp_path / "hub", "dinov2")
    recipe = recipe_of(backbone=Backbone(checkpoint=str(folder)), image=Image(size=56, geometry="squash"))
    member = backbone.build_member(recipe, folder)
    assert fit(member, recipe, frame)["tune_auroc"] > 0.8
    head = member.backbone.classifier
    assert torch.equal(head.weight[1], -head.weight[0])
    assert head.weight.shape == (2, 64)


def test_a_head_of_two_layers_is_refused(frame):
    config = {"depth": 1, "embed_dim": 24}
    backbone_ = Backbone(architecture="timm/deit_tiny_distilled_patch16_224", config=config)
    recipe = recipe_of(backbone=backbone_, image=Image(size=32))
    with pytest.raises(BackboneError, match=r"more than its last linear layer; use adapt\.mode lora or full"):
        fit(build(recipe), recipe, frame)


def test_features_that_are_not_finite_are_refused(frame):
    recipe = recipe_of()
    member = build(recipe)
    with torch.no_grad():
        next(member.backbone.convnext.parameters()).fill_(float("nan"))
    with pytest.raises(BackboneError, match="some features are not finite"):
        fit(member, recipe, frame)
