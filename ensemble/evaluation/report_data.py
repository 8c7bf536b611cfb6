"""The values of the report page: scores, decisions and robustness of each set of rows, and facts of the run."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ensemble.core import artifacts, metrics
from ensemble.core.bootstrap import PairedDifference, paired_difference, score_intervals
from ensemble.core.errors import join_limited
from ensemble.core.metrics import Interval
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.data import dataset
from ensemble.evaluation import protocol
from ensemble.evaluation.protocol import CLEAN
from ensemble.evaluation.report_scores import ScoredImages, member_logits, split_externals
from ensemble.stacking.stacker import Stacker, read_stacker_values

MAX_PARTS = 30  # sources or generators that are listed
FEW_GROUPS = 30  # below, intervals over groups are rough


def scores(rows: ScoredImages, threshold: float, resamples: int) -> dict[str, dict[str, Interval]]:
    """Every score of each member, the mean and the stack, with 95 % intervals over groups; NaN for want of a class."""
    thresholds = rows.thresholds(threshold)
    return {
        name: score_intervals(rows.labels, p, rows.groups, threshold=thresholds[name], resamples=resamples)
        for name, p in rows.p.items()
    }


def comparisons(
    rows: ScoredImages, scores: Mapping[str, Mapping[str, Interval]], resamples: int
) -> dict[str, PairedDifference]:
    """AUROC of the stack minus that of its best member, then of the mean; empty where a class is missing."""
    if not rows.both_classes:
        return {}
    p, best = rows.p, max(rows.names, key=lambda name: scores[name]["auroc"].value)
    return {
        name: paired_difference(rows.labels, p["stack"], p[name], rows.groups, resamples=resamples)
        for name in (best, "mean")
    }


def parts(rows: ScoredImages, column: str, threshold: float, resamples: int) -> list[protocol.PartScores]:
    """The stack's scores for each of the largest sources or generators: a generator's ai against all reals."""
    frame = rows.frame.assign(logit=rows.stack)
    names = frame[column].fillna("").astype(str)
    reals = (frame["label"] == 0) & (column == "generator")
    largest = names[~reals].value_counts().index[:MAX_PARTS]
    shown = names.isin(largest) | reals
    return protocol.score_parts(frame[shown], column, threshold, resamples)


def confusion(rows: ScoredImages, threshold: float) -> dict[str, list[dict[str, Any]]]:
    """Decisions at the stack's threshold by class: of all rows, by source and by generator, the largest first."""
    frame = rows.frame.assign(called=rows.p["stack"] >= threshold)
    parts = {"all": [_decisions("all", part) for _, part in frame.groupby("label", sort=False)]}
    for column in ("generator", "source"):
        named = frame.assign(name=frame[column].fillna("not named").astype(str))
        table = [_decisions(str(name), part) for (name, _), part in named.groupby(["name", "label"], sort=True)]
        parts[column] = sorted(table, key=itemgetter("images"), reverse=True)
    return parts


def _decisions(name: str, part: pd.DataFrame) -> dict[str, Any]:
    """How many images of one class were called ai and real, and which share is right."""
    images, ai, label = len(part), int(part["called"].sum()), part["label"].iloc[0]
    return {
        "name": name,
        "of": "ai" if label else "real",
        "images": images,
        "groups": part["group"].nunique(),
        "called_ai": ai,
        "called_real": images - ai,
        "right": (ai if label else images - ai) / images,
    }


def correlations(rows: ScoredImages) -> pd.DataFrame:
    """Pearson correlation of the logits of members and stack; NaN for one that does not vary."""
    names = (*rows.names, "stack")
    columns = np.column_stack([rows.logits, rows.stack])
    moved = columns.std(axis=0) > 0
    values = np.full((len(names), len(names)), np.nan)
    values[np.ix_(moved, moved)] = np.atleast_2d(np.corrcoef(columns[:, moved], rowvar=False))
    return pd.DataFrame(values, names, names)


def disagreements(rows: ScoredImages, threshold: float) -> pd.DataFrame:
    """Share of images that two of members and stack call differently, each at its own threshold."""
    names = (*rows.names, "stack")
    called = _calls(rows, threshold)
    return pd.DataFrame((called[:, :, None] != called[:, None, :]).mean(axis=0), names, names)


def divided(rows: ScoredImages, threshold: float) -> dict[str, int]:
    """Images on which not all members agree, and on how many of those the stack is right."""
    called = _calls(rows, threshold)
    split = (called[:, :-1] != called[:, :1]).any(axis=1)
    return {"images": int(split.sum()), "right": int((called[split, -1] == rows.labels[split]).sum())}


def _calls(rows: ScoredImages, threshold: float) -> np.ndarray:
    thresholds, p = rows.thresholds(threshold), rows.p
    return np.column_stack([p[name] >= thresholds[name] for name in (*rows.names, "stack")])


