"""The audit's checks that need no classifier: duplicates, sources, polarity, file numbers, unreadable files."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ensemble.core import metrics
from ensemble.core.errors import join_limited
from ensemble.core.names import LABELS, NEGATIVE_NAMES, POSITIVE_NAMES
from ensemble.data import dataset
from ensemble.data.index import FileIndex
from ensemble.data.sources import LabelledImage, Skipped

NUMBERING_AUROC = 0.9  # AUROC of the numbers in file names that is worth a note
SOURCE_CRAMERS_V = 0.30  # Cramer's V between class and source that is worth a warning
FEW_PAIRS_SHARE = 0.01  # near-duplicates across the classes, as a share of all images, that are no more than a note
IMBALANCE_RATIO = 4.0  # images of one class for one of the other
COMB_FIT = 0.35  # mean fit of DCT coefficients to multiples of a step; above it, lossless pixels were once a JPEG


@dataclass(frozen=True)
class Finding:
    """One thing the audit found. severity: block, warn or note."""

    kind: str
    severity: str
    text: str

    def __str__(self) -> str:
        return f"  {self.severity:5}  {self.kind}: {self.text}"


def duplicates(
    items: Sequence[LabelledImage], indexed: FileIndex, near: Sequence[tuple[int, int]]
) -> Iterator[Finding]:
    """Copies and near-duplicates: across the classes, and across groups that the user gave."""
    pixels = list(indexed.records["pixels"])
    copies, conflicts = dataset.equal_pairs(pixels), dataset.conflicting(items, pixels)
    if conflicts:
        text = f"{len(conflicts)} images stand in both classes with equal pixels ({_pairs(items, conflicts)})"
        yield Finding("conflicts", "block", text)
    known = {(a, b) for a, b in near if items[a].group is not None and items[a].group == items[b].group}
    near = sorted((a, b) for a, b in set(near) - known if pixels[a] != pixels[b])
    if known:
        yield Finding("duplicates", "note", f"{len(known)} near-duplicate pairs lie within groups of yours")
    across = [(a, b) for a, b in near if items[a].label != items[b].label]
    if across:
        text = f"{len(across)} near-duplicate pairs across the classes, kept in one split ({_pairs(items, across)})"
        yield Finding("duplicates", "warn" if len(across) > FEW_PAIRS_SHARE * len(items) else "note", text)
    joined = [(a, b) for a, b in (*copies, *near) if items[a].group and items[b].group not in (None, items[a].group)]
    if joined:
        pairs = _pairs(items, joined)
        text = f"{len(joined)} copies or near-duplicates lie in different groups of yours, now joined ({pairs})"
        yield Finding("duplicates", "warn", text)
    if same := len(copies) + len(near) - len(conflicts) - len(across):
        text = f"{same} copies or near-duplicates within a class, each kept in one split with its twin"
        yield Finding("duplicates", "warn" if same / len(items) > 0.05 else "note", text)


def _pairs(items: Sequence[LabelledImage], pairs: Sequence[tuple[int, int]]) -> str:
    return join_limited((f"{items[a].id} and {items[b].id}" for a, b in pairs), 2)


def sources(items: Sequence[LabelledImage]) -> list[Finding]:
    """Sources of one class alone, and class bound to source."""
    table = pd.crosstab(np.array([item.source or "" for item in items]), np.array([item.label for item in items]))
    if len(table) < 2 or table.shape[1] < 2:
        return []
    single = table[(table == 0).any(axis=1)]
    strength = cramers_v(table.to_numpy())
    if len(single):
        names = join_limited(
            f"{name} ({LABELS[int(row.to_numpy().argmax())]} {int(row.sum())})" for name, row in single.iterrows()
        )
        text = f"{len(single)} of {len(table)} sources hold one class alone: {names}; Cramer's V {strength:.2f}"
    elif strength > SOURCE_CRAMERS_V:
        text = f"class and source go together: Cramer's V {strength:.2f}"
    else:
        return []
    return [Finding("source", "warn", text)]


def cramers_v(counts: np.ndarray) -> float:
    """Association of two categories from their table of counts, 0 to 1, corrected for small numbers.

    Bergsma, "A bias-correction for Cramer's V and Tschuprow's T" (2013).
    """
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum()
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0, keepdims=True) / total
    phi2 = float((((counts - expected) ** 2) / np.maximum(expected, 1e-12)).sum() / total)
    r, k = counts.shape
    if total < 2 or min(r, k) < 2:
        return 0.0
    phi2 = max(0.0, phi2 - (k - 1) * (r - 1) / (total - 1))
    r, k = r - (r - 1) ** 2 / (total - 1), k - (k - 1) ** 2 / (total - 1)
    return float(min(1.0, (phi2 / max(min(r - 1, k - 1), 1e-12)) ** 0.5))


def polarity(items: Sequence[LabelledImage], headers: pd.DataFrame, notes: Sequence[str]) -> Iterator[Finding]:
    """Signs that the labels are the wrong way round, and a request to confirm how they were read."""
    labels = np.array([item.label for item in items])
    class_in_path = np.array([_class_in_path(item.path) for item in items])
    signs = (
        (headers["generator_text"].to_numpy() > 0, 0, "name a generator in their metadata, yet are labelled real"),
        (headers["camera"].to_numpy() >= 2, 1, "carry a camera's EXIF, yet are labelled ai"),
        (class_in_path == 1, 0, "lie in folders or have names that say ai, yet are labelled real"),
        (class_in_path == 0, 1, "lie in folders or have names that say real, yet are labelled ai"),
    )
    for marked, wrong, text in signs:
        count, right = int((marked & (labels == wrong)).sum()), int((marked & (labels != wrong)).sum())
        if count:
            swapped = count > 2 * right and count >= 0.05 * (labels == wrong).sum()
            hint = "; are the labels swapped? See --classes" if swapped else ""
            yield Finding("polarity", "warn" if swapped else "note", f"{count} images {text}{hint}")
    if notes:
        yield Finding("polarity", "note", f"confirm how the labels were read: {'; '.join(notes)}")


def _class_in_path(path: str) -> int:
    """1 or 0 if the words of an image's path name one class alone, else -1."""
    words = set("".join(c if c.isalnum() else " " for c in path.rpartition(".")[0]).casefold().split())
    ai, real = bool(words & POSITIVE_NAMES), bool(words & NEGATIVE_NAMES)
    return -1 if ai == real else int(ai)


