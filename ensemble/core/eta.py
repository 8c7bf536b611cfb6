"""Durations as text."""


def format_duration(seconds: float) -> str:
    """As one would say it: '40 s', '3 min', '1 h 20 min', '2 d 3 h'."""
    if round(seconds) < 60:
        return f"{round(max(seconds, 0))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return _two(minutes, 60, "h", "min")
    return _two(round(seconds / 3600), 24, "d", "h")


def _two(count: int, size: int, large: str, small: str) -> str:
    whole, rest = divmod(count, size)
    return f"{whole} {large} {rest} {small}" if rest else f"{whole} {large}"
