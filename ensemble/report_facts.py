"""What a report says of a run apart from scores: members, versions, and what to know before trusting it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, some
from ensemble.core.metrics import Interval
from ensemble.core.preprocess_config import ImageContract
from ensemble.data import dataset
from ensemble.evaluate_tables import read_interval
from ensemble.report_rows import Rows, split_names
from ensemble.stacking.stacker import Stacker

FEW_GROUPS = 30  # below, intervals over groups are rough


def member_facts(info: Mapping[str, Any]) -> dict[str, str]:
    """A member.json for people; what it does not hold is left empty."""
    recipe = info["recipe"]
    backbone, train, best = recipe.get("backbone", {}), recipe.get("train", {}), info["best"]
    contract = ImageContract.from_dict(info["contract"])
    views = f", {contract.count} crops" if contract.count > 1 else ""
    versions = info.get("versions", {})
    return {
        "member": info["name"],
        "backbone": backbone.get("checkpoint") or backbone.get("architecture") or "",
        "parameters": f"{info['parameters'] / 1e6:.1f} M",
        "image": f"{contract.size} px, {contract.geometry}{views}",
        "adapted by": recipe.get("adapt", {}).get("mode", ""),
        "epochs": f"{best['epoch']} of {train['epochs']}" if "epochs" in train else "",
        "tune AUROC": f"{best['tune_auroc']:.3f}" if "tune_auroc" in best else "",
        "folds": str(info.get("folds") or "none"),
        "seed": str(info.get("seed", "")),
        "trained in": f"{info['seconds'] / 60:.1f} min on {info.get('device', 'an unnamed device')}",
        "with": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def recipe_text(info: Mapping[str, Any]) -> str:
    """A member's recipe and image contract as JSON."""
    return json.dumps({"recipe": info["recipe"], "contract": info["contract"]}, indent=1, ensure_ascii=False)


def read_audit(run: Path) -> dict[str, Any] | None:
    """The run's audit.json, None where its data was not audited."""
    try:
        return artifacts.read_json(artifacts.audit_path(run), "run train-all again")
    except ArtifactError:
        return None


def weight_intervals(run: Path) -> list[Interval]:
    """Of the stack's weights, in the order of its members; empty where its kind estimates none."""
    told = artifacts.read_json(artifacts.stacker_path(run), "run stack again").get("weights")
    return [read_interval(weight) for weight in told or ()]


def null_scores(audit: Mapping[str, Any] | None) -> dict[str, Interval]:
    """What metadata alone reaches on the run's whole data set, by the names of scores."""
    null = (audit or {}).get("null")
    if not null:
        return {}
    return {
        "balanced_accuracy": read_interval(null["balanced_accuracy"]),
        "auroc": Interval(float(null["auroc"]), float("nan"), float("nan")),
    }


def cautions(
    run: Path, frame: pd.DataFrame, stacker: Stacker, sets: Sequence[Rows], audit: Mapping[str, Any] | None
) -> list[str]:
    """What to know before trusting the scores, a sentence each."""
    said = []
    if audit is None:
        said.append("The data was not audited, so a shortcut in how it is stored may stand behind every score.")
    elif audit["blocked"]:
        said.append("The audit would have stopped this training: it was accepted that shortcuts may drive the scores.")
    held = sets[0]
    if (groups := len(set(held.groups))) < FEW_GROUPS:
        said.append(f"{groups} groups of held-out images are few: the intervals are rough, and rather too short.")
    if (reals := int((held.labels == 0).sum())) < 100:
        said.append(f"{reals} held-out reals cannot resolve a false positive rate of 1 %; 100 would be the least.")
    if all(rows.cells is None for rows in sets):
        said.append(
            "Nothing here was degraded, and held-out images come from the sources of the training images: "
            "run evaluate on images as you will meet them."
        )
    said += [
        f"{trained} images of {rows.title} were in this run's training: that is no test."
        for rows in sets
        if (trained := rows.record.get("trained"))
    ]
    if elsewhere := split_names(run, stacker)[1]:
        said.append(f"Trained elsewhere, and known by their scores alone: {some(elsewhere)}.")
    if outside := [name for name in artifacts.list_members(run) if name not in stacker.members]:
        said.append(f"Not in the stack, and not shown: {some(outside)}.")
    files = dataset.files(frame)
    if lost := sum(not file.is_file() for file in files):
        said.append(f"{lost} of the run's {len(files)} image files are no longer where they were; scores need none.")
    return said
