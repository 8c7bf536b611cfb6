"""The state that every kind of fetch shares: class quotas, which files to take, what has been stored."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from tqdm import tqdm

from ensemble.core.errors import ImageError, UnavailableError, escape_control
from ensemble.data.archives import Tally
from ensemble.data.files import IMAGE_SUFFIXES
from ensemble.fetch.catalogue import ImageSource
from ensemble.fetch.hub_stream import resolve_revision
from ensemble.fetch.output_folder import OutputFolder

NOT_IMAGES = "not images"
OTHER_CLASS = "of another class"


@dataclass
class FetchJob:
    """One fetch in progress.

    quotas: images to store by label, infinite without a limit. state: what fetch.json says beside the source.
    skipped_full: whether an image was skipped because its class was full.
    """

    source: ImageSource
    output: OutputFolder
    quotas: dict[int, float]
    bar: "tqdm[Any]"
    state: dict[str, Any]
    tally: Tally = field(default_factory=Tally)
    skipped_full: bool = False
    downloaded_bytes: int = 0

    @property
    def is_full(self) -> bool:
        """Whether every class has reached its quota."""
        return all(self.output.counts[label] >= quota for label, quota in self.quotas.items())

    def needs(self, name: str, label: int | None) -> bool:
        """Whether to read an image: it is not stored yet, and its class is not full. Others are counted."""
        if label is None:
            self.tally.passed[OTHER_CLASS] += 1
        elif escape_control(name) in self.output.rows:
            pass
        elif self.output.counts[label] >= self.quotas[label]:
            self.skipped_full = True
        else:
            return True
        return False

    def store(self, name: str, label: int, data: bytes) -> None:
        """Store an image; what is not one is counted instead."""
        try:
            self.output.add(escape_control(name), label, data)
            self.bar.update()
        except ImageError:
            self.tally.passed[NOT_IMAGES] += 1

    def needs_file(self, name: str, prefix: str = "") -> bool:
        """Whether to read a file of an archive; `prefix` goes before its name where images are stored."""
        label = file_label(self.source, name, self.tally)
        return label is not None and self.needs(prefix + name, label)

    def store_file(self, name: str, data: bytes, prefix: str = "") -> None:
        """Store a file of an archive that `needs_file` said yes to."""
        label = file_label(self.source, name, Tally())
        if label is not None:
            self.store(prefix + name, label, data)

    def count_bytes(self, size: int) -> None:
        """Count bytes that came over the network."""
        self.downloaded_bytes += size
        self.bar.set_postfix_str(f"{self.downloaded_bytes / 1e6:,.0f} MB", refresh=False)

    def update_state(self, **values: Any) -> None:
        """Put values into fetch.json."""
        self.state |= values
        self.output.write_state(self.state)

    def pinned_commit(self) -> str:
        """The Hub commit that this folder is fetched from; every later fetch uses the same one."""
        if "commit" not in self.state:
            commit, licence = resolve_revision(self.source.hub, self.source.revision)
            self.update_state(commit=commit, licence=self.source.licence or licence)
        return str(self.state["commit"])


def class_quotas(limit: int, labels: Sequence[int]) -> dict[int, float]:
    """How many images of each label `limit` allows: even shares, the odd one to ai; 0 means no limit."""
    if limit == 0:
        return dict.fromkeys(labels, math.inf)
    share, rest = divmod(limit, len(labels))
    return {label: share + (rest if label == max(labels) else 0) for label in labels}


def file_label(source: ImageSource, name: str, tally: Tally) -> int | None:
    """The label of a file in an archive, by its folders; None, counted, for a file that is no image of the source."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith(".") or "__MACOSX" in path.parts:
        tally.passed[NOT_IMAGES] += 1
        return None
    folders = [part.casefold() for part in path.parts[:-1]]
    inside = f"/{source.folder.strip('/').casefold()}/" in f"/{'/'.join(folders)}/" if source.folder else True
    by_name = {key.casefold(): label for key, label in source.classes.items()}
    labels = [by_name[folder] for folder in folders if folder in by_name] if source.classes else [source.label]
    if inside and labels:
        return labels[-1]
    tally.passed[OTHER_CLASS] += 1
    return None


def require_package(name: str, purpose: str) -> None:
    """UnavailableError, with the command that installs it, where a package of the extra `fetch` is absent."""
    if importlib.util.find_spec(name) is None:
        raise UnavailableError(f"{purpose} needs {name}; run: pip install 'manyeyes[fetch]'")
