"""What a model card says of scores: on the held-out rows, and in evaluations of the run. No torch.

Text of unknown origin in Markdown.
"""

import re
import unicodedata
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
from ensemble.evaluation.tables import TITLES, read_interval
from ensemble.stacking.stacker import Stacker

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


SPECIAL = "\\`*_{}[]|~$@:#!"  # beyond & < >, what means something within a line of Markdown


def escaped(text: str) -> str:
    """Text of unknown origin as one line of Markdown that shows it and does nothing else."""
    line = " ".join("".join(c if not unicodedata.category(c).startswith("C") else " " for c in text).split())
    named = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
    shown = "".join(named.get(c, f"\\{c}" if c in SPECIAL else c) for c in line)
    return re.sub(r"(?i)(www)\.", r"\1\\.", shown)  # which alone would make a link


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


SHOWN = ("auroc", "log_loss")  # of stacker.json
CHOSEN = ("balanced_accuracy", "fpr=")  # how the rule of a threshold begins that was chosen on the held-out rows


def evaluations(run: Path, stacker: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of the run's evaluations of just these members and this stack, the latest first.

    stacker: of stacker.json. One that is damaged, or was written before it told its members, is left out.
    """
    present = describe_stacker(Stacker.from_dict(stacker))["sha256"], stacker.get("fitted_on", {}).get("members")
    found = []
    for name in report_scores.evaluations(run):
        try:
            record = artifacts.read_json(artifacts.evaluation_path(run, name) / "evaluation.json", "run evaluate again")
        except ArtifactError:
            continue
        if (record.get("stacker", {}).get("sha256"), record.get("model", {}).get("members")) == present:
            found.append(record)
    return found


def results(stacker: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> "list[EvalResult]":
    """For the card's YAML. What holds images of the run's own training is no result."""
    rows = stacker.get("rows", {})
    of = f"{rows.get('images')} held-out images of its own data in {rows.get('groups')} groups"
    scores = {**{name: _score(stacker, "stack", name) for name in SHOWN}, "balanced_accuracy": _balanced(stacker)}
    found = [_result("held-out", of, name, score) for name, score in scores.items() if score]
    for record in records:
        if not record["trained"]:
            name, score = _main_score(record)
            found.append(_result(f"evaluation {record['name']}", record["name"], name, score))
    return [result for result in found if np.isfinite(result.metric_value)]


def scores(stacker: Mapping[str, Any]) -> str:
    """Members, mean and stack on the held-out rows."""
    if not stacker.get("scores"):
        return "None were measured."
    rows, rule = stacker["rows"], str(stacker.get("threshold_rule", ""))
    lines = [
        [escaped(name), *(str(_score(stacker, name, score) or "") for score in SHOWN)] for name in stacker["scores"]
    ]
    few = " So few groups make them rough, and rather too short." if rows["groups"] < report_data.FEW_GROUPS else ""
    basis = "scored out of fold" if rows["stack"] == "out of fold" else escaped(rows["stack"])
    balanced = _balanced(stacker)
    chosen = ", which was chosen on these rows and so flatters it" if rule.startswith(CHOSEN) else ""
    at_threshold = (
        f" At its threshold of {stacker['threshold']:.4f}{chosen}, the stack's balanced accuracy is {balanced}."
        if balanced
        else ""
    )
    return (
        table(["", *(TITLES[name] for name in SHOWN)], lines)
        + f"\n\nOn {rows['images']} held-out images in {rows['groups']} groups; the stack was {basis}.{at_threshold} "
        f"In brackets: 95 % intervals, by drawing groups again.{few}"
    )


def evaluated(records: Sequence[Mapping[str, Any]]) -> str:
    """The stack in each evaluation, on undamaged images and in its worst cell; "" for none."""
    if not records:
        return ""
    head = ["evaluation", "images", TITLES["auroc"], "at the threshold", "worst cell"]
    return f"""

Evaluations of all members on labelled images by `evaluate`: as they are, and where damage told most.

{table(head, [_line(record) for record in records])}"""


def _line(record: Mapping[str, Any]) -> list[str]:
    rows, cells, worst = record["rows"], record["cells"], record["worst"]
    name, track = escaped(record["name"]), record["track"]
    if track != TRACKS[0]:
        name += f"; {escaped(track)}: training images were chosen by looking at it"
    if record["trained"]:
        name += f"; {record['trained']} images were in the run's own training: **THIS IS NO TEST**"
    clean = {score: read_interval(values) for score, values in cells[CLEAN].items()}
    at_threshold = "balanced_accuracy" if "balanced_accuracy" in clean else next(iter(clean))
    damaged = f"{escaped(worst['cell'])} of {len(cells)}: {TITLES[worst['score']]} {_interval(worst)}"
    return [
        name,
        f"{rows['real']} real, {rows['ai']} ai, in {rows['groups']} groups",
        str(clean.get("auroc", "")),
        f"{TITLES[at_threshold]} {clean[at_threshold]}",
        damaged if len(cells) > 1 else "",
    ]


def _result(dataset: str, of: str, name: str, score: Interval) -> "EvalResult":
    from huggingface_hub import EvalResult

    known = np.isfinite(score.low)
    return EvalResult(
        task_type="image-classification",
        task_name="AI-made or real",
        dataset_type=dataset,  # results of one type are put together under one name
        dataset_name=of,
        metric_type="roc_auc" if name == "auroc" else name,
        metric_name=TITLES[name] + (f" [95 % interval: {score.low:.4f}, {score.high:.4f}]" if known else ""),
        metric_value=round(score.value, 4),
    )


def _main_score(record: Mapping[str, Any]) -> tuple[str, Interval]:
    """That tells classes apart; of a stress set, which has one class, the share on the right side."""
    clean = record["cells"][CLEAN]
    name = "auroc" if "auroc" in clean else next(iter(clean))
    return name, read_interval(clean[name])


def _interval(values: Mapping[str, Any]) -> Interval:
    return read_interval({end: values[end] for end in ("value", "low", "high")})


def _score(stacker: Mapping[str, Any], name: str, score: str) -> Interval | None:
    found = stacker.get("scores", {}).get(name)
    return read_interval(found[score]) if found else None


def _balanced(stacker: Mapping[str, Any]) -> Interval | None:
    """At the threshold; None in what an older `stack` wrote."""
    found = stacker.get("balanced_accuracy")
    return read_interval(found) if found else None
