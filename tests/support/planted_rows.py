"""Traps among the rows: duplicates, sources, files that are skipped or broken, for planted.py."""

import io
from collections.abc import Callable, Mapping

import numpy as np
import planted_steps as steps
from PIL import Image
from planted_set import AI, FOLDERS, REAL, Hook, Item, Kind, Planted, Rng, Step, Style

PNG = ("png",)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(400)
ERROR_PAGE = b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head><body>Forbidden</body></html>"


def _some(items: list[Item], label: int, count: int, rng: Rng) -> list[Item]:
    mine = [item for item in items if item.label == label]
    return [mine[place] for place in rng.permutation(len(mine))[:count]]


def _copied(count: int, change: Step) -> Hook:
    """So many ai images become changed copies of as many real ones; each keeps the group it had."""

    def run(items: list[Item], rng: Rng) -> None:
        for copy, original in zip(_some(items, AI, count, rng), _some(items, REAL, count, rng), strict=True):
            copy.image = change(original.image, rng, 0)

    return run


def _twinned(count: int, change: Step, roots: tuple[str, str] | None = None) -> Hook:
    """In each class so many images become changed copies of others, in another group, and root if given."""

    def run(items: list[Item], rng: Rng) -> None:
        for label in FOLDERS:
            chosen = _some(items, label, 2 * count, rng)
            for copy, original in zip(chosen[:count], chosen[count:], strict=True):
                copy.image = change(original.image, rng, 0)
                copy.group, original.group = f"upload{copy.serial}", f"upload{original.serial}"
                if roots:
                    copy.source, original.source = roots

    return run


def _same_file(count: int) -> Hook:
    def run(items: list[Item], rng: Rng) -> None:
        for copy, original in zip(_some(items, AI, count, rng), _some(items, REAL, count, rng), strict=True):
            copy.data = original.data

    return run


def _below_roots(items: list[Item], rng: Rng) -> None:
    for item in items:
        item.name = f"{item.source}/{item.name}"


DUPLICATES = Kind(
    "copies of one picture across the classes, or in groups or roots that may fall into different splits",
    [
        Planted("30 % of ai are real images recompressed", pixels=_copied(36, steps.jpeg_before(60, 60))),
        Planted(
            "20 % of ai are real images mirrored and recompressed",
            pixels=_copied(24, steps.chain(steps.mirrored, steps.jpeg_before(75, 75))),
        ),
        Planted(
            "every ai image is a real one, reduced, enlarged and noisy",
            Style(PNG),
            Style(PNG),
            pixels=_copied(120, steps.chain(steps.enlarged(2, Image.Resampling.BICUBIC), steps.noisy(2))),
        ),
        Planted(
            "10 % of ai have the pixels of a real image, in lossless files",
            Style(("png", "webp-lossless")),
            Style(("png", "webp-lossless")),
            pixels=_copied(12, steps.brighter(1)),
        ),
        Planted("6 files lie in both classes", stored=_same_file(6)),
        Planted(
            "the user's groups part 18 recompressed pairs of each class",
            pixels=_twinned(18, steps.jpeg_before(70, 70)),
            table=True,
        ),
        Planted(
            "two roots share 20 images of each class, in one at half the size",
            Style(("webp",)),
            Style(("webp",)),
            pixels=_twinned(20, steps.halved, ("thumbs", "full")),
            stored=_below_roots,
            sources=lambda label, rng: ("thumbs", "full")[int(rng.integers(2))],
            table=True,
        ),
        Planted("25 % of ai are real images trimmed by up to 4 % an edge", pixels=_copied(30, steps.trimmed)),
        Planted("15 % of ai are real images turned by 90, 180 or 270 degrees", pixels=_copied(18, steps.turned)),
        Planted(
            "15 % of ai are real images mirrored, trimmed and brighter, in other groups",
            Style(PNG),
            Style(PNG),
            pixels=_copied(18, steps.chain(steps.mirrored, steps.trimmed, steps.brighter(1.06))),
            table=True,
        ),
    ],
)


def _drawn(ai: Mapping[str, float], real: Mapping[str, float]) -> Callable[[int, Rng], str]:
    """Draws a source by its weight in the row's class."""

    def draw(label: int, rng: Rng) -> str:
        weights = ai if label == AI else real
        shares = np.array(list(weights.values())) / sum(weights.values())
        return str(rng.choice(list(weights), p=shares))

    return draw


def _many(count: int) -> Callable[[int, Rng], str]:
    """Sources that each lean to one class, most of them strongly."""
    lean = np.random.default_rng(0).beta(0.2, 0.2, count)
    return _drawn(
        {f"site{i:02}": float(share) for i, share in enumerate(lean)},
        {f"site{i:02}": float(1 - share) for i, share in enumerate(lean)},
    )


