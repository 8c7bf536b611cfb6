"""Labels, groups and member logits of images: what stackers and cascades are fitted and scored on, checked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from ensemble.core.errors import ArtifactError, join_limited
from ensemble.models import external
from ensemble.models import members as trained
from ensemble.models.external import External
from ensemble.stacking.fit import StackLogits, fit_stacker, nested_cv_logits
from ensemble.stacking.grouped_cv import NestedFold, nested_folds


@dataclass(frozen=True)
class LabelledLogits:
    """Images with known classes that the members were not fitted on.

    members: names, in the order of the columns. logits: float [N, members]. labels: int [N], 1 is
    ai and 0 is real. groups: str or int [N]; images of one group are not independent.
    """

    members: tuple[str, ...]
    logits: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    @property
    def group_count(self) -> int:
        """The number of different groups."""
        return len(np.unique(self.groups))

    def subset(self, rows: np.ndarray) -> Self:
        """The rows that a bool [N] selects."""
        return replace(self, logits=self.logits[rows], labels=self.labels[rows], groups=self.groups[rows])

    def select(self, members: Sequence[str]) -> Self:
        """The same rows with these members, in this order."""
        columns = [self.members.index(name) for name in members]
        return replace(self, members=tuple(members), logits=self.logits[:, columns])


@dataclass(frozen=True)
class StackingData:
    """The rows a stacker is fitted on, and those it is scored on.

    Without folds both are the held-out rows, scored by cross-validation over `nests`. ids and
    fitting_ids: of the scored and of the fitting rows; empty for rows that have none, such as a bundle's.
    """

    fitting: LabelledLogits
    scored: LabelledLogits
    nests: Sequence[NestedFold] = ()
    ids: Sequence[str] = ()
    fitting_ids: Sequence[str] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """Names, in the order of the columns."""
        return self.fitting.members

    @property
    def basis(self) -> str:
        """How the scored rows relate to the stacker, in words."""
        return "out of fold" if self.scored is self.fitting else "fitted on other rows"

    def select(self, members: Sequence[str]) -> "StackingData":
        """The same rows with some of the members."""
        fitting = self.fitting.select(members)
        scored = fitting if self.scored is self.fitting else self.scored.select(members)
        return replace(self, fitting=fitting, scored=scored)


def read_stacking_data(run: Path, names: Sequence[str], externals: Sequence[External] = ()) -> StackingData:
    """The run's members, then those trained elsewhere; ArtifactError for what cannot be stacked."""
    rows, logits = trained.fitting_logits(run, names)
    if set(rows["split"]) == {"heldout"}:
        columns = [external.heldout_column(member, rows["id"]) for member in externals]
        every = (*names, *(member.name for member in externals))
        table = _labelled(every, rows, np.column_stack([logits, *columns]))
        refuse_constant(table)
        return cross_validated(table, rows["id"].tolist())
    if externals:
        raise ArtifactError(
            "--external needs a run without --folds: with folds the stack is fitted on training rows, "
            "and a model trained elsewhere has no out-of-fold scores of those"
        )
    fitting, fitting_ids = _labelled(names, rows, logits), rows["id"].tolist()
    rows, logits = trained.heldout_logits(run, names)
    refuse_constant(fitting)
    _check(fitting)
    return StackingData(fitting, _labelled(names, rows, logits), (), rows["id"].tolist(), fitting_ids)


def cross_validated(rows: LabelledLogits, ids: Sequence[str] = ()) -> StackingData:
    """Rows that a stacker is fitted on and, by cross-validation, scored on; ArtifactError if they cannot be stacked."""
    _check(rows)
    return StackingData(rows, rows, nested_folds(rows.labels, rows.groups), ids, ids)


def _labelled(names: Sequence[str], rows: pd.DataFrame, logits: np.ndarray) -> LabelledLogits:
    return LabelledLogits(tuple(names), logits, rows["label"].to_numpy(), rows["group"].to_numpy(dtype=str))


def refuse_constant(rows: LabelledLogits) -> None:
    """ArtifactError naming members that give every row the same logit: their training failed."""
    constant = [name for name, column in zip(rows.members, rows.logits.T, strict=True) if column.min() == column.max()]
    if constant:
        raise ArtifactError(
            f"every held-out image has the same p by {join_limited(constant)}, which separates no ai from real; "
            "train again, or choose others with --members"
        )


def _check(rows: LabelledLogits) -> None:
    if len(rows.labels) < len(rows.members):
        raise ArtifactError(
            f"{len(rows.labels)} held-out rows are fewer than the {len(rows.members)} members to weigh; "
            "train with a larger --heldout, or choose fewer with --members"
        )


def stack_scores(data: StackingData, method: str, calibration: str) -> StackLogits:
    """Stack logits of the scored rows, by stackers of this method that were not fitted on them."""
    fitting, scored = data.fitting, data.scored
    if scored is fitting:
        return nested_cv_logits(fitting.logits, fitting.labels, fitting.groups, method, calibration, data.nests)
    stacker = fit_stacker(fitting.members, fitting.logits, fitting.labels, fitting.groups, method, calibration)
    raw = stacker.raw_logit(stacker.fill_missing(scored.logits))
    return StackLogits(raw, stacker.calibration.apply(raw))
