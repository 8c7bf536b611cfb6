"""The `select` job: read, embed, choose, write; then the ablation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ensemble.core import artifacts, feature_cache
from ensemble.core.errors import DataError, join_limited
from ensemble.core.log import Log
from ensemble.data.sources import UNLABELLED, LabelledImage
from ensemble.models import features
from ensemble.models.torch_runner import choose_device
from ensemble.selection import neighbours, select
from ensemble.selection.ablation import ablate
from ensemble.selection.data import SelectionData, SelectOptions, read_pools, read_test
from ensemble.selection.output import ABLATION, check_output, write_selection
from ensemble.selection.select import Pool, Selection
from ensemble.training import train_all


@dataclass(frozen=True)
class SelectionResult:
    """What was chosen, and what the ablation needs.

    frame: selection.csv with a label in every row. dropped_test: number of pool images dropped as
    near-duplicates of test images. quartiles: of distances, for the chosen and for random images.
    counts: images by class.
    """

    frame: pd.DataFrame
    chosen: Selection
    dropped_test: int
    quartiles: dict[str, dict[str, float]]
    data: SelectionData
    counts: dict[int, int]


def select_images(options: SelectOptions, log: Log) -> SelectionResult:
    """Choose images and write the output folder; all errors that can be known early come before an image is read."""
    items, tests, counts = _read(options, log)
    device = choose_device(options.device)
    embedder = features.load_embedder(options.embedder, device)
    log(f"{len(tests)} test images, {len(items)} in the pool, embedded by {embedder.name} on {device}")
    data, dropped = _embed(options, items, tests, embedder, log)
    vectors, test_vectors = data.pool.features.vectors, data.test.vectors
    chosen = select.select(data.pool, test_vectors, counts, options.seed, options.clusters)
    random = select.random_rows(data.pool, counts, options.seed)
    quartiles = {
        "chosen, to the test image that drew it": _quartiles(chosen.distances),
        "chosen, to the nearest test image": _quartiles(select.nearest_distances(vectors[chosen.rows], test_vectors)),
        "random draw, to the nearest test image": _quartiles(select.nearest_distances(vectors[random], test_vectors)),
    }
    record = {
        "test": str(options.test),
        "pools": [str(pool) for pool in options.pools],
        "embedder": embedder.name,
        "embedder_sha256": embedder.sha256,
        "count": options.count,
        "balance": None if UNLABELLED in counts else counts[1] / options.count,
        "seed": options.seed,
        "near_duplicates_of_test": dropped,
        "near_duplicates_of_chosen": chosen.duplicates,
        "distances": quartiles,
    }
    frame = write_selection(options.output, data.items, chosen, data.test_items, options.copy, record)
    return SelectionResult(frame, chosen, dropped, quartiles, data, counts)


def ablate_selection(options: SelectOptions, result: SelectionResult, log: Log) -> dict[str, Any]:
    """Run `ablation.ablate` on the result, and write its report beside selection.csv."""
    report = ablate(result.data, result.counts, options, log)
    artifacts.write_json(options.output / ABLATION, report)
    return report


def _read(options: SelectOptions, log: Log) -> tuple[list[LabelledImage], list[LabelledImage], dict[int, int]]:
    """The pool's images, the test's, and how many of each class to choose. Raises for what cannot work."""
    if same := [pool for pool in options.pools if pool.resolve() == options.test.resolve()]:
        raise DataError(f"{same[0]} is both --test and --pool; name a pool of other images")
    check_output(options.output, [options.test, *options.pools])
    features.find_embedder(options.embedder)
    if options.recipe is not None:
        train_all.check_ready([options.load_recipe()], options.device)
    elif options.test_labels is not None:
        raise DataError("--test-labels is for --ablate; name a recipe with it, or leave it out")
    tests = read_test(options.test, options.reading.images, options.test_labels, labelled=options.recipe is not None)
    items, notes = read_pools(options.pools, options.reading)
    for note in notes:
        log(note)
    neighbours.check_search(len(items))
    labels = np.array([item.label for item in items])
    unlabelled = bool((labels == UNLABELLED).all())
    if unlabelled and (options.balance is not None or options.recipe is not None):
        option = "--balance" if options.balance is not None else "--ablate"
        raise DataError(
            f"{option} needs a pool of known classes; sort {join_limited(options.pools)} into ai/ and real/"
        )
    counts = select.class_counts(labels, options.count, options.balance)
    if options.recipe is not None and not all(counts.values()):
        raise DataError("--ablate trains on both classes; choose a --balance between 0 and 1")
    present = {label: int((labels == label).sum()) for label in counts}
    if any(present[label] < count for label, count in counts.items()):
        raise DataError(
            f"--count {options.count} needs {select.describe_counts(counts)}, but the pool holds "
            f"{select.describe_counts(present)}; "
            "lower --count, change --balance, or add a --pool"
        )
    return items, tests, counts


def _embed(
    options: SelectOptions,
    items: Sequence[LabelledImage],
    tests: Sequence[LabelledImage],
    embedder: features.Embedder,
    log: Log,
) -> tuple[SelectionData, int]:
    """Features of pool and test, and the number of pool images that are near-duplicates of test images.

    Unreadable test images are an error unless they are to be skipped; those of the pool are logged and left out.
    """
    cache = feature_cache.default_path() if options.cache else None
    test = features.embed_images([item.file for item in tests], embedder, cache, title="embed test")
    if test.errors and not (options.skip_unreadable and len(test.rows)):
        raise DataError(
            f"{len(test.errors)} of {len(tests)} test images cannot be read: {join_limited(test.errors.values(), 3)}; "
            "repair or remove them, or leave them out with --skip-unreadable"
        )
    for message in test.errors.values():
        log(f"left out of the test: {message}")
    pool = features.embed_images([item.file for item in items], embedder, cache, title="embed pool")
    for message in pool.errors.values():
        log(f"left out of the pool: {message}")
    if not len(pool.rows):
        raise DataError(f"no image of {len(items)} in the pool can be read; name another --pool")
    items = [items[row] for row in pool.rows]
    labels = np.array([item.label for item in items], dtype=np.int64)
    conflicting = select.conflicting_labels(pool, labels)
    if conflicting.any():
        files = join_limited((items[row].file for row in np.flatnonzero(conflicting)), 4)
        log(
            f"left out of the pool: {conflicting.sum()} images whose very pixels are labelled both ai and real "
            f"({files})"
        )
    near_test = select.duplicates_of_test(pool, test)
    candidates = Pool(pool, labels, ~(near_test | conflicting))
    return SelectionData(items, candidates, [tests[row] for row in test.rows], test), int(near_test.sum())


def _quartiles(distances: np.ndarray) -> dict[str, float]:
    values = np.quantile(distances, [0.25, 0.5, 0.75])
    return {f"{percent} %": round(float(value), 6) for percent, value in zip((25, 50, 75), values, strict=True)}
