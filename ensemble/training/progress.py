"""Progress of training for the user: a live table and bar on a terminal, log lines elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from ensemble.core.log import Log, format_duration

REFRESH_SECONDS = 1.0  # between two drawings of the table, each of which takes some milliseconds
LOG_SECONDS = 180.0  # between two log lines without a terminal
SPEED_STEPS = 30  # images per second are averaged over the last steps
STATUS_COLUMNS = (23, 40)  # width of the status on a terminal of 80 columns, and at most
BAR_COLUMNS = 40
OTHER_COLUMNS = 37  # width of scores and time, with the gaps
OTHER_LINES = 6  # two of the heading, the count of hidden members, the bar, the footer, the cursor
STYLES = {"trained": "green", "unchanged": "dim", "waiting": "dim", "failed": "red"}
SCORE_NAMES = {"train_loss": "train loss", "tune_auroc": "tune AUROC", "tune_log_loss": "tune log-loss"}


@dataclass(frozen=True)
class MemberRow:
    """A row of the table; the texts are empty where nothing is known."""

    name: str
    status: str = "waiting"  # or running, trained, unchanged, failed
    tune: str = ""
    heldout: str = ""
    error: str = ""
    seconds: float | None = None


@dataclass
class _Scoring:
    """Images that are scored without training; `started` in seconds of the clock."""

    title: str
    total: int
    started: float
    count: int = 0

    def speed(self, now: float) -> float | None:
        """Images per second."""
        return self.count / (now - self.started) if self.count and now > self.started else None


class MemberProgress:
    """How far one member is, and how long it still takes; `now` is in seconds of any clock.

    The work of the member is 1, and each fit is a share of it. Time is measured from the end of a fit's first step,
    which warms up. It includes the tuning between epochs.
    """

    def __init__(self, device: str = "") -> None:
        self.device = device
        self.title, self.epochs, self.steps, self.step = "", 0, 0, 0
        self.share = self.before = 0.0  # of the member's work: this fit, the earlier fits
        self.resumed = False  # an earlier run did some of the member
        self.loss: float | None = None
        self.lr = 0.0
        self.scoring: _Scoring | None = None
        self._timed_from: tuple[int, float] | None = None  # step, time
        self._recent: deque[tuple[float, int]] = deque(maxlen=SPEED_STEPS)  # time, images
        self._speed: float | None = None

    @property
    def lead(self) -> str:
        """How lines about the fit begin."""
        return f"{self.title}, " if self.title else ""

    def begin_fit(self, title: str, epochs: int, steps: int, done: int, share: float) -> None:
        """See `LiveProgress.on_fit_begin`."""
        if title != self.title:
            self.before += self.share
        self.title, self.epochs, self.steps, self.step, self.share = title, epochs, steps, done, share
        self.resumed |= done > 0
        self.loss = self._timed_from = self._speed = None
        self.end_scoring()

    def end_step(self, step: int, loss: float | None, lr: float, images: int, now: float) -> None:
        """See `LiveProgress.on_step`."""
        self.step, self.lr, self.scoring = step, lr, None
        self.loss = self.loss if loss is None else loss
        self._timed_from = self._timed_from or (step, now)
        self._recent.append((now, images))
        passed = now - self._recent[0][0]
        if passed > 0:
            self._speed = (sum(count for _, count in self._recent) - self._recent[0][1]) / passed

    def begin_scoring(self, title: str, total: int, now: float) -> _Scoring:
        """See `LiveProgress.on_scoring`."""
        self._recent.clear()
        self.scoring = _Scoring(title, total, now)
        return self.scoring

    def end_scoring(self) -> None:
        """Training goes on, or the epoch has ended."""
        self.scoring = None
        self._recent.clear()

    def status(self) -> str:
        """Such as "fold 2/5, epoch 1/3"."""
        if self.scoring is not None:
            return self.lead + ("tuning" if self.scoring.title == "tune" else self.scoring.title)
        if not self.steps:
            return f"starting on {self.device}"
        return f"{self.lead}epoch {min(self.step * self.epochs // self.steps + 1, self.epochs)}/{self.epochs}"

    def fraction(self) -> float:
        """0..1 of what `status` names."""
        part = self.scoring
        return part.count / max(part.total, 1) if part is not None else self.step / max(self.steps, 1)

    def speed(self, now: float) -> str:
        """Such as "32 images/s"; empty while it is not known."""
        images = self._speed if self.scoring is None else self.scoring.speed(now)
        return "" if images is None else f"{images:.0f} images/s" if images >= 10 else f"{images:.1f} images/s"

    def line(self, now: float) -> str:
        """A log line: status, counts, speed, time left."""
        parts = [self.status()]
        if self.scoring is not None:
            parts.append(f"{self.scoring.count}/{self.scoring.total} images")
        elif self.steps:
            loss = "" if self.loss is None else f", loss {self.loss:.4f}"
            parts.append(f"step {self.step}/{self.steps}{loss}, lr {self.lr:.2g}")
        left = self.seconds_left(now)
        parts += [self.speed(now), "" if left is None else f"{format_duration(left)} left"]
        return ", ".join(filter(None, parts))

    @property
    def _last_scoring(self) -> _Scoring | None:
        """The scoring after the fit; None during a fit and its tuning."""
        return None if self.scoring is None or self.scoring.title == "tune" else self.scoring

    def seconds_whole(self, now: float) -> float | None:
        """Of the member's fits at this speed, also those that an earlier run did; None while it is not known."""
        if self._timed_from is None:
            return None
        first, started = self._timed_from
        passed = (now if self._last_scoring is None else self._last_scoring.started) - started
        return passed * self.steps / (self.share * (self.step - first)) if passed > 0 and self.step > first else None

    def seconds_left(self, now: float) -> float | None:
        """Until the member is done; None while it is not known."""
        whole, scoring = self.seconds_whole(now), self._last_scoring
        if whole is None:
            return None
        if scoring is None:
            return max(whole * (1 - self.before - self.share * self.step / self.steps), 0.0)
        speed = scoring.speed(now)  # the fit has ended, maybe before its last epoch
        rest = max(scoring.total - scoring.count, 0) / speed if speed else 0.0
        return max(whole * (1 - self.before - self.share), 0.0) + rest


