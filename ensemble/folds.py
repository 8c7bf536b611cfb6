"""Folds for out-of-fold logits: every train and tune row is scored by weights that never saw its group."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from ensemble.core.errors import DataError
from ensemble.core.names import LABELS
from ensemble.members import FITTED_SPLITS
from ensemble.splits import group_strata, place


def assign_folds(frame: pd.DataFrame, count: int, seed: int) -> pd.Series:
    """The fold 0..count-1 (Int16) of each train and tune row, null for all others.

    Groups stay whole. In each stratum (groups with the same classes and sources) they are
    dealt in the order of their places, each to the fold that has fewest of the stratum,
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
        for name in sorted(names, key=lambda name: (place(name, seed), name)):
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
        ordered = sorted(names, key=lambda name: (place(name, seed + 1 + fold), name))
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
    """How long the refit trains: the median of the epochs that the folds chose, the later of two middles."""
    return int(np.quantile(list(best), 0.5, method="higher"))
