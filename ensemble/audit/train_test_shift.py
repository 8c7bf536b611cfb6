"""A training set against a test set: can they be told apart, and do they share pictures?

Adversarial validation: where a classifier tells training from test rows, scores on held-out
training rows will not hold on the test.
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
    """Readable test images, as indexed; `names` are how the user calls them."""

    names: list[str]
    files: list[Path]
    indexed: FileIndex


def read_test(path: Path, images: Path | None = None) -> TestSet:
    """Index a test set: a folder of images, or a CSV with id or path. Labels are not looked at."""
    if not path.exists():
        raise DataError(f"no test set at {path}; give a folder of images, or a CSV with id or path")
    items = sources.read_unlabelled(path, images)
    names, found = [item.path for item in items], [item.file for item in items]
    if not found:
        raise DataError(f"{path} holds no images")
    indexed = index_files(found, label="index test")
    if not len(indexed.rows):
        raise DataError(f"no image of {path} can be read: {join_limited(indexed.errors.values(), 3)}")
    return TestSet([names[i] for i in indexed.rows], [found[i] for i in indexed.rows], indexed)


def overlapping_pairs(indexed: FileIndex, test: TestSet) -> list[tuple[int, int]]:
    """Positions (training, test) of images that show the same picture, one pair a training image."""
    by_pixels = {value: i for i, value in enumerate(test.indexed.records["pixels"])}
    pairs = [(i, by_pixels[value]) for i, value in enumerate(indexed.records["pixels"]) if value in by_pixels]
    shown = test.indexed
    pairs += near_duplicates.near_duplicates_between(indexed.hashes, indexed.thumbs, shown.hashes, shown.thumbs)
    return sorted(dict(reversed(pairs)).items())


def compare_train_test(
    items: Sequence[sources.LabelledImage],
    indexed: FileIndex,
    group_names: np.ndarray,
    test: TestSet,
    shared: Sequence[tuple[int, int]],
) -> list[Finding]:
    """What training and test differ in, and the pictures they share (`overlapping`)."""
    found = []
    if test.indexed.errors:
        text = f"{len(test.indexed.errors)} test images cannot be read: {join_limited(test.indexed.errors.values(), 3)}"
        found.append(Finding("corrupt", "warn", text))
    if shared:
        pairs = join_limited((f"{items[a].id} and {test.names[b]}" for a, b in shared), 3)
        text = f"{len(shared)} training images are in the test too, or nearly ({pairs}); see --exclude-overlap"
        found.append(Finding("overlap", "warn", text))
    rng = np.random.default_rng(0)
    train_rows = np.sort(rng.permutation(len(items))[: 10 * PROBED_PER_CLASS])
    test_rows = np.sort(rng.permutation(len(test.files))[: 10 * PROBED_PER_CLASS])
    is_test = np.repeat([0, 1], [len(train_rows), len(test_rows)])
    own = np.array([f"test {i}" for i in test_rows], dtype=object)
    names = np.concatenate([group_names[train_rows], own])
    paths = [items[i].path for i in train_rows] + [test.names[i] for i in test_rows]
    headers = pd.concat(
        [indexed.headers.iloc[train_rows].astype(object), test.indexed.headers.iloc[test_rows].astype(object)],
        ignore_index=True,
    ).infer_objects()
    features = metadata_classifier.file_features(headers, paths)
    columns = [name for family, part in metadata_classifier.FAMILIES.items() if family != "names" for name in part]
    found += _probe("files", features[columns], is_test, names)
    thumbs = np.concatenate([indexed.thumbs[train_rows], test.indexed.thumbs[test_rows]])
    found += _probe("content", thumbnail_table(thumbs), is_test, names, linear=CONTENT_C)
    return found + _pixels([items[i].file for i in train_rows], [test.files[i] for i in test_rows], names)


def _pixels(train: Sequence[Path], test: Sequence[Path], names: np.ndarray) -> list[Finding]:
    """The spectra of equally many images of both."""
    count = min(PROBED_PER_CLASS, len(train), len(test))
    traces = pixel_traces.measure_files([*train[:count], *test[:count]], label="probe test")
    kept = np.concatenate([names[:count], names[len(train) : len(train) + count]])
    is_test = np.repeat([0, 1], count)
    measured = traces.notna().all(axis=1).to_numpy()
    return _probe(
        "spectrum",
        traces.loc[measured, pixel_traces.SPECTRUM_COLUMNS],
        is_test[measured],
        kept[measured],
        linear=SPECTRUM_C,
    )


def _probe(
    kind: str, table: pd.DataFrame, is_test: np.ndarray, names: np.ndarray, linear: float | None = None
) -> list[Finding]:
    probe = metadata_classifier.cross_validate(table, is_test, names, top=4 if linear is None else 0, linear=linear)
    if probe is None:
        return [Finding(f"against_{kind}", "note", f"too few images to compare {kind} of training and test")]
    if probe.balanced_accuracy.low <= WARN_ACCURACY:
        text = f"{kind}: training and test cannot be told apart ({probe.balanced_accuracy})"
        return [Finding(f"against_{kind}", "note", text)]
    seen = (
        by_class(table, is_test, [name for name, _ in probe.features], ("test", "training")) if probe.features else ""
    )
    text = f"{kind} tells training from test with balanced accuracy {probe.balanced_accuracy}"
    return [Finding(f"against_{kind}", "warn", f"{text}: {seen}" if seen else text)]


def exclude_overlap(
    items: Sequence[sources.LabelledImage], indexed: FileIndex, shared: Sequence[tuple[int, int]]
) -> tuple[list[sources.LabelledImage], FileIndex]:
    """The images that do not overlap with the test."""
    gone = {row for row, _ in shared}
    keep = np.array([row for row in range(len(items)) if row not in gone], dtype=np.int64)
    if not len(keep):
        raise DataError("every training image is in the test too; nothing is left to train on")
    return [items[row] for row in keep], indexed.take(keep)
