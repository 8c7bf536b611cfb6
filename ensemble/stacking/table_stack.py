"""A stack of anybody's scores: fitted on a table of members' scores and labels, applied to another table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import DataError
from ensemble.stacking.score_table import PROBABILITY, describe_answers, labelled_scores, read_score_table
from ensemble.stacking.stacker import Stacker, read_stacker_values

if TYPE_CHECKING:
    from ensemble.stacking.stack import StackOptions, StackResult


@dataclass(frozen=True)
class AppliedStack:
    """What `apply_to_table` wrote: rows, rows without a target since no member gave an answer, targets at or above the
    threshold, and lines on members that gave no answer.
    """

    rows: int
    empty: int
    called_ai: int
    threshold: float
    notes: tuple[str, ...]


def fit_table(
    table: Path, output: Path, members: Sequence[str], inputs: str, options: "StackOptions", needed: Sequence[str] = ()
) -> tuple["StackResult", pd.DataFrame, list[str]]:
    """Fit a stacker on a table of scores with labels, score it by cross-validation over groups, and write stacker.json.

    inputs: what the table holds, `probability` or `logit`. needed: columns of DESCRIBING that must be there. Also
    returns the table's describing columns, a row for each row of the result's data, and lines on how it was read. Needs
    scikit-learn.
    """
    from ensemble.stacking.logit_table import cross_validated
    from ensemble.stacking.stack import fit_and_score, stacker_record

    refuse_overwriting(output, table)
    scores = read_score_table(table, members, inputs)
    for column in needed:
        if column not in scores.described:
            raise DataError(f"--leave-out {column}: {table} has no column {column}")
    rows, described, notes = labelled_scores(scores, table)
    done = fit_and_score(cross_validated(rows, described["id"].tolist()), options)
    done = replace(done, stacker=replace(done.stacker, inputs=inputs))
    record = stacker_record(done, options, {"table": table.name, "sha256": artifacts.file_sha256(table)})
    artifacts.write_json(output, {**record, "rows": {**record["rows"], "split": "table"}})
    return done, described, notes


def apply_to_table(table: Path, stacker_path: Path, output: Path, logits: bool = False) -> AppliedStack:
    """Write `id,target` of a table by a stacker.json; the target of a row without any score is empty.

    A member without an answer counts as its mean calibrated probability on the rows that the stacker was fitted on.
    logits: the table holds logits; else the kind of numbers that the stacker was fitted on. DataError for a member
    whose column is not there. NumPy and pandas alone.
    """
    refuse_overwriting(output, table, stacker_path)
    stacker = Stacker.from_dict(read_stacker_values(stacker_path, "name a stacker.json that stack has written"))
    if logits and stacker.inputs == PROBABILITY:
        raise DataError(f"{stacker_path} was fitted on probabilities; leave out --logits")
    scores = read_score_table(table, stacker.members, stacker.inputs)
    target = stacker.target(stacker.fill_missing(scores.logits))
    frame = pd.DataFrame({"id": scores.ids, "target": target})
    with artifacts.replacing(output) as temporary:
        frame.to_csv(temporary, index=False)
    empty = int(np.isnan(target).sum())
    notes = describe_answers(scores.members, scores.logits, constant=False)
    return AppliedStack(len(frame), empty, int((target >= stacker.threshold).sum()), stacker.threshold, tuple(notes))


def refuse_overwriting(output: Path, *inputs: Path) -> None:
    """DataError if the output is one of the inputs."""
    for each in inputs:
        if output.exists() and each.exists() and output.samefile(each):
            raise DataError(f"{output} is an input and would be overwritten; choose another --output")
