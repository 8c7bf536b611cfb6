"""Lines of text for the user: the type of a log function, and durations as text."""

from collections.abc import Callable

Log = Callable[[str], object]  # takes one line, as `click.echo` and `print` do


def no_log(line: str) -> None:
    """A log function that drops the line."""


def format_duration(seconds: float) -> str:
    """Seconds as text with the two largest units: '40 s', '3 min', '1 h 20 min', '2 d 3 h'."""
    minutes = round(seconds / 60)
    if round(seconds) < 60:
        return f"{round(max(seconds, 0))} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        (whole, rest), large, small = divmod(minutes, 60), "h", "min"
    else:
        (whole, rest), large, small = divmod(round(seconds / 3600), 24), "d", "h"
    return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"