class LiveProgress:
    """Shows how the members of a run are trained, one after the other; a context manager, and the fits' callback.

    names: all members, in order. log: takes the lines where there is no terminal. Nothing is drawn by a thread, so
    what is shown is as old as the last call. While it is entered, lines must come through its `log`: others would
    be written into the table.
    """

    def __init__(
        self,
        names: Iterable[str],
        log: Log,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rows = {name: MemberRow(name) for name in names}
        self._log, self._clock = log, clock
        # A colour that is forced (FORCE_COLOR) does not make a log file a terminal.
        self._console = console or Console(force_terminal=sys.stdout.isatty())
        self._name, self._progress = "", MemberProgress()
        self._trained_seconds: list[float] = []  # of whole members
        self._began = self._shown = clock()
        self._live = Live(console=self._console, auto_refresh=False, get_renderable=self._renderable)

    def __enter__(self) -> "LiveProgress":
        if self._console.is_terminal and self._console.is_interactive:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.transient = kind is None  # results follow, unless the run was broken off
        self._live.stop()

    def log(self, line: str) -> None:
        """A line above the table, or to `log`."""
        if self._live.is_started:
            self._console.print(Text(line))
        else:
            self._log(line)

    def begin_member(self, name: str, device: str) -> None:
        """The following calls are about this member."""
        self._name, self._progress = name, MemberProgress(device)
        self._update(name, status="running")

    def end_member(self, name: str, status: str, score: str = "", seconds: float = 0.0, error: str = "") -> None:
        """The member is "trained", "unchanged" or "failed"; score: its held-out AUROC."""
        if status == "trained":
            whole = self._progress.seconds_whole(self._clock()) if self._progress.resumed else None
            self._trained_seconds.append(whole or seconds)
        self._name, self._progress = "", MemberProgress()
        self._update(name, status=status, heldout=score, error=error, seconds=seconds or None)

    def on_fit_begin(self, title: str, epochs: int, steps: int, done: int = 0, share: float = 1.0) -> None:
        """A fit begins; its title is "", "fold 2/5" or "refit".

        steps: of the whole fit; an earlier run did `done` of them. share: of the member's work, in (0, 1]. A fold
        that an earlier run finished is reported too, with done = steps. A fit that begins again, with a smaller
        batch, is reported again under the same title.
        """
        self._progress.begin_fit(title, epochs, steps, done, share)
        self._show(always=True)

    def on_step(self, step: int, loss: float | None, lr: float, images: int) -> None:
        """The optimizer step number `step` of the fit, from 1, is done; `images`: since the last call."""
        self._progress.end_step(step, loss, lr, images, self._clock())
        self._show()

    def on_epoch_end(self, record: Mapping[str, float], better: bool) -> None:
        """The numbers of an epoch; `better`: than every earlier epoch of the fit."""
        progress = self._progress
        progress.end_scoring()
        scores = {key: name for key, name in SCORE_NAMES.items() if key in record}
        if "tune_score" in record and abs(record["tune_score"]) not in [record[key] for key in scores]:
            scores["tune_score"] = "tune score"  # the recipe chooses epochs by another score
        epoch = f"{record['epoch']:.0f}" + (f"/{progress.epochs}" if progress.epochs else "")
        numbers = ", ".join(f"{name} {record[key]:.4f}" for key, name in scores.items())
        self.log(f"  {progress.lead}epoch {epoch}: {numbers}{', best' if better else ''}")
        if better and self._name and "tune_auroc" in record:
            self._update(self._name, tune=f"{record['tune_auroc']:.4f}")

    def on_scoring(self, title: str, total: int) -> Callable[[int], object]:
        """Scoring of `total` images begins, "tune" or "held-out"; call the returned function with each batch's size."""
        scoring = self._progress.begin_scoring(title, total, self._clock())
        self._show(always=True)

        def scored(count: int) -> None:
            scoring.count += count
            self._show()

        return scored

    def _update(self, name: str, **changes: Any) -> None:
        self._rows[name] = replace(self._rows.get(name, MemberRow(name)), **changes)
        self._show(always=True)

    def _show(self, always: bool = False) -> None:
        """Draw the table, or log a line, if it is time; always: draw the table now."""
        now = self._clock()
        if self._live.is_started and (always or now - self._shown >= REFRESH_SECONDS):
            self._shown = now
            self._live.refresh()
        elif not self._live.is_started and not always and self._name and now - self._shown >= LOG_SECONDS:
            self._shown = now
            run = f"; {self._footer()}" if len(self._rows) > 1 else ""
            self.log(f"  {self._name}: {self._progress.line(now)}{run}")

    def _renderable(self) -> Group:
        """The table of all members, the bar of the one that is trained, and the footer."""
        parts, progress = [self._table()], self._progress
        if progress.steps or progress.scoring:
            bar = Table.grid(Column(no_wrap=True), Column(), Column(no_wrap=True), padding=(0, 1))
            done = ProgressBar(total=1.0, completed=min(progress.fraction(), 1.0), width=BAR_COLUMNS)
            bar.add_row(Text(progress.status()), done, progress.speed(self._clock()))
            parts.append(bar)
        return Group(*parts, Text(self._footer()))

    def _table(self) -> Table:
        """As many rows as the terminal has room for, with that of the running member among them."""
        rows, size, (least, most) = list(self._rows.values()), self._console.size, STATUS_COLUMNS
        widest = max((len(row.name) for row in rows), default=0)
        name_width = max(min(widest, size.width - OTHER_COLUMNS - least), len("member"))
        status_width = min(max(size.width - OTHER_COLUMNS - name_width, least), most)
        limit = max(size.height - OTHER_LINES, 1)
        current = next((number for number, row in enumerate(rows) if row.name == self._name), 0)
        first = max(min(current - limit // 2, len(rows) - limit), 0)
        shown = rows[first : first + limit]
        hidden = f"and {len(rows) - len(shown)} more members" if len(shown) < len(rows) else None
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", caption_justify="left")
        table.add_column("member", width=name_width, no_wrap=True, overflow="ellipsis")
        table.add_column("status", width=status_width, no_wrap=True, overflow="ellipsis")
        for title in ("tune\nAUROC", "held-out\nAUROC", "time"):
            table.add_column(title, no_wrap=True)
        for row in shown:
            table.add_row(*map(Text, self._cells(row)), style=STYLES.get(row.status, "bold"))
        table.caption = hidden
        return table

    def _cells(self, row: MemberRow) -> tuple[str, str, str, str, str]:
        status, seconds = "done" if row.status == "trained" else row.status, row.seconds
        if running := row.status == "running":
            status, seconds = self._progress.status(), self._progress.seconds_left(self._clock())
        status = f"{status}: {row.error}" if row.error else status
        length = "" if seconds is None else format_duration(seconds) + (" left" if running else "")
        return row.name, status, row.tune, row.heldout, length

    def _footer(self) -> str:
        """How many members are done, the time so far, and the time left: other members take the mean time."""
        now = self._clock()
        waiting = sum(row.status == "waiting" for row in self._rows.values())
        running = sum(row.status == "running" for row in self._rows.values())
        text = f"{len(self._rows) - waiting - running} of {len(self._rows)} members, "
        text += f"{format_duration(now - self._began)} so far"
        whole, left = self._progress.seconds_whole(now), self._progress.seconds_left(now)
        known = [*self._trained_seconds, *([whole] if whole is not None else [])]
        if not known or not waiting + running:
            return text
        mean = sum(known) / len(known)
        total = waiting * mean + (mean if left is None else left) * running
        return f"{text}, about {format_duration(total)} left"
