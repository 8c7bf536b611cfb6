"""Torch members on a device, ready to score."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from ensemble.core.errors import UnavailableError
from ensemble.models.backbone import Member
from ensemble.models.members import load_member
from ensemble.models.runner import Runner

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(device: str) -> str:
    """`auto` as cuda where there is one, else cpu; UnavailableError for a device that is not here."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UnavailableError("no CUDA device was found by torch; use --device cpu, or check the driver")
    return ("cuda" if available else "cpu") if device == "auto" else device


def autocast(device: str, precision: str) -> AbstractContextManager[object]:
    """Matrix products and convolutions in fp32 (unchanged), bf16 or fp16, what needs range in fp32."""
    return torch.autocast(device.partition(":")[0], DTYPES[precision], enabled=precision != "fp32")


def member_runners(run: Path, names: Sequence[str], device: str = "auto") -> Iterator[Runner]:
    """A run's members, one after another, each loaded when its turn comes."""
    chosen = choose_device(device)
    return (torch_runner(name, load_member(run, name), chosen) for name in names)


def torch_runner(
    name: str, member: Member, device: torch.device | str, precision: str = "fp32", batch: int | None = None
) -> Runner:
    """The member as a Runner on `device`, `batch` images at a time; without it, all that it is given."""
    member.eval().to(device)

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), autocast(str(device), precision):
            parts = torch.from_numpy(pixels).split(batch or len(pixels))
            return torch.cat([member(part.to(device)).float().cpu() for part in parts]).numpy()

    return Runner(name, member.preprocess_config, run)