def _sourced(what: str, draw: Callable[[int, Rng], str], style: Style | None = None) -> Planted:
    style = style or Style()
    return Planted(what, style, style, sources=draw, table=True)


SOURCE = Kind(
    "the class is bound to the source (Cramer's V), or a source has a single class; the files are alike",
    [
        _sourced("one source a class", _drawn({"midjourney": 1}, {"flickr": 1})),
        _sourced("real of three sources, ai of another", _drawn({"sdxl": 1}, {"coco": 3, "flickr": 2, "raise": 1})),
        _sourced("85 % of a source ai, 85 % of the other real", _drawn({"a": 85, "b": 15}, {"a": 15, "b": 85})),
        _sourced(
            "a source of ai alone among mixed ones",
            _drawn({"midjourney": 1, "a": 1, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}),
            Style(("jpeg", "png")),
        ),
        _sourced("a source of real alone among mixed ones", _drawn({"a": 1, "b": 1}, {"raise": 2, "a": 1.5, "b": 1.5})),
        _sourced(
            "ten sources, each of one class",
            _drawn({f"gen{i}": 1 for i in range(5)}, {f"cam{i}": 1 for i in range(5)}),
            Style(PNG),
        ),
        _sourced("real have a source, ai have none", _drawn({"": 1}, {"flickr": 1, "coco": 1})),
        _sourced("shares of ai 0.9, 0.5, 0.1", _drawn({"a": 9, "b": 5, "c": 1}, {"a": 1, "b": 5, "c": 9})),
        _sourced("twenty sources that lean to a class", _many(20), Style(("webp",))),
        _sourced("75 % of a source ai, 75 % of the other real", _drawn({"a": 3, "b": 1}, {"a": 1, "b": 3})),
    ],
)


def _spoiled(label: int, count: int, change: Callable[[Item, Rng], None]) -> Hook:
    def run(items: list[Item], rng: Rng) -> None:
        for item in _some(items, label, count, rng):
            change(item, rng)

    return run


def _cut_off(item: Item, rng: Rng) -> None:
    item.data = item.data[: int(len(item.data) * rng.uniform(0.3, 0.8))]


def _emptied(item: Item, rng: Rng) -> None:
    item.data = b""


def _error_page(item: Item, rng: Rng) -> None:
    item.data = ERROR_PAGE


def _damaged(item: Item, rng: Rng) -> None:
    """Forty bytes overwritten past the middle, as by a bad disk."""
    middle = len(item.data) // 2
    item.data = item.data[:middle] + rng.bytes(40) + item.data[middle + 40 :]


def _without_suffix(item: Item, rng: Rng) -> None:
    item.name = item.name.rpartition(".")[0]


def _heic(item: Item, rng: Rng) -> None:
    item.data = HEIC + rng.bytes(2000)
    item.name = item.name.rpartition(".")[0] + ".heic"


def _jpeg_2000(item: Item, rng: Rng) -> None:
    item.data = _saved(item.image, "JPEG2000")
    item.name = item.name.rpartition(".")[0] + ".jp2"


def _floating(item: Item, rng: Rng) -> None:
    item.data = _saved(item.image.convert("F"), "TIFF")


def _saved(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


UNREADABLE = Kind(
    "files of one class that are skipped or cannot be read, counted by class (and by suffix where they are skipped)",
    [
        Planted("20 % of ai cut off, JPEG", stored=_spoiled(AI, 24, _cut_off)),
        Planted("15 % of real empty", stored=_spoiled(REAL, 18, _emptied)),
        Planted("35 % of real are JPEG 2000", counts=(120, 160), stored=_spoiled(REAL, 56, _jpeg_2000)),
        Planted("30 % of ai are HEIC", counts=(160, 120), stored=_spoiled(AI, 48, _heic)),
        Planted("10 % of real are web pages named .jpg", stored=_spoiled(REAL, 12, _error_page)),
        Planted(
            "10 % of ai damaged inside, PNG, as a CSV",
            Style(PNG),
            Style(PNG),
            stored=_spoiled(AI, 12, _damaged),
            table=True,
        ),
        Planted("40 % of ai have no suffix", counts=(160, 120), stored=_spoiled(AI, 64, _without_suffix)),
        Planted("10 % of ai cut off, PNG", Style(PNG), Style(PNG), stored=_spoiled(AI, 12, _cut_off)),
        Planted(
            "12 of real are floating-point TIFF",
            Style(("tiff",)),
            Style(("tiff",)),
            stored=_spoiled(REAL, 12, _floating),
        ),
        Planted("6 of ai cut off, WebP", Style(("webp",)), Style(("webp",)), stored=_spoiled(AI, 6, _cut_off)),
    ],
)
