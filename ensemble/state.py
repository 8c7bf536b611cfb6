"""The state of an unfinished fit on disk: one safetensors file, replaced whole, so that a kill loses nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError

FACTS = "facts"  # key of our JSON in the file's header


def write(path: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON-ready facts; atomic."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format_version": artifacts.FORMAT_VERSION, **facts})
    with artifacts.replacing(path) as temporary:
        try:
            save_file(ready, temporary, {FACTS: text})
        except SafetensorError as error:  # how a full disk shows itself here
            raise OSError(None, str(error)) from None


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `write` wrote; ArtifactError for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()[FACTS])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 not a mapping
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); train with --fresh to start anew") from None


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with their names put under a prefix."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under a prefix, by their own names."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def of_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """An optimizer's state: tensors by "parameter.key" or "group N.key", and its groups' plain values."""
    values = optimizer.state_dict()
    entries = {**values["state"], **{f"group {n}": group for n, group in enumerate(values["param_groups"])}}
    tensors = {
        f"{place}.{key}": torch.as_tensor(value)
        for place, entry in entries.items()
        for key, value in entry.items()
        if place in values["state"] or torch.is_tensor(value)  # timm's LAMB counts steps in its groups
    }
    plain = (int, float, bool, str, type(None))
    return tensors, [{k: v for k, v in group.items() if isinstance(v, plain)} for group in values["param_groups"]]


def into_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], groups: list[dict[str, Any]]
) -> None:
    """Give a new optimizer of the same parameters the state of `of_optimizer`."""
    own = optimizer.state_dict()["param_groups"]
    merged = [{**group, **saved} for group, saved in zip(own, groups, strict=True)]
    entries: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        place, _, key = name.partition(".")
        if place.startswith("group "):
            merged[int(place.removeprefix("group "))][key] = tensor
            continue
        like = parameters[int(place)].detach()
        # Fused optimizers walk a parameter and its moments in memory order, so both need the same strides.
        value = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor) if tensor.shape == like.shape else tensor
        entries.setdefault(int(place), {})[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": merged})
