"""One fit on tiny networks: what is chosen, saved, gone on from, and what stops it."""

import json

import pandas as pd
import pytest
import torch
from pictures import encoded, noise
from PIL import ImageFilter
from small_members import small_member

from ensemble.core.errors import TrainingError
from ensemble.core.recipe import Recipe
from ensemble.models.backbone import load_classifier
from ensemble.training import checkpoint, loop, step
from ensemble.training.data_loader import TrainDataset
from ensemble.training.distributed import ProcessGroup
from ensemble.training.progress import LiveProgress
from ensemble.training.tracking import open_trackers
from ensemble.training.validation import RowReader, best_epoch, predict_logits

TRAIN = {"lr": 1e-2, "epochs": 4, "batch_size": 4, "accumulate": 2, "precision": "fp32"}


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    rows = []
    for number in range(28):
        label = number % 2
        image = noise(number, 40, 40)
        path = folder / f"{number}.png"
        path.write_bytes(encoded(image.filter(ImageFilter.GaussianBlur(1)) if label else image))
        rows.append({"id": str(number), "root": str(folder), "path": path.name, "label": label})
    return pd.DataFrame(rows)


class Killed(BaseException):
    """What ends a fit at any point, as a kill would."""


class Recorder(LiveProgress):
    def __init__(self, kill_at=None):
        self.said = []
        super().__init__(["one"], self.said.append)
        self.kill_at, self.steps = kill_at, []

    def on_step(self, number, loss, lr, images):
        self.steps.append(number)
        if number == self.kill_at:
            raise Killed


def recipe_of(**train):
    values = {"name": "one", "backbone": {"architecture": "convnext"}, "augment": {"jpeg": [50, 90]}}
    return Recipe.model_validate({**values, "train": {**TRAIN, **train}})


def run(
    frame,
    folder,
    board=None,
    family="timm/test_efficientnet",
    tune=True,
    last_epoch=None,
    save=600.0,
    change=None,
    **train,
):
    """A fit on the first 22 rows, tuned on the others; (member, history, board)."""
    recipe, board = recipe_of(**train), board or Recorder()
    member = small_member(family)
    with torch.no_grad():
        for module in member.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
    if change is not None:
        change(member)
    rows = frame[:22]
    files = [f"{root}/{path}" for root, path in zip(rows["root"], rows["path"], strict=True)]
    data = TrainDataset(
        [*map(loop.Path, files)], rows["label"].to_numpy(), member.preprocess_config, recipe.augment, 3, None, 2**20
    )
    held = frame[22:] if tune else None
    last_epoch = last_epoch or recipe.train.epochs
    job = loop.FitConfig(
        recipe, rows, held, RowReader(None, 3), last_epoch, folder, 3, ProcessGroup(), save_seconds=save
    )
    history = loop.fit(member, job, data, board, lambda done: open_trackers((), folder, "one", {}, done))
    return member, history, board


