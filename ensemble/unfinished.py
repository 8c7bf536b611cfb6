"""Interrupted trainings: what they were of, whether they may be gone on from, and what disk space all will need."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, some
from ensemble.core.recipe import Recipe

REMEDY = "train with --fresh to start anew"
FILE = "work.json"
SPARE = 64 * 2**20  # bytes for all that is not weights


def kind_of_work(recipe: Recipe, data_sha256: str, seed: int, version: int) -> dict[str, Any]:
    """What decides a training; two with the same may go on from each other."""
    return {"recipe": recipe.values(), "data_sha256": data_sha256, "seed": seed, "training_version": version}


@contextmanager
def held(run: Path, name: str, say: Callable[[str], object]) -> Iterator[None]:
    """The member's training for this process alone; another that has it is waited for, which is said."""
    path = artifacts.beside_work_path(run, name, "lock")
    artifacts.ensure_folder(path.parent)
    lock = FileLock(path)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            say(f"  {name}: another process trains it; waiting for that one to end")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise ArtifactError(f"cannot lock {path} ({error}); choose a --run on storage with file locks") from None
    try:
        yield
    finally:
        lock.release()


def open_work(run: Path, name: str, kind: Mapping[str, Any]) -> Path:
    """The folder where a member is trained: as an interrupted training of this kind left it, else a new one."""
    work = artifacts.work_path(run, name)
    if _kind_on_disk(work) != kind:
        shutil.rmtree(work, ignore_errors=True)
        artifacts.write_json(work / FILE, kind)
    return work


def check(
    run: Path, kinds: Mapping[str, Mapping[str, Any]], fresh: bool, say: Callable[[str], object] = print
) -> list[str]:
    """Names of members whose interrupted training will be gone on from.

    fresh: remove what was begun, once nobody works on it. Raises ArtifactError, saying what changed,
    for one of another kind.
    """
    found, problems = [], []
    for name, kind in kinds.items():
        work = artifacts.work_path(run, name)
        if fresh:
            with held(run, name, say):
                shutil.rmtree(work, ignore_errors=True)
        if not begun(work):
            continue
        before = _kind_on_disk(work)
        if before == kind:
            found.append(name)
            continue
        changes = some(_changes(before or {}, kind), 4) or "its files are of another version"
        problems.append(f"{name}: its training was interrupted, and since then {changes}")
    if problems:
        raise ArtifactError("\n".join(problems) + "; set it back to go on, or add --fresh to train anew")
    return found


def begun(work: Path) -> bool:
    """Whether anything would be lost with this folder."""
    return any(work.glob("*/*.safetensors")) or any(work.glob("*/done.json"))


def _kind_on_disk(work: Path) -> dict[str, Any] | None:
    try:
        values = artifacts.read_json(work / FILE, REMEDY)
    except ArtifactError:
        return None
    values.pop("format_version")
    return values


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    names = {"data_sha256": "the data or its split", "training_version": "manyeyes' own training"}
    for key in now:
        if key == "recipe":
            old, new = _flat(before.get(key, {})), _flat(now[key])
            yield from (f"{k} {old.get(k)} became {v}" for k, v in new.items() if old.get(k) != v)
        elif before.get(key) != now[key]:
            told = f"{names[key]} changed" if key in names else f"{key} {before.get(key)} became {now[key]}"
            yield told


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_disk(run: Path, weights: Sequence[int], at_once: int = 1) -> None:
    """ArtifactError where the run's disk cannot hold what training writes.

    weights: bytes of each member's weights. at_once: how many are trained side by side.
    While a member is trained its state holds them, their average and two moments each, once
    more while it is replaced, and the best epoch's weights twice; afterwards its weights alone.
    """
    needed = SPARE + 10 * sum(sorted(weights)[-at_once:]) + sum(weights)
    free = shutil.disk_usage(next(folder for folder in (run, *run.absolute().parents) if folder.is_dir())).free
    if weights and free < needed:
        raise ArtifactError(
            f"training needs about {needed / 2**30:.1f} GiB on the disk of {run}, and {free / 2**30:.1f} are free; "
            "make room, or choose another --run"
        )
