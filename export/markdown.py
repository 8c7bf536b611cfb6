"""Text of unknown origin in Markdown."""

import re
import unicodedata
from collections.abc import Sequence

SPECIAL = "\\`*_{}[]|~$@:#!"  # beyond & < >, what means something within a line of Markdown


def escaped(text: str) -> str:
    """Text of unknown origin as one line of Markdown that shows it and does nothing else."""
    line = " ".join("".join(c if not unicodedata.category(c).startswith("C") else " " for c in text).split())
    named = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
    shown = "".join(named.get(c, f"\\{c}" if c in SPECIAL else c) for c in line)
    return re.sub(r"(?i)(www)\.", r"\1\\.", shown)  # which alone would make a link


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
