"""The state of an unfinished fit on disk: one safetensors file, replaced whole, so that a kill loses nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ensemble import artifacts
from ensemble.errors import ArtifactError

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
    """An optimizer's state: tensors by "parameter.key", and what its groups hold beside parameters."""
    values = optimizer.state_dict()
    tensors = {
        f"{parameter}.{key}": torch.as_tensor(value)
        for parameter, entry in values["state"].items()
        for key, value in entry.items()
    }
    plain = (int, float, bool, str, type(None))
    groups = [{key: v for key, v in group.items() if isinstance(v, plain)} for group in values["param_groups"]]
    return tensors, groups


def into_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], groups: list[dict[str, Any]]
) -> None:
    """Give a new optimizer of the same parameters the state of `of_optimizer`."""
    values = optimizer.state_dict()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.partition(".")
        state.setdefault(int(parameter), {})[key] = tensor
    merged = [{**own, **saved} for own, saved in zip(values["param_groups"], groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": merged})