def robustness(rows: ScoredImages, stacker: Stacker) -> pd.DataFrame | None:
    """AUROC of members and stack under each degradation, in the evaluation's order; None without both classes."""
    if rows.cells is None or not rows.both_classes:
        return None
    cells = list(dict.fromkeys([CLEAN, *rows.cells["cell"]]))
    values = []
    for cell in cells:
        part = rows.cells[rows.cells["cell"] == cell]
        logits = member_logits(part, rows.names)
        columns = np.column_stack([logits, stacker.logit(logits)])
        values.append([metrics.auroc(part["label"].to_numpy(), column) for column in columns.T])
    return pd.DataFrame(values, cells, [*rows.names, "stack"])


def counts(frame: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Images and groups of a run's data set by split and class, by source and by generator."""
    named = frame.assign(of=np.where(frame["label"] == 1, "ai", "real"))
    tables: dict[str, list[Any]] = {}
    for column in ("split", "source", "generator"):
        part = named.assign(name=named[column].fillna("not named").astype(str))
        table = part.groupby(["name", "of"]).agg(images=("label", "size"), groups=("group", "nunique")).reset_index()
        tables[column] = table.sort_values("images", ascending=False, kind="stable").to_dict("records")
    return tables


def member_facts(info: Mapping[str, Any]) -> dict[str, str]:
    """A member.json for people; what it does not hold is left empty."""
    recipe = info["recipe"]
    backbone, train, best = recipe.get("backbone", {}), recipe.get("train", {}), info["best"]
    preprocess_config = PreprocessConfig.from_dict(info["contract"])
    views = f", {preprocess_config.count} crops" if preprocess_config.count > 1 else ""
    versions = info.get("versions", {})
    return {
        "member": info["name"],
        "backbone": backbone.get("checkpoint") or backbone.get("architecture") or "",
        "parameters": f"{info['parameters'] / 1e6:.1f} M",
        "image": f"{preprocess_config.size} px, {preprocess_config.geometry}{views}",
        "adapted by": recipe.get("adapt", {}).get("mode", ""),
        "epochs": f"{best['epoch']} of {train['epochs']}" if "epochs" in train else "",
        "tune AUROC": f"{best['tune_auroc']:.3f}" if "tune_auroc" in best else "",
        "folds": str(info.get("folds") or "none"),
        "seed": str(info.get("seed", "")),
        "trained in": f"{info['seconds'] / 60:.1f} min on {info.get('device', 'an unnamed device')}",
        "with": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def weight_intervals(run: Path) -> list[Interval]:
    """Of the stack's weights, in the order of its members; empty where its kind estimates none."""
    weights = read_stacker_values(artifacts.stacker_path(run), "run stack again").get("weights")
    return [Interval.from_dict(weight) for weight in weights or ()]


def null_scores(audit: Mapping[str, Any] | None) -> dict[str, Interval]:
    """What metadata alone reaches on the run's whole data set, by the names of scores."""
    null = (audit or {}).get("null")
    if not null:
        return {}
    return {
        "balanced_accuracy": Interval.from_dict(null["balanced_accuracy"]),
        "auroc": Interval(float(null["auroc"]), float("nan"), float("nan")),
    }


def cautions(
    run: Path, frame: pd.DataFrame, stacker: Stacker, sets: Sequence[ScoredImages], audit: Mapping[str, Any] | None
) -> list[str]:
    """What to know before trusting the scores, a sentence each."""
    lines = []
    if audit is None:
        lines.append("The data was not audited, so a shortcut in how it is stored may stand behind every score.")
    elif audit["blocked"]:
        lines.append("The audit would have stopped this training: it was accepted that shortcuts may drive the scores.")
    held = sets[0]
    if (groups := len(set(held.groups))) < FEW_GROUPS:
        lines.append(f"{groups} groups of held-out images are few: the intervals are rough, and rather too short.")
    if (reals := int((held.labels == 0).sum())) < 100:
        lines.append(f"{reals} held-out reals cannot resolve a false positive rate of 1 %; 100 would be the least.")
    if all(rows.cells is None for rows in sets):
        lines.append(
            "Nothing here was degraded, and held-out images come from the sources of the training images: "
            "run evaluate on images as you will meet them."
        )
    lines += [
        f"{trained} images of {rows.title} were in this run's training: that is no test."
        for rows in sets
        if (trained := rows.record.get("trained"))
    ]
    if elsewhere := split_externals(run, stacker)[1]:
        lines.append(f"Trained elsewhere, and known by their scores alone: {join_limited(elsewhere)}.")
    if outside := [name for name in artifacts.list_members(run) if name not in stacker.members]:
        lines.append(f"Not in the stack, and not shown: {join_limited(outside)}.")
    files = dataset.files(frame)
    if lost := sum(not file.is_file() for file in files):
        lines.append(f"{lost} of the run's {len(files)} image files are no longer where they were; scores need none.")
    return lines
