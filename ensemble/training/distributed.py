"""One or several training processes, as torchrun and accelerate launch start them."""

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
GROUP_TIMEOUT = timedelta(hours=12)  # others wait while the first process reads the data


class MainProcessError(ManyeyesError):
    """The first process ended with an error that is not of ours; only that one knows more."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that train together; alone it is 0 of 1.

    device: "cpu", "cuda", or "cuda:N" for the process's own GPU.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        """Whether this process reads the data, talks and writes."""
        return self.rank == 0

    @property
    def device_type(self) -> str:
        """cpu or cuda."""
        return self.device.partition(":")[0]


def is_launched() -> bool:
    """Whether a launcher started several processes of this command."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def init_process_group(device: str) -> ProcessGroup:
    """This process's place; in several processes the group is set up, over NCCL for GPUs and gloo for CPUs.

    device: auto, cpu or cuda. Raises UnavailableError for a device that is not here.
    """
    kind = choose_device(device)
    if not is_launched():
        return ProcessGroup(device=kind)
    rank, count, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UnavailableError(
                f"process {local} of this machine has no GPU of its own ({torch.cuda.device_count()} are here); "
                "start as many processes as there are GPUs, or add --device cpu"
            )
        torch.cuda.set_device(local)
        kind = f"cuda:{local}"
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if kind != "cpu" else "gloo", timeout=GROUP_TIMEOUT)
    return ProcessGroup(rank, count, kind)


def destroy_process_group() -> None:
    """Close the group, if there is one."""
    if distributed.is_available() and distributed.is_initialized():
        with suppress(RuntimeError):  # another process may be gone already
            distributed.destroy_process_group()


def run_on_main(processes: ProcessGroup, work: Callable[[], T]) -> T:
    """The value of `work`, done by the first process alone; where it fails, all raise its error.

    The value travels between the processes: plain data only.
    """
    if processes.world_size == 1:
        return work()
    box: list[Any] = [None, None]
    if processes.is_main:
        try:
            box[0] = work()
        except ManyeyesError as error:
            box[1] = (True, str(error))
            broadcast(box)
            raise
        except BaseException as error:
            box[1] = (False, f"the first process failed: {error}")
            broadcast(box)
            raise
    broadcast(box)
    if box[1] is not None:
        ours, text = box[1]
        raise (ManyeyesError if ours else MainProcessError)(text)
    return box[0]


def broadcast(box: list[Any]) -> None:
    """Fill every process's list with the first one's values."""
    distributed.broadcast_object_list(box, src=0)


def shard_indices(processes: ProcessGroup, count: int) -> np.ndarray:
    """int64: which of `count` rows this process works on."""
    return np.arange(processes.rank, count, processes.world_size)


def all_gather(processes: ProcessGroup, values: np.ndarray, count: int) -> np.ndarray:
    """All rows [count, ...] in order, from the rows `mine` of each process; none is doubled."""
    if processes.world_size == 1:
        return values
    parts: list[Any] = [None] * processes.world_size
    distributed.all_gather_object(parts, values)
    result = np.empty((count, *values.shape[1:]), dtype=values.dtype)
    for rank, part in enumerate(parts):
        result[rank :: processes.world_size] = part
    return result


def any_rank(processes: ProcessGroup, value: bool) -> bool:
    """Whether it is so in any of the processes."""
    if processes.world_size == 1:
        return value
    flag = torch.tensor(int(value), device=processes.device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())
