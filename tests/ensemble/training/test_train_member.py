import json

import numpy as np
import pytest
import torch
from helpers import make_frame, noisy_logits, write_member
from PIL import Image
from small_members import small_member
from small_nets import QUICK

from ensemble.core import artifacts
from ensemble.core.errors import UnavailableError
from ensemble.core.metrics import auroc
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.core.recipe import Augment, Recipe
from ensemble.data import dataset
from ensemble.models.backbone import build_member, save_classifier
from ensemble.models.members import heldout_logits, load_member, read_info
from ensemble.models.runner import score_images
from ensemble.models.torch_runner import choose_device, torch_runner
from ensemble.training import train_all
from ensemble.training.data_loader import TrainDataset, collate
from ensemble.training.step import summed_loss, view_logits
from ensemble.training.train_member import TrainContext

PREPROCESS_CONFIG = PreprocessConfig(size=32, mean=(0.5,) * 3, std=(0.5,) * 3, geometry="native_crops")
AUGMENT = Augment(quarter_turns=True, jpeg=(50, 90))


@pytest.fixture(scope="module")
def files(tmp_path_factory, photos):
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{number}.png" for number in range(4)]
    for path, photo in zip(paths, photos, strict=True):
        photo.resize((48, 64), Image.Resampling.BOX).save(path)
    return paths


def rows(files, epoch=0, seed=0, augment=AUGMENT):
    data = TrainDataset(files, np.array([0, 1, 0, 1]), PREPROCESS_CONFIG, augment, seed)
    return collate([data[epoch, row] for row in range(len(data))])


def test_augmentation_depends_on_seed_epoch_and_row_alone(files):
    first = rows(files)["pixels"]
    assert first.shape == (4, 1, 32, 32, 3)
    assert first.dtype == torch.uint8
    assert torch.equal(first, rows(files)["pixels"])
    assert not torch.equal(first, rows(files, epoch=1)["pixels"])
    assert not torch.equal(first, rows(files, seed=1)["pixels"])


def test_without_augmentation_rows_are_the_contracts_pixels(files):
    batch = rows(files, augment=None)
    photo = np.asarray(Image.open(files[0]).convert("RGB"))
    np.testing.assert_array_equal(batch["pixels"][0, 0].numpy(), photo[16:48, 8:40])
    assert batch["labels"].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_views_are_averaged_and_labels_smoothed():
    def brightness(pixels):
        return pixels.float().mean(dim=(1, 2, 3))

    pixels = torch.stack([torch.full((32, 32, 3), value, dtype=torch.uint8) for value in (1, 3)])[None]
    logits = view_logits(brightness, pixels)
    assert logits.tolist() == [2.0]
    assert summed_loss(logits, torch.ones(1), 0.0).item() == pytest.approx(np.log1p(np.exp(-2.0)))
    smooth = summed_loss(logits.repeat(2), torch.ones(2), 0.2).item()
    assert smooth == pytest.approx(2 * (0.9 * np.log1p(np.exp(-2.0)) + 0.1 * np.log1p(np.exp(2.0))))


def test_views_of_other_sizes_give_a_logit_each():
    member = build_member(QUICK["vit_small"], None)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    logits = torch_runner("vit", member, torch.device("cpu")).run(pixels)
    assert logits.shape == (3,)
    assert logits.dtype == np.float32


def test_member_puts_mean_and_std_inside():
    recipe = QUICK["vit_small"]
    member = build_member(recipe, None)
    seen = {}
    member.backbone.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    member(torch.full((1, 64, 64, 3), 255, dtype=torch.uint8))
    expected = (1 - torch.tensor(member.preprocess_config.mean)) / torch.tensor(member.preprocess_config.std)
    torch.testing.assert_close(seen["pixel_values"][0, :, 0, 0], expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_an_error_and_auto_is_the_cpu():
    with pytest.raises(UnavailableError, match="no CUDA device"):
        choose_device("cuda")
    assert choose_device("auto") == "cpu"


def test_saved_member_is_the_best_epoch_and_repeats_its_held_out_logits(run):
    held, logits = heldout_logits(run, ["tiny_convnext"])
    frame = dataset_of(run)
    [part] = json.loads((run / "members" / "tiny_convnext" / "history.json").read_text())["parts"]
    history = part["epochs"]
    best = read_info(run, "tiny_convnext")["best"]
    assert best["tune_auroc"] == max(epoch["tune_auroc"] for epoch in history)
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]

    runner = torch_runner("m", load_member(run, "tiny_convnext"), torch.device("cpu"))
    rows = frame.set_index("id").loc[held["id"]]
    again, errors = score_images(dataset.files(rows), [runner])
    assert not errors
    np.testing.assert_allclose(again[:, 0], logits[:, 0], atol=1e-4)
    tune = frame[frame["split"] == "tune"]
    scores, _ = score_images(dataset.files(tune), [runner])
    # half precision while tuning may swap neighbours
    assert auroc(tune["label"].to_numpy(), scores[:, 0]) == pytest.approx(best["tune_auroc"], abs=0.1)


def dataset_of(run):
    import pandas as pd

    return pd.read_parquet(run / "dataset.parquet")


def test_a_member_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    frame = make_frame()
    artifacts.write_parquet(artifacts.dataset_path(tmp_path), frame)
    small = {"architecture": "convnext", "config": {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2}}
    values = {"backbone": small, "image": {"size": 32}, "train": {"lr": 1e-3, "epochs": 1, "batch_size": 4}}
    recipes = [Recipe.model_validate({"name": name, **values}) for name in ("one", "two")]

    def trained(recipe, *_):
        if recipe.name == "one":
            raise RuntimeError("the disk is gone")
        write_member(tmp_path, "two", frame, noisy_logits(frame, 2))

    monkeypatch.setattr(train_all, "train_member", trained)
    said = []
    one, two = train_all.train_all(recipes, frame, tmp_path, TrainContext(), said.append)
    assert (one.status, two.status) == ("failed", "trained")
    log = artifacts.work_path(tmp_path, "one") / "error.txt"
    assert one.error == f"the disk is gone (details in {log})"
    assert "RuntimeError: the disk is gone" in log.read_text()
    assert f"  failed: {one.error}" in said
    assert float(two.score) > 0.5


def test_a_member_records_whether_its_checkpoint_was_of_the_hub(run, tmp_path, monkeypatch):
    save_classifier(small_member("swin"), tmp_path / "org" / "name")
    (tmp_path / "org" / "name").rename(tmp_path / "cached")
    save_classifier(small_member("swin"), tmp_path / "client" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ensemble.core.hub_download.download_classifier", lambda name: tmp_path / "cached")
    values = {"image": {"size": 32}, "adapt": {"mode": "probe"}, "train": {"batch_size": 32, "lr": 1e-3, "epochs": 1}}
    recipes = [
        Recipe.model_validate({"name": name, "backbone": {"checkpoint": checkpoint}, **values})
        for name, checkpoint in (("hub", "org/name"), ("local", "client/model"))
    ]
    frame = dataset_of(run)
    artifacts.write_parquet(artifacts.dataset_path(tmp_path / "run"), frame)
    done = train_all.train_all(recipes, frame, tmp_path / "run", TrainContext(), print)
    assert [one.status for one in done] == ["trained"] * 2
    assert [read_info(tmp_path / "run", name)["hub_checkpoint"] for name in ("hub", "local")] == ["org/name", None]
