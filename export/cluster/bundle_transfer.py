"""Transfer of a bundle to the machines of a cluster: used where it lies already, or sent once to each, in chunks."""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from export.bundle import bundle

CHUNK_BYTES = 16 << 20  # sent at a time, to each machine

FetchChunk = Callable[[str, int], bytes]  # a file's name in the bundle, the offset of the chunk -> its bytes


@dataclass(frozen=True)
class BundleSource:
    """A bundle where the job was started: its folder, the content of bundle.json, and each file's size in bytes.

    sha256: of the content of bundle.json, which has the hash of every other file.
    """

    folder: Path
    listed: Mapping[str, Any]
    sha256: str
    sizes: Mapping[str, int]


def describe_bundle(folder: Path) -> BundleSource:
    """What another machine needs to know of a bundle to have the same."""
    listed = bundle.read_contents(folder)
    try:
        sizes = {name: (folder / name).stat().st_size for name in ("bundle.json", *listed["files"])}
    except OSError as error:
        raise ArtifactError(f"{error.filename} is missing; {bundle.REMEDY}") from None
    return BundleSource(folder.absolute(), listed, artifacts.json_sha256(listed), sizes)


def local_bundle(source: BundleSource, fetch: FetchChunk) -> Path:
    """The folder of the bundle on this machine, every file checked.

    It is the folder where the job was started if this machine sees it, or else a copy in the user's cache.
    """
    if _is_same(source.folder, source):
        return source.folder
    copy = artifacts.cache_path() / "bundles" / source.sha256[:32]
    artifacts.ensure_folder(copy.parent)
    with FileLock(copy.with_suffix(".lock")):  # the first worker of a machine fetches it for all
        with suppress(ArtifactError):  # none yet, or damaged
            if _is_same(copy, source):
                return copy
        _download(copy, source, fetch)
    return copy


def _is_same(folder: Path, source: BundleSource) -> bool:
    """Whether the folder has the source's bundle.json, and files that this user may read.

    ArtifactError if it has, and another file is damaged.
    """
    if not all(os.access(folder / name, os.R_OK) for name in source.sizes):
        return False
    try:
        same = artifacts.json_sha256(bundle.read_contents(folder)) == source.sha256
    except ArtifactError:
        return False
    if same and artifacts.json_sha256(bundle.open_bundle(folder)) != source.sha256:
        raise ArtifactError(f"{folder} was changed meanwhile; run the same command again")
    return same


def _download(copy: Path, source: BundleSource, fetch: FetchChunk) -> None:
    arriving = copy.with_name(f"{copy.name}.arriving")
    shutil.rmtree(arriving, ignore_errors=True)  # of a killed worker
    try:
        for name, size in source.sizes.items():
            (arriving / name).parent.mkdir(parents=True, exist_ok=True)
            with (arriving / name).open("wb") as file:
                for start in range(0, size, CHUNK_BYTES):
                    file.write(fetch(name, start))
        if not _is_same(arriving, source):
            raise ArtifactError(f"{source.folder} was changed while it was sent; run the same command again")
        shutil.rmtree(copy, ignore_errors=True)
        os.replace(arriving, copy)
    except OSError as error:
        raise ArtifactError(
            f"the bundle cannot be kept in {copy}: {error.strerror or error}; make room, or set MANYEYES_CACHE there"
        ) from None
