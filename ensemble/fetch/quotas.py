"""What every kind of fetch shares: how much of which class is wanted, which files count, what has been taken."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from tqdm import tqdm

from ensemble.core.errors import ImageError, UnavailableError
from ensemble.data.archives import Tally, printable
from ensemble.data.files import IMAGE_SUFFIXES
from ensemble.fetch.catalogue import Source
from ensemble.fetch.hub_stream import pin
from ensemble.fetch.output_folder import Store

NOT_IMAGES = "not images"
OTHER_CLASS = "of no class that was asked for"


@dataclass
class Job:
    """A fetch under way: what is wanted, where it goes, and how far it is."""

    source: Source
    store: Store
    quotas: dict[int, float]
    bar: "tqdm[Any]"
    state: dict[str, Any]
    tally: Tally = field(default_factory=Tally)
    left_out: bool = False
    downloaded: int = 0

    @property
    def full(self) -> bool:
        """Whether every class has all that was asked for."""
        return all(self.store.counts[label] >= quota for label, quota in self.quotas.items())

    def wants(self, name: str, label: int | None) -> bool:
        """Whether to read an image: not one that is stored, or whose class has enough."""
        if label is None:
            self.tally.pass_over(OTHER_CLASS)
        elif printable(name) in self.store.rows:
            pass
        elif self.store.counts[label] >= self.quotas[label]:
            self.left_out = True
        else:
            return True
        return False

    def take(self, name: str, label: int, data: bytes) -> None:
        """Store an image, or count what only claims to be one."""
        try:
            self.store.add(printable(name), label, data)
            self.bar.update()
        except ImageError:
            self.tally.pass_over(NOT_IMAGES)

    def received(self, size: int) -> None:
        """Count bytes that came over the network."""
        self.downloaded += size
        self.bar.set_postfix_str(f"{self.downloaded / 1e6:,.0f} MB", refresh=False)

    def remember(self, **values: Any) -> None:
        """Put values into fetch.json."""
        self.state |= values
        self.store.write_state(self.state)


def shares(limit: int, labels: Sequence[int]) -> dict[int, float]:
    """How many images of each label `limit` allows: even shares, the odd one to ai; 0 means no limit."""
    if limit == 0:
        return dict.fromkeys(labels, math.inf)
    share, rest = divmod(limit, len(labels))
    return {label: share + (rest if label == max(labels) else 0) for label in labels}


def file_label(source: Source, name: str, tally: Tally) -> int | None:
    """The label of a file in an archive by its folders, or None, counted, if it is no image of the source."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith(".") or "__MACOSX" in path.parts:
        tally.pass_over(NOT_IMAGES)
        return None
    folders = [part.casefold() for part in path.parts[:-1]]
    inside = f"/{source.folder.strip('/').casefold()}/" in f"/{'/'.join(folders)}/" if source.folder else True
    by_name = {key.casefold(): label for key, label in source.classes.items()}
    found = [by_name[folder] for folder in folders if folder in by_name] if source.classes else [source.label]
    if inside and found:
        return found[-1]
    tally.pass_over(OTHER_CLASS)
    return None


def file_filter(job: Job, prefix: str = "") -> Callable[[str], bool]:
    """Which files of an archive a job wants; `prefix` goes before their names."""

    def wanted(name: str) -> bool:
        label = file_label(job.source, name, job.tally)
        return label is not None and job.wants(prefix + name, label)

    return wanted


def pinned_commit(job: Job) -> str:
    """The Hub commit that this folder is fetched from, the same in every later fetch."""
    if "commit" not in job.state:
        commit, licence = pin(job.source.hub, job.source.revision)
        job.remember(commit=commit, licence=job.source.licence or licence)
    return str(job.state["commit"])


def require_package(name: str, purpose: str) -> None:
    """UnavailableError, with the command that installs it, where a package of the extra `fetch` is absent."""
    if importlib.util.find_spec(name) is None:
        raise UnavailableError(f"{purpose} needs {name}; run: pip install 'manyeyes[fetch]'")
