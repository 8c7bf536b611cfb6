"""Exported files against what they were made from: at fp32 the member, at a lower precision the fp32 file.

At fp32 a logit may differ by 0.001. Below fp32 the scores may differ, and what is done with them
may not. On at least 256 real images that no member was fitted on, for every member and for the stack:

    change  |p_lower - p_fp32|, its largest and its mean; reported
    spearman  correlation of the ranks of the logits, ties sharing theirs; reported
    auroc   AUROC(lower) - AUROC(fp32); at most 0.001 either way
    flips   share of images on the other side of the threshold; at most 0.5 %

p is sigmoid(logit) at 0.5 for a member, target at the stack's threshold for the stack. The two
limits are the project's requirement for a precision to be used unasked. With 256 images one flip
is 0.4 % and two are too many: fewer images could not tell 0.5 % from nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import auroc, sigmoid
from ensemble.models.runner import Runner
from ensemble.stacking.stacker import Stacker

TOLERANCE = 1e-3  # largest difference of a logit, fp32
BATCH_SIZES = (1, 2, 7)

LEAST_IMAGES, MOST_IMAGES = 256, 1024  # below fp32
AUROC_LIMIT, FLIPS_LIMIT = 1e-3, 5e-3
ROUNDING = 1e-9  # 0.951 - 0.95 is a little more than 0.001


def certify(
    original: Runner,
    exported: Runner,
    pixels: np.ndarray,
    tolerance: float = TOLERANCE,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> dict[str, Any]:
    """Compare logits of the same pixels, uint8 [N, S, S, 3], at several batch sizes.

    Returns what goes into certificate.json; raises ArtifactError where any logit is not
    finite or differs by more than `tolerance`.
    """
    expected = original.run(pixels).astype(np.float64)
    differences = {}
    for size in batch_sizes:
        parts = [exported.run(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        differences[size] = np.abs(np.concatenate(parts).astype(np.float64) - expected)
    largest = {size: float(difference.max()) for size, difference in differences.items()}
    # written so that NaN fails too
    if not all(value <= tolerance for value in largest.values()):
        seen = ", ".join(f"{value:.2g} at batch {size}" for size, value in largest.items())
        raise ArtifactError(
            f"{exported.name}: the exported file's logits differ from the member's by {seen} "
            f"(tolerance {tolerance:g}); it was not kept"
        )
    return {
        "images": len(pixels),
        "batch_sizes": list(batch_sizes),
        "max_abs_difference": max(largest.values()),
        "mean_abs_difference": float(np.mean(list(differences.values()))),
        "tolerance": tolerance,
    }


@dataclass(frozen=True)
class Change:
    """How far one model's scores at a lower precision lie from those at fp32; NaN where they are not finite.

    largest, mean: of |p_lower - p_fp32|. failed: what is beyond its limit, in words.
    """

    largest: float
    mean: float
    spearman: float
    auroc: float
    flips: float
    failed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values: null for NaN."""
        figures = {key: None if value != value else value for key, value in vars(self).items()}
        return {**figures, "failed": list(self.failed)}


@dataclass(frozen=True)
class Verdict:
    """What one precision does in one runtime: to each member, and to the stack of the members that passed.

    usable: those members, the others stay fp32; empty if the stack fails.
    """

    members: Mapping[str, Change]
    stack: Change
    usable: tuple[str, ...]


def compare(fp32: np.ndarray, lower: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> Change:
    """Logits float [N] of the same images at fp32 and at a lower precision; labels int [N] with ai = 1."""
    if not (np.isfinite(fp32).all() and np.isfinite(lower).all()):
        return Change(np.nan, np.nan, np.nan, np.nan, np.nan, ("logits that are not finite",))
    before, after = sigmoid(fp32), sigmoid(lower)
    change = np.abs(after - before)
    ranks = [pd.Series(logits).rank().to_numpy() for logits in (fp32, lower)]
    moved = auroc(labels, lower) - auroc(labels, fp32)
    flips = float(((before >= threshold) != (after >= threshold)).mean())
    failed = []
    if not abs(moved) <= AUROC_LIMIT + ROUNDING:
        failed.append(f"AUROC by {moved:+.4f}")
    if not flips <= FLIPS_LIMIT:
        failed.append(f"{flips:.2%} flipped")
    return Change(float(change.max()), float(change.mean()), _correlation(*ranks), moved, flips, tuple(failed))


def judge(stacker: Stacker, fp32: np.ndarray, lower: np.ndarray, labels: np.ndarray) -> Verdict:
    """Logits [N, members] in the stacker's order, labels int [N]. A column may be equal in both."""
    members = {
        name: compare(before, after, labels)
        for name, before, after in zip(stacker.members, fp32.T, lower.T, strict=True)
    }
    passed = [not change.failed for change in members.values()]
    stack = compare(stacker.logit(fp32), stacker.logit(np.where(passed, lower, fp32)), labels, stacker.threshold)
    usable = tuple(name for name, good in zip(members, passed, strict=True) if good and not stack.failed)
    return Verdict(members, stack, usable)


def table(certificates: Mapping[str, Any]) -> pd.DataFrame:
    """What certificate.json says of lower precisions, a line a member and one for the stack, as text."""
    lines = [
        (key, name, change, name in made["usable"] if name != "stack" else bool(made["usable"]))
        for key, made in certificates.items()
        for name, change in (*made["members"].items(), ("stack", made["stack"]))
    ]
    return pd.DataFrame(
        {
            "precision": [key for key, *_ in lines],
            "": [name for _, name, *_ in lines],
            "largest change": [_text(change["largest"], ".4f") for *_, change, _ in lines],
            "mean": [_text(change["mean"], ".5f") for *_, change, _ in lines],
            "Spearman": [_text(change["spearman"], ".5f") for *_, change, _ in lines],
            "AUROC": [_text(change["auroc"], "+.5f") for *_, change, _ in lines],
            "flips": [_text(change["flips"], ".2%") for *_, change, _ in lines],
            "verdict": [_verdict(change, used) for *_, change, used in lines],
        }
    )


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _verdict(change: Mapping[str, Any], used: bool) -> str:
    if change["failed"]:
        return f"fails: {', '.join(change['failed'])}"
    return "passes" if used else "passes, but not used"


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(first, second)[0, 1])
