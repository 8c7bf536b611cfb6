"""Selection from command line to folder: read, embed, choose, write; then the ablation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ensemble.core import artifacts, feature_cache
from ensemble.core.errors import DataError, join_limited
from ensemble.core.log import Log
from ensemble.core.recipe import Recipe
from ensemble.core.recipe_files import load_recipes
from ensemble.data.sources import LabelledImage
from ensemble.models import features
from ensemble.models.torch_runner import choose_device
from ensemble.selection import neighbours, select
from ensemble.selection.ablation import Material, ablate
from ensemble.selection.data import read_pools, read_test, refuse_overlap
from ensemble.selection.output import ABLATION, check_output, write_selection
from ensemble.selection.select import UNLABELLED, Selection
from ensemble.training import train_all as runs


@dataclass(frozen=True)
class SelectOptions:
    """What the command was asked for; each field is the option of that name."""

    test: Path
    pools: Sequence[Path]
    count: int
    output: Path
    embedder: str | None = None
    balance: float | None = None
    clusters: int | None = None
    copy: bool = False
    images: Path | None = None
    classes: Mapping[str, str] | None = None
    positive: str | None = None
    group_column: str = "group"
    skip_unreadable: bool = False
    cache: bool = True
    recipe: Path | None = None
    test_labels: Path | None = None
    seeds: int = 3
    overrides: Sequence[str] = ()
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class Result:
    """What was chosen, and what the ablation needs of the way there.

    frame: selection.csv with a label in every row. dropped_test: pool images dropped as
    near-duplicates of test images. tests: how many test images could draw. quartiles: of
    distances, by draw.
    """

    frame: pd.DataFrame
    chosen: Selection
    dropped_test: int
    tests: int
    quartiles: dict[str, dict[str, float]]
    material: Material
    counts: dict[int, int]


def select_images(job: SelectOptions, log: Log) -> Result:
    """Choose images as `job` says and write its output folder.

    Raises, before any image is read, for what is known to fail.
    """
    items, tests, counts = _read(job, log)
    device = choose_device(job.device)
    embedder = features.load_embedder(job.embedder, device)
    cache = feature_cache.default_path() if job.cache else None
    log(f"{len(tests)} test images, {len(items)} in the pool, embedded by {embedder.name} on {device}")
    material, dropped = _embed(job, items, tests, embedder, cache, log)
    vectors, labels = material.test.vectors, material.labels
    arguments = (material.pool, labels, material.allowed)
    chosen = select.select(*arguments, vectors, counts, job.seed, job.clusters)
    drawn = select.random_rows(*arguments, counts, job.seed)
    quartiles = {
        "chosen, to the test image that drew it": _quartiles(chosen.distances),
        "chosen, to the nearest test image": _quartiles(select.nearest_distances(chosen.rows, material.pool, vectors)),
        "random draw, to the nearest test image": _quartiles(select.nearest_distances(drawn, material.pool, vectors)),
    }
    record = {
        "test": str(job.test),
        "pools": [str(pool) for pool in job.pools],
        "embedder": embedder.name,
        "embedder_sha256": embedder.sha256,
        "count": job.count,
        "balance": None if UNLABELLED in counts else counts[1] / job.count,
        "seed": job.seed,
        "near_duplicates_of_test": dropped,
        "near_duplicates_of_chosen": chosen.repeats,
        "distances": quartiles,
    }
    frame = write_selection(job.output, material.items, chosen, material.test_items, job.copy, record)
    return Result(frame, chosen, dropped, len(vectors), quartiles, material, counts)


def ablate_selection(job: SelectOptions, result: Result, log: Log) -> dict[str, Any]:
    """The ablation of `ablate.ablate`, written beside selection.csv."""
    device = choose_device(job.device)
    report = ablate(
        _recipe(job), result.material, result.counts, job.seeds, job.seed, device, log, clusters=job.clusters
    )
    artifacts.write_json(job.output / ABLATION, report)
    return report


def _read(job: SelectOptions, log: Log) -> tuple[list[LabelledImage], list[LabelledImage], dict[int, int]]:
    """The pool's images, the test's, and how many of each class to choose; all that can be refused early is."""
    refuse_overlap(job.test, job.pools)
    check_output(job.output, [job.test, *job.pools])
    features.find_embedder(job.embedder)
    if job.recipe is not None:
        runs.check_ready([_recipe(job)], job.device)
    elif job.test_labels is not None:
        raise DataError("--test-labels is for --ablate; name a recipe with it, or leave it out")
    tests = read_test(job.test, job.images, job.test_labels, labelled=job.recipe is not None)
    items, notes = read_pools(job.pools, job.images, job.classes, job.positive, job.group_column)
    for note in notes:
        log(note)
    neighbours.check_search(len(items))
    labels = np.array([item.label for item in items])
    unlabelled = bool((labels == UNLABELLED).all())
    if unlabelled and (job.balance is not None or job.recipe is not None):
        asked = "--balance" if job.balance is not None else "--ablate"
        raise DataError(f"{asked} needs a pool of known classes; sort {join_limited(job.pools)} into ai/ and real/")
    counts = select.class_counts(labels, job.count, job.balance)
    if job.recipe is not None and not all(counts.values()):
        raise DataError("--ablate trains on both classes; choose a --balance between 0 and 1")
    if any(int((labels == label).sum()) < count for label, count in counts.items()):
        present = {label: int((labels == label).sum()) for label in counts}
        raise DataError(
            f"--count {job.count} needs {select.by_class(counts)}, but the pool holds {select.by_class(present)}; "
            "lower --count, change --balance, or add a --pool"
        )
    return items, tests, counts


def _recipe(job: SelectOptions) -> Recipe:
    return load_recipes([job.recipe] if job.recipe is not None else [], job.overrides)[0]


def _embed(
    job: SelectOptions,
    items: Sequence[LabelledImage],
    tests: Sequence[LabelledImage],
    embedder: features.Embedder,
    cache: Path | None,
    log: Log,
) -> tuple[Material, int]:
    """Features of both, and how many pool images are near-duplicates of test images.

    Unreadable test images are an error unless skipped. What is left out of the pool is said.
    """
    test = features.embed_images([item.file for item in tests], embedder, cache, title="embed test")
    if test.errors and not (job.skip_unreadable and len(test.rows)):
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
    kept = [items[row] for row in pool.rows]
    unsure = select.conflicting(pool, np.array([item.label for item in kept]))
    if unsure.any():
        named = join_limited((kept[row].file for row in np.flatnonzero(unsure)), 4)
        log(f"left out of the pool: {unsure.sum()} images whose very pixels are labelled both ai and real ({named})")
    of_test = select.duplicates_of_test(pool, test)
    allowed = ~(of_test | unsure)
    return Material(kept, pool, allowed, [tests[row] for row in test.rows], test), int(of_test.sum())


def _quartiles(distances: np.ndarray) -> dict[str, float]:
    values = np.quantile(distances, [0.25, 0.5, 0.75])
    return {f"{percent} %": round(float(value), 6) for percent, value in zip((25, 50, 75), values, strict=True)}
