"""Groups -> splits: by hash, stratified by class and source, whole generators or sources kept out."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pandas as pd

from ensemble.core.errors import DataError, some
from ensemble.core.names import LABELS

FITTED = ("train", "tune", "heldout")  # what members and stacker are made from
SPLITS = (*FITTED, "unseen")
HOLD_OUT_COLUMNS = ("generator", "source")
LEEWAY = 2.5  # standard deviations that chance may take a stratum's share from what was asked


@dataclass(frozen=True)
class Fractions:
    """Shares of the groups that go to tune and heldout; the rest is for training."""

    tune: float = 0.10
    heldout: float = 0.15

    def __post_init__(self) -> None:
        if min(self.tune, self.heldout) <= 0 or self.tune + self.heldout >= 1:
            raise DataError(
                f"--tune {self.tune} and --heldout {self.heldout}: both must be above 0 and their sum below 1"
            )


def assign_splits(frame: pd.DataFrame, fractions: Fractions, seed: int, hold_out: Sequence[str] = ()) -> list[str]:
    """The split of each row, from its label, source, generator and group.

    A group's place between 0 and 1 is the hash of [seed, group] alone: the same on any
    machine and in any order. Heldout takes the places below its share, tune those above
    that, so more images move none of those already there. Only where a stratum (groups
    with the same classes and sources) would get too few or too many of them, by LEEWAY or
    none at all where one is due, are its groups nearest the border moved.

    `hold_out` are texts like "generator=midjourney-v5" or "source=flickr30k": groups with
    such an image become unseen. Raises DataError for one that nothing matches, or if they
    take a whole class.
    """
    unseen = _unseen_groups(frame, hold_out)
    for label, name in enumerate(LABELS):
        rows = frame["group"][frame["label"] == label]
        if len(rows) and rows.isin(unseen).all():
            raise DataError(f"--hold-out {' '.join(hold_out)} leaves no {name} images to fit on; hold out less")
    strata = group_strata(frame[~frame["group"].isin(unseen)])
    split = dict.fromkeys(unseen, "unseen")
    for names in strata.values():
        split |= _split_stratum(names, fractions, seed)
    return [split[group] for group in frame["group"]]


def group_strata(frame: pd.DataFrame) -> dict[tuple[tuple[int, str], ...], list[str]]:
    """Names of groups by the (class, source) pairs that their rows have."""
    cells = zip(frame["label"], frame["source"].fillna(""), strict=True)
    kinds: dict[str, set[tuple[int, str]]] = {}
    for group, cell in zip(frame["group"], cells, strict=True):
        kinds.setdefault(group, set()).add(cell)
    strata: dict[tuple[tuple[int, str], ...], list[str]] = {}
    for group, kind in kinds.items():
        strata.setdefault(tuple(sorted(kind)), []).append(group)
    return strata


def place(group: str, seed: int) -> float:
    """A group's place in [0, 1), from the seed and its own name."""
    return int.from_bytes(sha256(json.dumps([seed, group]).encode()).digest()[:8], "big") / 2**64


def _split_stratum(names: Sequence[str], fractions: Fractions, seed: int) -> dict[str, str]:
    places = {name: place(name, seed) for name in names}
    ordered = sorted(names, key=lambda name: (places[name], name))
    values = np.array([places[name] for name in ordered])
    below = [int((values < edge).sum()) for edge in (fractions.heldout, fractions.heldout + fractions.tune)]
    spare = int(len(names) * fractions.tune >= 1)
    heldout = min(_within(below[0], len(names), fractions.heldout), len(names) - spare)
    tune = min(_within(below[1] - below[0], len(names), fractions.tune), len(names) - heldout)
    parts = ["heldout"] * heldout + ["tune"] * tune
    return dict(zip(ordered, parts + ["train"] * (len(names) - len(parts)), strict=True))


def _within(count: int, total: int, share: float) -> int:
    """`count` of `total` groups, moved to the nearest number that chance allows for this share."""
    due, spread = total * share, LEEWAY * (total * share * (1 - share)) ** 0.5
    least = max(due - spread, 1 if due >= 1 else 0)
    most = max(due + spread, 1)
    return int(np.clip(count, np.ceil(least), np.floor(most)))


def _unseen_groups(frame: pd.DataFrame, hold_out: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for text in hold_out:
        column, equals, value = text.partition("=")
        if not equals or column not in HOLD_OUT_COLUMNS:
            raise DataError(f"--hold-out {text}: write generator=NAME or source=NAME")
        rows = frame[column] == value
        if not rows.any():
            known = sorted(frame[column].dropna().unique())
            raise DataError(f"--hold-out {text}: no image has this {column}; there are: {some(known, 12) or 'none'}")
        found |= set(frame.loc[rows, "group"])
    return found
