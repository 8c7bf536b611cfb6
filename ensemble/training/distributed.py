"""One or several training processes, as torchrun and accelerate launch start them, and what they exchange."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed

from ensemble.core.errors import ManyeyesError, UnavailableError
from ensemble.models.torch_runner import choose_device

T = TypeVar("T")
GROUP_TIMEOUT = timedelta(hours=12)  # others wait while the main process reads the data


class MainProcessError(ManyeyesError):
    """The main process ended with an error that is not a ManyeyesError; only that process has the details."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that train together; a single process is rank 0 of 1.

    device: "cpu", "cuda", or "cuda:N" for the process's own GPU.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this process reads the data, logs and writes."""
        return self.rank == 0

    @property
    def device_type(self) -> str:
        """cpu or cuda."""
        return self.device.partition(":")[0]


def is_launched() -> bool:
    """Whether a launcher started several processes of this command."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def init_process_group(device: str) -> ProcessGroup:
    """The group of this process; several processes are connected, over NCCL for GPUs and gloo for CPUs.

    device: auto, cpu or cuda. Raises UnavailableError for a device that is not here.
    """
    chosen = choose_device(device)
    if not is_launched():
        return ProcessGroup(device=chosen)
    rank, world_size, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if chosen == "cuda":
        if local >= torch.cuda.device_count():
            raise UnavailableError(
                f"process {local} of this machine has no GPU of its own ({torch.cuda.device_count()} are here); "
                "start as many processes as there are GPUs, or add --device cpu"
            )
        torch.cuda.set_device(local)
        chosen = f"cuda:{local}"
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if chosen != "cpu" else "gloo", timeout=GROUP_TIMEOUT)
    return ProcessGroup(rank, world_size, chosen)


def destroy_process_group() -> None:
    """Disconnect the processes, if there are several."""
    if distributed.is_available() and distributed.is_initialized():
        with suppress(RuntimeError):  # another process may be gone already
            distributed.destroy_process_group()


def run_on_main(processes: ProcessGroup, work: Callable[[], T]) -> T:
    """The value of `work`, which the main process alone does; if it fails, all processes raise its error.

    The value is sent to the other processes: plain data only.
    """
    if processes.world_size == 1:
        return work()
    box: list[Any] = [None, None]
    try:
        if processes.is_main:
            box[0] = work()
    except BaseException as error:
        ours = isinstance(error, ManyeyesError)
        box[1] = (ours, str(error) if ours else f"the first process failed: {error}")
        raise
    finally:
        distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        ours, text = box[1]
        raise (ManyeyesError if ours else MainProcessError)(text)
    return box[0]


def shard_indices(processes: ProcessGroup, count: int) -> np.ndarray:
    """int64: the numbers of those of `count` rows that this process works on."""
    return np.arange(processes.rank, count, processes.world_size)


def all_gather(processes: ProcessGroup, values: np.ndarray, count: int) -> np.ndarray:
    """All rows [count, ...] in order, from each process's rows of `shard_indices`."""
    if processes.world_size == 1:
        return values
    parts: list[Any] = [None] * processes.world_size
    distributed.all_gather_object(parts, values)
    result = np.empty((count, *values.shape[1:]), dtype=values.dtype)
    for rank, part in enumerate(parts):
        result[rank :: processes.world_size] = part
    return result


def any_rank(processes: ProcessGroup, value: bool) -> bool:
    """Whether the value is true in any of the processes."""
    if processes.world_size == 1:
        return value
    flag = torch.tensor(int(value), device=processes.device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())
