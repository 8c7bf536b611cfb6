"""The scores on a model card: on the run's held-out images, and in its evaluations. No torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import Interval
from ensemble.evaluation import report_data, report_scores
from ensemble.evaluation.evaluate import describe_stacker
from ensemble.evaluation.leakage import TRACKS
from ensemble.evaluation.protocol import CLEAN
from ensemble.evaluation.tables import TITLES
from ensemble.stacking.stacker import Stacker
from export.hub.markdown import escape, table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


ENDS = ("value", "low", "high")  # of an interval
CARD_SCORES = ("auroc", "log_loss")  # keys in stacker.json
TUNED_RULES = ("balanced_accuracy", "fpr=")  # threshold rules that begin so were tuned on the held-out rows


def read_evaluations(run: Path, stacker: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of the run's evaluations of exactly these members and this stacker, the latest first.

    stacker: the content of stacker.json. Damaged records, and old ones that do not name their members, are left out.
    """
    identity = describe_stacker(Stacker.from_dict(stacker))["sha256"], stacker.get("fitted_on", {}).get("members")
    records = []
    for name in report_scores.list_evaluations(run):
        try:
            record = artifacts.read_json(artifacts.evaluation_path(run, name) / "evaluation.json", "run evaluate again")
        except ArtifactError:
            continue
        if (record.get("stacker", {}).get("sha256"), record.get("model", {}).get("members")) == identity:
            records.append(record)
    return records


def eval_results(stacker: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> "list[EvalResult]":
    """Results for the card's YAML. An evaluation with images of the run's own training set is no result."""
    rows = stacker.get("rows", {})
    heldout = f"{rows.get('images')} held-out images of its own data in {rows.get('groups')} groups"
    scores = {
        **{name: _score(stacker, "stack", name) for name in CARD_SCORES},
        "balanced_accuracy": _balanced_accuracy(stacker),
    }
    results = [_eval_result("held-out", heldout, name, score) for name, score in scores.items() if score]
    for record in records:
        if not record["trained"]:
            # of a data set with one class only, the share on the right side of the threshold
            clean = record["cells"][CLEAN]
            name = "auroc" if "auroc" in clean else next(iter(clean))
            score = Interval.from_dict(clean[name])
            results.append(_eval_result(f"evaluation {record['name']}", record["name"], name, score))
    return [result for result in results if np.isfinite(result.metric_value)]


def render_scores(stacker: Mapping[str, Any]) -> str:
    """Scores of members, mean and stack on the held-out rows, in Markdown."""
    if not stacker.get("scores"):
        return "None were measured."
    rows, rule = stacker["rows"], str(stacker.get("threshold_rule", ""))
    lines = [
        [escape(name), *(str(_score(stacker, name, score) or "") for score in CARD_SCORES)]
        for name in stacker["scores"]
    ]
    caution = " So few groups make them rough, and rather too short." if rows["groups"] < report_data.FEW_GROUPS else ""
    basis = "scored out of fold" if rows["stack"] == "out of fold" else escape(rows["stack"])
    balanced = _balanced_accuracy(stacker)
    tuned = ", which was chosen on these rows and so flatters it" if rule.startswith(TUNED_RULES) else ""
    at_threshold = (
        f" At its threshold of {stacker['threshold']:.4f}{tuned}, the stack's balanced accuracy is {balanced}."
        if balanced
        else ""
    )
    return (
        table(["", *(TITLES[name] for name in CARD_SCORES)], lines)
        + f"\n\nOn {rows['images']} held-out images in {rows['groups']} groups; the stack was {basis}.{at_threshold} "
        f"In brackets: 95 % intervals, by drawing groups again.{caution}"
    )


def render_evaluations(records: Sequence[Mapping[str, Any]]) -> str:
    """Scores of the stack in each evaluation, on clean images and under the worst corruption; "" without any."""
    if not records:
        return ""
    head = ["evaluation", "images", TITLES["auroc"], "at the threshold", "worst corruption"]
    return f"""

Evaluations of all members on labelled images by `evaluate`: as they are, and under the worst corruption.

{table(head, [_evaluation_row(record) for record in records])}"""


def _evaluation_row(record: Mapping[str, Any]) -> list[str]:
    rows, cells, worst = record["rows"], record["cells"], record["worst"]
    name, track = escape(record["name"]), record["track"]
    if track != TRACKS[0]:
        name += f"; {escape(track)}: training images were chosen by looking at it"
    if record["trained"]:
        name += f"; {record['trained']} images were in the run's own training: **THIS IS NO TEST**"
    clean = {score: Interval.from_dict(values) for score, values in cells[CLEAN].items()}
    at_threshold = "balanced_accuracy" if "balanced_accuracy" in clean else next(iter(clean))
    low = Interval.from_dict({end: worst[end] for end in ENDS})
    damaged = f"{escape(worst['cell'])} of {len(cells)}: {TITLES[worst['score']]} {low}"
    return [
        name,
        f"{rows['real']} real, {rows['ai']} ai, in {rows['groups']} groups",
        str(clean.get("auroc", "")),
        f"{TITLES[at_threshold]} {clean[at_threshold]}",
        damaged if len(cells) > 1 else "",
    ]


def _eval_result(dataset_type: str, dataset: str, name: str, score: Interval) -> "EvalResult":
    from huggingface_hub import EvalResult

    known = np.isfinite(score.low)
    return EvalResult(
        task_type="image-classification",
        task_name="AI-made or real",
        dataset_type=dataset_type,  # the Hub groups results by type, under one name
        dataset_name=dataset,
        metric_type="roc_auc" if name == "auroc" else name,
        metric_name=TITLES[name] + (f" [95 % interval: {score.low:.4f}, {score.high:.4f}]" if known else ""),
        metric_value=round(score.value, 4),
    )


def _score(stacker: Mapping[str, Any], name: str, score: str) -> Interval | None:
    scores = stacker.get("scores", {}).get(name)
    return Interval.from_dict(scores[score]) if scores else None


def _balanced_accuracy(stacker: Mapping[str, Any]) -> Interval | None:
    """At the threshold; None where an older `stack` did not store it."""
    ends = stacker.get("balanced_accuracy")
    return Interval.from_dict(ends) if ends else None
