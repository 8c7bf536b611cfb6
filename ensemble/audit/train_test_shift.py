"""Adversarial validation of a training set against a test set, and the pictures that they share.

Where a classifier tells training from test rows, scores on held-out training rows will not hold on the test.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ensemble.audit import metadata_classifier
from ensemble.audit.checks import Finding, by_class
from ensemble.audit.metadata_classifier import CONTENT_C, PROBED_PER_CLASS, SPECTRUM_C, WARN_ACCURACY, thumbnail_table
from ensemble.core.errors import DataError, join_limited
from ensemble.data import sources
from ensemble.data.index import FileIndex, index_files
from ensemble.images import near_duplicates, pixel_traces


@dataclass(frozen=True)
class TestSet:
    """Readable test images and their index. names: their paths as the user gave them."""

    names: list[str]
    files: list[Path]
    indexed: FileIndex


def read_test(path: Path, images: Path | None = None) -> TestSet:
    """Index a test set: a folder of images, or a CSV with id or path. Labels are not looked at."""
    if not path.exists():
        raise DataError(f"no test set at {path}; give a folder of images, or a CSV with id or path")
    items = sources.read_unlabelled(path, images)
    if not items:
        raise DataError(f"{path} holds no images")
    indexed = index_files([item.file for item in items], label="index test")
    if not len(indexed.rows):
        raise DataError(f"no image of {path} can be read: {join_limited(indexed.errors.values(), 3)}")
    readable = [items[i] for i in indexed.rows]
    return TestSet([item.path for item in readable], [item.file for item in readable], indexed)


def overlapping_pairs(indexed: FileIndex, test: TestSet) -> list[tuple[int, int]]:
    """Positions (training, test) of images that show the same picture, one pair a training image."""
    by_pixels = {value: i for i, value in enumerate(test.indexed.records["pixels"])}
    pairs = [(i, by_pixels[value]) for i, value in enumerate(indexed.records["pixels"]) if value in by_pixels]
    other = test.indexed
    pairs += near_duplicates.near_duplicates_between(indexed.hashes, indexed.thumbs, other.hashes, other.thumbs)
    return sorted(dict(reversed(pairs)).items())


def compare_train_test(
    items: Sequence[sources.LabelledImage],
    indexed: FileIndex,
    group_names: np.ndarray,
    test: TestSet,
    shared: Sequence[tuple[int, int]],
) -> list[Finding]:
    """How training and test differ, and how many pictures they share (`overlapping_pairs`)."""
    findings = []
    if test.indexed.errors:
        text = f"{len(test.indexed.errors)} test images cannot be read: {join_limited(test.indexed.errors.values(), 3)}"
        findings.append(Finding("corrupt", "warn", text))
    if shared:
        pairs = join_limited((f"{items[a].id} and {test.names[b]}" for a, b in shared), 3)
        text = f"{len(shared)} training images are in the test too, or nearly ({pairs}); see --exclude-overlap"
        findings.append(Finding("overlap", "warn", text))
    rng = np.random.default_rng(0)
    train_rows = np.sort(rng.permutation(len(items))[: 10 * PROBED_PER_CLASS])
    test_rows = np.sort(rng.permutation(len(test.files))[: 10 * PROBED_PER_CLASS])
    is_test = np.repeat([0, 1], [len(train_rows), len(test_rows)])
    names = np.concatenate([group_names[train_rows], np.array([f"test {i}" for i in test_rows], dtype=object)])
    paths = [items[i].path for i in train_rows] + [test.names[i] for i in test_rows]
    headers = [indexed.headers.iloc[train_rows].astype(object), test.indexed.headers.iloc[test_rows].astype(object)]
    features = metadata_classifier.file_features(pd.concat(headers, ignore_index=True).infer_objects(), paths)
    columns = [name for family, part in metadata_classifier.FAMILIES.items() if family != "names" for name in part]
    findings.append(_compare("files", features[columns], is_test, names))
    thumbs = np.concatenate([indexed.thumbs[train_rows], test.indexed.thumbs[test_rows]])
    findings.append(_compare("content", thumbnail_table(thumbs), is_test, names, linear=CONTENT_C))
    # the spectra of equally many images of both
    count = min(PROBED_PER_CLASS, len(train_rows), len(test_rows))
    files = [items[i].file for i in train_rows[:count]] + [test.files[i] for i in test_rows[:count]]
    traces = pixel_traces.measure_files(files, label="probe test")
    measured = traces.notna().all(axis=1).to_numpy()
    both = np.r_[:count, len(train_rows) : len(train_rows) + count][measured]
    spectra = traces.loc[measured, pixel_traces.SPECTRUM_COLUMNS]
    return [*findings, _compare("spectrum", spectra, is_test[both], names[both], linear=SPECTRUM_C)]


def _compare(
    kind: str, table: pd.DataFrame, is_test: np.ndarray, names: np.ndarray, linear: float | None = None
) -> Finding:
    result = metadata_classifier.cross_validate(table, is_test, names, top=4 if linear is None else 0, linear=linear)
    if result is None:
        return Finding(f"against_{kind}", "note", f"too few images to compare {kind} of training and test")
    if result.balanced_accuracy.low <= WARN_ACCURACY:
        text = f"{kind}: no clear difference between training and test ({result.balanced_accuracy})"
        return Finding(f"against_{kind}", "note", text)
    values = by_class(table, is_test, [name for name, _ in result.features], ("test", "training"))
    text = f"{kind} tells training from test with balanced accuracy {result.balanced_accuracy}"
    return Finding(f"against_{kind}", "warn", f"{text}: {values}" if values else text)


def exclude_overlap(
    items: Sequence[sources.LabelledImage], indexed: FileIndex, shared: Sequence[tuple[int, int]]
) -> tuple[list[sources.LabelledImage], FileIndex]:
    """The images that do not overlap with the test; DataError if there is none."""
    rows = np.setdiff1d(np.arange(len(items)), [row for row, _ in shared])
    if not len(rows):
        raise DataError("every training image is in the test too; nothing is left to train on")
    return [items[row] for row in rows], indexed.take(rows)
