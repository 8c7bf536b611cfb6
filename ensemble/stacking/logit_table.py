"""The rows and member logits that a stacker is fitted and scored on, checked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ensemble.core.errors import ArtifactError, join_limited
from ensemble.models import external, members
from ensemble.models.external import External
from ensemble.stacking.fit import Scores, fit_stacker, held_logits, out_of_fold, solve
from ensemble.stacking.grouped_cv import Nest, nested_folds


@dataclass(frozen=True)
class Part:
    """Rows (id, label, group, split) and their logits float64 [N, members]."""

    rows: pd.DataFrame
    logits: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int [N]."""
        return self.rows["label"].to_numpy()

    @property
    def groups(self) -> np.ndarray:
        """str [N]."""
        return self.rows["group"].to_numpy(dtype=str)


@dataclass(frozen=True)
class Material:
    """What a stacker is made of. Without folds both parts are the held-out rows, scored out of fold, by `nests`."""

    names: tuple[str, ...]
    fitting: Part
    scored: Part
    nests: Sequence[Nest]

    @property
    def basis(self) -> str:
        """How the scored rows stand to the stacker, in words."""
        return "out of fold" if self.scored is self.fitting else "fitted on other rows"


def read_material(run: Path, names: Sequence[str], externals: Sequence[External] = ()) -> Material:
    """The run's members, then those trained elsewhere; ArtifactError for what cannot be stacked."""
    fitting = Part(*members.fitting_logits(run, names))
    if set(fitting.rows["split"]) == {"heldout"}:
        fitting = scored = _with(fitting, externals)
    elif externals:
        raise ArtifactError(
            "--external needs a run without --folds: with folds the stack is fitted on training rows, "
            "and a model trained elsewhere has no out-of-fold scores of those"
        )
    else:
        scored = Part(*members.heldout_logits(run, names))
    names = (*names, *(member.name for member in externals))
    if scored is fitting:
        return same_rows(names, fitting)
    material = Material(names, fitting, scored, ())
    _check(material)
    return material


def same_rows(names: Sequence[str], part: Part) -> Material:
    """Rows that a stacker is both fitted on and, out of fold, scored on; ArtifactError for what cannot be stacked."""
    material = Material(tuple(names), part, part, ())
    _check(material)
    return replace(material, nests=nested_folds(part.labels, part.groups))


def _with(part: Part, externals: Sequence[External]) -> Part:
    columns = [external.heldout_column(member, part.rows["id"]) for member in externals]
    return replace(part, logits=np.column_stack([part.logits, *columns]))


def _check(material: Material) -> None:
    part = material.fitting
    constant = [
        name for name, column in zip(material.names, part.logits.T, strict=True) if column.min() == column.max()
    ]
    if constant:
        raise ArtifactError(
            f"every held-out image has the same p by {join_limited(constant)}, so nothing is told apart; "
            "train again, or choose others with --members"
        )
    if len(part.rows) < len(material.names):
        raise ArtifactError(
            f"{len(part.rows)} held-out rows are fewer than the {len(material.names)} members to weigh; "
            "train with a larger --heldout, or choose fewer with --members"
        )


def subset(material: Material, columns: Sequence[int]) -> Material:
    """The same rows with some of the members."""
    chosen = list(columns)
    fitting = replace(material.fitting, logits=material.fitting.logits[:, chosen])
    if material.scored is material.fitting:
        scored = fitting
    else:
        scored = replace(material.scored, logits=material.scored.logits[:, chosen])
    return Material(tuple(material.names[column] for column in chosen), fitting, scored, material.nests)


def stack_scores(material: Material, kind: str, calibration: str) -> Scores:
    """Stack logits of the scored rows by a stacker of this kind that has not seen them."""
    fitting, scored = material.fitting, material.scored
    if scored is fitting:
        return out_of_fold(fitting.logits, fitting.labels, fitting.groups, kind, calibration, material.nests)
    stacker = fit_stacker(material.names, fitting.logits, fitting.labels, fitting.groups, kind, calibration)
    raw = stacker.raw_logit(scored.logits)
    return Scores(raw, stacker.calibration.apply(raw))


def scores_at(material: Material, kind: str, strength: float) -> np.ndarray:
    """As `stack_scores`, float64 [N], at a penalty that is given and without calibration: a fit a fold."""
    fitting, scored = material.fitting, material.scored
    if scored is fitting:
        folds = [(nest.rows, nest.held) for nest in material.nests]
        return held_logits(kind, fitting.logits, fitting.labels, folds, strength)
    coef, intercept = solve(kind, fitting.logits, fitting.labels, strength)
    return scored.logits @ coef + intercept
