"""Certificates: an exported file against what it was made from, at fp32 the member, below it the fp32 file.

At fp32 a logit may differ by 0.001. Below fp32 scores may differ, as long as decisions stay the same.
On at least 256 real images that no member was fitted on, for every member and for the stack:

    largest, mean     of |p_lower - p_fp32|; reported
    spearman          rank correlation of the logits, ties averaged; reported
    auroc             AUROC(lower) - AUROC(fp32); at most 0.001 either way
    decision_changes  share of images on the other side of the threshold ("flips" in JSON); at most 0.5 %

p is sigmoid(logit) with threshold 0.5 for a member, and target with the stack's threshold for the stack.
The two limits are the project's requirement for a precision that `auto` may choose. With 256 images one
change is 0.4 %, and two exceed the limit: fewer images could not measure 0.5 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import auroc, sigmoid
from ensemble.models.runner import Runner
from ensemble.stacking.stacker import Stacker

TOLERANCE = 1e-3  # largest difference of a logit at fp32
BATCH_SIZES = (1, 2, 7)

MIN_IMAGES, MAX_IMAGES = 256, 1024  # below fp32
AUROC_LIMIT, DECISION_CHANGE_LIMIT = 1e-3, 5e-3
ROUNDING = 1e-9  # 0.951 - 0.95 is slightly more than 0.001 in floating point


def certify_fp32(expected: np.ndarray, exported: Runner, pixels: np.ndarray) -> dict[str, Any]:
    """Compare an exported file's logits of pixels, uint8 [N, S, S, 3], at several batch sizes with `expected`, [N].

    Returns what goes into certificate.json; raises ArtifactError where any logit is not
    finite or differs by more than TOLERANCE.
    """
    differences = {}
    for size in BATCH_SIZES:
        parts = [exported.run(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        differences[size] = np.abs(np.concatenate(parts).astype(np.float64) - expected)
    largest = {size: float(difference.max()) for size, difference in differences.items()}
    # written so that NaN fails too
    if not all(value <= TOLERANCE for value in largest.values()):
        seen = ", ".join(f"{value:.2g} at batch {size}" for size, value in largest.items())
        raise ArtifactError(
            f"{exported.name}: the exported file's logits differ from the member's by {seen} "
            f"(tolerance {TOLERANCE:g}); it was not kept"
        )
    return {
        "images": len(pixels),
        "batch_sizes": list(BATCH_SIZES),
        "max_abs_difference": max(largest.values()),
        "mean_abs_difference": float(np.mean(list(differences.values()))),
        "tolerance": TOLERANCE,
    }


@dataclass(frozen=True)
class ScoreChange:
    """How one model's scores at a lower precision differ from those at fp32; NaN where a logit is not finite.

    failed: what exceeds its limit, as text. The other fields: as the module says.
    """

    largest: float
    mean: float
    spearman: float
    auroc: float
    decision_changes: float
    failed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values: null for NaN."""
        keys = {"decision_changes": "flips"}
        values = {keys.get(key, key): None if value != value else value for key, value in vars(self).items()}
        return {**values, "failed": list(self.failed)}


def compare_scores(fp32: np.ndarray, lower: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> ScoreChange:
    """Logits float [N] of the same images at fp32 and at a lower precision; labels int [N] with ai = 1."""
    if not (np.isfinite(fp32).all() and np.isfinite(lower).all()):
        return ScoreChange(np.nan, np.nan, np.nan, np.nan, np.nan, ("logits that are not finite",))
    before, after = sigmoid(fp32), sigmoid(lower)
    change = np.abs(after - before)
    before_rank, after_rank = (pd.Series(logits).rank().to_numpy() for logits in (fp32, lower))
    with np.errstate(invalid="ignore"):
        spearman = float(np.corrcoef(before_rank, after_rank)[0, 1])
    moved = auroc(labels, lower) - auroc(labels, fp32)
    decision_changes = float(((before >= threshold) != (after >= threshold)).mean())
    failed = []
    if not abs(moved) <= AUROC_LIMIT + ROUNDING:
        failed.append(f"AUROC by {moved:+.4f}")
    if not decision_changes <= DECISION_CHANGE_LIMIT:
        failed.append(f"{decision_changes:.2%} flipped")
    return ScoreChange(float(change.max()), float(change.mean()), spearman, moved, decision_changes, tuple(failed))


def judge(
    stacker: Stacker, fp32: np.ndarray, lower: np.ndarray, labels: np.ndarray
) -> tuple[dict[str, ScoreChange], ScoreChange, tuple[str, ...]]:
    """Judge a precision in one runtime by logits [N, members] in the stacker's order and labels int [N].

    Returns the score changes of each member and of the stack of those that passed, and the members that may
    run at the precision: those that passed, none if the stack fails.
    """
    members = {
        name: compare_scores(before, after, labels)
        for name, before, after in zip(stacker.members, fp32.T, lower.T, strict=True)
    }
    passed = [not change.failed for change in members.values()]
    stack = compare_scores(stacker.logit(fp32), stacker.logit(np.where(passed, lower, fp32)), labels, stacker.threshold)
    usable = tuple(name for name, good in zip(members, passed, strict=True) if good and not stack.failed)
    return members, stack, usable


def table(certificates: Mapping[str, Any]) -> pd.DataFrame:
    """The lower precisions of certificate.json as a table of text: a line for each member and one for the stack."""
    lines = []
    for key, record in certificates.items():
        for name, change in (*record["members"].items(), ("stack", record["stack"])):
            used = bool(record["usable"]) if name == "stack" else name in record["usable"]
            verdict = "passes" if used else "passes, but not used"
            lines.append(
                {
                    "precision": key,
                    "": name,
                    "largest change": _text(change["largest"], ".4f"),
                    "mean": _text(change["mean"], ".5f"),
                    "Spearman": _text(change["spearman"], ".5f"),
                    "AUROC": _text(change["auroc"], "+.5f"),
                    "flips": _text(change["flips"], ".2%"),
                    "verdict": f"fails: {', '.join(change['failed'])}" if change["failed"] else verdict,
                }
            )
    return pd.DataFrame(lines)


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
