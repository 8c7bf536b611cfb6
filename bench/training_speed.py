"""Images per second of training, ours beside transformers' example-style Trainer script.

    python bench/training_speed.py [FOLDER] [--families swin,vit] [--rounds 3] [--steps 12] [--batch 16]

FOLDER holds any images (default: photographs of installed packages, cut into 256-pixel JPEGs).

Equal on both sides: network (random weights, drop path as in the recipe), input size, images, batch,
steps, AdamW (fused), gradient clipping, precision, torch's threads; decoding is in the measured time,
the first steps are not. Each side runs in a process of its own, since ours changes how memory
is kept, and the two take turns.

Different: theirs is examples/pytorch/image-classification/run_image_classification.py with its
defaults: RandomResizedCrop, flip, ToTensor and Normalize in the training process, softmax cross-entropy,
Trainer. Ours crops, degrades and turns as the recipe says, brings uint8 pixels to the network, and trains one logit.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms as T  # noqa: N812
import transformers
from PIL import Image
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ensemble import machine  # noqa: E402
from ensemble.backbone import Member, build_member  # noqa: E402
from ensemble.demo_data import packaged_photos  # noqa: E402
from ensemble.errors import UnavailableError  # noqa: E402
from ensemble.files import list_images  # noqa: E402
from ensemble.loader import Rows, collate  # noqa: E402
from ensemble.recipe import Recipe  # noqa: E402
from ensemble.recipe_files import find_recipes, load_recipes  # noqa: E402
from ensemble.train import Objective  # noqa: E402

WARM_UP = 3  # steps
TILE = 256  # pixels
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
            update={"backbone": recipe.backbone.model_copy(update={"weights": None, "weights_match": "name"})}
        )
        for recipe in load_recipes(find_recipes(ROOT / "recipes" / "quick"))
    ]
    train = {"lr": 5e-5, "epochs": 1, "batch_size": 16}
    augment = {"jpeg": [30, 100]}
    full = [Recipe(name=name, backbone=backbone, augment=augment, train=train) for name, backbone in FULL.items()]
    return {recipe.name: recipe for recipe in quick + full}


class TheirRows(Dataset[dict[str, Any]]):
    """What the example's `train_transforms` makes of each image."""

    def __init__(self, files: list[Path], member: Member) -> None:
        contract = member.contract
        self.files = files
        self.transform = T.Compose(
            [
                T.RandomResizedCrop(contract.size),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize(contract.mean, contract.std),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.transform(Image.open(self.files[row]).convert("RGB")), "labels": row % 2}


def their_collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    pixels = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


class Clock(transformers.TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: D102
        self.times.append(time.perf_counter())


def their_rate(recipe: Recipe, files: list[Path], batch: int, steps: int, precision: str) -> float:
    member = build_member(recipe, None)
    clock = Clock()
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
    return rate(clock.times, batch)


def our_rate(recipe: Recipe, files: list[Path], batch: int, steps: int, precision: str) -> float:
    machine.keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    member = build_member(recipe, None).to(device)
    if machine.prefers_channels_last(member):
        member.to(memory_format=torch.channels_last)
    objective = Objective(member, 0.0).train()
    optimizer = torch.optim.AdamW(objective.parameters(), 5e-5, fused=True)
    rows = Rows(files, np.arange(len(files)) % 2, member.contract, recipe.augment)
    loader = DataLoader(rows, batch, shuffle=True, drop_last=True, collate_fn=collate)
    times = []
    for values in itertools.islice(endless(loader), WARM_UP + steps):
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = objective(values["pixels"].to(device), values["labels"].to(device))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # a step ends when it is done, on a GPU too
        times.append(time.perf_counter())
    return rate(times, batch)


def endless(loader: DataLoader[dict[str, Any]]) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def rate(times: list[float], batch: int) -> float:
    """Images per second after the warm-up."""
    timed = times[WARM_UP - 1 :]
    return batch * (len(timed) - 1) / (timed[-1] - timed[0])


SIDES = {"theirs": their_rate, "ours": our_rate}


def measured(side: str, options: argparse.Namespace, folder: Path, family: str, precision: str) -> float:
    """One side's rate, from a process of its own."""
    settings = [f"--{name}={getattr(options, name)}" for name in ("steps", "batch")]
    command = [sys.executable, __file__, str(folder), *settings, "--families", family]
    done = subprocess.run(
        [*command, "--precision", precision, "--side", side], check=True, stdout=subprocess.PIPE, text=True
    )
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
        machine.choose_precision(build_member(recipe, None), train, device)
    except UnavailableError:
        return ["fp32"]
    return ["fp32", "bf16"]


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Print the table, and the geometric mean of the ratios for each precision."""
    print(f"{torch.get_num_threads()} threads, batch {options.batch}, images/s, medians of {options.rounds}")
    print(f"{'family':20} precision   theirs     ours   ratio  (lowest..highest)", flush=True)
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
                f"{family:20} {precision:9}{theirs:9.1f}{ours:9.1f}{ratios[-1]:8.2f}  ({each[0]:.2f}..{each[-1]:.2f})",
                flush=True,
            )
        mean = math.exp(statistics.mean(map(math.log, ratios)))
        print(f"{'geometric mean':20} {precision:9}{mean:26.2f}   lowest {min(ratios):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--families", default=",".join(families()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.families.split(",")) - set(families()):
        parser.error(f"unknown families: {', '.join(sorted(unknown))}; there are {', '.join(families())}")
    if options.side:
        recipe = families()[options.families]
        files = [options.folder / name for name in list_images(options.folder)]
        print(json.dumps(SIDES[options.side](recipe, files, options.batch, options.steps, options.precision)))
        return
    with tempfile.TemporaryDirectory() as work:
        compare(options, options.folder or cut_tiles(Path(work) / "tiles"))


if __name__ == "__main__":
    main()
