"""What a member may be called: its name becomes a folder, a file, a column and a row."""

import re

RESERVED = {"id", "target", "mean", "stack", "label"}  # column and row names of our tables


def is_member_name(name: str) -> bool:
    """Letters, digits, - and _, beginning with a letter or digit, and no reserved word."""
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)) and name not in RESERVED
