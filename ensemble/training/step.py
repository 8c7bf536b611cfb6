"""One optimizer step, with accumulation, clipping, mixed precision and several processes; the EMA of the weights."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ensemble.core.errors import TrainingError, error_line
from ensemble.core.log import Log
from ensemble.core.recipe import Train
from ensemble.models.backbone import Member
from ensemble.models.torch_runner import autocast
from ensemble.training.distributed import ProcessGroup
from ensemble.training.optimizer import make_optimizer


class Ema:
    """The exponential moving average of a member's floating weights and buffers; integer buffers are copied.

    decay: lowered where its horizon 1 / (1 - decay) is longer than a tenth of `total_steps`, so that the first
    weights have no influence at the end of a short training.
    """

    def __init__(self, member: Member, decay: float, total_steps: int) -> None:
        self.decay = max(0.0, min(decay, 1.0 - 10.0 / total_steps))
        self.count = 0  # updates so far; saved with `average`
        self.average = {name: tensor.detach().clone() for name, tensor in member.state_dict().items()}

    @torch.no_grad()
    def update(self, member: Member) -> None:
        """Average in the member's weights after an optimizer step.

        The decay rises as min(decay, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage.
        """
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        current = member.state_dict()
        floating = [name for name, tensor in self.average.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.average[name] for name in floating], [current[name] for name in floating], 1 - decay)
        for name, tensor in self.average.items():
            if not tensor.is_floating_point():
                tensor.copy_(current[name])
        self.count += 1

    def load(self, state: Mapping[str, torch.Tensor], count: int) -> None:
        """Restore a saved `average` and `count` of the same network."""
        for name, tensor in self.average.items():
            tensor.copy_(state[name])
        self.count = count

    @contextmanager
    def applied(self, member: Member) -> Iterator[Member]:
        """In the block the member has the averaged weights, afterwards its own again."""
        self._swap(member)
        try:
            yield member
        finally:
            self._swap(member)

    @torch.no_grad()
    def _swap(self, member: Member) -> None:
        # by value, one tensor at a time: optimizers and replicas keep pointing at the same memory
        for name, tensor in member.state_dict().items():
            own = tensor.clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(own)


Batch = dict[str, torch.Tensor]


@dataclass
class TrainState:
    """A member in training, with its optimizer.

    network: the member, maybe compiled and wrapped for several processes. micro_batch: most images of one forward
    pass; it is halved when memory runs out.
    """

    member: Member
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None
    train: Train
    precision: str
    channels_last: bool
    processes: ProcessGroup
    micro_batch: int


def build_train_state(
    member: Member, train: Train, steps: int, precision: str, channels_last: bool, processes: ProcessGroup
) -> TrainState:
    """The state before the first of `steps` optimizer steps; the member is moved to its device in place."""
    member.memory_format = torch.channels_last if channels_last else torch.contiguous_format
    member.to(processes.device).to(memory_format=member.memory_format)
    for module in member.modules():
        if isinstance(module, nn.Hardtanh):  # ReLU6 too: changed in place, its input is copied for the backward pass
            module.inplace = False
    network: Any = member
    if train.compile:
        network = torch.compile(network)
    if processes.world_size > 1:
        network = DistributedDataParallel(network)
    return TrainState(
        member,
        network,
        make_optimizer(member, train),
        torch.amp.GradScaler(processes.device_type, enabled=precision == "fp16"),
        Ema(member, train.ema, steps) if train.ema is not None else None,
        train,
        precision,
        channels_last,
        processes,
        train.batch_size,
    )


def view_logits(network: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K, S, S, 3] -> float32 [N]: the mean logit of each image's K views."""
    return network(pixels.flatten(0, 1)).view(pixels.shape[0], -1).mean(dim=1)


def summed_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Binary cross-entropy in nats, summed over float [N]; labels smoothed towards 1/2 (Szegedy et al., 2016)."""
    targets = labels * (1 - smoothing) + smoothing / 2
    return functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")


def optimizer_step(state: TrainState, batches: Sequence[Batch], count: int, log: Log) -> torch.Tensor:
    """One update from this process's batches of a step of `count` images over all processes.

    Returns float32 [2] on the device: the mean loss of this process's images, and the norm of the gradient before
    clipping. When memory runs out, the step is repeated with micro-batches of half the size: the update is the same
    but for batch statistics.
    """
    while True:
        try:
            loss = _gradients(state, batches, count)
            break
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            problem = error_line(error, first=True)
        _halve(state, problem, log)  # outside the handler: the traceback would keep the activations
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.member.parameters(), state.train.clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update(state.member)
    return torch.stack([loss, norm.detach().to(loss)])


def _gradients(state: TrainState, batches: Sequence[Batch], count: int) -> torch.Tensor:
    pixels, labels = (
        [part for batch in batches for part in batch[key].split(state.micro_batch)] for key in ("pixels", "labels")
    )
    device, world = state.processes.device, state.processes.world_size
    total = torch.zeros((), device=device)
    for number, (images, targets) in enumerate(zip(pixels, labels, strict=True), start=1):
        # gradients of several processes are averaged once, with the last micro-batch
        accumulates = world > 1 and number < len(labels)
        with state.network.no_sync() if accumulates else nullcontext():  # type: ignore[operator]
            with autocast(device, state.precision):
                logits = view_logits(state.network, images.to(device, non_blocking=True))
            loss = summed_loss(logits.float(), targets.to(device, non_blocking=True), state.train.label_smoothing)
            state.scaler.scale(loss * (world / count)).backward()
        total += loss.detach()
    return total / sum(map(len, labels))


def _out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory; on a CPU torch says so in the message alone."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _halve(state: TrainState, problem: str, log: Log) -> None:
    state.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if state.processes.device_type == "cuda":
        torch.cuda.empty_cache()
    if state.micro_batch == 1 or state.processes.world_size > 1:
        raise TrainingError(
            f"out of memory with {state.micro_batch} images at once ({problem}); set train.checkpointing=true, "
            "a smaller image.size, or a smaller train.batch_size with a larger train.accumulate"
        )
    before, state.micro_batch = state.micro_batch, -(-state.micro_batch // 2)
    effective = state.train.batch_size * state.train.accumulate
    log(f"  out of memory with {before} images at once: going on with {state.micro_batch}, still {effective} a step")
