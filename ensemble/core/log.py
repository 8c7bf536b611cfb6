"""The type of a log function: a callback that takes one line of text for the user, such as `click.echo` or `print`."""

from collections.abc import Callable

Log = Callable[[str], object]
