"""A run's data, ready to train on: indexed, audited, split, written to dataset.parquet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ensemble.audit import audit, train_test_shift
from ensemble.audit.headline import read_audit
from ensemble.core import artifacts
from ensemble.core.log import Log
from ensemble.data import dataset, splits
from ensemble.data.index import FileIndex
from ensemble.data.sources import LabelledImage
from ensemble.data.splits import Fractions
from ensemble.images import canonical


@dataclass(frozen=True)
class DatasetOptions:
    """Options of `prepare_dataset`, named as on the command line."""

    fractions: Fractions
    seed: int = 0
    folds: int | None = None
    skip_unreadable: bool = False
    hold_out: tuple[str, ...] = ()
    against: Path | None = None
    exclude_overlap: bool = False
    accept_shortcuts: bool = False
    canonical: bool = False
    images: Path | None = None
    data: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def prepare_dataset(run: Path, data: Sequence[LabelledImage], options: DatasetOptions, log: Log) -> pd.DataFrame:
    """Index, audit and split the data; write the run's dataset.parquet and audit.json; log what is in it.

    Raises DataError for data that cannot be used, also where metadata alone gives the class
    away, unless that is accepted or taken away on the fly.
    """
    artifacts.ensure_writable(run)
    items, indexed = dataset.index_items(data, options.skip_unreadable)
    for message in indexed.errors.values():
        log(f"left out: {message}")
    if options.against is not None:
        test = train_test_shift.read_test(options.against, options.images)
        items, indexed = _compare(items, indexed, test, options, log)
    near = dataset.near_pairs(indexed)
    frame = dataset.assemble(items, indexed, near, options.fractions, options.seed, options.hold_out)
    if options.folds is not None:
        frame["fold"] = splits.assign_folds(frame, options.folds, options.seed)
    audited = _audit(run, frame, items, indexed, near, options.notes)
    for line in audit.lines(audited):
        log(line)
    if not (options.accept_shortcuts or options.canonical):
        audit.refuse_blocked(audited, " ".join(map(str, options.data)) or items[0].root)
    _write_plan(run, frame, indexed, options.canonical, log)
    artifacts.write_parquet(artifacts.dataset_path(run), frame)
    log(f"{len(frame)} images")
    log(dataset.describe(frame))
    return frame


def _compare(
    items: list[LabelledImage], indexed: FileIndex, test: train_test_shift.TestSet, options: DatasetOptions, log: Log
) -> tuple[list[LabelledImage], FileIndex]:
    """Log what tells the data from the test set; leave out shared images if `exclude_overlap` is set."""
    shared = train_test_shift.overlapping_pairs(indexed, test)
    names = np.array([item.group or item.id for item in items], dtype=object)
    for finding in train_test_shift.compare_train_test(items, indexed, names, test, shared):
        log(str(finding))
    if not options.exclude_overlap or not shared:
        return items, indexed
    log(f"left out: {len({row for row, _ in shared})} images that the test shows too")
    return train_test_shift.exclude_overlap(items, indexed, shared)


def _audit(
    run: Path,
    frame: pd.DataFrame,
    items: list[LabelledImage],
    indexed: FileIndex,
    near: Sequence[tuple[int, int]],
    notes: Sequence[str],
) -> dict[str, Any]:
    """The audit of these rows: the stored one if they are unchanged, else a new one."""
    columns = ["id", "path", "label", "group", "source", "sha256"]
    version = {"data_sha256": artifacts.frame_sha256(frame, columns), "audit_version": audit.AUDIT_VERSION}
    stored = read_audit(run)
    if stored is not None and version.items() <= stored.items():
        return stored
    values = audit.audit(items, indexed, near, notes=notes).to_dict()
    artifacts.write_json(artifacts.audit_path(run), version | values)
    return values


def _write_plan(run: Path, frame: pd.DataFrame, indexed: FileIndex, enabled: bool, log: Log) -> None:
    path = artifacts.canonical_path(run)
    if not enabled:
        path.unlink(missing_ok=True)
        return
    plan = canonical.make_plan(indexed.headers, frame["label"].to_numpy(), left_out=0.0)
    artifacts.write_json(path, {"plan": plan.to_dict()})
    low, high = plan.quality
    log(f"canonical form as images are read: crops of {plan.size} pixels, JPEG quality {low} to {high}")
