"""Exponential moving average of a member's weights and batch-norm statistics."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from ensemble.core.errors import ArtifactError
from ensemble.models.backbone import Member


class Ema:
    """The average of a member's floating weights and buffers; integer buffers are the member's last.

    decay: the wished one; its horizon 1 / (1 - decay) is kept within a tenth of `total_steps`,
    so that the start is forgotten by the end of a short training.
    """

    def __init__(self, member: Member, decay: float, total_steps: int) -> None:
        self.decay = max(0.0, min(decay, 1.0 - 10.0 / total_steps))
        self.count = 0  # updates so far; with `state` it is all that a resume needs
        self._average = {name: tensor.detach().clone() for name, tensor in member.state_dict().items()}

    @torch.no_grad()
    def update(self, member: Member) -> None:
        """Take in the member's weights after an optimizer step.

        The decay rises as min(decay, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage.
        """
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        current = member.state_dict()
        floating = [name for name, tensor in self._average.items() if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [self._average[name] for name in floating], [current[name] for name in floating], 1 - decay
        )
        for name, tensor in self._average.items():
            if not tensor.is_floating_point():
                tensor.copy_(current[name])
        self.count += 1

    def state(self) -> dict[str, torch.Tensor]:
        """The average under the names of `member.state_dict()`; the tensors are not copies."""
        return dict(self._average)

    def load(self, state: Mapping[str, torch.Tensor], count: int) -> None:
        """Go on from what `state` and `count` were."""
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if shapes != {name: tensor.shape for name, tensor in self._average.items()}:
            raise ArtifactError("the saved moving average is of another network; train again with --fresh")
        for name, tensor in self._average.items():
            tensor.copy_(state[name])
        self.count = count

    @contextmanager
    def applied(self, member: Member) -> Iterator[Member]:
        """The member with the averaged weights inside the block, and with its own again after it."""
        self._swap(member)
        try:
            yield member
        finally:
            self._swap(member)

    @torch.no_grad()
    def _swap(self, member: Member) -> None:
        # by value, one tensor at a time: optimizers and replicas keep pointing at the same memory
        for name, tensor in member.state_dict().items():
            held = tensor.clone()
            tensor.copy_(self._average[name])
            self._average[name].copy_(held)
