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
    """A folder, its image contract, its two class names, and which of its outputs means AI-made."""

    name: str
    folder: Path
    preprocess_config: PreprocessConfig
    classes: tuple[str, str]
    positive: int

    @property
    def sha256(self) -> str:
        """A hash of all that decides its logits."""
        files = sorted(path for path in self.folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
        hashes = {path.name: artifacts.file_sha256(path) for path in files}
        return artifacts.json_sha256([hashes, self.preprocess_config.to_dict(), self.positive])

    def load(self) -> "Member":
        """Its torch module."""
        from ensemble.models.backbone import Member, load_classifier

        return Member(load_classifier(self.folder)[0], self.preprocess_config, self.positive).eval()


def read_classifiers(folders: Mapping[str, Path], positive: str | None = None) -> list[Classifier]:
    """What must be known of each before its weights are loaded; BackboneError for one that cannot be a member.

    positive: the class that means AI-made, of those that have a class of that name; the
    names of the others must say it.
    """
    alone = len(folders) == 1
    found = [_read(name, folder, positive, alone) for name, folder in folders.items()]
    if positive and not any(_has(one.classes, positive) for one in found):
        known = join_limited(sorted({label for one in found for label in one.classes}))
        raise BackboneError(f"no class is called {positive!r}; the classes are {known}")
    return found


def _read(name: str, folder: Path, positive: str | None, alone: bool) -> Classifier:
    from ensemble.models import backbone, processor
    from ensemble.models.members import stored_preprocess_config

    if not (folder / "config.json").is_file():
        raise BackboneError(f"{folder} is no image classifier: it has no config.json")
    config = backbone.load_config(folder)
    classes = [str(config.id2label[index]) for index in sorted(config.id2label)]
    try:
        wanted = positive if positive and (alone or _has(classes, positive)) else None
        negative, chosen = resolve_polarity(classes, wanted)
    except ValueError as error:
        raise BackboneError(f"{folder}: {error}") from None
    preprocess_config = stored_preprocess_config(folder) or processor.from_checkpoint(folder, config)
    return Classifier(name, folder, preprocess_config, (negative, chosen), classes.index(chosen))


def _has(classes: Sequence[str], name: str) -> bool:
    return name.casefold() in {label.casefold() for label in classes}
