"""Audit and canonical form of data as the user names it: read, index, and hand on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ensemble import against as other
from ensemble import audit, canonicalise
from ensemble.core import artifacts
from ensemble.core.errors import DataError
from ensemble.core.names import LABELS
from ensemble.data import dataset, sources
from ensemble.data.splits import Fractions
from ensemble.images.canonical import make_plan


def audit_data(
    items: Sequence[sources.Labelled],
    notes: Sequence[str],
    skipped: sources.Skipped | None = None,
    against: Path | None = None,
    images: Path | None = None,
) -> tuple[audit.Audited, other.Test | None]:
    """Index and audit labelled images, with a test set if one is given; broken files are findings."""
    test = other.read_test(against, images) if against is not None else None
    kept, indexed = dataset.index_items(items, skip_unreadable=True)
    for label, name in enumerate(LABELS):
        if not any(item.label == label for item in kept):
            raise DataError(f"no {name} image can be read: {next(iter(indexed.errors.values()))}")
    audited = audit.audit(kept, indexed, dataset.near_pairs(indexed), skipped, notes)
    if test is None:
        return audited, None
    more = other.compare(kept, indexed, audited.groups, test, other.overlapping(indexed, test))
    found = audit.ordered([*audited.audit.findings, *more])
    return replace(audited, audit=replace(audited.audit, findings=found)), test


def canonicalise_data(
    data: Sequence[Path],
    folder: Path,
    images: Path | None,
    classes: Mapping[str, str],
    positive: str | None,
    group_column: str,
    skip_unreadable: bool,
    size: int | None,
    quality: tuple[int, int] | None,
    seed: int,
) -> list[str]:
    """Write the canonical form of labelled data; returns what should be said of it."""
    if quality is not None and quality[0] > quality[1]:
        raise DataError(f"--quality {quality[0]} {quality[1]}: the lower one comes first")
    target = folder.resolve()
    if any(path.resolve().is_relative_to(target) or target.is_relative_to(path.resolve()) for path in data):
        raise DataError(f"{folder} holds the data itself, or lies in it; name another folder")
    artifacts.ensure_writable(target.parent)
    canonicalise.check_output(folder)
    items, notes = sources.read_data(data, images, classes, positive, group_column)
    kept, indexed = dataset.index_items(items, skip_unreadable)
    plan = make_plan(indexed.headers, np.array([item.label for item in kept]), size, quality)
    near = dataset.near_pairs(indexed)
    frame = dataset.assemble(kept, indexed, near, Fractions(), seed, check=False)
    written = canonicalise.canonicalise(frame, plan, folder, seed)
    low, high = plan.quality
    return [
        *notes,
        f"crops of {plan.size} pixels, JPEG quality {low} to {high}",
        *canonicalise.explain(written, frame),
        *(f"left out: {message}" for message in indexed.errors.values()),
    ]
