"""A small main job on tiles of real photographs, through the command line, for tests that need its result."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from pictures import photo_file
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = "astronaut.png brick.png camera.png coffee.png grass.png gravel.png hubble_deep_field.jpg rocket.jpg".split()
TEST_PHOTO = "chelsea.png"
TILE, TILES = 64, 6
HOSTILE = ["007", "a b,c", "é<script>"]
TINY = {
    "tiny_convnext": "architecture: convnext\n"
    "  config: {patch_size: 4, hidden_sizes: [8, 16, 24, 32], depths: [1, 1, 1, 1]}",
    "tiny_vit": "architecture: timm/vit_tiny_patch16_224\n  config: {patch_size: 8, depth: 1, embed_dim: 24}",
}
SHARES = ("--tune", "0.2", "--heldout", "0.4", "--seed", "27")


def manyeyes(*arguments, code=0, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def blurred(tile):
    """The AI class of these tests: enough of a difference for a tiny network to see."""
    return tile.filter(ImageFilter.GaussianBlur(3))


def tiles_of(name, count, rng):
    photo = Image.open(photo_file(name)).convert("RGB")
    for number in range(count):
        left, top = (int(rng.integers(0, side - TILE)) for side in photo.size)
        tile = photo.crop((left, top, left + TILE, top + TILE))
        yield f"{Path(name).stem}_{number}", tile


def make_data(folder):
    """data/train.csv with its tiles, data/test.csv with hostile ids, and recipes/."""
    rng = np.random.default_rng(0)
    (folder / "recipes").mkdir()
    for name, text in TINY.items():
        (folder / "recipes" / f"{name}.yaml").write_text(
            f"backbone:\n  {text}\nimage: {{size: 64, geometry: native_crops}}\n"
            "train: {lr: 3.0e-3, epochs: 3, batch_size: 16}\n"
        )
    (folder / "data" / "images").mkdir(parents=True)
    rows = []
    for photo in PHOTOS:
        for name, tile in tiles_of(photo, 2 * TILES, rng):
            label = len(rows) % 2
            path = f"tiles/{'ai' if label else 'real'}/{name}.png"
            (folder / "data" / path).parent.mkdir(parents=True, exist_ok=True)
            (blurred(tile) if label else tile).save(folder / "data" / path)
            rows.append({"id": name, "path": path, "label": label, "photo": Path(photo).stem})
    pd.DataFrame(rows).to_csv(folder / "data" / "train.csv", index=False)
    ids = HOSTILE + [f"t{number}" for number in range(9)]
    for key, (_, tile) in zip(ids, tiles_of(TEST_PHOTO, len(ids), rng), strict=True):
        (tile if key[-1] in "02468c" else blurred(tile)).save(folder / "data" / "images" / f"{key}.png")
    pd.DataFrame({"id": ids}).to_csv(folder / "data" / "test.csv", index=False)
    return folder


def make_run(work):
    """A trained and stacked run with its bundle."""
    folder = work / "run"
    data = ("--data", work / "data" / "train.csv", "--group-column", "photo")
    done = manyeyes("train-all", work / "recipes", *data, *SHARES, "--run", folder)
    assert "1 counts as ai" in done.stdout
    assert "96 images" in done.stdout
    assert done.stdout.count("trained") == 2
    done = manyeyes("stack", "--run", folder)
    assert "out of fold" in done.stdout
    assert "The stack" in done.stdout
    manyeyes("export", "--run", folder)
    return folder
