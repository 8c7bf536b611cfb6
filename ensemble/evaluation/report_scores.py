"""The images of a report, of a run or of an evaluation, with every member's logit and the stack's."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL.Image import Image

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, DataError, join_limited
from ensemble.core.metrics import sigmoid
from ensemble.data import dataset, splits
from ensemble.evaluation.protocol import CLEAN, LOGIT_PREFIX
from ensemble.images import canonical, decode
from ensemble.models import external, members
from ensemble.stacking.leave_out import LeftOut, leave_each_out, run_parts
from ensemble.stacking.logit_table import read_stacking_data, stack_scores
from ensemble.stacking.stacker import Stacker, read_stacker_values

DESCRIBED = ["id", "root", "path", "label", "group", "source", "generator"]


@dataclass(frozen=True)
class ScoredImages:
    """Scored images.

    title, basis: which rows, and how they stand to the stack, in words. frame: the columns
    DESCRIBED, one row an image. logits: float64 [N, members]. stack: the stack's logit,
    float64 [N]; raw: the same before calibration. read: the image of a row as it was scored,
    or ImageError. cells: member logits under each degradation, if there are any. record: an
    evaluation's own account of itself. mean: the logit of the members' mean; None: the mean of their logits.
    """

    title: str
    basis: str
    frame: pd.DataFrame
    names: tuple[str, ...]
    logits: np.ndarray
    stack: np.ndarray
    raw: np.ndarray
    read: Callable[[int], Image]
    cells: pd.DataFrame | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    mean: np.ndarray | None = None

    @property
    def labels(self) -> np.ndarray:
        """int [N]: ai = 1, real = 0."""
        return self.frame["label"].to_numpy()

    @property
    def groups(self) -> np.ndarray:
        """str [N]: images of one group are not independent."""
        return self.frame["group"].to_numpy(dtype=str)

    @property
    def both_classes(self) -> bool:
        """Whether there are ai and real images, as most scores need."""
        return len(set(self.labels)) == 2

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """Logits by name: the members, their mean, the stack."""
        columns = dict(zip(self.names, self.logits.T, strict=True))
        return {**columns, "mean": self.logits.mean(axis=1) if self.mean is None else self.mean, "stack": self.stack}

    @property
    def p(self) -> dict[str, np.ndarray]:
        """P(ai) by name, of `scores`."""
        return {name: sigmoid(values) for name, values in self.scores.items()}

    def thresholds(self, threshold: float) -> dict[str, float]:
        """Where each of `scores` begins to mean ai: 0.5, and for the stack its own."""
        return {name: threshold if name == "stack" else 0.5 for name in self.scores}

    def where(self) -> str:
        """The rows in one line, for the foot of a table."""
        ai = int(self.labels.sum())
        return (
            f"{self.title}: {len(self.frame)} images ({ai} ai, {len(self.frame) - ai} real) "
            f"in {len(set(self.groups))} groups; the stack {self.basis}."
        )


def read_run_images(run: Path, stacker: Stacker) -> list[ScoredImages]:
    """The run's held-out rows and, if it kept whole generators or sources out, its unseen rows.

    Members trained elsewhere have no scores of unseen rows.
    """
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
    own, elsewhere = split_externals(run, stacker)
    data = read_stacking_data(run, own, [external.read_external(run, name) for name in elsewhere])
    record = read_stacker_values(artifacts.stacker_path(run), "run stack again")
    stack = stack_scores(data, stacker.refit_method, record.get("calibration_asked", stacker.calibration.kind))
    basis = f"is scored {data.basis}" if data.basis == "out of fold" else f"was {data.basis}"
    rows, read = _run_images(run, frame, data.ids, own[0])
    logits, title = data.scored.logits, "The run's held-out rows"
    # out of fold as the stack is: calibrated on the rows that it is scored on, the mean would look better
    mean = stack_scores(data, "mean" if stacker.member_calibrations else "logit-mean", "none").raw
    both = stack.calibrated, stack.raw
    sets = [ScoredImages(title, basis, rows, stacker.members, logits, *both, read, mean=mean)]
    if (frame["split"] == "unseen").any() and not elsewhere:
        unseen, logits = members.heldout_logits(run, stacker.members, ("unseen",))
        rows, read = _run_images(run, frame, unseen["id"].tolist(), own[0])
        title, basis = "Generators and sources never trained on", "was fitted on other rows"
        both = stacker.logit(logits), stacker.raw_logit(logits)
        mean = stacker.mean_logit(logits)
        sets.append(ScoredImages(title, basis, rows, stacker.members, logits, *both, read, mean=mean))
    return sets


def leave_out_parts(run: Path, stacker: Stacker) -> dict[str, tuple[list[LeftOut], list[str]]]:
    """By generator and by source: the run's stack refitted without each and scored on it, and parts of few images.

    A column with fewer than two parts is left out, and so are all of a stacker without a known penalty.
    """
    own, elsewhere = split_externals(run, stacker)
    data = read_stacking_data(run, own, [external.read_external(run, name) for name in elsewhere])
    strength = read_stacker_values(artifacts.stacker_path(run), "run stack again").get("strength")
    result = {}
    for column in ("generator", "source"):
        with suppress(DataError):
            parts = run_parts(run, data, column)
            result[column] = leave_each_out(data, parts, stacker.refit_method, float(strength or 1))
    return {column: lines for column, lines in result.items() if lines[0]}


def split_externals(run: Path, stacker: Stacker) -> tuple[list[str], list[str]]:
    """The stack's members that the run trained, and those that were trained elsewhere; in the stack these come last."""
    elsewhere = [name for name in stacker.members if external.is_external(run, name)]
    return [name for name in stacker.members if name not in elsewhere], elsewhere


