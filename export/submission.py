"""Check a submission against the competition's sample before it is uploaded."""

from pathlib import Path

import pandas as pd

from ensemble.errors import DataError, some
from ensemble.sources import read_table


def check_submission(submission: Path, sample: Path) -> int:
    """Compare a submission CSV with sample_submission.csv; returns the number of rows.

    Raises DataError for other columns, other ids, another order, or a target that is
    empty, not a number, or outside [0, 1].
    """
    ours, theirs = read_table(submission), read_table(sample)
    if list(ours.columns) != list(theirs.columns):
        raise DataError(f"{submission} has columns {', '.join(ours.columns)}, the sample {', '.join(theirs.columns)}")
    if not {"id", "target"} <= set(theirs.columns):
        raise DataError(f"{sample} needs the columns id and target; it has: {', '.join(theirs.columns)}")
    if list(ours["id"]) != list(theirs["id"]):
        differing = set(ours["id"]) ^ set(theirs["id"])
        same = "the same ids stand in another order, or some more than once"
        what = f"ids differ: {some(sorted(differing))}" if differing else same
        raise DataError(f"{submission} does not match {sample}: {what}")
    target = pd.to_numeric(ours["target"], errors="coerce")
    bad = ours.loc[~target.between(0, 1), "id"]
    if len(bad):
        raise DataError(f"{submission}: target is empty or outside [0, 1] for {len(bad)} ids: {some(bad)}")
    return len(ours)
