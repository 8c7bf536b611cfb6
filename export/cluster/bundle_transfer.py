"""A bundle on the machines of a cluster: where it lies already, or sent once to each, piece by piece."""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.data.storage import readable
from export.bundle import bundle

PIECE = 16 << 20  # bytes on their way at a time, to each machine

Fetch = Callable[[str, int], bytes]  # a file's name in the bundle, where a piece starts -> its bytes


@dataclass(frozen=True)
class Source:
    """A bundle where the job was started: its folder, what bundle.json lists, and each file's size in bytes.

    sha256: of what bundle.json lists, which has every other file's.
    """

    folder: Path
    listed: Mapping[str, Any]
    sha256: str
    sizes: Mapping[str, int]


def source_of(folder: Path) -> Source:
    """What to know of a bundle to have the same elsewhere."""
    listed = bundle.contents(folder)
    names = ["bundle.json", *listed["files"]]
    try:
        sizes = {name: (folder / name).stat().st_size for name in names}
    except OSError as error:
        raise ArtifactError(f"{error.filename} is missing; {bundle.REMEDY}") from None
    return Source(folder.absolute(), listed, artifacts.json_sha256(listed), sizes)


def piece(folder: Path, name: str, start: int) -> bytes:
    """Up to PIECE bytes of a bundle's file."""
    with (folder / name).open("rb") as file:
        file.seek(start)
        return file.read(PIECE)


def located(source: Source, fetch: Fetch) -> Path:
    """The bundle on this machine, by its list: where it lies at the start of the job, or in the user's cache."""
    if _same(source.folder, source):
        return source.folder
    kept = artifacts.cache_path() / "bundles" / source.sha256[:32]
    artifacts.ensure_folder(kept.parent)
    with FileLock(kept.with_suffix(".lock")):  # the first worker of a machine fetches it for all
        if not _whole(kept, source):
            _fetch(kept, source, fetch)
    return kept


def _same(folder: Path, source: Source) -> bool:
    if not all(readable(folder / name) for name in source.sizes):  # another user's, perhaps
        return False
    try:
        return artifacts.json_sha256(bundle.contents(folder)) == source.sha256
    except ArtifactError:
        return False


def _whole(folder: Path, source: Source) -> bool:
    if not _same(folder, source):
        return False
    try:
        bundle.open_bundle(folder)
    except ArtifactError:
        return False
    return True


def _fetch(kept: Path, source: Source, fetch: Fetch) -> None:
    arriving = kept.with_name(f"{kept.name}.arriving")
    shutil.rmtree(arriving, ignore_errors=True)  # of a killed worker
    try:
        for name, size in source.sizes.items():
            (arriving / name).parent.mkdir(parents=True, exist_ok=True)
            with (arriving / name).open("wb") as file:
                for start in range(0, size, PIECE):
                    file.write(fetch(name, start))
        if not _same(arriving, source):
            raise ArtifactError(f"{source.folder} was changed while it was sent; run the same command again")
        bundle.open_bundle(arriving)
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(arriving, kept)
    except OSError as error:
        raise ArtifactError(
            f"the bundle cannot be kept in {kept}: {error.strerror or error}; make room, or set MANYEYES_CACHE there"
        ) from None
