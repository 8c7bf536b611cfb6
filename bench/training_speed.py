"""Images per second of training, ours beside transformers' example-style Trainer script.

    python bench/training_speed.py [FOLDER] [--families swin,vit] [--rounds 3] [--steps 10] [--batch 16]

FOLDER holds any images (default: photographs of installed packages, cut into 256-pixel JPEGs). Without --batch
the quick networks take 16 images a step and the full sizes 4. EfficientNet-Lite1 is measured only if named: it is
Lite0's family. The defaults should take about 13 minutes on two quiet cores.

Equal on both sides: network (its class and config, random weights, drop path as in the recipe), input size,
images, batch, steps, AdamW (fused), gradient clipping, precision, torch's threads. Each side runs in a process of
its own, since ours changes how memory is kept, and the two take turns. The first steps are not measured.

Theirs is examples/pytorch/image-classification/run_image_classification.py with its defaults: RandomResizedCrop,
flip, ToTensor and Normalize in the training process, softmax cross-entropy, Trainer.

Ours is `ensemble.fit.fit` as `train` calls it, in an epoch after the first: what was decoded is still in memory
(on a CPU; a data set above a quarter of the free memory would be decoded again). Threads crop or resize as the
image contract says, degrade half of the images as the recipe says (JPEG, which theirs does not) and flip; the
network takes uint8 pixels and gives one logit.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
import torchvision.transforms as T  # noqa: N812
import transformers
from PIL import Image
from torch.utils.data import Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ensemble.core.errors import UnavailableError  # noqa: E402
from ensemble.core.recipe import Recipe, find_recipes, load_recipes  # noqa: E402
from ensemble.data.files import list_images  # noqa: E402
from ensemble.fetch.demo_data import packaged_photos  # noqa: E402
from ensemble.models.backbone import Member, build_member  # noqa: E402
from ensemble.training import precision as train_precision  # noqa: E402
from ensemble.training.data_loader import PREFETCH_BATCHES, TrainDataset  # noqa: E402
from ensemble.training.distributed import ProcessGroup  # noqa: E402
from ensemble.training.loop import FitConfig, fit  # noqa: E402
from ensemble.training.progress import LiveProgress  # noqa: E402
from ensemble.training.tracking import Trackers  # noqa: E402
from ensemble.training.validation import RowReader  # noqa: E402

WARM_UP = 2  # steps
TILE = 256  # pixels
TWIN = "efficientnet_lite1"  # of efficientnet_lite0
Step = tuple[int, int, float]  # number from 1, images, when it ended
FULL: dict[str, dict[str, Any]] = {  # beside the quick recipes: what people fine-tune
    "swin_tiny": {"architecture": "swin", "config": {"image_size": 224}, "drop_path": 0.1},
    "swinv2_tiny": {"architecture": "swinv2", "config": {"image_size": 256, "window_size": 8}, "drop_path": 0.1},
    "convnext_tiny": {"architecture": "convnext", "config": {"image_size": 224}, "drop_path": 0.1},
    "vit_tiny": {"architecture": "timm/vit_tiny_patch16_224"},
}


def families() -> dict[str, Recipe]:
    """The quick recipes without their weights, then the smallest full sizes."""
    quick = [
        recipe.model_copy(
            update={
                "backbone": recipe.backbone.model_copy(update={"weights": None, "weights_match": "name"}),
                "train": recipe.train.model_copy(update={"batch_size": 16}),
            }
        )
        for recipe in load_recipes(find_recipes(ROOT / "recipes" / "quick"))
        if recipe.adapt.mode != "probe"
    ]
    train = {"lr": 5e-5, "epochs": 1, "batch_size": 4}
    augment = {"jpeg": [30, 100]}
    full = [Recipe(name=name, backbone=backbone, augment=augment, train=train) for name, backbone in FULL.items()]
    return {recipe.name: recipe for recipe in quick + full}


class TheirRows(Dataset[dict[str, Any]]):
    """What the example's `train_transforms` makes of each image."""

    def __init__(self, files: list[Path], member: Member) -> None:
        preprocess_config = member.preprocess_config
        self.files = files
        self.transform = T.Compose(
            [
                T.RandomResizedCrop(preprocess_config.size),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize(preprocess_config.mean, preprocess_config.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.transform(Image.open(self.files[row]).convert("RGB")), "labels": row % 2}


def their_collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    pixels = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


class TheirClock(transformers.TrainerCallback):
    """When each step ended, and its images."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: D102
        self.steps.append((state.global_step, args.per_device_train_batch_size, time.perf_counter()))


class Enough(BaseException):
    """All steps are measured; the epoch need not end."""


class OurClock(LiveProgress):
    """The board of a run, which also notes when steps ended."""

    def __init__(self, last: int) -> None:
        super().__init__([], print)
        self.last, self.steps = last, list[Step]()

    def on_step(self, step: int, loss: float | None, lr: float, images: int) -> None:  # noqa: D102
        super().on_step(step, loss, lr, images)
        self.steps.append((step, images, time.perf_counter()))
        if step >= self.last:
            raise Enough


def their_rate(recipe: Recipe, files: list[Path], batch: int, steps: int, precision: str) -> float:
    member = build_member(recipe, None)
    clock = TheirClock()
    with tempfile.TemporaryDirectory() as work:
        arguments = transformers.TrainingArguments(
            output_dir=work,
            per_device_train_batch_size=batch,
            max_steps=WARM_UP + steps,
            bf16=precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        rows = TheirRows(files, member)
        trainer = transformers.Trainer(member.backbone, arguments, their_collate, rows, callbacks=[clock])
        trainer.train()
    return rate(clock.steps)


def our_rate(recipe: Recipe, files: list[Path], batch: int, steps: int, precision: str) -> float:
    train_precision.keep_freed_memory()
    processes = ProcessGroup(device="cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = processes.device_type == "cpu"
    train = recipe.train.model_copy(update={"batch_size": batch, "precision": precision})
    # loaders work ahead of the last step too, as they do amid an epoch
    count = batch * (WARM_UP + steps + PREFETCH_BATCHES * (1 if on_cpu else os.cpu_count() or 1))
    keep = psutil.virtual_memory().available // 4 if on_cpu else 0
    member = build_member(recipe, None)
    shown = [files[row % len(files)] for row in range(count)]
    rows = TrainDataset(shown, np.arange(count) % 2, member.preprocess_config, recipe.augment, cache_bytes=keep)
    if on_cpu:
        for row in range(count):
            rows[0, row]  # as a first epoch leaves them
    clock = OurClock(WARM_UP + steps)
    with tempfile.TemporaryDirectory() as work, suppress(Enough):
        recipe = recipe.model_copy(update={"train": train})
        job = FitConfig(recipe, pd.DataFrame(), None, RowReader(None, 0), 1, Path(work), 0, processes)
        fit(member, job, rows, clock, lambda done: Trackers(None, []))
    return rate(clock.steps)


def rate(steps: list[Step]) -> float:
    """Images per second after the warm-up, from steps in order; on a GPU ours tells of ten at a time."""
    (_, _, started), *timed = [step for step in steps if step[0] >= WARM_UP]
    return sum(images for _, images, _ in timed) / (timed[-1][2] - started)


SIDES = {"theirs": their_rate, "ours": our_rate}


def batch_size(options: argparse.Namespace, family: str) -> int:
    return options.batch or families()[family].train.batch_size


def measured(side: str, options: argparse.Namespace, folder: Path, family: str, precision: str) -> float:
    """One side's rate, from a process of its own."""
    command = [sys.executable, __file__, str(folder), "--families", family, "--precision", precision, "--side", side]
    settings = ["--steps", str(options.steps), "--batch", str(batch_size(options, family))]
    done = subprocess.run([*command, *settings], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def cut_tiles(folder: Path, count: int = 128) -> Path:
    """`count` JPEG tiles of the packaged photographs, cut at random places."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    photos = [photo.convert("RGB") for photo in packaged_photos().values() if min(photo.size) >= TILE]
    for number in range(count):
        photo = photos[number % len(photos)]
        left, top = (int(rng.integers(side - TILE + 1)) for side in photo.size)
        photo.crop((left, top, left + TILE, top + TILE)).save(folder / f"{number:03}.jpg", quality=92)
    return folder


def precisions() -> list[str]:
    """fp32, and bf16 where the hardware computes in it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = next(iter(families().values()))
    train = recipe.train.model_copy(update={"precision": "bf16"})
    try:
        train_precision.choose_precision(build_member(recipe, None), train, device)
    except UnavailableError:
        return ["fp32"]
    return ["fp32", "bf16"]


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Print the table, and the geometric mean of the ratios for each precision."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{device}, {torch.get_num_threads()} threads, {versions}; images/s, medians of {options.rounds}")
    print(f"{'family':20} batch precision   theirs     ours   ratio  (lowest..highest)", flush=True)
    for precision in [options.precision] if options.precision else precisions():
        ratios = []
        for family in options.families.split(","):
            rounds = [
                {side: measured(side, options, folder, family, precision) for side in SIDES}
                for _ in range(options.rounds)
            ]
            theirs, ours = (statistics.median(values[side] for values in rounds) for side in SIDES)
            each = sorted(values["ours"] / values["theirs"] for values in rounds)
            ratios.append(statistics.median(each))
            print(
                f"{family:20} {batch_size(options, family):5} {precision:9}"
                f"{theirs:9.1f}{ours:9.1f}{ratios[-1]:8.2f}  ({each[0]:.2f}..{each[-1]:.2f})",
                flush=True,
            )
        mean = math.exp(statistics.mean(map(math.log, ratios)))
        print(f"{'geometric mean':20} {precision:>15}{mean:26.2f}   lowest {min(ratios):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--families", default=",".join(name for name in families() if name != TWIN))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.families.split(",")) - set(families()):
        parser.error(f"unknown families: {', '.join(sorted(unknown))}; there are {', '.join(families())}")
    if options.folder and not (options.folder.is_dir() and list_images(options.folder)):
        parser.error(f"no images in {options.folder}")
    if options.side:
        recipe = families()[options.families]
        files = [options.folder / name for name in list_images(options.folder)]
        print(json.dumps(SIDES[options.side](recipe, files, options.batch, options.steps, options.precision)))
        return
    with tempfile.TemporaryDirectory() as work:
        compare(options, options.folder or cut_tiles(Path(work) / "tiles"))


if __name__ == "__main__":
    main()
