"""How the board looks on a terminal: a table of the members and a line for the whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ensemble.core import eta

STATUS = (23, 40)  # columns of the status, on a terminal of 80 and on a wide one
OTHERS = 37  # columns of scores and time, with the gaps
BAR = 8
AROUND = 5  # lines of the heading, the count of other members, the footer, the cursor

STYLES = {"trained": "green", "unchanged": "dim", "waiting": "dim", "failed": "red"}


@dataclass(frozen=True)
class Row:
    """A member; the texts are empty where nothing is known."""

    name: str
    status: str = "waiting"  # or trained, unchanged, failed, or what is being done
    tune: str = ""
    heldout: str = ""
    error: str = ""
    seconds: float | None = None  # taken, or left while it runs, or expected while it waits


@dataclass(frozen=True)
class Running:
    """How far the member is that is worked on: `done` in 0..1 of what `status` tells."""

    status: str
    done: float | None = None
    speed: float | None = None  # images per second


def draw(rows: Sequence[Row], running: Mapping[str, Running], footer: str, size: tuple[int, int]) -> RenderableType:
    """The table on a terminal of `size` (columns, lines); running members have a bar on a second line."""
    width, height = size
    least, most = STATUS
    name_width = max(min(max((len(row.name) for row in rows), default=0), width - OTHERS - least), len("member"))
    status_width = min(max(width - OTHERS - name_width, least), most)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("member", width=name_width, no_wrap=True, overflow="ellipsis")
    table.add_column("status", width=status_width, no_wrap=True, overflow="ellipsis")
    table.add_column("tune\nAUROC", no_wrap=True)
    table.add_column("held-out\nAUROC", no_wrap=True)
    table.add_column("time", no_wrap=True)
    first = next((number for number, row in enumerate(rows) if row.name in running), 0)
    lines = [2 if row.name in running and running[row.name].done is not None else 1 for row in rows]
    shown = window(lines, first, height - AROUND)
    for row in rows[shown.start : shown.stop]:
        here = row.name in running
        table.add_row(
            Text(row.name, style="bold" if here else ""),
            _progress(running[row.name]) if here else _status(row),
            Text(row.tune),
            Text(row.heldout),
            Text(_time(row, here)),
        )
    hidden = len(rows) - len(shown)
    return Group(table, Text(f"and {hidden} more members", style="dim") if hidden else Text(), Text(footer))


def window(lines: Sequence[int], current: int, limit: int) -> range:
    """Rows, of so many lines each, that take at most `limit`; with the current one, amid them where that can be."""
    start, stop, left = current, min(current + 1, len(lines)), limit - sum(lines[current : current + 1])
    while True:
        before = start > 0 and lines[start - 1] <= left
        after = stop < len(lines) and lines[stop] <= left
        if before and (current - start < stop - current or not after):
            start -= 1
            left -= lines[start]
        elif after:
            left -= lines[stop]
            stop += 1
        else:
            return range(start, stop)


def speed(images: float) -> str:
    """Images per second, with a decimal where they are few."""
    return f"{images:.0f} images/s" if images >= 10 else f"{images:.1f} images/s"


def _status(row: Row) -> RenderableType:
    text = f"{row.status}: {row.error}" if row.error else "done" if row.status == "trained" else row.status
    return Text(text, style=STYLES.get(row.status, ""))


def _progress(running: Running) -> RenderableType:
    if running.done is None:
        return Text(running.status)
    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column()
    line.add_column(no_wrap=True)
    bar = ProgressBar(total=1.0, completed=min(running.done, 1.0), width=BAR)
    line.add_row(bar, Text("" if running.speed is None else speed(running.speed)))
    return Group(Text(running.status), line)


def _time(row: Row, here: bool) -> str:
    if row.seconds is None:
        return ""
    length = eta.duration(row.seconds)
    if here:
        return f"{length} left"
    return f"about {length}" if row.status == "waiting" else length
