"""What `evaluate` prints: evaluation.json as tables for people."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ensemble.core.metrics import Interval
from ensemble.evaluation import protocol

TITLES = protocol.TITLES | {
    "average_precision": "average precision",
    "f1": "F1",
    "tpr_at_1": "TPR at 1 % FPR",
    "tpr_at_5": "TPR at 5 % FPR",
    "log_loss": "log-loss",
    "brier": "Brier",
    "ece": "ECE",
}
WORST = "<- worst"


def score_table(record: Mapping[str, Any]) -> pd.DataFrame:
    """Every score of the undamaged images."""
    scores = record["cells"]["clean"]
    return pd.DataFrame({"score": [TITLES[name] for name in scores], "value": list(map(_text, scores.values()))})


def corruption_table(record: Mapping[str, Any]) -> pd.DataFrame:
    """Cells from the worst to the best, with what each costs against the undamaged images."""
    deciding = record["worst"]["score"]
    cells = sorted(record["cells"].items(), key=lambda item: item[1][deciding]["value"])
    clean = record["cells"]["clean"][deciding]["value"]
    titles = [name for name in protocol.TITLES if name in cells[0][1]]
    return pd.DataFrame(
        [
            {"cell": name}
            | {TITLES[title]: _text(scores[title]) for title in titles}
            | {f"{TITLES[deciding]}, loss": f"{clean - scores[deciding]['value']:.4f}" if name != "clean" else ""}
            | {"": WORST if name == record["worst"]["cell"] else ""}
            for name, scores in cells
        ]
    )


def part_table(parts: Sequence[Mapping[str, Any]], title: str) -> pd.DataFrame:
    """Generators or sources, from the worst balanced accuracy to the best."""

    def rank(part: Mapping[str, Any]) -> float:
        values = [part["scores"][name]["value"] for name in ("balanced_accuracy", "accuracy_real", "accuracy_ai")]
        return next((value for value in values if value is not None), 0.0)

    table = pd.DataFrame(
        [
            {title: part["name"], "real": part["real"], "ai": part["ai"]}
            | {TITLES[name]: _text(part["scores"][name]) for name in protocol.TITLES}
            for part in sorted(parts, key=rank)
        ]
    )
    return table.loc[:, (table != "").any()]


def leave_out_table(lines: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Generators, with the stack's AUROC as it is and refitted without each."""
    return pd.DataFrame(
        [
            {
                "generator": line["generator"],
                "ai": line["images"],
                "the run's stack, AUROC": _text(line["full"]),
                "refitted without it": _text(line["without"]) or "too few rows",
                "rows left out": line["rows"],
                "members": "trained on it" if line["known"] else "never saw it",
            }
            for line in lines
        ]
    )


def stress_lines(record: Mapping[str, Any]) -> list[str]:
    """The rate of errors at the frozen threshold, and how the target is spread."""
    ((name, scores),) = record["cells"]["clean"].items()
    right = Interval.from_dict(scores)
    wrong = Interval(1 - right.value, 1 - right.high, 1 - right.low)
    rate = "FPR: reals called ai" if name == "accuracy_real" else "miss rate: ai images called real"
    lines = [f"{rate}, at the frozen threshold {record['stacker']['threshold']:.4g}: {wrong}"]
    quantiles = record["target_quantiles"].items()
    return lines + [f"target, {100 * float(q):g} % quantile: {_text(values)}" for q, values in quantiles]


def _text(values: Mapping[str, float | None]) -> str:
    score = Interval.from_dict(values)
    if np.isnan(score.value):
        return ""
    return f"{score.value:.4f}" if np.isnan(score.low) else str(score)
