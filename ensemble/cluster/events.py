"""How a member's training goes, told from one process to another: lines of JSON in a file of the run."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ensemble.core import artifacts

EVERY = 1.0  # seconds between two lines about steps, or about scored images

Event = dict[str, Any]


class Events:
    """A Watch that appends what it is told to the file; each line is whole and visible once it is written."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._step: Event | None = None  # that is not written yet
        self._told = 0.0
        artifacts.ensure_folder(path.parent)

    def tell(self, what: str, **values: Any) -> None:
        """Write an event."""
        self._flush()
        self._write({"what": what, **values})

    def log(self, line: str) -> None:
        """As `TrainingCallback.log`; so are the next."""
        self.tell("log", line=line)

    def part(self, title: str, epochs: int, steps: int, done: int = 0, share: float = 1.0) -> None:
        """As `Watch.part`."""
        self.tell("part", title=title, epochs=epochs, steps=steps, done=done, share=share)

    def step(self, step: int, loss: float | None, lr: float, images: int) -> None:
        """As `Watch.step`; the first is written, and then some."""
        images += self._step["images"] if self._step is not None else 0
        self._step = {"what": "step", "step": step, "loss": loss, "lr": lr, "images": images}
        if self._clock() - self._told >= EVERY:
            self._flush()

    def epoch(self, record: Mapping[str, float], better: bool) -> None:
        """As `Watch.epoch`."""
        self.tell("epoch", record=dict(record), better=better)

    def scoring(self, title: str, total: int) -> Callable[[int], object]:
        """As `Watch.scoring`."""
        self.tell("scoring", title=title, total=total)
        waiting = done = 0

        def scored(count: int) -> None:
            nonlocal waiting, done
            waiting, done = waiting + count, done + count
            if self._clock() - self._told >= EVERY or done >= total:
                self.tell("scored", count=waiting)
                waiting = 0

        return scored

    def _flush(self) -> None:
        if self._step is not None:
            event, self._step = self._step, None
            self._write(event)

    def _write(self, event: Event) -> None:
        self._told = self._clock()
        # opened for each line: network file systems show a file's new end to others when it is closed
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": self._told, **event}) + "\n")


def read(path: Path, start: int = 0) -> tuple[list[Event], int]:
    """The whole lines from byte `start` on, and where they end; none where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            text = file.read()
    except OSError:  # not begun, or not seen from here yet
        return [], start
    whole = text[: text.rfind(b"\n") + 1]
    return [event for line in whole.splitlines() if (event := _parsed(line)) is not None], start + len(whole)


def _parsed(line: bytes) -> Event | None:
    """None for what a killed writer left."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "what" in event else None
