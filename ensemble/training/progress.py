"""How far one member's training is, from what the training tells: what is done, how fast, and the time left.

How the board looks on a terminal: a table of the members and a line for the whole.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

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


WINDOW = 30  # steps that images per second are taken over


class TrainingCallback(Protocol):
    """Whom training tells how it goes: a Board, or what carries it to one elsewhere."""

    def log(self, line: str) -> None:
        """A line for the user."""

    def part(self, title: str, epochs: int, steps: int, done: int = 0, share: float = 1.0) -> None:
        """A fit begins: `title` "", "fold 2/5" or "refit".

        steps: of the whole fit, `done` of them by an earlier run. share: in (0, 1], of the member's
        work. A part that an earlier run finished is told too, with done = steps. One that begins again,
        with a smaller batch, is told again under its title.
        """

    def step(self, step: int, loss: float | None, lr: float, images: int) -> None:
        """An optimizer step is done, the `step`th of its part, on so many images."""

    def epoch(self, record: Mapping[str, float], better: bool) -> None:
        """The numbers of an epoch, those it has; `better`: the best of its part so far."""

    def scoring(self, title: str, total: int) -> Callable[[int], object]:
        """Rows of `title`, "tune" or "held-out", are scored: call the function with the count of each batch."""


@dataclass(frozen=True)
class _Fit:
    """A part of a member's work: a fit of `steps`."""

    title: str
    epochs: int
    steps: int
    share: float
    before: float  # share of the member's work that earlier parts were
    resumed: bool  # an earlier run did some of this member
    step: int
    first: int | None = None  # the step this process began after; the one before it warmed up
    started: float = 0.0  # when it began
    loss: float | None = None
    lr: float = 0.0
    speed: float | None = None  # images per second, of training alone

    @property
    def text(self) -> str:
        epoch = min(self.step * self.epochs // max(self.steps, 1) + 1, self.epochs)
        return f"{_lead(self.title)}epoch {epoch}/{self.epochs}"


@dataclass(frozen=True)
class _Scoring:
    """Images that go through the member once, without training."""

    title: str
    total: int
    started: float
    count: int = 0

    def left(self, now: float) -> float:
        pace = eta.pace(self.count, now - self.started)
        return 0.0 if pace is None else pace * max(self.total - self.count, 0)


class Progress:
    """One member that is worked on at `where`; times are in seconds of any clock.

    expected: seconds of the whole member, where known.
    """

    def __init__(self, where: str, expected: float | None = None, at: str = "") -> None:
        self._where, self._expected, self._at = where, expected, at
        self._fit: _Fit | None = None
        self._scoring: _Scoring | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    @property
    def resumed(self) -> bool:
        """Whether an earlier run did some of this member."""
        return self._fit is not None and self._fit.resumed

    @property
    def lead(self) -> str:
        """What lines of the current part begin with."""
        return _lead(self._fit.title) if self._fit else ""

    @property
    def epochs(self) -> int | None:
        """Of the current part."""
        return self._fit.epochs if self._fit else None

    def part(self, title: str, epochs: int, steps: int, done: int, share: float) -> None:
        """As `Watch.part`."""
        last, before, resumed = self._fit, 0.0, done > 0
        if last is not None:
            before = last.before if last.title == title else last.before + last.share
            resumed = resumed or last.resumed
        self._fit, self._scoring = _Fit(title, epochs, steps, share, before, resumed, done), None
        self._recent.clear()

    def step(self, step: int, loss: float | None, lr: float, images: int, now: float) -> None:
        """As `Watch.step`."""
        if self._fit is None:
            return
        first = {"first": step, "started": now} if self._fit.first is None else {}
        known = self._fit.loss if loss is None else loss
        self._recent.append((now, images))
        speed = _images_per_second(self._recent) or self._fit.speed
        self._fit = replace(self._fit, step=step, loss=known, lr=lr, speed=speed, **first)  # type: ignore[arg-type]
        self._scoring = None

    def epoch(self) -> None:
        """An epoch ended."""
        self._scoring = None
        self._recent.clear()

    def scoring(self, title: str, total: int, now: float) -> None:
        """Rows of `title`, "tune" or "held-out", are scored from now."""
        self._scoring = _Scoring(title, total, now)
        self._recent.clear()

    def scored(self, count: int) -> None:
        """So many more of them are."""
        if self._scoring is not None:
            self._scoring = replace(self._scoring, count=self._scoring.count + count)

    def running(self, now: float) -> Running:
        """What it is doing, for the table."""
        if self._scoring is not None:
            title = "tuning" if self._scoring.title == "tune" else self._scoring.title
            lead = _lead(self._fit.title) if self._fit else ""
            pace = eta.pace(self._scoring.count, now - self._scoring.started)
            done = self._scoring.count / max(self._scoring.total, 1)
            return Running(f"{lead}{title}{self._at}", done, 1 / pace if pace else None)
        if self._fit is None:
            return Running(f"starting on {self._where}")
        return Running(f"{self._fit.text}{self._at}", self._fit.step / max(self._fit.steps, 1), self._fit.speed)

    def line(self, now: float) -> str:
        """The same in words, with more numbers."""
        running = self.running(now)
        parts = [running.status]
        if self._scoring is not None:
            parts.append(f"{self._scoring.count}/{self._scoring.total} images")
        elif self._fit is not None:
            loss = "" if self._fit.loss is None else f", loss {self._fit.loss:.4f}"
            parts.append(f"step {self._fit.step}/{self._fit.steps}{loss}, lr {self._fit.lr:.2g}")
        if running.speed is not None:
            parts.append(speed(running.speed))
        left = self.left(now)
        return ", ".join(parts if left is None else [*parts, f"{eta.duration(left)} left"])

    @property
    def _after(self) -> _Scoring | None:
        """What is scored after a fit; None during one."""
        return None if self._scoring is None or self._scoring.title == "tune" else self._scoring

    def _pace(self, now: float) -> float | None:
        """Seconds a step, with the tuning between epochs and without what follows the last."""
        if self._fit is None or self._fit.first is None:
            return None
        until = self._after.started if self._after else now
        return eta.pace(self._fit.step - self._fit.first, until - self._fit.started)

    def left(self, now: float) -> float | None:
        """Seconds left of the member; None while nothing is known."""
        fit, pace = self._fit, self._pace(now)
        if fit is None or pace is None:
            return self._expected
        if self._after is not None:  # the fit is over, were it early
            return eta.member_left(pace, fit.steps, fit.steps, fit.share, fit.before) + self._after.left(now)
        return eta.member_left(pace, fit.step, fit.steps, fit.share, fit.before)

    def whole(self, now: float) -> float | None:
        """Seconds of the whole member, with what an earlier run did of it."""
        fit, pace = self._fit, self._pace(now)
        return None if fit is None or pace is None else eta.member_seconds(pace, fit.steps, fit.share)


def _lead(title: str) -> str:
    return f"{title}, " if title else ""


def _images_per_second(steps: Sequence[tuple[float, int]]) -> float | None:
    """From (time, images) of the last steps; the first one only starts the clock."""
    if len(steps) < 2 or steps[-1][0] <= steps[0][0]:
        return None
    return sum(images for _, images in list(steps)[1:]) / (steps[-1][0] - steps[0][0])
