"""The errors a user can cause, each one line that says what to do.

ManyeyesError            anything below; cli.py prints it as one line and exits with 2
├── RecipeError          a recipe file or a --set override
├── DataError            image folders, CSV files, labels, groups, splits
│   └── ImageError       one file cannot be turned into pixels
├── BackboneError        a checkpoint, an architecture or its weights
│   └── HubError         the Hugging Face Hub refuses, lacks it or cannot be reached
├── ArtifactError        a run or bundle: missing, incomplete, stale or damaged
├── TrainingError        training a member cannot go on
└── UnavailableError     a device, provider or package that was asked for is not here
"""

from collections.abc import Iterable
from dataclasses import dataclass, field


class ManyeyesError(Exception):
    """Base of every error meant for the user; the message is one line."""


class RecipeError(ManyeyesError):
    """A recipe, or an override of one, is wrong."""


class DataError(ManyeyesError):
    """The data cannot be used as given."""


class ImageError(DataError):
    """One file cannot be turned into pixels; the message names the file."""


class BackboneError(ManyeyesError):
    """A checkpoint cannot be found, reached or loaded exactly."""


class HubError(BackboneError):
    """The Hugging Face Hub refuses what was asked, does not have it, or cannot be reached."""


class ArtifactError(ManyeyesError):
    """A file that an earlier command wrote is missing, stale or damaged."""


class TrainingError(ManyeyesError):
    """Training a member cannot go on."""


class UnavailableError(ManyeyesError):
    """What was asked to run the models is not on this machine."""


def escape_control(text: str) -> str:
    """`text` with line ends and what moves a terminal's cursor escaped: names in it may be a stranger's."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def error_line(error: BaseException | str, first: bool = False) -> str:
    """An error's text as one line, control characters escaped; the name of its class if it has no text.

    first: the first line that is not blank, whole; other lines are often a traceback or general advice.
    Otherwise all lines are joined, and cut to 300 characters.
    """
    named = "no reason given" if isinstance(error, str) else type(error).__name__
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = " ".join(" ".join(lines[:1] if first else lines).split())
    return escape_control(text if first else text[:300]).rstrip(".") or named


@dataclass
class LimitedList:
    """The first few of many things, for a message, and how many there are: 'a, b and 3 more'."""

    limit: int = 5
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, item: object) -> None:
        """Count one more; its text is kept if it is among the first."""
        self.count += 1
        if len(self.first) < self.limit:
            self.first.append(escape_control(str(item)))

    def __str__(self) -> str:
        listed = ", ".join(self.first)
        return f"{listed} and {self.count - self.limit} more" if self.count > self.limit else listed


def join_limited(items: Iterable[object], limit: int = 5) -> str:
    """Join the first `limit` items with commas and count the rest: 'a, b and 3 more'."""
    sample = LimitedList(limit)
    for item in items:
        sample.add(item)
    return str(sample)
