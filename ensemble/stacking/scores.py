"""Models scored side by side on the same rows: members, their mean and the stack, or stacks by different methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ensemble.core import bootstrap, metrics
from ensemble.core.metrics import Interval


@dataclass(frozen=True)
class ModelScores:
    """One line of a table: its scores, and its AUROC and log-loss minus the reference's, on the same draws of groups.

    The differences are None for the reference itself.
    """

    name: str
    auroc: Interval
    log_loss: Interval
    auroc_difference: Interval | None = None
    log_loss_difference: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, without the name."""
        return {key: value.to_dict() for key, value in vars(self).items() if isinstance(value, Interval)}


def score_models(
    p: Mapping[str, np.ndarray],
    reference: str,
    labels: np.ndarray,
    groups: np.ndarray,
    ranking: Mapping[str, np.ndarray] | None = None,
) -> list[ModelScores]:
    """A line for each model's p, float64 [N], in this order, with 95 % intervals over groups.

    ranking: p before calibration, for the AUROC. One calibration cannot change the order of a
    stack's scores, but several folds, each calibrated in its own way, mix badly.
    """
    base = list(p).index(reference)
    lines: list[list[Interval]] = [[] for _ in p]
    differences: list[list[Interval]] = [[] for _ in p]
    resamples = bootstrap.resamples_for(len(labels))
    for score, columns in (("auroc", {**p, **(ranking or {})}), ("log_loss", p)):
        draws = bootstrap.bootstrap_scores(labels, list(columns.values()), groups, (score,), resamples=resamples)[score]
        values = [metrics.score(score, labels, column) for column in columns.values()]
        for row, (value, drawn) in enumerate(zip(values, draws, strict=True)):
            lines[row].append(bootstrap.percentile_interval(value, drawn))
            if row != base:
                differences[row].append(bootstrap.percentile_interval(value - values[base], drawn - draws[base]))
    return [ModelScores(name, *lines[row], *differences[row]) for row, name in enumerate(p)]


def score_frames(scores: pd.DataFrame, truth: pd.DataFrame) -> list[ModelScores]:
    """Members, their mean and the stack: of what `infer --members` wrote and of a table of `id`, `label`, `group`.

    Each row is a group where there is no column group.
    """
    rows = truth.set_index("id", drop=False).loc[scores["id"]]
    members = scores.drop(columns=["id", "target"])
    p = {str(name): members[name].to_numpy(dtype=np.float64) for name in members}
    p |= {"mean": members.mean(axis=1).to_numpy(), "stack": scores["target"].to_numpy(dtype=np.float64)}
    groups = rows["group" if "group" in rows else "id"].to_numpy(dtype=str)
    return score_models(p, "stack", rows["label"].to_numpy(), groups)


def format_scores(scored: Sequence[ModelScores], weights: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The scores, and the stack's weights if given, as text for people."""
    frame = pd.DataFrame(
        {
            "": [line.name for line in scored],
            "AUROC": [str(line.auroc) for line in scored],
            "log-loss": [str(line.log_loss) for line in scored],
        }
    )
    if weights is not None:
        frame["weight"] = [weights.get(line.name, "") for line in scored]
    return frame


def format_differences(scored: Sequence[ModelScores], reference: str, first: str) -> pd.DataFrame:
    """The scores and how far they lie from the reference's, as text; `first` heads the names."""
    frame = format_scores(scored).rename(columns={"": first})
    frame[f"AUROC minus {reference}"] = [format_signed(line.auroc_difference) for line in scored]
    frame[f"log-loss minus {reference}"] = [format_signed(line.log_loss_difference) for line in scored]
    return frame


def format_signed(interval: Interval | None) -> str:
    """A difference or a weight with its interval, every number with its sign; empty for None."""
    return "" if interval is None else f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def verdict(scored: Sequence[ModelScores]) -> str:
    """Whether the stack beats its best member and the mean on these rows, by paired intervals, in one sentence."""
    by_name = {line.name: line for line in scored}
    best = max((line for line in scored if line.name not in ("mean", "stack")), key=lambda line: line.auroc.value)
    outcomes = [
        _against(label, line.auroc_difference)
        for label, line in ((f"its best member {best.name}", best), ("the mean", by_name["mean"]))
        if line.auroc_difference is not None
    ]
    return f"The stack {' and '.join(outcomes)} in AUROC on these rows."


def _against(rival: str, difference: Interval) -> str:
    ahead = Interval(0.0 - difference.value, 0.0 - difference.high, 0.0 - difference.low)
    if ahead.low > 0:
        return f"beats {rival} by {ahead}"
    if ahead.high < 0:
        return f"loses to {rival} by {difference}"
    return f"does not clearly differ from {rival} ({format_signed(ahead)})"
