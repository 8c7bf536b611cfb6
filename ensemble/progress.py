"""How far one member's training is, from what the training tells: what is done, how fast, and the time left."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ensemble import board_table
from ensemble.board_table import Running
from ensemble.core import eta

WINDOW = 30  # steps that images per second are taken over


class Watch(Protocol):
    """Whom training tells how it goes: a Board, or what carries it to one elsewhere."""

    def say(self, line: str) -> None:
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
            parts.append(board_table.speed(running.speed))
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