def weights(member):
    return {name: tensor.clone() for name, tensor in member.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


EMA = {"ema": 0.9, "label_smoothing": 0.1, "layer_decay": 0.8}


@pytest.mark.parametrize("options", [{}, EMA, {"optimizer": "lamb", "tune_score": "log_loss"}], ids=str)
def test_a_killed_fit_ends_as_an_unbroken_one(frame, tmp_path, options):
    whole, history, board = run(frame, tmp_path / "whole", **options)
    assert board.steps == list(range(1, 13))
    for kill_at in (2, 5, 9):  # in the first epoch, between states, in a later epoch
        folder = tmp_path / str(kill_at)
        with pytest.raises(Killed):
            run(frame, folder, Recorder(kill_at), save=0.0, **options)
        member, again, board = run(frame, folder, **options)
        assert board.steps[0] == kill_at, "it goes on after the last state"
        assert board.steps[-1] == 12
        assert again == history
        assert equal(weights(member), weights(whole))


def test_lost_moments_would_show(frame, tmp_path):
    whole, _, _ = run(frame, tmp_path / "whole", tune=False)
    with pytest.raises(Killed):
        run(frame, tmp_path / "cut", Recorder(9), tune=False, save=0.0)
    path = tmp_path / "cut" / loop.STATE_FILE
    tensors, facts = checkpoint.read(path)
    checkpoint.write(path, {k: torch.zeros_like(t) if "exp_avg" in k else t for k, t in tensors.items()}, facts)
    member, _, _ = run(frame, tmp_path / "cut", tune=False)
    assert not equal(weights(member), weights(whole))


def test_a_finished_fit_is_not_fitted_again(frame, tmp_path):
    first, history, _ = run(frame, tmp_path)
    second, again, board = run(frame, tmp_path)
    assert board.steps == []
    assert again == history
    assert equal(weights(first), weights(second))


def test_the_best_epoch_is_what_is_left(frame, tmp_path):
    member, history, board = run(frame, tmp_path)
    best = history["epochs"][history["best"] - 1]
    assert best["tune_auroc"] == max(epoch["tune_auroc"] for epoch in history["epochs"])
    assert best["tune_score"] == best["tune_auroc"]
    logits = predict_logits(member, recipe_of(), frame[22:], RowReader(None, 3), ProcessGroup())
    from ensemble.core.metrics import auroc, log_loss, sigmoid

    labels = frame[22:]["label"].to_numpy()
    assert auroc(labels, logits) == pytest.approx(best["tune_auroc"])
    assert log_loss(labels, sigmoid(logits)) == pytest.approx(best["tune_log_loss"], rel=1e-5)
    assert [path.name for path in tmp_path.glob("best-*")] == [f"best-{history['best']:04}.safetensors"]
    assert sum(line.startswith("  epoch ") for line in board.said) == 4
    json.dumps(history)


def test_epochs_compare_by_the_chosen_score():
    epochs = [
        {"epoch": 1, "tune_score": 0.7},
        {"epoch": 2, "tune_score": 0.9},
        {"epoch": 3, "tune_score": 0.9},
        {"epoch": 4, "tune_score": 0.2},
    ]
    assert best_epoch(epochs, "auroc")["epoch"] == 2
    assert best_epoch(epochs, "worst_cell")["epoch"] == 2
    assert best_epoch(epochs, "log_loss")["epoch"] == 4
    assert best_epoch([{"epoch": 1}, {"epoch": 2}], "auroc")["epoch"] == 2


def test_worst_cell_names_the_cell(frame, tmp_path):
    _, history, _ = run(frame, tmp_path, tune_score="worst_cell", epochs=1)
    [epoch] = history["epochs"]
    assert epoch["tune_score"] == epoch["tune_worst_cell"] <= epoch["tune_auroc"]
    from ensemble.images.robustness import SMALL_GRID

    assert epoch["worst_cell"] in SMALL_GRID


def test_patience_ends_a_fit_that_gets_no_better(frame, tmp_path, monkeypatch):
    scores = iter([0.6, 0.8, 0.7, 0.75, 0.9])
    monkeypatch.setattr(
        loop, "tune_scores", lambda *_: {"tune_auroc": (s := next(scores)), "tune_log_loss": 0.5, "tune_score": s}
    )
    _, history, _ = run(frame, tmp_path, epochs=5, patience=2)
    assert [epoch["epoch"] for epoch in history["epochs"]] == [1, 2, 3, 4]
    assert history["best"] == 2


def test_the_moving_average_is_tuned_and_kept(frame, tmp_path):
    plain, _, _ = run(frame, tmp_path / "plain", tune=False, epochs=6)
    averaged, _, _ = run(frame, tmp_path / "ema", tune=False, epochs=6, ema=0.9)
    tensors, facts = checkpoint.read(tmp_path / "ema" / loop.STATE_FILE)
    assert facts["ema_count"] == 18
    assert equal(checkpoint.strip_prefix("member", tensors), weights(plain)), "the average does not touch the training"
    assert equal(checkpoint.strip_prefix("ema", tensors), weights(averaged))
    assert not equal(weights(averaged), weights(plain))
    buffers = [name for name, _ in averaged.named_buffers() if name.endswith("running_mean")]
    assert any(not torch.equal(weights(averaged)[name], weights(plain)[name]) for name in buffers)


def test_a_refit_ends_early_on_the_schedule_of_all_epochs(frame, tmp_path):
    _, history, _ = run(frame, tmp_path / "refit", tune=False, last_epoch=2, save=0.0)
    assert [sorted(epoch) for epoch in history["epochs"]] == [["epoch", "train_loss"]] * 2
    assert history["best"] == 2
    _, whole, _ = run(frame, tmp_path / "whole", tune=False)
    assert history["steps"] == whole["steps"][:6]
    assert history["steps"][-1]["lr"] > 0.4 * TRAIN["lr"]


def hungry(member, most, error):
    """The member runs out of memory with more than `most` images at once."""
    forward = member.forward

    def limited(pixels):
        if member.training and len(pixels) > most:
            raise error
        return forward(pixels)

    member.forward = limited


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"),
    ],
    ids=["cuda", "cpu"],
)
def test_out_of_memory_halves_the_batch_and_not_the_step(frame, tmp_path, error):
    family = "convnext"  # without batch norm the parts of a step do not matter
    plain, _, _ = run(frame, tmp_path / "plain", family=family)
    member, _, board = run(frame, tmp_path / "small", family=family, change=lambda m: hungry(m, 1, error))
    assert [line for line in board.said if "out of memory" in line] == [
        "  out of memory with 4 images at once: going on with 2, still 8 a step",
        "  out of memory with 2 images at once: going on with 1, still 8 a step",
    ]
    for one, other in zip(plain.parameters(), member.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert checkpoint.read(tmp_path / "small" / loop.STATE_FILE)[1]["most"] == 1
    longer, _, _ = run(frame, tmp_path / "longer", family=family, lr=2e-2)
    assert not torch.allclose(next(longer.parameters()), next(plain.parameters()), atol=1e-5)


def test_memory_that_ends_at_one_image_says_what_to_do(frame, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "_gradients", lambda *_: (_ for _ in ()).throw(MemoryError("no")))
    with pytest.raises(TrainingError, match=r"out of memory with 1 images at once.*train\.checkpointing=true"):
        run(frame, tmp_path)


def test_other_errors_are_not_taken_for_memory(frame, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "_gradients", lambda *_: (_ for _ in ()).throw(RuntimeError("size mismatch")))
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(frame, tmp_path)


def poisoned(number):
    real = loop.optimizer_step
    calls = iter(range(1, 100))

    def poison(engine, *arguments):
        values = real(engine, *arguments)
        return values * float("nan") if next(calls) == number else values

    return poison


def test_a_loss_that_is_no_number_keeps_the_last_good_weights(frame, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "optimizer_step", poisoned(8))
    with pytest.raises(TrainingError) as error:
        run(frame, tmp_path, family="convnext")
    told = str(error.value)
    assert "no longer a number in epoch 3, step 2" in told
    assert "lower train.lr" in told
    assert "--fresh" in told
    assert f"the last good weights are in {tmp_path / 'last_good'}" in told
    network, _ = load_classifier(tmp_path / "last_good")
    [best] = tmp_path.glob("best-*")
    saved, _ = checkpoint.read(best)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, saved[f"backbone.{name}"])
        assert torch.isfinite(tensor).all()