def _run_images(
    run: Path, frame: pd.DataFrame, ids: Sequence[str], member: str
) -> tuple[pd.DataFrame, Callable[[int], Image]]:
    """DESCRIBED of a run's rows that no member was fitted on, and a reader of their images as `member` saw them."""
    scored = frame[~frame["split"].isin(splits.FITTED_SPLITS)].reset_index(drop=True)
    positions = pd.Series(scored.index, index=scored["id"])[list(ids)].to_numpy()  # canonical forms are drawn by them
    rows = scored.loc[positions, DESCRIBED].reset_index(drop=True)
    files = dataset.files(rows)
    plan = canonical.read_plan(artifacts.canonical_path(run))
    seed = members.read_info(run, member).get("seed", 0)

    def read(row: int) -> Image:
        if plan is None:
            return decode.decode(files[row])
        return canonical.read_canonical(files[row], plan, [seed, 0, int(positions[row])])

    return rows, read


def list_evaluations(run: Path) -> list[str]:
    """Names of the run's finished evaluations, the latest first."""
    marks = artifacts.evaluation_path(run, "x").parent.glob("*/evaluation.json")
    return [mark.parent.name for mark in sorted(marks, key=lambda mark: mark.stat().st_mtime, reverse=True)]


def read_evaluated_images(run: Path, name: str, stacker: Stacker) -> ScoredImages:
    """The images of an evaluation, undamaged, with their degraded logits beside them.

    The stack is the run's present one, whichever was evaluated.
    """
    if name not in (present := list_evaluations(run)):
        raise ArtifactError(
            f"no evaluation {name!r} in {run}; it has: {', '.join(present) or 'none'}; make one with evaluate"
        )
    folder = artifacts.evaluation_path(run, name)
    remedy = "run evaluate again"
    record = artifacts.read_json(folder / "evaluation.json", remedy)
    scores = artifacts.read_parquet(folder / "scores.parquet", remedy)
    wanted = [*DESCRIBED, "cell", *(LOGIT_PREFIX + member for member in stacker.members)]
    if missing := [column for column in wanted if column not in scores]:
        raise ArtifactError(
            f"evaluation {name!r} lacks {join_limited(missing)}: the stack has other members now; {remedy}"
        )
    clean = scores[scores["cell"] == CLEAN].reset_index(drop=True)
    if clean.empty:
        raise ArtifactError(f"evaluation {name!r} has no undamaged images; {remedy}")
    files = dataset.files(clean)
    logits = member_logits(clean, stacker.members)
    return ScoredImages(
        f"Evaluation {name} of {record.get('data', 'unnamed data')}",
        "was fitted on other rows",
        clean[DESCRIBED],
        stacker.members,
        logits,
        stacker.logit(logits),
        stacker.raw_logit(logits),
        lambda row: decode.decode(files[row]),
        scores if (scores["cell"] != CLEAN).any() else None,
        record,
        stacker.mean_logit(logits),
    )


def member_logits(scores: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """float64 [N, members] from the columns of an evaluation."""
    return scores[[LOGIT_PREFIX + name for name in names]].to_numpy(dtype=np.float64)
