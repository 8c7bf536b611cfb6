"""Does the stack hold on what it did not see? Refit it without each generator, or source, and score it there.

The members stay as they are: those that were trained on a generator know it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ensemble.core import artifacts
from ensemble.core.errors import DataError, join_limited
from ensemble.core.metrics import sigmoid
from ensemble.stacking.fit import SOFTENED_METHODS, solve
from ensemble.stacking.grouped_cv import Fold, grouped_folds, single_threaded_blas
from ensemble.stacking.logit_table import StackingData
from ensemble.stacking.scores import ModelScores, format_signed, score_models

Parts = tuple[np.ndarray, np.ndarray]  # of fitting rows, of scored rows
MODELS = ("stack", "mean", "best member")
MIN_IMAGES = 5  # of a part that is scored


@dataclass(frozen=True)
class LeftOut:
    """Scores on one generator or source by models fitted without it.

    images: of the part. rest: images of the other class that it was compared with, each scored by a stacker that saw
    neither the part nor the image's group; 0 where the part has both classes. best: the members that were best on the
    fitting rows. scored: the stack, the mean and the best member, the differences being from the stack.
    """

    name: str
    images: int
    rest: int
    best: tuple[str, ...]
    scored: tuple[ModelScores, ...]


def run_parts(run: Path, data: StackingData, column: str) -> Parts:
    """The generator or source of a run's fitting and scored rows, of dataset.parquet."""
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first").set_index("id")
    fitting, scored = (frame.loc[list(ids), column].to_numpy(dtype=object) for ids in (data.fitting_ids, data.ids))
    return fitting, scored


def leave_each_out(data: StackingData, parts: Parts, method: str, strength: float) -> tuple[list[LeftOut], list[str]]:
    """A line for each part of the scored rows, and the parts that have too few images for one.

    A part that holds all images of a class has neither: nothing would be left to fit on.

    parts: the part of each fitting row and of each scored row, object [N] each, None or "" where it is not known.
    method, strength: of the stacker, as fit.py names them. DataError for fewer than two parts.
    """
    fitting, scored = data.fitting, data.scored
    lines: list[LeftOut] = []
    refused: list[str] = []
    names = sorted({str(name) for name in parts[1] if name})
    if len(names) < 2:
        raise DataError("--leave-out needs two different values or more in that column of the rows")
    every = grouped_folds(fitting.labels, fitting.groups) if scored is fitting else []
    with single_threaded_blas():
        for name in tqdm(names, desc="leave out", unit="part", leave=False, disable=None):
            own, fit = parts[1] == name, parts[0] != name
            labels = scored.labels
            both = len(np.unique(labels[own])) == 2
            rows = own if both else own | (labels != labels[own][0])
            if len(np.unique(fitting.labels[fit])) < 2:
                continue  # all images of a class, such as the one name of all real images
            folds = _folds(fit, rows, [] if both else every)
            if own.sum() < MIN_IMAGES or any(len(np.unique(fitting.labels[chosen])) < 2 for chosen, _ in folds):
                refused.append(f"{name} ({own.sum()})")
                continue
            p, best = _scores(data, folds, rows, method, strength)
            groups = scored.groups[rows]
            models = score_models(p, MODELS[0], labels[rows], groups)
            lines.append(LeftOut(name, int(own.sum()), int((rows & ~own).sum()), best, tuple(models)))
    return lines, refused


def _scores(
    data: StackingData, folds: Sequence[Fold], rows: np.ndarray, method: str, strength: float
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """p float64 of each of MODELS on the scored rows bool [N], and the members that were best. folds: of `_folds`."""
    fitting, scored, positions = data.fitting, data.scored, np.flatnonzero(rows)
    p = {name: np.empty(len(positions)) for name in MODELS}
    best: dict[str, None] = {}
    for chosen, held in folds:
        logits, labels = fitting.logits[chosen], fitting.labels[chosen]
        for name, each in zip(MODELS, (method, "mean", "best"), strict=True):
            # the strength of another kind of method is a penalty, no temperature
            own = strength if each == method or method in SOFTENED_METHODS else 1.0
            stacker = solve(each, logits, labels, own)
            values = scored.logits[positions[held]]
            p[name][held] = sigmoid(stacker.raw_logit(stacker.fill_missing(values)))
            if each == "best":
                best[scored.members[int(np.argmax(stacker.coef))]] = None
    return p, tuple(best)


def _folds(fit: np.ndarray, rows: np.ndarray, every: Sequence[Fold]) -> list[Fold]:
    """Positions of fitting rows, and positions among the rows to score. every: folds of all rows; none to use one."""
    if not every:
        return [(np.flatnonzero(fit), np.arange(int(rows.sum())))]
    order = np.cumsum(rows) - 1
    return [(chosen[fit[chosen]], order[held[rows[held]]]) for chosen, held in every]


def leave_out_table(lines: Sequence[LeftOut], column: str) -> pd.DataFrame:
    """The lines as text, from the lowest AUROC of the stack."""
    rows = []
    for line in sorted(lines, key=lambda line: line.scored[0].auroc.value):
        stack, mean, best = line.scored
        rows.append(
            {
                column: line.name,
                "images": line.images,
                "AUROC": str(stack.auroc),
                "log-loss": str(stack.log_loss),
                "mean: AUROC minus stack's": format_signed(mean.auroc_difference),
                "best member": "/".join(line.best),
                "its AUROC minus stack's": format_signed(best.auroc_difference),
                "its log-loss minus stack's": format_signed(best.log_loss_difference),
            }
        )
    return pd.DataFrame(rows)


def describe_left_out(lines: Sequence[LeftOut], refused: Sequence[str], column: str) -> list[str]:
    """The worst part by name, how often the stack wins, and parts that have too few images."""
    texts = []
    if not lines:
        texts.append(f"No {column} can be left out: each has all images of a class, or fewer than {MIN_IMAGES} images.")
    else:
        worst = min(lines, key=lambda line: line.scored[0].auroc.value)
        ahead = [sum(line.scored[0].auroc.value >= line.scored[k].auroc.value for line in lines) for k in (1, 2)]
        texts.append(
            f"Worst {column}: {worst.name}, AUROC {worst.scored[0].auroc}. The stack is at least as good as the mean "
            f"on {ahead[0]} of {len(lines)}, and as the best member on {ahead[1]}."
        )
    if refused:
        texts.append(f"Left out of the table, for fewer than {MIN_IMAGES} images: {join_limited(refused)}.")
    return texts