def test_a_loss_that_is_no_number_at_once_says_so_too(frame, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "optimizer_step", poisoned(1))
    with pytest.raises(TrainingError, match="in epoch 1, step 1, at lr"):
        run(frame, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own imports
@pytest.mark.filterwarnings("ignore:Distutils was imported before Setuptools")  # what this process imported before
def test_a_compiled_network_learns_the_same(frame, tmp_path):
    def without_dropout(member):  # which compiled code draws in its own order
        for module in member.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    alike = {"family": "timm/test_vit", "tune": False, "epochs": 1, "change": without_dropout}
    plain, _, _ = run(frame, tmp_path / "plain", **alike)
    compiled, _, _ = run(frame, tmp_path / "compiled", **alike, compile=True)
    assert weights(plain).keys() == weights(compiled).keys()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_activations_not_changed_in_place_give_the_same_gradients():
    def gradients(member):
        pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        member.train()(pixels).sum().backward()
        return {name: p.grad for name, p in member.named_parameters() if p.grad is not None}

    def clipped(member):
        return [module for module in member.modules() if isinstance(module, torch.nn.Hardtanh)]

    built, plain = (small_member("timm/mobilenetv2_035") for _ in range(2))
    assert all(module.inplace for module in clipped(plain))
    for member in (built, plain):
        step.build_train_state(member, recipe_of().train, 1, "fp32", False, ProcessGroup())
    assert not any(module.inplace for module in clipped(built))
    for module in clipped(plain):
        module.inplace = True
    assert equal(gradients(plain), gradients(built))
