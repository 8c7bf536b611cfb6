"""What a report says of a set of rows, as plain values for the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import pandas as pd

from ensemble import breakdown
from ensemble.core import metrics
from ensemble.core.bootstrap import Paired, paired, score_intervals
from ensemble.core.metrics import Interval
from ensemble.evaluate import CLEAN
from ensemble.report_rows import Rows, member_logits
from ensemble.stacking.stacker import Stacker

LARGEST = 30  # sources or generators that are listed


@dataclass(frozen=True)
class Line:
    """The scores of one member, the mean or the stack; NaN where a class is missing."""

    name: str
    weight: float | None
    threshold: float
    scores: dict[str, Interval]


@dataclass(frozen=True)
class Versus:
    """The stack against another, in AUROC on the same rows."""

    other: str
    paired: Paired


@dataclass(frozen=True)
class Called:
    """A part of the rows: how many were called ai and real at the stack's threshold."""

    name: str
    of: str
    images: int
    groups: int
    called_ai: int
    called_real: int

    @property
    def right(self) -> float:
        """The share on its own side."""
        return (self.called_ai if self.of == "ai" else self.called_real) / self.images


@dataclass(frozen=True)
class Heat:
    """A table of numbers that is shown in colour: values float [rows, columns], NaN where there is none."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray


def scores(rows: Rows, stacker: Stacker, resamples: int) -> list[Line]:
    """Every score of every member, of the mean and of the stack, with 95 % intervals over groups."""
    weights, thresholds = dict(zip(stacker.members, stacker.coef, strict=True)), rows.thresholds(stacker.threshold)
    return [
        Line(
            name,
            weights.get(name),
            thresholds[name],
            score_intervals(rows.labels, p, rows.groups, threshold=thresholds[name], resamples=resamples),
        )
        for name, p in rows.p.items()
    ]


def best_member(lines: Sequence[Line]) -> Line:
    """The member of the highest AUROC."""
    members = [line for line in lines if line.name not in ("mean", "stack")]
    return max(members, key=lambda line: line.scores["auroc"].value)


def comparisons(rows: Rows, lines: Sequence[Line], resamples: int) -> list[Versus]:
    """The stack against its best member and against the mean; nothing where a class is missing."""
    if not rows.both_classes:
        return []
    p = rows.p
    return [
        Versus(name, paired(rows.labels, p["stack"], p[name], rows.groups, resamples=resamples))
        for name in (best_member(lines).name, "mean")
    ]


def parts(rows: Rows, column: str, threshold: float, resamples: int) -> list[breakdown.Part]:
    """The stack's scores for each of the largest sources or generators: a generator's ai against all reals."""
    frame = rows.frame.assign(logit=rows.stack)
    counted = frame[frame["label"] == 1] if column == "generator" else frame
    largest = set(counted[column].fillna("").astype(str).value_counts().index[:LARGEST])
    kept = frame[column].fillna("").astype(str).isin(largest)
    if column == "generator":
        kept |= frame["label"] == 0
    return breakdown.by(frame[kept], column, threshold, resamples)


def confusion(rows: Rows, threshold: float) -> dict[str, list[Called]]:
    """Calls at the stack's threshold: of all rows, and by source and generator, the largest first."""
    frame = rows.frame.assign(called=rows.p["stack"] >= threshold)
    parts = {"all": [_called("all", part) for _, part in frame.groupby("label", sort=False)]}
    for column in ("generator", "source"):
        named = frame.assign(name=frame[column].fillna("not named").astype(str))
        found = [_called(str(name), part) for (name, _), part in named.groupby(["name", "label"], sort=True)]
        parts[column] = sorted(found, key=lambda part: -part.images)
    return parts


def _called(name: str, part: pd.DataFrame) -> Called:
    ai = int(part["called"].sum())
    of = "ai" if part["label"].iloc[0] else "real"
    return Called(name, of, len(part), part["group"].nunique(), ai, len(part) - ai)


def correlations(rows: Rows) -> Heat:
    """Pearson correlation of the logits of members and stack."""
    names = (*rows.names, "stack")
    columns = np.column_stack([rows.logits, rows.stack])
    moved = columns.std(axis=0) > 0
    values = np.full((len(names), len(names)), np.nan)
    values[np.ix_(moved, moved)] = np.atleast_2d(np.corrcoef(columns[:, moved], rowvar=False))
    return Heat(names, names, values)


def disagreements(rows: Rows, threshold: float) -> Heat:
    """Share of images that two of members and stack call differently, each at its own threshold."""
    names = (*rows.names, "stack")
    called = _calls(rows, threshold)
    return Heat(names, names, (called[:, :, None] != called[:, None, :]).mean(axis=0))


def divided(rows: Rows, threshold: float) -> dict[str, int]:
    """Images on which not all members agree, and on how many of those the stack is right."""
    called = _calls(rows, threshold)
    split = (called[:, :-1] != called[:, :1]).any(axis=1)
    return {"images": int(split.sum()), "right": int((called[split, -1] == rows.labels[split]).sum())}


def _calls(rows: Rows, threshold: float) -> np.ndarray:
    thresholds, p = rows.thresholds(threshold), rows.p
    return np.column_stack([p[name] >= thresholds[name] for name in (*rows.names, "stack")])


def robustness(rows: Rows, stacker: Stacker) -> Heat | None:
    """AUROC of members and stack under each degradation, in the order of the evaluation;
    None without any, or without a class."""
    if rows.cells is None or not rows.both_classes:
        return None
    names = (*rows.names, "stack")
    cells = list(dict.fromkeys([CLEAN, *rows.cells["cell"]]))
    values = []
    for cell in cells:
        part = rows.cells[rows.cells["cell"] == cell]
        logits = member_logits(part, rows.names)
        columns = np.column_stack([logits, stacker.logit(logits)])
        values.append([metrics.auroc(part["label"].to_numpy(), column) for column in columns.T])
    return Heat(tuple(cells), names, np.array(values))


def counts(frame: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Images and groups of a run's data set by split and class, by source and by generator."""
    named = frame.assign(of=np.where(frame["label"] == 1, "ai", "real"))
    found = {}
    for column in ("split", "source", "generator"):
        part = named.assign(name=named[column].fillna("not named").astype(str))
        table = [
            {"name": name, "of": of, "images": len(rows), "groups": rows["group"].nunique()}
            for (name, of), rows in part.groupby(["name", "of"], sort=True)
        ]
        found[column] = sorted(table, key=itemgetter("images"), reverse=True)
    return found
