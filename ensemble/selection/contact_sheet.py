"""A sheet of test images, each beside the pool images that it drew."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ensemble.images import decode

CELL = 144  # side of an image, in pixels
GAP = 12
TEXT = 15  # height of the letters, in pixels
LINE = 22
INK, PAPER, FRAME = (20, 20, 20), (255, 255, 255), (200, 30, 30)


@dataclass(frozen=True)
class Row:
    """A test image, its name, and the (file, caption) of each image that it drew."""

    file: Path
    name: str
    drawn: Sequence[tuple[Path, str]]


def write_picture(rows: Sequence[Row], path: Path) -> None:
    """Write the sheet as a JPEG: the test image framed on the left, what it drew on its right."""
    columns = max([3, *(1 + len(row.drawn) for row in rows)])  # the headings are as wide as three
    height = CELL + LINE + GAP
    sheet = Image.new("RGB", (GAP + columns * (CELL + GAP) + GAP, LINE + 2 * GAP + len(rows) * height), PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT)
    pen.text((GAP, GAP), "test image", FRAME, font)
    pen.text((CELL + 3 * GAP, GAP), "what it drew from the pool (1 - cosine)", INK, font)
    for number, row in enumerate(rows):
        top = LINE + 2 * GAP + number * height
        pen.rectangle((GAP - 3, top - 3, GAP + CELL + 2, top + CELL + 2), outline=FRAME, width=3)
        _cell(sheet, pen, font, (GAP, top), row.file, row.name)
        for column, (file, caption) in enumerate(row.drawn, start=1):
            _cell(sheet, pen, font, (2 * GAP + column * (CELL + GAP), top), file, caption)
    sheet.save(path, "JPEG", quality=90)


def _cell(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    corner: tuple[int, int],
    file: Path,
    caption: str,
) -> None:
    image = decode.decode(file).convert("RGB")
    fitted = ImageOps.contain(image, (CELL, CELL))
    left, top = corner
    sheet.paste(fitted, (left + (CELL - fitted.width) // 2, top + (CELL - fitted.height) // 2))
    pen.text((left, top + CELL + 4), _fit(caption, pen, font), INK, font)


def _fit(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The end of a text, which tells ids apart, as far as it fits below an image."""
    text = " ".join(text.split())
    if pen.textlength(text, font) <= CELL:
        return text
    while pen.textlength(f"...{text}", font) > CELL:
        text = text[1:]
    return f"...{text}"
