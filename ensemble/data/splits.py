"""Assign groups of images to splits and to folds, both stratified by class and source.

Splits: by hash; whole generators or sources can be held out. Folds, for out-of-fold logits: every train and tune row
is scored by weights that never saw its group.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pandas as pd

from ensemble.core.errors import DataError, join_limited
from ensemble.core.names import LABELS

FITTED_SPLITS = ("train", "tune")  # rows that shaped a member: by gradients, or by choice of epoch
FITTED = ("train", "tune", "heldout")  # what members and stacker are made from
SPLITS = (*FITTED, "unseen")
HOLD_OUT_COLUMNS = ("generator", "source")
MAX_DEVIATION = 2.5  # standard deviations of a stratum's share from the requested one, by chance


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

    A group's number in [0, 1) is `unit_hash`: the same on any machine and in any order.
    Heldout takes the groups whose number is below its share, tune those next to them, so more
    images move none of those already there. Only where a stratum (groups with the same classes
    and sources) would get too few or too many, by MAX_DEVIATION or none at all where one is
    expected, its groups nearest the border are moved.

    hold_out: texts like "generator=midjourney-v5" or "source=flickr30k"; groups with such an
    image become unseen. Raises DataError for a text that nothing matches, or if a whole class
    becomes unseen.
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


def unit_hash(group: str, seed: int) -> float:
    """A number in [0, 1) for a group: the hash of the seed and its name."""
    return int.from_bytes(sha256(json.dumps([seed, group]).encode()).digest()[:8], "big") / 2**64


def _by_hash(names: Iterable[str], seed: int) -> list[str]:
    return sorted(names, key=lambda name: (unit_hash(name, seed), name))


def _split_stratum(names: Sequence[str], fractions: Fractions, seed: int) -> dict[str, str]:
    ordered = _by_hash(names, seed)
    hashes = np.array([unit_hash(name, seed) for name in ordered])
    below = [int((hashes < edge).sum()) for edge in (fractions.heldout, fractions.heldout + fractions.tune)]
    spare = int(len(names) * fractions.tune >= 1)
    heldout = min(_within(below[0], len(names), fractions.heldout), len(names) - spare)
    tune = min(_within(below[1] - below[0], len(names), fractions.tune), len(names) - heldout)
    parts = ["heldout"] * heldout + ["tune"] * tune
    return dict(zip(ordered, parts + ["train"] * (len(names) - len(parts)), strict=True))


def _within(count: int, total: int, share: float) -> int:
    """`count` of `total` groups, clipped to MAX_DEVIATION of the binomial distribution of this share."""
    expected, spread = total * share, MAX_DEVIATION * (total * share * (1 - share)) ** 0.5
    least = max(expected - spread, 1 if expected >= 1 else 0)
    most = max(expected + spread, 1)
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
            raise DataError(
                f"--hold-out {text}: no image has this {column}; there are: {join_limited(known, 12) or 'none'}"
            )
        found |= set(frame.loc[rows, "group"])
    return found


def assign_folds(frame: pd.DataFrame, count: int, seed: int) -> pd.Series:
    """The fold 0..count-1 (Int16) of each train and tune row, null for all others.

    Groups stay whole. In each stratum (groups with the same classes and sources) they are
    dealt in the order of their hashes, each to the fold that has fewest of the stratum,
    then fewest images. Raises DataError where groups are too few, of a class or in some fold.
    """
    fitted = frame[frame["split"].isin(FITTED_SPLITS)]
    groups, name = min((fitted.loc[fitted["label"] == k, "group"].nunique(), name) for k, name in enumerate(LABELS))
    if groups < count:
        remedy = f"use --folds {groups} or fewer" if groups > 2 else "leave --folds out"
        raise DataError(
            f"--folds {count}: there are only {groups} groups with {name} images to train on; {remedy}, or add images"
        )
    sizes = fitted["group"].value_counts().to_dict()
    images = np.zeros(count, dtype=np.int64)
    fold: dict[str, int] = {}
    for _, names in sorted(group_strata(fitted).items()):
        dealt = np.zeros(count, dtype=np.int64)
        for name in _by_hash(names, seed):
            chosen = min(range(count), key=lambda k: (dealt[k], images[k], k))
            fold[name] = chosen
            dealt[chosen] += 1
            images[chosen] += sizes[name]
    values = frame["group"].map(fold).where(frame["split"].isin(FITTED_SPLITS))
    folded = frame.assign(fold=values.astype("Int16"))
    for number in range(count):
        fold_parts(folded, number, seed)
    return folded["fold"]


def fold_parts(frame: pd.DataFrame, fold: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(train, tune, scored) rows of one fold.

    The fold's tune part is cut anew from the rows that it trains on, with about the share
    of groups that the run's own tune split has, so that the epoch is chosen without the
    scored rows too.
    """
    fitted = frame[frame["fold"].notna()]
    scored = fitted[fitted["fold"] == fold]
    rest = fitted[fitted["fold"] != fold]
    share = fitted.loc[fitted["split"] == "tune", "group"].nunique() / fitted["group"].nunique()
    tune: set[str] = set()
    for _, names in sorted(group_strata(rest).items()):
        ordered = _by_hash(names, seed + 1 + fold)
        tune |= set(ordered[: min(max(round(share * len(ordered)), 1), len(ordered) - 1)])
    held = rest["group"].isin(tune)
    for part, name in ((rest[held], "tune"), (rest[~held], "train")):
        if set(part["label"]) != {0, 1}:
            raise DataError(
                f"fold {fold + 1} has too few groups to {name} on both classes; "
                "use another number of --folds, leave it out, or add images"
            )
    return rest[~held], rest[held], scored


def chosen_epochs(best: Iterable[int]) -> int:
    """Epochs of the refit: the median of the folds' best epochs, the higher of the two middle ones."""
    return int(np.quantile(list(best), 0.5, method="higher"))
