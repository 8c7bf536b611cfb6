"""Subsets of members worth trying, and those that nothing beats for the time they take."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Protocol, TypeVar

import numpy as np
from tqdm import tqdm

EXHAUSTIVE = 8  # members up to which every subset is tried


class Stack(Protocol):
    """A stack of some members: its AUROC on rows it was not fitted on, and what an image takes."""

    @property
    def members(self) -> tuple[str, ...]:
        """Their names."""

    @property
    def auroc(self) -> float:
        """0 to 1."""

    @property
    def milliseconds(self) -> float:
        """An image."""


S = TypeVar("S", bound=Stack)


def explore(count: int, measure: Callable[[tuple[int, ...]], S]) -> list[S]:
    """What `measure` says of subsets of so many members, each given by their places in order.

    Every subset of up to eight; of more, those found by adding, again and again, the member
    that raises the AUROC most.
    """
    if count <= EXHAUSTIVE:
        subsets = [chosen for size in range(1, count + 1) for chosen in combinations(range(count), size)]
        return [measure(chosen) for chosen in tqdm(subsets, desc="frontier", unit="stack", leave=False, disable=None)]
    kept: tuple[int, ...] = ()
    tried: list[S] = []
    for _ in tqdm(range(count), desc="frontier", unit="member", leave=False, disable=None):
        grown = [tuple(sorted((*kept, column))) for column in range(count) if column not in kept]
        found = [measure(chosen) for chosen in grown]
        kept = grown[int(np.argmax([stack.auroc for stack in found]))]
        tried += found
    return tried


def undominated(stacks: Sequence[S], better: Callable[[S, S | None], bool] = lambda slow, fast: True) -> list[S]:
    """Those that score above chance and above all that take as little time or less, from the fastest.

    `better` may refuse one: it is asked whether a slower stack is better than the best of the
    faster ones, or, where there is none, than chance.
    """
    best: list[S] = []
    for stack in sorted(stacks, key=lambda stack: (stack.milliseconds, -stack.auroc, len(stack.members))):
        fast = best[-1] if best else None
        if stack.auroc > (fast.auroc if fast else 0.5) and better(stack, fast):
            best.append(stack)
    return best
