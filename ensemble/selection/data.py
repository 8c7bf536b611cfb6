"""Read the images for `select`: the pools, labelled or not, and the test set."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ensemble.core.errors import DataError, join_limited
from ensemble.core.names import NEGATIVE_NAMES, POSITIVE_NAMES
from ensemble.core.recipe import Recipe, load_recipes
from ensemble.data.files import IMAGE_SUFFIXES
from ensemble.data.sources import LabelledImage, ReadOptions, has_labels, read_data, read_unlabelled
from ensemble.data.tables import require_unique
from ensemble.models.features import Features
from ensemble.selection.select import Pool


@dataclass(frozen=True)
class SelectOptions:
    """The options of the command `select`, under the same names. recipe: of --ablate."""

    test: Path
    pools: Sequence[Path]
    count: int
    output: Path
    reading: ReadOptions
    embedder: str | None = None
    balance: float | None = None
    clusters: int | None = None
    copy: bool = False
    skip_unreadable: bool = False
    cache: bool = True
    recipe: Path | None = None
    test_labels: Path | None = None
    seeds: int = 3
    overrides: Sequence[str] = ()
    seed: int = 0
    device: str = "auto"

    def load_recipe(self) -> Recipe:
        """The recipe of --ablate with the overrides."""
        return load_recipes([self.recipe] if self.recipe is not None else [], self.overrides)[0]


@dataclass(frozen=True)
class SelectionData:
    """The images that could be read: `items` and `test_items` are those of the rows of `pool` and `test`."""

    items: Sequence[LabelledImage]
    pool: Pool
    test_items: Sequence[LabelledImage]
    test: Features


def read_pools(paths: Sequence[Path], options: ReadOptions) -> tuple[list[LabelledImage], list[str]]:
    """The images of all pools, sorted by id, and notes on how their labels were read.

    A table with a column label, or a folder of class folders, is read like training data; images
    of any other pool are UNLABELLED. Raises DataError where pools of both kinds are mixed, or no
    pool holds an image.
    """
    if missing := [path for path in paths if not path.exists()]:
        raise DataError(f"no pool at {missing[0]}; --pool takes a folder of images or a CSV")
    labelled = [_has_labels(path, bool(options.classes or options.positive)) for path in paths]
    if all(labelled):
        items, notes = read_data(paths, replace(options, one_class=True))
    elif any(labelled):
        with_labels = join_limited(path for path, has in zip(paths, labelled, strict=True) if has)
        without = join_limited(path for path, has in zip(paths, labelled, strict=True) if not has)
        raise DataError(
            f"of some pools the classes are known ({with_labels}), of others not ({without}); "
            "sort their images into ai/ and real/, or select from them apart"
        )
    else:
        items, notes = [], []
        names = [path.resolve().name for path in paths]
        for path, name in zip(paths, names, strict=True):
            source = name if names.count(name) == 1 else path.resolve().as_posix()
            prefix = f"{source}/" if len(paths) > 1 else ""
            read = _read_one(path, options.images, prefix)
            items += [replace(item, source=item.source or source) for item in read]
    if not items:
        raise DataError(f"no images in {join_limited(paths)}")
    return sorted(items, key=lambda item: item.id), notes


def read_test(path: Path, images: Path | None, labels: Path | None, labelled: bool) -> list[LabelledImage]:
    """The test's images, sorted by id, from a folder or a CSV with id or path.

    labelled: also read their classes and groups, from the test itself or from the CSV `labels`
    (id or path, label, and optionally group); DataError for an image without a label.
    """
    if not path.exists():
        raise DataError(f"no test images at {path}; --test takes a folder of images or a CSV")
    items = _read_one(path, images, "")
    if not items:
        raise DataError(f"no images in {path}")
    if labelled:
        source, root = labels or path, images or Path(items[0].root)
        try:
            known, _ = read_data([source], ReadOptions(root if source.is_file() else None))
        except DataError as error:
            remedy = "" if labels is not None else "; name a CSV of them with --test-labels"
            raise DataError(f"--ablate needs the test's labels: {error}{remedy}") from None
        by_file = {item.file.resolve(): item for item in known}
        pairs = [(item, by_file.get(item.file.resolve())) for item in items]
        if missing := [item.id for item, row in pairs if row is None]:
            raise DataError(
                f"{source} has no label for {len(missing)} of {len(items)} test images: {join_limited(missing)}"
            )
        items = [replace(item, label=row.label, group=row.group, source=row.source) for item, row in pairs if row]
    return sorted(items, key=lambda item: item.id)


def _has_labels(path: Path, named: bool) -> bool:
    if path.is_file():
        return has_labels(path)
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    if any(entry.is_file() and entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries):
        return False
    return named or any(entry.name.casefold() in POSITIVE_NAMES | NEGATIVE_NAMES for entry in entries)


def _read_one(path: Path, images: Path | None, prefix: str) -> list[LabelledImage]:
    """The images of one folder or table, without their labels."""
    items = read_unlabelled(path, images, prefix)
    require_unique((item.id.removeprefix(prefix) for item in items), path)
    return items
