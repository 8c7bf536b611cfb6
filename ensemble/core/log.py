"""The type of a log function: a callback that takes one line of text for the user, such as `click.echo` or `print`."""

from collections.abc import Callable

Log = Callable[[str], object]


def no_log(line: str) -> None:
    """A log function that drops the line."""
