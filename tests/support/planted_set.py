"""A planted set: how each class is drawn and stored, and the writing of it, for planted.py."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import planted_metadata
from PIL import Image, JpegImagePlugin
from planted_photos import Wanted, cut

AI, REAL = 1, 0
FOLDERS = {AI: "ai", REAL: "real"}
COUNT = 120  # images of a class
ROOTS = ("commons", "flickr", "archive")  # sources, where they are no trap
GENERATORS = ("sdxl", "midjourney-v5")
CODECS: dict[str, tuple[str, str, dict[str, Any]]] = {  # Pillow's format, suffix, options
    "jpeg": ("JPEG", ".jpg", {}),
    "png": ("PNG", ".png", {"compress_level": 6}),
    "webp": ("WEBP", ".webp", {}),
    "webp-lossless": ("WEBP", ".webp", {"lossless": True, "method": 0}),
    "tiff": ("TIFF", ".tif", {}),
    "avif": ("AVIF", ".avif", {"speed": 9, "max_threads": 1}),
}

Rng = np.random.Generator
Sizes = Callable[[Rng], tuple[int, int]]
Step = Callable[[Image.Image, Rng, int], Image.Image]
Name = Callable[[int, Rng], str]


def any_of(*sizes: tuple[int, int]) -> Sizes:
    """Draws one of these (width, height)."""
    return lambda rng: sizes[int(rng.integers(len(sizes)))]


def between(low: int, high: int, step: int = 1) -> Sizes:
    """Draws width and height apart, each from `low` to `high` pixels."""
    sides = range(low, high + 1, step)
    return lambda rng: (sides[int(rng.integers(len(sides)))], sides[int(rng.integers(len(sides)))])


def hex_name(serial: int, rng: Rng) -> str:
    """Twelve random digits and letters."""
    return rng.bytes(6).hex()


@dataclass(frozen=True)
class Style:
    """How images are cut and stored; whatever leaves a choice is drawn for each image.

    codecs: keys of CODECS. quality: of lossy ones, both ends included. subsampling, tables (a Pillow
    preset's, in place of the quality's), progressive: of JPEG. scale: tile pixels per photo pixel.
    steps: what happens to the pixels before storing, given the image's number in its class. metadata: names of
    planted_metadata, on a share `carry` of the images. name: stem by a serial number of its own. suffix:
    in place of the codec's. pick: indices of the photos to cut from.
    """

    codecs: Sequence[str] = ("jpeg",)
    quality: tuple[int, int] = (75, 95)
    subsampling: Sequence[str] = ("4:2:0",)
    tables: str | None = None
    progressive: bool = False
    mode: str = "RGB"
    sizes: Sizes = field(default=any_of((128, 128)))
    scale: tuple[float, float] = (0.3, 1.0)
    filter: Image.Resampling = Image.Resampling.LANCZOS
    steps: Sequence[Step] = ()
    metadata: tuple[str, ...] = ()
    carry: float = 1.0
    name: Name = hex_name
    suffix: str | None = None
    pick: Callable[[Sequence[Image.Image]], Sequence[int]] = field(default=lambda photos: range(len(photos)))


@dataclass
class Item:
    """One image on its way to a file."""

    label: int
    style: Style
    serial: int
    image: Image.Image
    group: str
    source: str = ""
    generator: str = ""
    data: bytes = b""
    name: str = ""


Hook = Callable[[list[Item], Rng], None]


@dataclass(frozen=True)
class Planted:
    """One set. A share of each class is stored in its own style, the rest in the other's.

    pixels and stored: hooks that change items before and after they are encoded. sources: draws the source
    of each row from its label; table: write a CSV (id, path, label, group, source, generator) and one folder of
    images, instead of ai/ and real/.
    """

    what: str
    ai: Style = Style()
    real: Style = Style()
    ai_share: float = 1.0
    real_share: float = 1.0
    counts: tuple[int, int] = (COUNT, COUNT)  # ai, real
    pixels: Hook | None = None
    stored: Hook | None = None
    sources: Callable[[int, Rng], str] = lambda label, rng: ROOTS[int(rng.integers(len(ROOTS)))]
    table: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of trap: what an audit should say of it, and its variants."""

    expects: str
    variants: Sequence[Planted]


