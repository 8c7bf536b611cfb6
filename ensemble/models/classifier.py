"""Two-class image classifiers from anywhere, in transformers' or timm's layout. Reading one needs torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble.core import artifacts
from ensemble.core.errors import BackboneError, join_limited
from ensemble.core.names import resolve_polarity
from ensemble.core.preprocess_config import PreprocessConfig

if TYPE_CHECKING:
    from ensemble.models.backbone import Member


@dataclass(frozen=True)
class Classifier:
    """A two-class checkpoint folder. classes: (negative, positive). positive: the output that means AI-made."""

    name: str
    folder: Path
    preprocess_config: PreprocessConfig
    classes: tuple[str, str]
    positive: int

    @property
    def sha256(self) -> str:
        """Hash of its files, its preprocessing and `positive`."""
        files = sorted(path for path in self.folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
        hashes = {path.name: artifacts.file_sha256(path) for path in files}
        return artifacts.json_sha256([hashes, self.preprocess_config.to_dict(), self.positive])

    def load(self) -> "Member":
        """Its torch module."""
        from ensemble.models.backbone import Member, load_classifier

        return Member(load_classifier(self.folder)[0], self.preprocess_config, self.positive).eval()


def read_classifiers(folders: Mapping[str, Path], positive: str | None = None) -> list[Classifier]:
    """Read the configs of checkpoint folders, without weights; BackboneError for one that cannot be a member.

    positive: the class that means AI-made, in each classifier that has a class of this name; in others the classes'
    own names must tell it.
    """
    classifiers = [_read(name, folder, positive, len(folders) == 1) for name, folder in folders.items()]
    if positive and not any(_has(classifier.classes, positive) for classifier in classifiers):
        known = join_limited(sorted({label for classifier in classifiers for label in classifier.classes}))
        raise BackboneError(f"no class is called {positive!r}; the classes are {known}")
    return classifiers


def _read(name: str, folder: Path, positive: str | None, alone: bool) -> Classifier:
    from ensemble.models import backbone, processor
    from ensemble.models.members import stored_preprocess_config

    if not (folder / "config.json").is_file():
        raise BackboneError(f"{folder} is no image classifier: it has no config.json")
    config = backbone.load_config(folder)
    classes = [str(config.id2label[index]) for index in sorted(config.id2label)]
    try:
        use_positive = positive and (alone or _has(classes, positive))
        negative, chosen = resolve_polarity(classes, positive if use_positive else None)
    except ValueError as error:
        raise BackboneError(f"{folder}: {error}") from None
    preprocess_config = stored_preprocess_config(folder) or processor.from_checkpoint(folder, config)
    return Classifier(name, folder, preprocess_config, (negative, chosen), classes.index(chosen))


def _has(classes: Sequence[str], name: str) -> bool:
    return name.casefold() in {label.casefold() for label in classes}
