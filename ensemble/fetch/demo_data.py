"""A small real data set without a network: photographs from packages, rebuilt by a neural network.

The AI class is made by super-resolution: a tile is halved in size and brought back by a
small network trained on the spot, so both classes share content, size and format, and
only the generator's traces differ. Every tile of a photograph stays in one split.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from ensemble.core import artifacts
from ensemble.core.errors import DataError
from ensemble.core.log import Log
from ensemble.images import decode

# Sharp ones: a blurred tile holds nothing that a generator could have changed.
PHOTOS = {
    "skimage/data": (
        "astronaut brick camera chelsea coffee coins grass gravel hubble_deep_field motorcycle_left rocket"
    ).split(),
    "sklearn/datasets/images": ["china", "flower"],
}
TEST_PHOTOS = frozenset({"chelsea", "china", "coins", "gravel"})
TILE = 128  # pixels
TILES = {"train": 32, "test": 20}  # of a photograph, for each class
STEPS = 200  # of the generator's training

Tile = tuple[str, int, Image.Image, int]  # photograph, label, pixels, JPEG quality


def make_demo_data(folder: Path, log: Log, seed: int = 0) -> None:
    """Write train.csv, test.csv, labels.csv, sample_submission.csv and their tiles below `folder`.

    What is already whole is kept. Raises DataError if the photographs' package is missing.
    """
    if (folder / "labels.csv").is_file():  # written last
        log(f"demo data is in {folder}")
        return
    photos = packaged_photos()
    rng = np.random.default_rng(seed)
    generator = _train_generator([photo for name, photo in photos.items() if name not in TEST_PHOTOS], seed)
    tiles: dict[str, list[Tile]] = {"train": [], "test": []}
    for name, photo in photos.items():
        split = "test" if name in TEST_PHOTOS else "train"
        for label in (0, 1):
            for _ in range(TILES[split]):
                tile = _tile(photo, rng)
                tile = _rebuild(generator, tile) if label else tile
                tiles[split].append((name, label, tile, int(rng.integers(85, 99))))
    for split, each in tiles.items():
        _write(folder, split, [each[i] for i in rng.permutation(len(each))])
    log(
        f"{len(tiles['train'])} training and {len(tiles['test'])} test tiles of {len(photos)} photographs "
        f"({len(TEST_PHOTOS)} for the test alone) -> {folder}"
    )


def packaged_photos() -> dict[str, Image.Image]:
    """The photographs by name, as RGB. Raises DataError if their package is missing."""
    found = {}
    for location, names in PHOTOS.items():
        package, _, inner = location.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise DataError("the demo's photographs come with scikit-image; run: pip install 'manyeyes[demo]'")
        folder = Path(next(iter(spec.submodule_search_locations))) / inner
        for name in names:
            file = next((p for p in (folder / f"{name}.png", folder / f"{name}.jpg") if p.is_file()), None)
            if file is None:
                raise DataError(f"{folder} has no photograph {name}; run: pip install --force-reinstall {package}")
            found[name] = decode.decode(file).convert("RGB")
    return found


def _tile(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    left, top = (int(rng.integers(0, side - TILE + 1)) for side in photo.size)
    return photo.crop((left, top, left + TILE, top + TILE))


class _Upscaler(nn.Module):
    """Doubles an image's size: bicubic plus what three convolutions add. After Dong et al., SRCNN (2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, low: torch.Tensor) -> torch.Tensor:
        """float [N, 3, H, W] in [0, 1] -> float [N, 3, 2H, 2W]."""
        upscaled: torch.Tensor = functional.interpolate(low, scale_factor=2, mode="bicubic") + self.body(low)
        return upscaled


def _train_generator(photos: Sequence[Image.Image], seed: int) -> _Upscaler:
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    network = _Upscaler()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(STEPS):
        tiles = [_tile(photos[int(rng.integers(len(photos)))], rng) for _ in range(8)]
        high = torch.stack([_tensor(tile) for tile in tiles])
        low = torch.stack([_tensor(_halved(tile)) for tile in tiles])
        loss = functional.l1_loss(network(low), high)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def _rebuild(generator: _Upscaler, tile: Image.Image) -> Image.Image:
    with torch.inference_mode():
        rebuilt = generator(_tensor(_halved(tile))[None])[0].clamp(0, 1)
    return Image.fromarray((rebuilt * 255).round().byte().permute(1, 2, 0).numpy())


def _halved(tile: Image.Image) -> Image.Image:
    return tile.resize((TILE // 2, TILE // 2), Image.Resampling.BICUBIC)


def _tensor(tile: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(tile)).permute(2, 0, 1).float() / 255


def _write(folder: Path, split: str, tiles: Sequence[Tile]) -> None:
    artifacts.ensure_folder(folder / split)
    rows = []
    for number, (photo, label, tile, quality) in enumerate(tiles):
        key = f"{split}_{number:04d}"
        tile.save(folder / split / f"{key}.jpg", quality=quality)
        rows.append({"id": key, "path": f"{split}/{key}.jpg", "label": label, "group": photo})
    frame = pd.DataFrame(rows)
    if split == "train":
        frame.to_csv(folder / "train.csv", index=False)
        return
    frame[["id", "path"]].to_csv(folder / "test.csv", index=False)
    frame[["id"]].assign(target=0.5).to_csv(folder / "sample_submission.csv", index=False)
    frame[["id", "label", "group"]].to_csv(folder / "labels.csv", index=False)
