"""The sources of images for `fetch`: the entries of catalogue.toml, and any data set on the Hub by its id."""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ensemble.core.errors import DataError
from ensemble.core.names import NEGATIVE, NEGATIVE_NAMES, POSITIVE, POSITIVE_NAMES

CATALOGUE_FILE = Path(__file__).with_name("catalogue.toml")
HUB_PREFIX = "hf://datasets/"
FORMATS = ("tar.gz", "parquet", "zip")
LABEL_OF = {NEGATIVE: 0, POSITIVE: 1}


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


def load_catalogue(path: Path = CATALOGUE_FILE) -> dict[str, ImageSource]:
    """All entries by name, in the file's order. DataError names an entry that is wrong."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable catalogue: {error}") from None
    return {name: _parse_entry(name, table) for name, table in tables.items()}


def _parse_entry(name: str, table: Mapping[str, Any]) -> ImageSource:
    known = {item.name for item in fields(ImageSource)} - {"name", "label"} | {"class"}
    if unknown := sorted(set(table) - known):
        raise DataError(f"catalogue entry {name}: unknown key {unknown[0]!r}; it may have {', '.join(sorted(known))}")
    values = dict(table)
    single, classes = values.pop("class", None), values.pop("classes", {})
    if (single is None) == (not classes):
        raise DataError(f"catalogue entry {name} needs either class or classes")
    if values.get("unpack") not in FORMATS or not all(values.get(key) for key in ("title", "licence", "url")):
        raise DataError(f"catalogue entry {name} needs title, licence, url, and unpack as one of {', '.join(FORMATS)}")
    if bool(values.get("hub")) == bool(values.get("kaggle")) or (values["unpack"] == "zip") != ("kaggle" in values):
        raise DataError(f"catalogue entry {name} needs hub with tar.gz or parquet, or kaggle with zip")
    if values["unpack"] == "tar.gz" and not values.get("path"):
        raise DataError(f"catalogue entry {name} needs the path of its archive")
    label = None if single is None else parse_label(single, name)
    return ImageSource(
        name, label=label, classes={key: parse_label(value, name) for key, value in classes.items()}, **values
    )


def parse_label(value: str, where: str) -> int:
    """1 for "ai", 0 for "real"; DataError, naming `where`, for anything else."""
    if value not in LABEL_OF:
        raise DataError(f"{where}: a class is {POSITIVE} or {NEGATIVE}, not {value!r}")
    return LABEL_OF[value]


def find_source(name: str, catalogue: Mapping[str, ImageSource]) -> ImageSource:
    """The entry called `name`, or DataError with the nearest name."""
    if name in catalogue:
        return catalogue[name]
    near = difflib.get_close_matches(name.casefold(), catalogue, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(catalogue)}"
    raise DataError(
        f"the catalogue has no source {name!r}; {hint} (python cli.py fetch --list; {HUB_PREFIX}OWNER/NAME for others)"
    )


@dataclass(frozen=True)
class HubOptions:
    """How to read a Hub data set that the catalogue does not know.

    Either `label` ("ai" or "real") is the class of all its images, or `label_column` is a column
    whose values `classes` maps to a class ({"cat": "real"}; default: the usual class names).
    """

    image_column: str = "image"
    label_column: str = ""
    label: str | None = None
    classes: Mapping[str, str] = field(default_factory=dict)
    generator: str = ""
    split: str = "train"
    config: str | None = None


def hub_source(address: str, options: HubOptions) -> ImageSource:
    """A Hub data set as a source: hf://datasets/OWNER/NAME, or with @REVISION."""
    match = re.fullmatch(rf"{HUB_PREFIX}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", address)
    if not match:
        raise DataError(f"{address!r} is no Hub data set; write {HUB_PREFIX}OWNER/NAME")
    repo, revision = match.groups()
    if bool(options.label) == bool(options.label_column):
        raise DataError("say what the images are: --class ai, --class real, or --label-column NAME")
    if options.classes and not options.label_column:
        raise DataError("--classes maps the values of a column: name it with --label-column")
    mapping = {name: parse_label(value, f"--classes {name}") for name, value in options.classes.items()}
    if options.label_column and not mapping:
        mapping = dict.fromkeys(sorted(POSITIVE_NAMES), 1) | dict.fromkeys(sorted(NEGATIVE_NAMES), 0)
    return ImageSource(
        name=repo,
        title=f"{repo} on the Hub",
        unpack="parquet",
        hub=repo,
        label=parse_label(options.label, "--class") if options.label else None,
        classes=mapping,
        url=f"https://huggingface.co/datasets/{repo}",
        revision=revision,
        **{name: value for name, value in vars(options).items() if name not in ("label", "classes")},
    )
