"""Which of two class names is the positive one (`ai`) and which the negative (`real`)."""

from collections.abc import Sequence

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
        raise ValueError(f"two classes are needed, found {len(unique)}: {', '.join(unique) or 'none'}")
    if positive is not None:
        matches = [name for name in unique if name.casefold() == positive.casefold()]
        if len(matches) != 1:
            raise ValueError(f"no class is called {positive!r}; the classes are {', '.join(unique)}")
        chosen = matches[0]
    else:
        positives = [name for name in unique if name.casefold() in POSITIVE_NAMES]
        negatives = [name for name in unique if name.casefold() in NEGATIVE_NAMES]
        if len(positives) != 1 or len(negatives) != 1:
            raise ValueError(f"cannot tell which of {', '.join(unique)} means AI-made; name it with --positive")
        chosen = positives[0]
    return next(name for name in unique if name != chosen), chosen
