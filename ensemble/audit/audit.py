"""Audit of a labelled data set: shortcuts that a detector could learn in place of the pictures.

If metadata alone tells the classes apart, training is refused unless the user accepts it. Everything else is a warning
or a note.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ensemble.audit import checks, metadata_classifier, train_test_shift
from ensemble.audit.checks import Finding
from ensemble.audit.metadata_classifier import (
    CONTENT_C,
    PROBED_PER_CLASS,
    SPECTRUM_C,
    WARN_ACCURACY,
    CrossValidation,
    cross_validate,
    thumbnail_table,
)
from ensemble.core.errors import DataError
from ensemble.core.names import LABELS
from ensemble.data import dataset
from ensemble.data.index import FileIndex
from ensemble.data.sources import LabelledImage, Skipped
from ensemble.images import pixel_traces

BLOCK_ACCURACY = 0.60  # balanced accuracy of metadata alone; its interval must reach below it
PIXELS_WARN_ACCURACY = 0.60  # the same for what the pixels carry; above it, a warning
AUDIT_VERSION = 1  # raised by hand when the same data would give another audit


@dataclass(frozen=True)
class Audit:
    """An audit's findings, and what they were made from.

    labels, groups: of the items. metadata, metadata_with_bytes: the accuracy of metadata alone, and with bytes per
    pixel ("null" and "null_with_bytes" in JSON). probed: rows whose pixels were probed. traces: of those rows.
    """

    items: list[LabelledImage]
    indexed: FileIndex
    labels: np.ndarray
    groups: np.ndarray
    metadata: CrossValidation | None
    metadata_with_bytes: CrossValidation | None
    probed: np.ndarray
    traces: pd.DataFrame
    findings: tuple[Finding, ...]

    @property
    def blocked(self) -> bool:
        """Whether training must not start without --accept-shortcuts."""
        return any(finding.severity == "block" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "images": len(self.items),
            "ai": int(self.labels.sum()),
            "groups": len(set(self.groups)),
            "headline": headline(self),
            "blocked": self.blocked,
            "null": self.metadata.to_dict() if self.metadata else None,
            "null_with_bytes": self.metadata_with_bytes.to_dict() if self.metadata_with_bytes else None,
            "findings": [vars(finding) for finding in self.findings],
        }


def audit(
    items: list[LabelledImage],
    indexed: FileIndex,
    near: Sequence[tuple[int, int]],
    skipped: Skipped | None = None,
    notes: Sequence[str] = (),
) -> Audit:
    """Look for shortcuts among readable, indexed images; `items` are those of `indexed.rows`.

    near: their near-duplicates, from `dataset.near_pairs`. skipped: images of kinds that cannot be read. notes: how
    labels were read.
    """
    labels = np.array([item.label for item in items])
    groups = np.array(dataset.group_names(items, indexed, near), dtype=object)
    features = metadata_classifier.file_features(indexed.headers, [item.path for item in items])
    names = [name for family in metadata_classifier.FAMILIES.values() for name in family]
    alone = cross_validate(features[names], labels, groups, top=5)
    with_bytes = cross_validate(features[[*names, *metadata_classifier.BYTES]], labels, groups, top=5)
    rng = np.random.default_rng(0)
    classes = [rng.permutation(np.flatnonzero(labels == label))[:PROBED_PER_CLASS] for label in (0, 1)]
    rows = np.sort(np.concatenate(classes))
    traces = pixel_traces.measure_files([items[row].file for row in rows])
    findings = [
        *_metadata_findings(alone, with_bytes),
        *_family_findings(features, labels, groups),
        *checks.duplicates(items, indexed, near),
        *checks.sources(items),
        *checks.polarity(items, indexed.headers, notes),
        *checks.numbering(items),
        *checks.left_out(indexed, skipped),
        *checks.balance(labels),
        *_pixel_findings(indexed, labels, groups, rows, traces),
    ]
    return Audit(items, indexed, labels, groups, alone, with_bytes, rows, traces, ordered(findings))


def ordered(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Sorted by severity: block, warn, note."""
    return tuple(sorted(findings, key=lambda finding: ("block", "warn", "note").index(finding.severity)))


def headline(audit: Audit) -> str:
    """How well metadata alone does, in one line, to stand beside every score made from this data."""
    if audit.metadata is None:
        return "Metadata alone: too few groups to tell whether it gives the class away."
    accuracy = audit.metadata.balanced_accuracy
    weak = "a weak shortcut" if accuracy.low > WARN_ACCURACY else "no shortcut found"
    verdict = "a shortcut" if accuracy.low > BLOCK_ACCURACY else weak
    return f"Metadata alone tells ai from real with balanced accuracy {accuracy}: {verdict}."


def lines(values: Mapping[str, Any]) -> list[str]:
    """An audit as lines of text; `values` as of `Audit.to_dict`."""
    return [values["headline"], *(str(Finding(**finding)) for finding in values["findings"])]


