"""What augmentation costs: each degradation, whole recipes, and what a training process then delivers.

    python bench/augment.py [--photos FOLDER] [--recipes recipes recipes/quick] [--side 3000]

On 256-pixel tiles and on photographs (default: those inside scikit-image and scikit-learn, enlarged to --side pixels,
as few of them are large), beside decoding alone and torchvision's transforms on tensors. Processor time on one thread:
medians for a degradation, means for a recipe. A ratio is torchvision's time over ours: above 1 ours is faster.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ensemble.core.preprocess_config import PreprocessConfig  # noqa: E402
from ensemble.core.recipe import Augment, find_recipes, load_recipes  # noqa: E402
from ensemble.data.files import list_images  # noqa: E402
from ensemble.fetch.demo_data import packaged_photos  # noqa: E402
from ensemble.images import decode, degradations, preprocess  # noqa: E402
from ensemble.training.data_loader import TrainDataset  # noqa: E402

TILE = 256  # pixels
SIZE = 224  # of a member's input
BICUBIC = InterpolationMode.BICUBIC
EVERYTHING = Augment(
    chance=1.0, chain=(1, 5), jpeg=(30, 100), webp=(30, 100), blur=(0.1, 3), resize=(0.25, 2), noise=(0.01, 0.1),
    crop=(0.5, 1),
)  # fmt: skip
CASES: dict[str, tuple[Callable[[Image.Image], object], Callable[[torch.Tensor], object] | None]] = {
    "jpeg 70": (partial(degradations.jpeg, quality=70), partial(tv.jpeg, quality=70)),
    "webp 70, as augmentation": (partial(degradations.webp, quality=70, method=degradations.FAST_WEBP), None),
    "webp 70, as the grid": (partial(degradations.webp, quality=70), None),
    "blur 1": (partial(degradations.blur, sigma=1.0), v2.GaussianBlur(7, 1.0)),
    "blur 3": (partial(degradations.blur, sigma=3.0), v2.GaussianBlur(19, 3.0)),
    "resize 0.5, bicubic": (
        partial(degradations.resize, scale=0.5, filter_name="bicubic"),
        lambda x: tv.resize(x, [x.shape[1] // 2, x.shape[2] // 2], BICUBIC),
    ),
    "resize 2, bicubic": (
        partial(degradations.resize, scale=2.0, filter_name="bicubic"),
        lambda x: tv.resize(x, [x.shape[1] * 2, x.shape[2] * 2], BICUBIC),
    ),
    "noise 0.05": (partial(degradations.noise, sigma=0.05, seed=0), v2.GaussianNoise(sigma=0.05)),
    "crop 0.8": (partial(degradations.crop, scale=0.8, y=0.5, x=0.5), None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--recipes", type=Path, nargs="+", default=[ROOT / "recipes", ROOT / "recipes" / "quick"])
    parser.add_argument("--side", type=int, default=2000, help="longer side of the packaged photographs")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    photos = read_photos(options.photos, options.side)
    augments = augments_of(options.recipes)
    with tempfile.TemporaryDirectory() as folder:
        for what, pictures in (("tiles", tiles_of(photos)), ("photographs", photos[:6])):
            sizes = sorted(picture.width * picture.height / 1e6 for picture in pictures)
            print(f"{len(pictures)} {what}, {sizes[0]:.2f} to {sizes[-1]:.2f} megapixels, JPEG 90")
            each(pictures, options.repeats)
            whole(pictures, augments, Path(folder) / what, options.repeats)


def each(pictures: Sequence[Image.Image], repeats: int) -> None:
    """A row a degradation: its time, torchvision's and their ratio."""
    data = [encoded(picture) for picture in pictures]
    tensors = [tv.pil_to_tensor(picture) for picture in pictures]
    print(f"  {'':48}{'ours':>10}{'torchvision':>14}{'ratio':>8}")
    [decoding] = medians([partial(decode.decode)], [data], repeats)
    print(f"  {'decode alone':48}{decoding:7.2f} ms")
    for name, (ours, theirs) in CASES.items():
        if theirs is None:
            [own] = medians([ours], [pictures], repeats)
            print(f"  {name:48}{own:7.2f} ms")
        else:
            own, other = medians([ours, theirs], [pictures, tensors], repeats)
            print(f"  {name:48}{own:7.2f} ms{other:11.2f} ms{other / own:8.2f}")


