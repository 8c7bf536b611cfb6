"""Resumable trainings: the fingerprint of a training, locks, disk space, and the saved state of a fit.

The state is one safetensors file that is replaced atomically, so that a kill loses nothing.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, join_limited
from ensemble.core.log import Log
from ensemble.core.recipe import Recipe

REMEDY = "train with --fresh to start anew"
FINGERPRINT_FILE = "work.json"
SPARE_BYTES = 64 * 2**20  # for all files that are not weights


def training_fingerprint(recipe: Recipe, data_sha256: str, seed: int, version: int) -> dict[str, Any]:
    """What decides the result of a training; one may resume another with the same fingerprint."""
    return {"recipe": recipe.values(), "data_sha256": data_sha256, "seed": seed, "training_version": version}


def member_lock(run: Path, name: str, log: Log) -> AbstractContextManager[None]:
    """A lock on the member's training; if another process holds it, logs that and waits."""
    path = artifacts.beside_work_path(run, name, "lock")
    artifacts.ensure_folder(path.parent)
    held = f"  {name}: another process trains it; waiting for that one to end"
    return artifacts.file_lock(path, held, "choose a --run on storage with file locks", wait_log=log)


def open_workdir(run: Path, name: str, fingerprint: Mapping[str, Any]) -> Path:
    """The folder where a member is trained: that of an interrupted training with this fingerprint, or a new one."""
    work = artifacts.work_path(run, name)
    if _saved_fingerprint(work) != fingerprint:
        shutil.rmtree(work, ignore_errors=True)
        artifacts.write_json(work / FINGERPRINT_FILE, fingerprint)
    return work


def find_resumable(
    run: Path, fingerprints: Mapping[str, Mapping[str, Any]], fresh: bool, log: Log = print
) -> list[str]:
    """Names of members whose interrupted training will be resumed.

    fresh: remove interrupted trainings, once no process works on them. Raises ArtifactError, which says what changed,
    for one with another fingerprint.
    """
    resumable, problems = [], []
    for name, fingerprint in fingerprints.items():
        work = artifacts.work_path(run, name)
        if fresh:
            with member_lock(run, name, log):
                shutil.rmtree(work, ignore_errors=True)
        if not (any(work.glob("*/*.safetensors")) or any(work.glob("*/done.json"))):
            continue  # neither a saved state nor a finished fold
        before = _saved_fingerprint(work)
        if before == fingerprint:
            resumable.append(name)
            continue
        changes = join_limited(_changes(before or {}, fingerprint), 4) or "its files are of another version"
        problems.append(f"{name}: its training was interrupted, and since then {changes}")
    if problems:
        raise ArtifactError("\n".join(problems) + "; set it back to go on, or add --fresh to train anew")
    return resumable


def _saved_fingerprint(work: Path) -> dict[str, Any] | None:
    try:
        values = artifacts.read_json(work / FINGERPRINT_FILE, REMEDY)
    except ArtifactError:
        return None
    values.pop("format_version")
    return values


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    names = {"data_sha256": "the data or its split", "training_version": "manyeyes' own training"}
    for key in now:
        if key == "recipe":
            old, new = flatten(before.get(key, {})), flatten(now[key])
            yield from (f"{k} {old.get(k)} became {v}" for k, v in new.items() if old.get(k) != v)
        elif before.get(key) != now[key]:
            yield f"{names[key]} changed" if key in names else f"{key} {before.get(key)} became {now[key]}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def check_disk(run: Path, weights: Sequence[int], parallel: int = 1) -> None:
    """ArtifactError where the run's disk cannot hold what training writes.

    weights: bytes of each member's weights. parallel: how many members are trained at once. A member in training
    takes ten times its weights: the state has them, their average and two moments each, twice while it is replaced,
    and the best epoch's weights twice. Afterwards it takes its weights alone.
    """
    needed = SPARE_BYTES + 10 * sum(sorted(weights)[-parallel:]) + sum(weights)
    free = shutil.disk_usage(next(folder for folder in (run, *run.absolute().parents) if folder.is_dir())).free
    if weights and free < needed:
        raise ArtifactError(
            f"training needs about {needed / 2**30:.1f} GiB on the disk of {run}, and {free / 2**30:.1f} are free; "
            "make room, or choose another --run"
        )


METADATA_KEY = "facts"  # of our JSON in the header of the safetensors file


def write(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON-ready facts; atomic."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format_version": artifacts.FORMAT_VERSION, **facts})
    with artifacts.replacing(path) as temporary:
        try:
            save_file(ready, temporary, {METADATA_KEY: text})
        except SafetensorError as error:  # such as a full disk
            raise OSError(None, str(error)) from None


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and facts that `write` wrote; ArtifactError for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()[METADATA_KEY])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 not a mapping
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); {REMEDY}") from None


def strip_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with "prefix.", without it."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """An optimizer's state: tensors by "parameter.key" or "group N.key", and its groups' plain values."""
    values = optimizer.state_dict()
    tensors = {f"{n}.{key}": torch.as_tensor(v) for n, entry in values["state"].items() for key, v in entry.items()}
    for n, group in enumerate(values["param_groups"]):  # timm's LAMB counts steps in its groups
        tensors |= {f"group {n}.{key}": value for key, value in group.items() if torch.is_tensor(value)}
    plain = (int, float, bool, str, type(None))
    return tensors, [{k: v for k, v in group.items() if isinstance(v, plain)} for group in values["param_groups"]]


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], groups: list[dict[str, Any]]
) -> None:
    """Restore what `optimizer_state` returned, in a new optimizer of the same parameters."""
    own = optimizer.state_dict()["param_groups"]
    merged = [{**group, **saved} for group, saved in zip(own, groups, strict=True)]
    entries: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        owner, _, key = name.partition(".")
        if owner.startswith("group "):
            merged[int(owner.removeprefix("group "))][key] = tensor
            continue
        like = parameters[int(owner)].detach()
        # Fused optimizers go through a parameter and its moments in memory order, so both need the same strides.
        value = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor) if tensor.shape == like.shape else tensor
        entries.setdefault(int(owner), {})[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": merged})
