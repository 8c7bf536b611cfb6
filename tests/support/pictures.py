"""Small pictures and files, and names that file systems allow but programs stumble over."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PHOTOS = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")


SIDE = 96  # pixels of a crop
CROPPED = [*PHOTOS, "brick.png", "camera.png", "grass.png", "gravel.png", "hubble_deep_field.jpg"]
HOSTILE_NAMES = ("a b", "é 写真", "1,2", 'it\'s "it"', "two\nlines", "<script>", "007", "NA", "1e5", "a.b")


def photo_file(name: str) -> Path:
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "data" / name


def noise(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def write_files(folder: Path, *names: str, data: bytes = b"") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def crops(count: int) -> list[Image.Image]:
    """Disjoint crops of photographs, at their own resolution."""
    found = []
    for name in CROPPED:
        photo = Image.open(photo_file(name)).convert("RGB")
        photo.info.clear()  # a comment or profile of its own would be saved along
        tops, lefts = (range(0, side - SIDE + 1, SIDE) for side in (photo.height, photo.width))
        found += [photo.crop((left, top, left + SIDE, top + SIDE)) for top in tops for left in lefts]
    order = np.random.default_rng(0).permutation(len(found))[:count]
    assert len(order) == count
    return [found[i] for i in order]