def numbering(items: Sequence[LabelledImage]) -> list[Finding]:
    """File names whose numbers go with the class: one class was numbered after the other."""
    labels = np.array([item.label for item in items])
    digits = ["".join(re.findall(r"\d", item.path.rpartition("/")[2]))[-12:] for item in items]
    order = metrics.auroc(labels, np.array([float(text or -1) for text in digits]))
    if max(order, 1 - order) < NUMBERING_AUROC:
        return []
    first, last = ("real", "ai") if order > 0.5 else ("ai", "real")
    text = f"numbers in the names of {first} come before those of {last}; no detector reads them"
    return [Finding("names", "note", text)]


def left_out(indexed: FileIndex, skipped: Skipped | None) -> Iterator[Finding]:
    """Broken files, and kinds of images that cannot be read."""
    if indexed.errors:
        text = f"{len(indexed.errors)} images cannot be read: {join_limited(indexed.errors.values(), 3)}"
        yield Finding("corrupt", "warn", text)
    if skipped:
        kinds = join_limited(f"{count} {suffix} in {folder}" for (folder, suffix), count in sorted(skipped.items()))
        yield Finding("skipped", "warn", f"images of a kind that cannot be read are left out: {kinds}; convert them")


def balance(labels: np.ndarray) -> list[Finding]:
    """Classes of very different size."""
    counts = np.bincount(labels, minlength=2)
    if counts.max() <= IMBALANCE_RATIO * counts.min():
        return []
    return [Finding("balance", "note", f"{counts[1]} ai against {counts[0]} real images")]


def jpeg_in_lossless(headers: pd.DataFrame, traces: pd.DataFrame, labels: np.ndarray) -> Iterator[Finding]:
    """Lossless files whose pixels went through JPEG, by class."""
    lossless = (headers["lossless"] > 0).to_numpy()
    hidden = (traces["comb"] > COMB_FIT).to_numpy()
    sides = [hidden[lossless & (labels == label)] for label in (0, 1)]
    if not (len(sides[0]) and len(sides[1])):
        return
    shares, pooled = [float(side.mean()) for side in sides], float(np.concatenate(sides).mean())
    error = (pooled * (1 - pooled) * (1 / len(sides[0]) + 1 / len(sides[1]))) ** 0.5
    if abs(shares[1] - shares[0]) > max(0.1, 3 * error):
        text = f"JPEG grids inside lossless files: {shares[1]:.0%} of ai's and {shares[0]:.0%} of real's"
        yield Finding("hidden_jpeg", "warn", text)


def by_class(
    features: pd.DataFrame, labels: np.ndarray, columns: Sequence[str], sides: tuple[str, str] = ("ai", "real")
) -> str:
    """What the rows labelled 1 and 0 have in these columns, as text: medians of numbers, the commonest texts."""
    parts = []
    for name in list(columns)[:3]:
        values = features[name]
        if values.nunique() < 2:
            continue
        if pd.api.types.is_numeric_dtype(values) and values.nunique() > 2:
            means = [f"{values[labels == label].median():.4g}" for label in (1, 0)]
        else:
            texts = values.map("{:g}".format) if pd.api.types.is_numeric_dtype(values) else values.astype(str)
            means = [_commonest(texts[labels == label]) for label in (1, 0)]
        parts.append(f"{name} {means[0]} in {sides[0]}, {means[1]} in {sides[1]}")
    return "; ".join(parts)


def _commonest(texts: pd.Series) -> str:
    (text, count), *_ = Counter(texts).most_common(1)
    return f"{text or 'none'} ({count / len(texts):.0%})"