def write(planted: Planted, folder: Path, photos: Sequence[Image.Image], rng: Rng) -> Path:
    """Write the set into `folder`, which must be new, and return what to give to an audit."""
    items = _draw(planted, photos, rng)
    if planted.pixels:
        planted.pixels(items, rng)
    for item in items:
        suffix, item.data = encode(item.image, item.style, rng)
        item.name = item.style.name(item.serial, rng) + suffix
    if planted.stored:
        planted.stored(items, rng)
    folder.mkdir(parents=True)
    return _write_table(items, folder) if planted.table else _write_folders(items, folder)


def _draw(planted: Planted, photos: Sequence[Image.Image], rng: Rng) -> list[Item]:
    ai, real = ((style, style.pick(photos)) for style in (planted.ai, planted.real))
    plan = []
    for label, own, other, share, count in (
        (AI, ai, real, planted.ai_share, planted.counts[0]),
        (REAL, real, ai, planted.real_share, planted.counts[1]),
    ):
        odd = rng.permutation(count) >= round(share * count)
        plan += [(label, number, *(other if odd[number] else own)) for number in range(count)]
    tiles = cut(photos, [Wanted(style.sizes(rng), style.scale, style.filter, pick) for _, _, style, pick in plan], rng)
    serials = rng.permutation(10_000)
    items = []
    for (label, number, style, _), (index, tile), serial in zip(plan, tiles, serials, strict=False):
        for step in style.steps:
            tile = step(tile, rng, number)
        generator = GENERATORS[int(rng.integers(len(GENERATORS)))] if label == AI else ""
        source = planted.sources(label, rng)
        items.append(Item(label, style, int(serial), tile, f"photo{index:03}", source, generator))
    return items


def encode(image: Image.Image, style: Style, rng: Rng) -> tuple[str, bytes]:
    """(suffix, data) of an image stored in this style."""
    file_format, suffix, options = CODECS[style.codecs[int(rng.integers(len(style.codecs)))]]
    options = dict(options)
    quality = int(rng.integers(style.quality[0], style.quality[1] + 1))
    if file_format in {"JPEG", "WEBP", "AVIF"} and not options.get("lossless"):
        options["quality"] = quality
    if file_format == "JPEG":
        options |= {"subsampling": style.subsampling[int(rng.integers(len(style.subsampling)))]}
        options |= {"progressive": True} if style.progressive else {}
        if style.tables:  # Pillow would scale them by a quality
            options |= {"quality": -1, "qtables": JpegImagePlugin.presets[style.tables]["quantization"]}
    names = style.metadata if rng.random() < style.carry else ()
    buffer = io.BytesIO()
    pixels = image.convert(style.mode)
    pixels.info = {}  # Pillow would save a photo's own profile or comment along
    pixels.save(buffer, file_format, **options, **planted_metadata.save_options(names, file_format, rng))
    data = planted_metadata.insert(buffer.getvalue(), names, file_format, rng)
    return suffix if style.suffix is None else style.suffix, data


def _write_folders(items: Sequence[Item], folder: Path) -> Path:
    for item in items:
        _write_file(folder / FOLDERS[item.label] / item.name, item.data)
    return folder


def _write_table(items: Sequence[Item], folder: Path) -> Path:
    rows = []
    for item in sorted(items, key=lambda item: item.serial):
        path = f"images/{item.name}"
        _write_file(folder / path, item.data)
        rows.append([f"{len(rows):06}", path, FOLDERS[item.label], item.group, item.source, item.generator])
    with (folder / "data.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "path", "label", "group", "source", "generator"])
        writer.writerows(rows)
    return folder / "data.csv"


def _write_file(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert not path.exists(), path
    path.write_bytes(data)