def refuse_blocked(values: Mapping[str, Any], data: str) -> None:
    """Raise DataError if the audit, as of `Audit.to_dict`, blocks training."""
    if values["blocked"]:
        reasons = "; ".join(finding["text"] for finding in values["findings"] if finding["severity"] == "block")
        raise DataError(
            f"the files give the class away: {reasons}. Take that away with: python cli.py canonicalise {data} DIR; "
            "or as images are read, with --canonical; or train as it is, with --accept-shortcuts"
        )


def _metadata_findings(alone: CrossValidation | None, with_bytes: CrossValidation | None) -> Iterator[Finding]:
    if alone is None or with_bytes is None:
        yield Finding("null", "note", "too few groups a class to cross-validate what metadata alone can tell")
        return
    accuracy, more = alone.balanced_accuracy, with_bytes.balanced_accuracy
    if accuracy.low > BLOCK_ACCURACY:
        features = ", ".join(name for name, _ in alone.features) or "several together"
        text = f"metadata alone reaches balanced accuracy {accuracy}, mostly by {features}"
        yield Finding("null", "block", text)
    if more.low > max(WARN_ACCURACY, accuracy.value + 0.02):
        severity = "warn" if more.low > PIXELS_WARN_ACCURACY else "note"
        yield Finding("bytes", severity, f"with bytes per pixel metadata reaches {more}; content drives it too")


def _family_findings(features: pd.DataFrame, labels: np.ndarray, groups: np.ndarray) -> Iterator[Finding]:
    for family, columns in metadata_classifier.FAMILIES.items():
        result = cross_validate(features[list(columns)], labels, groups, top=3)
        if result is not None and result.balanced_accuracy.low > WARN_ACCURACY:
            values = checks.by_class(features, labels, [name for name, _ in result.features] or columns)
            text = f"balanced accuracy {result.balanced_accuracy} by {family} alone: {values}"
            yield Finding(family, "warn", text)


# kind of finding: columns, what they are, what it may mean, C of the logistic regression (None: boosted trees)
_PIXEL_PROBES = {
    "hidden_jpeg": (
        ["comb", "step", "grid_7", "grid_most", "grid_off", *pixel_traces.DCT_COLUMNS],
        "traces of earlier JPEG compression in the pixels",
        "canonicalise levels them",
        None,
    ),
    "resampling": (
        [*pixel_traces.RESAMPLING_COLUMNS, *pixel_traces.SPECTRUM_COLUMNS],
        "spectra of the pixels",
        "this may be the generator's own trace, or that one class was resized",
        SPECTRUM_C,
    ),
}


def _pixel_findings(
    indexed: FileIndex, labels: np.ndarray, groups: np.ndarray, rows: np.ndarray, traces: pd.DataFrame
) -> Iterator[Finding]:
    yield from checks.jpeg_in_lossless(indexed.headers.iloc[rows], traces, labels[rows])
    content = cross_validate(thumbnail_table(indexed.thumbs[rows]), labels[rows], groups[rows], linear=CONTENT_C)
    if content is not None and content.balanced_accuracy.low > PIXELS_WARN_ACCURACY:
        text = f"a thumbnail of 8x8 pixels tells {content.balanced_accuracy}: the classes show different things"
        yield Finding("content", "warn", text)
    measured = traces.notna().all(axis=1).to_numpy()
    part = rows[measured]
    for kind, (columns, what, meaning, strength) in _PIXEL_PROBES.items():
        result = cross_validate(traces.loc[measured, columns], labels[part], groups[part], linear=strength)
        if result is not None and result.balanced_accuracy.low > WARN_ACCURACY:
            yield Finding(kind, "note", f"{what} tell {result.balanced_accuracy}; {meaning}")


def audit_data(
    items: Sequence[LabelledImage],
    notes: Sequence[str],
    skipped: Skipped | None = None,
    against: Path | None = None,
    images: Path | None = None,
) -> tuple[Audit, train_test_shift.TestSet | None]:
    """Index and audit labelled images, with a test set if one is given; broken files are findings."""
    test = train_test_shift.read_test(against, images) if against is not None else None
    readable, indexed = dataset.index_items(items, skip_unreadable=True)
    for label, name in enumerate(LABELS):
        if not any(item.label == label for item in readable):
            raise DataError(f"no {name} image can be read: {next(iter(indexed.errors.values()))}")
    audited = audit(readable, indexed, dataset.near_pairs(indexed), skipped, notes)
    if test is None:
        return audited, None
    overlap = train_test_shift.overlapping_pairs(indexed, test)
    more = train_test_shift.compare_train_test(readable, indexed, audited.groups, test, overlap)
    return replace(audited, findings=ordered([*audited.findings, *more])), test
