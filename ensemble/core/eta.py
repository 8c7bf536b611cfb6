"""How long it still takes, from numbers alone, and how to say it."""

from collections.abc import Sequence


def pace(steps: int, seconds: float) -> float | None:
    """Seconds a step; None before there is one to go by."""
    return seconds / steps if steps > 0 and seconds > 0 else None


def member_seconds(pace: float, steps: int, share: float) -> float:
    """A whole member, if `steps` at this pace are a share in (0, 1] of its work."""
    return pace * steps / share


def member_left(pace: float, step: int, steps: int, share: float, before: float) -> float:
    """Seconds left of a member that is at `step` of this part; `before`: the share of parts that are done."""
    later = max(1 - before - share, 0)
    return pace * (steps - step) + later * member_seconds(pace, steps, share)


def run_left(running: Sequence[float | None], waiting: Sequence[float | None], known: Sequence[float]) -> float | None:
    """Seconds left of the whole run; None while nothing is known.

    running: seconds left of each member that is worked on. waiting: expected seconds of each other
    member; as many are worked on at once as now. What is None counts as the mean of `known`, whole
    members' seconds.
    """
    missing = sum(known) / len(known) if known else None
    seconds = [value for value in (missing if s is None else s for s in (*running, *waiting)) if value is not None]
    if len(seconds) < len(running) + len(waiting):
        return None
    return max(sum(seconds) / max(len(running), 1), *seconds[: len(running)], 0.0)


def duration(seconds: float) -> str:
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
