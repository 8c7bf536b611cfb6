"""The cascade: members run one after another, and an image exits early once the rest could hardly change its score.

NumPy only; fit.py fits it. The idea of early exits: Viola and Jones, "Rapid object detection using a boosted
cascade of simple features" (2001).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ensemble.core.metrics import Interval
from ensemble.stacking.stacker import Stacker, weighted_sum


@dataclass(frozen=True)
class CascadeStep:
    """After `member`: a linear surrogate of the stack's logit, and the limits beyond which an image exits with it.

    surrogate logit = intercept + sum of coef * part over the members so far, in the cascade's order; a member's part
    is what the stacker sums (`Stacker.parts`): its calibrated probability, or its logit. An image exits where the
    surrogate logit is <= low or >= high; with infinite limits none exits.
    """

    member: str
    coef: tuple[float, ...]
    intercept: float
    low: float = -np.inf
    high: float = np.inf

    def surrogate_logit(self, parts: np.ndarray) -> np.ndarray:
        """float64 [N] from parts [N, members] in the cascade's order; NaN where one it needs is missing."""
        return weighted_sum(parts, self.coef, self.intercept)

    def exits(self, logit: np.ndarray) -> np.ndarray:
        """Which images with these surrogate logits [N] exit: bool [N]; NaN does not."""
        return (logit <= self.low) | (logit >= self.high)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values: null for an infinite limit."""
        limits = {
            name: limit if np.isfinite(limit) else None for name, limit in (("low", self.low), ("high", self.high))
        }
        return {**asdict(self), "coef": list(self.coef), **limits}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CascadeStep":
        """The step from `to_dict`'s values."""
        low = -np.inf if values["low"] is None else values["low"]
        high = np.inf if values["high"] is None else values["high"]
        return cls(values["member"], tuple(values["coef"]), values["intercept"], low, high)


@dataclass(frozen=True)
class CascadeReport:
    """Scores of a cascade on rows, each by limits that were fitted on other rows.

    auroc: of the full stack, and of the cascade. loss: the first minus the second, with its
    95 % interval over groups. shares: of the images that exit after each member, in the
    cascade's order, summing to 1. milliseconds: of the members an image, by the full stack and
    by the cascade. decision_changes: the share of images whose class at the stacker's threshold changes.
    """

    rows: int
    groups: int
    auroc: tuple[float, float]
    loss: Interval
    shares: tuple[float, ...]
    milliseconds: tuple[float, float]
    decision_changes: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        lists = {name: list(getattr(self, name)) for name in ("auroc", "shares", "milliseconds")}
        values = {**asdict(self), **lists, "loss": self.loss.to_dict()}
        values["flips"] = values.pop("decision_changes")  # its name in files
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CascadeReport":
        """The report from `to_dict`'s values."""
        lists = {name: tuple(values[name]) for name in ("auroc", "shares", "milliseconds")}
        values = {**values, **lists, "loss": Interval.from_dict(values["loss"])}
        return cls(**{"decision_changes" if name == "flips" else name: value for name, value in values.items()})


@dataclass(frozen=True)
class Cascade:
    """A step after each member but the last, then `last`, after which the stacker itself gives the score.

    milliseconds: of each member an image, in this order. tolerance: the loss of AUROC that the
    cascade was fitted to stay within.
    """

    steps: tuple[CascadeStep, ...]
    last: str
    milliseconds: tuple[float, ...]
    tolerance: float
    report: CascadeReport

    @property
    def order(self) -> tuple[str, ...]:
        """Member names in the order in which they run."""
        return (*(step.member for step in self.steps), self.last)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "steps": [step.to_dict() for step in self.steps],
            "last": self.last,
            "milliseconds": list(self.milliseconds),
            "tolerance": self.tolerance,
            "report": self.report.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Cascade":
        """The cascade from `to_dict`'s values."""
        steps, report = tuple(map(CascadeStep.from_dict, values["steps"])), CascadeReport.from_dict(values["report"])
        return cls(steps, values["last"], tuple(values["milliseconds"]), values["tolerance"], report)

    def apply(self, logits: np.ndarray, stacker: Stacker) -> tuple[np.ndarray, np.ndarray]:
        """The logit float64 [N], calibrated, and the step int [N] after which each image exits.

        logits: [N, members] in the stacker's order, NaN for members that did not run. An image
        that does not exit early has the last step and the stacker's own logit: NaN while a
        member is missing.
        """
        ordered = stacker.parts(logits)[:, [stacker.members.index(name) for name in self.order]]
        return early_exit(self.steps, ordered, stacker.logit(logits))

    def stays(self, logits: np.ndarray, stacker: Stacker) -> np.ndarray:
        """Which images need the next member, bool [N]. logits: [N, members that ran], in the cascade's order."""
        count = logits.shape[1]
        parts = stacker.parts(logits, self.order[:count])
        return early_exit(self.steps[:count], parts, np.zeros(len(logits)))[1] == count


def early_exit(steps: Sequence[CascadeStep], ordered: np.ndarray, full: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `Cascade.apply`, from parts [N, members] in the cascade's order and the full stack's logits [N]."""
    logits, exits = full, np.full(len(full), len(steps))
    for number, step in reversed(list(enumerate(steps))):  # backwards: the first step at which an image exits wins
        surrogate = step.surrogate_logit(ordered)
        leaves = step.exits(surrogate)
        logits, exits = np.where(leaves, surrogate, logits), np.where(leaves, number, exits)
    return logits, exits
