"""Which of two class names is the positive one (`ai`) and which the negative (`real`).

What a member may be called: its name becomes a folder, a file, a column and a row.
"""

import re
from collections.abc import Mapping, Sequence
from unicodedata import normalize

from ensemble.core.errors import escape_control, join_limited

NEGATIVE, POSITIVE = "real", "ai"
LABELS = (NEGATIVE, POSITIVE)  # the index is the label: real = 0, ai = 1
POSITIVE_NAMES = frozenset({"ai", "fake", "artificial", "generated", "synthetic"})
NEGATIVE_NAMES = frozenset({"real", "human", "natural", "photo"})


def resolve_polarity(names: Sequence[str], positive: str | None = None) -> tuple[str, str]:
    """Return the two names as (negative, positive).

    `positive` settles it where the names do not speak for themselves. Raises ValueError,
    saying why, where it stays open: a guess would silently reverse every score.
    """
    unique = sorted(set(names))
    if len(unique) != 2:
        raise ValueError(f"two classes are needed, found {len(unique)}: {join_limited(unique, 9) or 'none'}")
    if positive is not None:
        matches = [name for name in unique if name.casefold() == positive.casefold()]
        if len(matches) != 1:
            raise ValueError(f"no class is called {positive!r}; the classes are {join_limited(unique)}")
        chosen = matches[0]
    else:
        positives = [name for name in unique if name.casefold() in POSITIVE_NAMES]
        negatives = [name for name in unique if name.casefold() in NEGATIVE_NAMES]
        if len(positives) != 1 or len(negatives) != 1:
            raise ValueError(f"cannot tell which of {join_limited(unique)} means AI-made; name it with --positive")
        chosen = positives[0]
    return next(name for name in unique if name != chosen), chosen


def class_labels(
    names: Sequence[str],
    classes: Mapping[str, str] | None = None,
    positive: str | None = None,
    one_will_do: bool = False,
) -> dict[str, int]:
    """The label, 1 = ai and 0 = real, of each class name.

    `classes` maps names to "ai" or "real" and may map several to one. Without it two names
    are expected, or, where `one_will_do`, a single one that speaks for itself. Raises
    ValueError, saying why, where a name's meaning stays open.
    """
    unique = sorted(set(names))
    if classes:
        known = {_folded(name): LABELS.index(label) for name, label in classes.items()}
        if open_ones := [name for name in unique if _folded(name) not in known]:
            raise ValueError(f"--classes does not say what these are: {join_limited(open_ones, 9)}")
        return {name: known[_folded(name)] for name in unique}
    if one_will_do and len(unique) == 1:
        name = unique[0]
        if name.casefold() in (positive.casefold() if positive else None, *POSITIVE_NAMES):
            return {name: 1}
        if name.casefold() in NEGATIVE_NAMES:
            return {name: 0}
        raise ValueError(
            f"cannot tell whether {escape_control(name)} is ai or real; say it with --classes "
            f"{escape_control(name)}=ai (or =real)"
        )
    negative, chosen = resolve_polarity(unique, positive)
    return {negative: 0, chosen: 1}


def parse_classes(text: str) -> dict[str, str]:
    """`Fake=ai,human=real` -> {"fake": "ai", "human": "real"}; ValueError where it is not that."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, label = (piece.strip() for piece in part.rpartition("="))
        if not equals or not name or label.casefold() not in LABELS:
            raise ValueError(f"{part!r}: write NAME=ai or NAME=real, separated by commas")
        if found.setdefault(_folded(name), label.casefold()) != label.casefold():
            raise ValueError(f"{name!r} is given as both ai and real")
    return found


def _folded(name: str) -> str:
    """Without case, and accents composed: some file systems take them apart."""
    return normalize("NFC", name.casefold())


RESERVED = {"id", "target", "mean", "stack", "label"}  # column and row names of our tables


def is_member_name(name: str) -> bool:
    """Letters, digits, - and _, beginning with a letter or digit, and no reserved word."""
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)) and name not in RESERVED
