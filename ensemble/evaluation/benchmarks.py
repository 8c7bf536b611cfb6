"""Benchmarks as they are published, recognised by their folders: GenImage, FakeImageDataset, Chameleon.

Each gives the same rows as any labelled data, with the benchmark's own parts as `source` or `generator`,
so that scores part by part are the table that its authors print.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ensemble.core.errors import DataError, join_limited
from ensemble.core.names import class_labels
from ensemble.data.files import list_images
from ensemble.data.sources import LabelledImage, ReadOptions, read_data
from ensemble.data.tables import require_unique

# GenImage's generators, by what their folders are called (github.com/GenImage-Dataset/GenImage):
# the name of the download, and that of the archive inside it.
GENIMAGE = {
    "midjourney": "Midjourney",
    "stablediffusionv14": "SD v1.4",
    "sdv4": "SD v1.4",
    "stablediffusionv15": "SD v1.5",
    "sdv5": "SD v1.5",
    "adm": "ADM",
    "glide": "GLIDE",
    "wukong": "Wukong",
    "vqdm": "VQDM",
    "biggan": "BigGAN",
}
# FakeImageDataset's folders below ImageData/val and ImageData/train (github.com/Inf-imagine/Sentry). It ships no reals.
FAKE_IMAGE_DATASET = {
    "Midjourneyv5-5K": "Midjourney v5",
    "SDv15-CC30K": "SD v1.5",
    "SDv21-CC15K": "SD v2.1",
    "IF-CC95K": "IF",
    "cogview2-22K": "CogView2",
    "stylegan3-60K": "StyleGAN3",
    "SDv15R-CC1M": "SD v1.5",
    "IFv1-CC1M": "IF",
    "stylegan3-80K": "StyleGAN3",
}
CHAMELEON = {"0_real": 0, "1_fake": 1}


@dataclass(frozen=True)
class Part:
    """Images of one class and one part of a benchmark: a folder below `root`.

    reals of a part stand beside its ai images under the same `source`.
    """

    folder: Path
    label: int
    source: str
    generator: str | None = None


@dataclass(frozen=True)
class Layout:
    """A benchmark as found: its name, the root that ids count from, its parts, and notes for the user."""

    name: str
    root: Path
    parts: tuple[Part, ...]
    notes: tuple[str, ...]


def recognize_layout(path: Path, options: ReadOptions | None = None) -> Layout | None:
    """The benchmark whose folders lie at `path`, or None; DataError for one whose classes cannot be known.

    What counts is the folders' names. Where there are validation images, those alone are taken.
    """
    if not path.is_dir():
        return None
    folder = path / "test" if (path / "test").is_dir() else path
    if all((folder / name).is_dir() for name in CHAMELEON):
        parts = tuple(Part(folder / name, label, "Chameleon") for name, label in CHAMELEON.items())
        return Layout("Chameleon", path, parts, ())
    return _genimage(path) or _fake_image_dataset(path, options or ReadOptions())


def read_benchmarks(
    paths: Sequence[Path], options: ReadOptions
) -> tuple[list[LabelledImage], list[str], tuple[str, ...]]:
    """Labelled images of any data, benchmarks in their own layout included.

    Returns the images, notes for the user, and the names of the benchmarks. A single class is
    enough. Ids of several are prefixed by the folder's name, as `read_data` does.
    """
    layouts = {path: layout for path in paths if (layout := recognize_layout(path, options)) is not None}
    others = [path for path in paths if path not in layouts]
    items: list[LabelledImage] = []
    notes: list[str] = []
    if others:
        items, notes = read_data(others, replace(options, one_class=True))
        if layouts and len(others) == 1:
            items = [replace(item, id=f"{others[0].resolve().name}/{item.id}") for item in items]
    for path, layout in layouts.items():
        prefix = f"{path.resolve().name}/" if len(paths) > 1 else ""
        items += [replace(item, id=prefix + item.id) for item in _read(layout)]
        notes += [f"{path}: {note}" for note in (f"recognised as {layout.name} by its folders", *layout.notes)]
    require_unique((item.id for item in items), remedy="; give one of the folders another name")
    return items, notes, tuple(dict.fromkeys(layout.name for layout in layouts.values()))


def _read(layout: Layout) -> list[LabelledImage]:
    root = layout.root.resolve()
    items = []
    for part in layout.parts:
        start = part.folder.resolve().relative_to(root).as_posix()
        paths = list_images(part.folder)
        if not paths:
            raise DataError(f"{part.folder} holds no images; unpack {layout.name} there")
        items += [
            LabelledImage(path, str(root), path, part.label, None, part.source, part.generator)
            for path in (f"{start}/{name}" for name in paths)
        ]
    return items


def _genimage(path: Path) -> Layout | None:
    """GENERATOR/{train,val}/{ai,nature}, or with the archive's own folder in between; also one generator alone."""
    parts: list[Part] = []
    without = []
    for folder in (path, *_folders(path)):
        for inner in (folder, *_folders(folder)):
            if not all((inner / "val" / name).is_dir() for name in ("ai", "nature")):
                if all((inner / "train" / name).is_dir() for name in ("ai", "nature")):
                    without.append(inner)
                continue
            named = (folder if folder != path else inner).resolve().name
            plain = "".join(letter for letter in named.casefold() if letter.isalnum())
            name = next((name for key, name in GENIMAGE.items() if plain.endswith(key)), named)
            if all(part.folder != inner / "val" / "ai" for part in parts):
                parts.append(Part(inner / "val" / "nature", 0, name))
                parts.append(Part(inner / "val" / "ai", 1, name, name))
    if not parts:
        return None
    notes = ["of each generator the images of val/ are taken, as is published"]
    if without:
        notes.append(f"left out, without val/: {join_limited(sorted({folder.name for folder in without}))}")
    return Layout("GenImage", path, tuple(parts), tuple(notes))


def _fake_image_dataset(path: Path, options: ReadOptions) -> Layout | None:
    """ImageData/val/NAME/, ai each of them; folders of reals beside them get their class by name or by --classes."""
    candidates = [path / "ImageData" / "val", path / "val", path]
    folder = next((each for each in candidates if FAKE_IMAGE_DATASET.keys() & {c.name for c in _folders(each)}), None)
    if folder is None:
        return None
    children = _folders(folder)
    known = [child for child in children if child.name in FAKE_IMAGE_DATASET]
    parts = [Part(child, 1, child.name, FAKE_IMAGE_DATASET[child.name]) for child in known]
    for child in children:
        if child in known:
            continue
        try:
            label = class_labels([child.name], options.classes, options.positive, one_will_do=True)[child.name]
        except ValueError:
            raise DataError(
                f"{folder}: FakeImageDataset has no folder {child.name!r}; say what it holds with "
                f"--classes {child.name}=real (or =ai), or move it"
            ) from None
        parts.append(Part(child, label, child.name, child.name if label else None))
    notes = []
    if all(part.label for part in parts):
        notes.append("it ships no real images: add some with another --data, or score it alone with --stress")
    return Layout("FakeImageDataset", path, tuple(parts), tuple(notes))


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
