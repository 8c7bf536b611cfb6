"""Text of unknown origin as Markdown."""

import re
import unicodedata
from collections.abc import Sequence

SPECIAL_CHARACTERS = "\\`*_{}[]|~$@:#!"  # of inline Markdown, besides & < >


def escape(text: str) -> str:
    """Text as one line of Markdown that renders as plain text: no markup, HTML or links."""
    line = " ".join("".join(c if not unicodedata.category(c).startswith("C") else " " for c in text).split())
    entities = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
    escaped = "".join(entities.get(c, f"\\{c}" if c in SPECIAL_CHARACTERS else c) for c in line)
    return re.sub(r"(?i)(www)\.", r"\1\\.", escaped)  # "www." alone makes a link


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
