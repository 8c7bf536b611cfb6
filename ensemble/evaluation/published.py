"""Figures published for the benchmarks of `layouts`, beside ours."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ensemble.core.metrics import Interval
from ensemble.evaluation.tables import read_interval

FIGURES = Path(__file__).with_name("published.toml")


@dataclass(frozen=True)
class Figure:
    """One method's published scores of a benchmark, in per cent by part; published.toml says what each field means."""

    benchmark: str
    method: str
    score: str
    by: str
    parts: Mapping[str, float]
    source: str
    url: str
    second_hand: bool
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        hand = "; second-hand, not checked against the paper" if self.second_hand else ""
        return f"{self.method}{note}: {self.source}, {self.url}{hand}"


def load_figures(path: Path = FIGURES) -> list[Figure]:
    """Every figure, as the file has them."""
    return [Figure(**values) for values in tomllib.loads(path.read_text(encoding="utf-8"))["figure"]]


def figures_of(benchmarks: Sequence[str]) -> list[Figure]:
    """The figures of these benchmarks."""
    return [figure for figure in load_figures() if figure.benchmark in benchmarks]


def compare(figures: Sequence[Figure], parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """Ours and theirs in per cent, a row a part, as text for people; figures share their score and `by`.

    parts: "source" and "generator" -> the parts of evaluation.json. The mean is over the parts that
    both have, and only where there are several.
    """
    score, column = figures[0].score, figures[0].by
    ours = {part["name"]: read_interval(part["scores"][score]) for part in parts[column]}
    names = [name for name in dict.fromkeys(key for figure in figures for key in figure.parts) if name in ours]
    rows = [
        {"": name, "ours": _percent(ours[name])}
        | {figure.method: f"{figure.parts[name]:.1f}" if name in figure.parts else "" for figure in figures}
        for name in names
    ]
    if len(names) > 1:
        mean = {
            "": f"mean of {len(names)}",
            "ours": f"{100 * sum(ours[name].value for name in names) / len(names):.1f}",
        }
        for figure in figures:
            told = [figure.parts[name] for name in names if name in figure.parts]
            mean[figure.method] = f"{sum(told) / len(told):.1f}" if len(told) == len(names) else ""
        rows.append(mean)
    return pd.DataFrame(rows)


def _percent(score: Interval) -> str:
    return f"{100 * score.value:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"
