"""The live view of training: a row a member and the time left; plain lines without a terminal."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from ensemble import board_table, eta
from ensemble.board_table import Row, Running

REFRESH = 1.0  # seconds between two drawings of the table, each some milliseconds
PLAIN = 180.0  # seconds between two lines of progress without a terminal
WINDOW = 30  # steps that images per second are taken over

Say = Callable[[str], object]


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


class Board:
    """Shows how training goes; a context manager.

    names: the members that will be trained, in order. say: where lines go without a terminal.
    rates: expected seconds of a member, where known. Nothing is drawn by a thread, so what is
    shown is as old as the last call. While it is entered, lines must come through `Board.say`:
    click.echo would write into the table.
    """

    def __init__(
        self,
        names: Sequence[str],
        say: Say,
        rates: Mapping[str, float] | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rows = {name: Row(name, seconds=(rates or {}).get(name)) for name in names}
        self._rates = dict(rates or {})
        self._say, self._clock = say, clock
        # A colour that is forced (FORCE_COLOR) does not make a log file a terminal.
        self._console = console or Console(force_terminal=sys.stdout.isatty())
        self._live: Live | None = None
        self._name, self._device = "", ""
        self._fit: _Fit | None = None
        self._scoring: _Scoring | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._known: list[float] = []  # seconds of the members that were trained, whole
        self._began = self._shown = clock()

    def __enter__(self) -> "Board":
        if self._console.is_terminal and self._console.is_interactive:
            self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._draw)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.transient = kind is None  # results follow, unless the run was broken off
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """A line above the table, or a plain one."""
        if self._live is None:
            self._say(line)
        else:
            self._console.print(Text(line))

    def member(self, name: str, device: str) -> None:
        """This member is worked on from now."""
        self._name, self._device = name, device
        self._fit = self._scoring = None
        self._update(name, status="running")

    def part(self, title: str, epochs: int, steps: int, done: int = 0, share: float = 1.0) -> None:
        """A fit begins: `title` "", "fold 2/5" or "refit".

        steps: of the whole fit, `done` of them by an earlier run. share: in (0, 1], of the member's
        work. A part that an earlier run finished is told too, with done = steps. One that begins again,
        with a smaller batch, is told again under its title.
        """
        last, before, resumed = self._fit, 0.0, done > 0
        if last is not None:
            before = last.before if last.title == title else last.before + last.share
            resumed = resumed or last.resumed
        self._fit, self._scoring = _Fit(title, epochs, steps, share, before, resumed, done), None
        self._recent.clear()
        self._show(always=True)

    def step(self, step: int, loss: float | None, lr: float, images: int) -> None:
        """An optimizer step is done, the `step`th of its part, on so many images."""
        if self._fit is None:
            return
        now = self._clock()
        first = {"first": step, "started": now} if self._fit.first is None else {}
        known = self._fit.loss if loss is None else loss
        self._recent.append((now, images))
        speed = _images_per_second(self._recent) or self._fit.speed
        self._fit = replace(self._fit, step=step, loss=known, lr=lr, speed=speed, **first)  # type: ignore[arg-type]
        self._scoring = None
        self._show()

    def epoch(self, record: Mapping[str, float], better: bool) -> None:
        """The numbers of an epoch, those it has; `better`: the best of its part so far."""
        lead, epochs = (_lead(self._fit.title), f"/{self._fit.epochs}") if self._fit else ("", "")
        numbers = ", ".join(f"{name} {record[key]:.4f}" for key, name in _told(record).items())
        self.say(f"  {lead}epoch {record['epoch']:.0f}{epochs}: {numbers}{', best' if better else ''}")
        self._scoring = None
        self._recent.clear()
        if better and self._name and "tune_auroc" in record:
            self._update(self._name, tune=f"{record['tune_auroc']:.4f}")

    def scoring(self, title: str, total: int) -> Callable[[int], object]:
        """Rows of `title`, "tune" or "held-out", are scored: call the function with the count of each batch."""
        self._scoring = _Scoring(title, total, self._clock())
        self._recent.clear()
        self._show(always=True)

        def progress(count: int) -> None:
            if self._scoring is not None:
                self._scoring = replace(self._scoring, count=self._scoring.count + count)
                self._show()

        return progress

    def finished(self, name: str, status: str, score: str = "", seconds: float = 0.0, error: str = "") -> None:
        """Nothing more comes of this member: "trained", "unchanged" or "failed"; score: its held-out AUROC."""
        if status == "trained":
            resumed = self._fit is not None and self._fit.resumed and name == self._name
            self._known.append(self._whole(self._clock()) or seconds if resumed else seconds)
        if name == self._name:
            self._name, self._fit, self._scoring = "", None, None
        self._update(name, status=status, heldout=score, error=error, seconds=seconds or None)

    def _update(self, name: str, **changes: Any) -> None:
        self._rows[name] = replace(self._rows.get(name, Row(name)), **changes)
        self._show(always=True)

    def _show(self, always: bool = False) -> None:
        """Draw the table, or say a line, if it is time; `always`: draw it now."""
        now = self._clock()
        if self._live is not None and (always or now - self._shown >= REFRESH):
            self._shown = now
            self._live.refresh()
        elif self._live is None and not always and now - self._shown >= PLAIN:
            self._shown = now
            self.say(f"  {self._name}: {self._line(now)}; {self._footer(now)}")

    def _draw(self) -> RenderableType:
        now = self._clock()
        rows = [replace(row, seconds=self._left(now)) if row.name == self._name else row for row in self._rows.values()]
        size = self._console.size
        return board_table.draw(rows, self._name, self._running(now), self._footer(now), (size.width, size.height))

    def _running(self, now: float) -> Running:
        if self._scoring is not None:
            title = "tuning" if self._scoring.title == "tune" else self._scoring.title
            lead = _lead(self._fit.title) if self._fit else ""
            pace = eta.pace(self._scoring.count, now - self._scoring.started)
            done = self._scoring.count / max(self._scoring.total, 1)
            return Running(f"{lead}{title}", done, 1 / pace if pace else None)
        if self._fit is None:
            return Running(f"starting on {self._device}")
        return Running(self._fit.text, self._fit.step / max(self._fit.steps, 1), self._fit.speed)

    def _line(self, now: float) -> str:
        running = self._running(now)
        parts = [running.status]
        if self._scoring is not None:
            parts.append(f"{self._scoring.count}/{self._scoring.total} images")
        elif self._fit is not None:
            loss = "" if self._fit.loss is None else f", loss {self._fit.loss:.4f}"
            parts.append(f"step {self._fit.step}/{self._fit.steps}{loss}, lr {self._fit.lr:.2g}")
        if running.speed is not None:
            parts.append(board_table.speed(running.speed))
        left = self._left(now)
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

    def _left(self, now: float) -> float | None:
        """Seconds left of the member that is worked on."""
        fit, pace = self._fit, self._pace(now)
        if fit is None or pace is None:
            return self._rates.get(self._name)
        if self._after is not None:  # the fit is over, were it early
            return eta.member_left(pace, fit.steps, fit.steps, fit.share, fit.before) + self._after.left(now)
        return eta.member_left(pace, fit.step, fit.steps, fit.share, fit.before)

    def _whole(self, now: float) -> float | None:
        """Seconds of the member that is worked on, with what an earlier run did of it."""
        fit, pace = self._fit, self._pace(now)
        return None if fit is None or pace is None else eta.member_seconds(pace, fit.steps, fit.share)

    def _footer(self, now: float) -> str:
        waiting = [row.name for row in self._rows.values() if row.status == "waiting"]
        ended = len(self._rows) - len(waiting) - bool(self._name)
        running = self._left(now) if self._name else 0.0
        whole = self._whole(now)
        known = [*self._known, *self._rates.values(), *([whole] if whole else [])]
        left = eta.run_left(running, [self._rates.get(name) for name in waiting], known)
        text = f"{ended} of {len(self._rows)} members, {eta.duration(now - self._began)} so far"
        return text if left is None or ended == len(self._rows) else f"{text}, about {eta.duration(left)} left"


def _told(record: Mapping[str, float]) -> dict[str, str]:
    """Keys of an epoch's record that are told, and their names; the tune score if it is none of the others."""
    names = {"train_loss": "train loss", "tune_auroc": "tune AUROC", "tune_log_loss": "tune log-loss"}
    told = {key: name for key, name in names.items() if key in record}
    if "tune_score" in record and abs(record["tune_score"]) not in [record[key] for key in told]:
        told["tune_score"] = "tune score"
    return told


def _lead(title: str) -> str:
    return f"{title}, " if title else ""


def _images_per_second(steps: Sequence[tuple[float, int]]) -> float | None:
    """From (time, images) of the last steps; the first one only starts the clock."""
    if len(steps) < 2 or steps[-1][0] <= steps[0][0]:
        return None
    return sum(images for _, images in list(steps)[1:]) / (steps[-1][0] - steps[0][0])
