import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.core.errors import DataError
from ensemble.data.splits import assign_folds, chosen_epochs, fold_parts


def make(groups=40, seed=0, folds=None):
    rng = np.random.default_rng(seed)
    rows = []
    for group in range(groups):
        split = "heldout" if group % 8 == 7 else "tune" if group % 8 == 6 else "train"
        for number in range(int(rng.integers(1, 6))):
            label = int(rng.random() < 0.5) if group % 3 == 0 else group % 2
            rows.append((f"{group}-{number}", f"g{group}", label, split, ("a", "b")[group % 2]))
    frame = pd.DataFrame(rows, columns=["id", "group", "label", "split", "source"])
    frame["fold"] = pd.array([None] * len(frame), dtype="Int16")
    return frame if folds is None else frame.assign(fold=assign_folds(frame, folds, seed))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(30, 60), st.integers(0, 3))
def test_folds_cover_train_and_tune_rows_by_whole_groups(count, groups, seed):
    frame = make(groups, seed, count)
    fitted = frame["split"] != "heldout"
    assert (frame["fold"].notna() == fitted).all()
    assert set(frame.loc[fitted, "fold"]) == set(range(count))
    assert (frame[fitted].groupby("group")["fold"].nunique() == 1).all()
    assert str(frame["fold"].dtype) == "Int16"


def test_folds_are_of_about_one_size_and_the_order_of_rows_does_not_matter():
    frame = make(60)
    folds = assign_folds(frame, 5, 0)
    groups = frame.assign(fold=folds).dropna(subset="fold").groupby("fold")["group"].nunique()
    assert groups.max() - groups.min() <= 3
    shuffled = frame.sample(frac=1, random_state=0)
    pd.testing.assert_series_equal(assign_folds(shuffled, 5, 0).sort_index(), folds, check_names=False)
    assert not assign_folds(frame, 5, 1).equals(folds)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(0, 3))
def test_no_group_of_a_fold_is_trained_or_tuned_on(count, seed):
    frame = make(50, seed, count)
    seen = []
    for fold in range(count):
        train, tune, scored = fold_parts(frame, fold, seed)
        parts = [set(part["group"]) for part in (train, tune, scored)]
        assert not parts[0] & parts[1]
        assert not (parts[0] | parts[1]) & parts[2]
        assert set(train["label"]) == set(tune["label"]) == {0, 1}
        assert "heldout" not in set(pd.concat([train, tune, scored])["split"])
        assert len(train) + len(tune) + len(scored) == frame["fold"].notna().sum()
        seen += list(scored["id"])
    assert sorted(seen) == sorted(frame.loc[frame["fold"].notna(), "id"])


def test_more_folds_than_groups_are_refused_with_the_number_that_would_do():
    frame = make(16)
    groups = min(frame[(frame["split"] != "heldout") & (frame["label"] == k)]["group"].nunique() for k in (0, 1))
    with pytest.raises(DataError, match=re.escape(f"use --folds {groups} or fewer")):
        assign_folds(frame, 30, 0)
    assert assign_folds(frame, groups, 0).nunique() == groups


@pytest.mark.parametrize(("best", "epochs"), [([3], 3), ([1, 5, 3], 3), ([2, 3], 3), ([5, 5, 1, 1], 5)])
def test_the_refit_trains_as_long_as_the_folds_chose(best, epochs):
    assert chosen_epochs(best) == epochs
