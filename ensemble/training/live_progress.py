"""The live view of training: a row a member and the time left; plain lines without a terminal."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from ensemble.core import eta
from ensemble.core.log import Log
from ensemble.training import progress as board_table
from ensemble.training.progress import Progress, Row

REFRESH = 1.0  # seconds between two drawings of the table, each some milliseconds
PLAIN = 180.0  # seconds between two lines of progress without a terminal


class LiveProgress:
    """Shows how training goes; a context manager.

    names: the members that will be trained, in order. log: where lines go without a terminal.
    rates: expected seconds of a member, where known. several: members are worked on at once, on a
    cluster: `turn` says whose the next calls are, and lines carry names. Nothing is drawn by a thread, so what is
    shown is as old as the last call. While it is entered, lines must come through `LiveProgress.log`:
    click.echo would write into the table.
    """

    def __init__(
        self,
        names: Sequence[str],
        log: Log,
        rates: Mapping[str, float] | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        several: bool = False,
    ) -> None:
        self._rows = {name: Row(name, seconds=(rates or {}).get(name)) for name in names}
        self._rates = dict(rates or {})
        self._log, self._clock, self._several = log, clock, several
        # A colour that is forced (FORCE_COLOR) does not make a log file a terminal.
        self._console = console or Console(force_terminal=sys.stdout.isatty())
        self._live: Live | None = None
        self._name = ""
        self._running: dict[str, Progress] = {}
        self._known: list[float] = []  # seconds of the members that were trained, whole
        self._began = self._shown = clock()

    def __enter__(self) -> "LiveProgress":
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

    def log(self, line: str) -> None:
        """A line above the table, or a plain one."""
        if self._live is None:
            self._log(line)
        else:
            self._console.print(Text(line))

    def member(self, name: str, where: str) -> None:
        """This member is worked on from now: on a device, or a node of a cluster."""
        self._name = name
        self._running[name] = Progress(where, self._rates.get(name), f" on {where}" if self._several else "")
        self._update(name, status="running")

    def turn(self, name: str) -> None:
        """The next calls are of this member."""
        self._name = name

    def waits(self, name: str) -> None:
        """This member was worked on, and will be again."""
        self._running.pop(name, None)
        self._update(name, status="waiting")

    def part(self, title: str, epochs: int, steps: int, done: int = 0, share: float = 1.0) -> None:
        """As `Watch.part`, of the current member; so are the next."""
        if (progress := self._current) is not None:
            progress.part(title, epochs, steps, done, share)
            self._show(always=True)

    def step(self, step: int, loss: float | None, lr: float, images: int) -> None:
        """As `Watch.step`."""
        if (progress := self._current) is not None:
            progress.step(step, loss, lr, images, self._clock())
            self._show()

    def epoch(self, record: Mapping[str, float], better: bool) -> None:
        """As `Watch.epoch`."""
        progress = self._current
        lead = f"{self._name}: " if self._several else ""
        epochs = ""
        if progress is not None:
            lead, epochs = f"{lead}{progress.lead}", f"/{progress.epochs}" if progress.epochs else ""
            progress.epoch()
        numbers = ", ".join(f"{name} {record[key]:.4f}" for key, name in _told(record).items())
        self.log(f"  {lead}epoch {record['epoch']:.0f}{epochs}: {numbers}{', best' if better else ''}")
        if better and self._name and "tune_auroc" in record:
            self._update(self._name, tune=f"{record['tune_auroc']:.4f}")

    def scoring(self, title: str, total: int) -> Callable[[int], object]:
        """As `Watch.scoring`."""
        progress = self._current
        if progress is not None:
            progress.scoring(title, total, self._clock())
            self._show(always=True)

        def scored(count: int) -> None:
            if progress is not None:
                progress.scored(count)
                self._show()

        return scored

    def finished(self, name: str, status: str, score: str = "", seconds: float = 0.0, error: str = "") -> None:
        """Nothing more comes of this member: "trained", "unchanged" or "failed"; score: its held-out AUROC."""
        progress = self._running.pop(name, None)
        if status == "trained":
            whole = progress.whole(self._clock()) if progress is not None and progress.resumed else None
            self._known.append(whole or seconds)
        if name == self._name:
            self._name = ""
        self._update(name, status=status, heldout=score, error=error, seconds=seconds or None)

    @property
    def _current(self) -> Progress | None:
        return self._running.get(self._name)

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
            for name, progress in self._running.items():
                self.log(f"  {name}: {progress.line(now)}; {self._footer(now)}")

    def _draw(self) -> RenderableType:
        now = self._clock()
        left = {name: progress.left(now) for name, progress in self._running.items()}
        rows = [replace(row, seconds=left[row.name]) if row.name in left else row for row in self._rows.values()]
        running = {name: progress.running(now) for name, progress in self._running.items()}
        size = self._console.size
        return board_table.draw(rows, running, self._footer(now), (size.width, size.height))

    def _footer(self, now: float) -> str:
        waiting = [row.name for row in self._rows.values() if row.status == "waiting"]
        ended = len(self._rows) - len(waiting) - len(self._running)
        running = [progress.left(now) for progress in self._running.values()]
        whole = [seconds for progress in self._running.values() if (seconds := progress.whole(now))]
        known = [*self._known, *self._rates.values(), *whole]
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
