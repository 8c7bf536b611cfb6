"""One image and its members' heat maps, as a picture. Needs matplotlib."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ensemble.core import artifacts

COLUMNS = 4
PANEL = 3.2  # width of a picture, in inches
LETTERS = 44  # of a name, so many fit above its picture
INK, QUIET = "#333333", "#777777"


@dataclass(frozen=True)
class Panel:
    """A picture, what stands above it in strong letters, and the line below that."""

    picture: Image.Image
    name: str
    line: str


def write_picture(panels: Sequence[Panel], title: str, note: str, path: Path) -> None:
    """Write pictures of one size side by side as a PNG; no text is read as mathematics."""
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    first = panels[0].picture
    tall = PANEL * min(max(first.height / first.width, 0.3), 2.0)
    size = (columns * PANEL + 0.4, rows * (tall + 0.55) + 1.0)
    figure = Figure(figsize=size, dpi=120)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    figure.subplots_adjust(
        left=0.2 / size[0],
        right=1 - 0.2 / size[0],
        bottom=0.4 / size[1],
        top=1 - 1.0 / size[1],
        hspace=0.55 / tall,
        wspace=0.05,
    )
    for place in axes:
        place.set_axis_off()
    for place, panel in zip(axes, panels, strict=False):
        _draw(place, panel)
    places: dict[str, Any] = {"x": 0.2 / size[0], "parse_math": False}
    figure.text(y=1 - 0.3 / size[1], s=drawable(title, 30 * columns), color=INK, fontsize=12, va="center", **places)
    figure.text(y=0.2 / size[1], s=drawable(note, 60 * columns), color=QUIET, fontsize=8, va="center", **places)
    with artifacts.replacing(path) as temporary:
        canvas.print_png(temporary, metadata={"Software": None})


def drawable(text: str, longest: int = LETTERS) -> str:
    """A text on one line, of letters that the font has, its beginning left out where it is too long."""
    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    shown = "".join(letter if ord(letter) in known and letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= longest else f"...{shown[3 - longest :]}"


def _draw(axes: Axes, panel: Panel) -> None:
    axes.imshow(panel.picture)
    for text, points, weight in ((drawable(panel.name), 17, "bold"), (panel.line, 4, "normal")):
        axes.annotate(
            text,
            (0, 1),
            (0, points),
            xycoords="axes fraction",
            textcoords="offset points",
            color=INK,
            fontsize=8,
            weight=weight,
            parse_math=False,
        )