def degraded(picture: Image.Image, augment: Augment, rng: np.random.Generator) -> Image.Image:
    for change in degradations.draw_degradations(augment, rng):
        picture = change.apply(picture)
    return picture


def whole(pictures: Sequence[Image.Image], augments: dict[str, Augment], folder: Path, repeats: int) -> None:
    """A row a recipe: augmentation of an image, then images a second of a process that reads, degrades and crops."""
    files = []
    folder.mkdir()
    for number, picture in enumerate(pictures):
        files.append(folder / f"{number}.jpg")
        files[-1].write_bytes(encoded(picture))
    geometries = ("squash", "native_crops")
    print(f"  {'':48}{'degrade':>10}{'over decode':>14}   images/s a process, {' / '.join(geometries)}")
    decoding = statistics.mean(seconds(decode.decode, file) for file in files for _ in range(repeats)) * 1000
    for name, augment in {"none": Augment(), **augments}.items():
        times = [
            seconds(degraded, picture, augment, np.random.default_rng([row, turn]))
            for turn in range(8 * repeats)
            for row, picture in enumerate(pictures)
        ]
        rates = [delivered(files, augment, geometry, 4 * repeats) for geometry in geometries]
        spent = statistics.mean(times) * 1000
        print(f"  {name:48}{spent:7.2f} ms{spent / decoding:13.2f}x   {rates[0]:8.0f} / {rates[1]:.0f}")


def delivered(files: Sequence[Path], augment: Augment, geometry: str, epochs: int) -> float:
    """Images a second of processor time."""
    preprocess_config = PreprocessConfig(size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3, geometry=geometry)
    rows = TrainDataset(files, np.zeros(len(files)), preprocess_config, augment)
    spent = 0.0
    for rows.epoch in range(epochs):
        spent += sum(seconds(rows.__getitem__, row) for row in range(len(files)))
    return epochs * len(files) / spent


def medians(calls: Sequence[Callable], inputs: Sequence[Sequence], repeats: int) -> list[float]:
    """Milliseconds of each call over its inputs, in turns, so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for group in zip(*inputs, strict=True):
            for call, item, spent in zip(calls, group, times, strict=True):
                spent.append(seconds(call, item))
    return [statistics.median(spent) * 1000 for spent in times]


def seconds(call: Callable, *arguments: object) -> float:
    started = time.process_time()
    call(*arguments)
    return time.process_time() - started


def read_photos(folder: Path | None, side: int) -> list[Image.Image]:
    if folder is not None:
        return [preprocess.flatten(decode.decode(folder / name), (255, 255, 255)) for name in list_images(folder)]
    photos = packaged_photos().values()
    return [photo.resize([round(edge * side / max(photo.size)) for edge in photo.size], 3) for photo in photos]


def tiles_of(photos: Sequence[Image.Image], most: int = 24) -> list[Image.Image]:
    tiles = []
    for number in range(most):
        photo = photos[number % len(photos)]
        tiles.append(degradations.crop_at(photo, TILE, TILE, *np.random.default_rng(number).random(2)))
    return tiles


def augments_of(folders: Sequence[Path]) -> dict[str, Augment]:
    """The different augmentations of the recipes, and one with everything."""
    recipes = [recipe for folder in folders for recipe in load_recipes(find_recipes(folder))]
    named: dict[str, list[str]] = {}
    by_text = {}
    for recipe in recipes:
        text = recipe.augment.model_dump_json()
        by_text[text] = recipe.augment
        named.setdefault(text, []).append(recipe.name)
    found = {", ".join(names)[:46]: by_text[text] for text, names in named.items()}
    return found | {"all six, 1 to 5 of them, always": EVERYTHING}


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
