"""The sources of images for `fetch`: the entries of catalogue.toml, and any data set on the Hub by its id."""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensemble.core.errors import DataError
from ensemble.core.names import LABELS, NEGATIVE_NAMES, POSITIVE_NAMES

CATALOGUE_FILE = Path(__file__).with_name("catalogue.toml")
HUB_PREFIX = "hf://datasets/"


@dataclass(frozen=True)
class ImageSource:
    """Where images are stored and what they show. catalogue.toml explains each field.

    `label` is 1 (ai), 0 (real), or None where `classes` maps folder names or label values to a label.
    """

    name: str
    title: str
    unpack: str
    hub: str = ""
    kaggle: str = ""
    path: str = ""
    folder: str = ""
    label: int | None = None
    classes: Mapping[str, int] = field(default_factory=dict)
    generator: str = ""
    licence: str = ""
    url: str = ""
    bytes: int | None = None
    images: int | None = None
    unverified: str = ""
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    image_column: str = "image"
    label_column: str = ""

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels that its images can have: (0,), (1,) or (0, 1)."""
        return (self.label,) if self.label is not None else tuple(sorted(set(self.classes.values())))

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that decide which images a fetch takes and how it labels them, JSON-ready."""
        names = "name unpack hub kaggle path folder label generator revision config split image_column label_column"
        return {name: getattr(self, name) for name in names.split()} | {"classes": dict(self.classes)}


def load_catalogue() -> dict[str, ImageSource]:
    """All entries of catalogue.toml by name, in the file's order."""
    tables = tomllib.loads(CATALOGUE_FILE.read_text(encoding="utf-8"))
    return {name: _parse_entry(name, **table) for name, table in tables.items()}


def _parse_entry(name: str, classes: Mapping[str, str] | None = None, **values: Any) -> ImageSource:
    label = LABELS.index(values.pop("class")) if "class" in values else None
    return ImageSource(name, label=label, classes=_as_labels(classes), **values)


def _as_labels(classes: Mapping[str, str] | None) -> dict[str, int]:
    return {name: LABELS.index(value) for name, value in (classes or {}).items()}


def find_source(name: str, catalogue: Mapping[str, ImageSource]) -> ImageSource:
    """The entry called `name`, or DataError with the nearest name."""
    if name in catalogue:
        return catalogue[name]
    near = difflib.get_close_matches(name.casefold(), catalogue, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(catalogue)}"
    raise DataError(
        f"the catalogue has no source {name!r}; {hint} (python cli.py fetch --list; {HUB_PREFIX}OWNER/NAME for others)"
    )


def hub_source(
    address: str, label: str | None = None, classes: Mapping[str, str] | None = None, **others: Any
) -> ImageSource:
    """A Hub data set that the catalogue does not know: hf://datasets/OWNER/NAME, or with @REVISION.

    Either `label` ("ai" or "real") is the class of all its images, or the field `label_column` is a column
    whose values `classes` maps to a class ({"cat": "real"}; default: the usual class names).
    """
    match = re.fullmatch(rf"{HUB_PREFIX}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address)
    if not match:
        raise DataError(f"{address!r} is no Hub data set; write {HUB_PREFIX}OWNER/NAME")
    repo, revision = match.groups()
    by_column = bool(others.get("label_column"))
    if bool(label) == by_column:
        raise DataError("say what the images are: --class ai, --class real, or --label-column NAME")
    if classes and not by_column:
        raise DataError("--classes maps the values of a column: name it with --label-column")
    mapping = _as_labels(classes)
    if by_column and not mapping:
        mapping = dict.fromkeys(sorted(POSITIVE_NAMES), 1) | dict.fromkeys(sorted(NEGATIVE_NAMES), 0)
    return ImageSource(
        name=repo,
        title=f"{repo} on the Hub",
        unpack="parquet",
        hub=repo,
        label=LABELS.index(label) if label else None,
        classes=mapping,
        url=f"https://huggingface.co/datasets/{repo}",
        revision=revision,
        **others,
    )
