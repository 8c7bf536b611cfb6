"""The contact sheet selection.jpg: test images, each beside the pool images chosen for it."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ensemble.images import decode

CELL_PIXELS = 144  # longest side of an image on the sheet
GAP_PIXELS = 12
FONT_PIXELS = 15
LINE_PIXELS = 22
TEXT_COLOUR, BACKGROUND, FRAME_COLOUR = (20, 20, 20), (255, 255, 255), (200, 30, 30)


# the file and the caption of a test image, then those of each pool image chosen for it
SheetRow = Sequence[tuple[Path, str]]


def write_contact_sheet(rows: Sequence[SheetRow], path: Path) -> None:
    """Write the sheet as a JPEG: each test image framed on the left, the images chosen for it on its right."""
    columns = max([3, *map(len, rows)])  # the headings need the width of three
    header, row_height = LINE_PIXELS + 2 * GAP_PIXELS, CELL_PIXELS + LINE_PIXELS + GAP_PIXELS
    width = 2 * GAP_PIXELS + columns * (CELL_PIXELS + GAP_PIXELS)
    sheet = Image.new("RGB", (width, header + len(rows) * row_height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_PIXELS)
    pen.text((GAP_PIXELS, GAP_PIXELS), "test image", FRAME_COLOUR, font)
    pen.text((CELL_PIXELS + 3 * GAP_PIXELS, GAP_PIXELS), "what it drew from the pool (1 - cosine)", TEXT_COLOUR, font)
    for number, row in enumerate(rows):
        top = header + number * row_height
        frame = (GAP_PIXELS - 3, top - 3, GAP_PIXELS + CELL_PIXELS + 2, top + CELL_PIXELS + 2)
        pen.rectangle(frame, outline=FRAME_COLOUR, width=3)
        for column, (file, caption) in enumerate(row):
            left = GAP_PIXELS + column * (CELL_PIXELS + GAP_PIXELS) + (GAP_PIXELS if column else 0)
            fitted = ImageOps.contain(decode.decode(file).convert("RGB"), (CELL_PIXELS, CELL_PIXELS))
            sheet.paste(fitted, (left + (CELL_PIXELS - fitted.width) // 2, top + (CELL_PIXELS - fitted.height) // 2))
            pen.text((left, top + CELL_PIXELS + 4), _shorten(caption, pen, font), TEXT_COLOUR, font)
    sheet.save(path, "JPEG", quality=90)


def _shorten(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """As much of the end of a text as fits below an image; ids differ at their end."""
    text = " ".join(text.split())
    if pen.textlength(text, font) <= CELL_PIXELS:
        return text
    while pen.textlength(f"...{text}", font) > CELL_PIXELS:
        text = text[1:]
    return f"...{text}"
