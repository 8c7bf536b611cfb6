"""Ensemble: members that are ready to run, and the stacker and cascade that turn their logits into one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.cascade.cascade import Cascade
from ensemble.models.external import External, test_column
from ensemble.models.runner import Runner
from ensemble.stacking.stacker import Stacker


@dataclass(frozen=True)
class Ensemble:
    """Members ready to run, in the order they run in, the stacker, and the device (cpu or cuda).

    externals: members of the stacker that were trained elsewhere; their scores are looked up by id.
    identity: a hash of all that decides the logits: weights, contracts, settings, and the
    versions of the libraries that run them.
    cascade: decides which images need which members; without it every image needs all.
    settings: how each member is run, such as ("swin", "openvino bf16").
    """

    runners: tuple[Runner, ...]
    stacker: Stacker
    device: str
    externals: tuple[External, ...] = ()
    identity: str = ""
    cascade: Cascade | None = None
    settings: tuple[tuple[str, str], ...] = ()

    def with_externals(
        self, logits: np.ndarray, ids: Sequence[str], members: Sequence[str] | None = None
    ) -> np.ndarray:
        """Add the columns of the members that are looked up by id: [N, runners] -> [N, members].

        members: which, and in which order; by default the stacker's.
        """
        columns = {runner.name: column for column, runner in enumerate(self.runners)}
        externals = {member.name: member for member in self.externals}
        own = [
            logits[:, columns[name]] if name in columns else test_column(externals[name], ids)
            for name in (self.stacker.members if members is None else members)
        ]
        return np.column_stack([logits[:, :0], *own])

    def apply(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The stack's logit float64 [N] of the members' logits, and the position of the last member used, int [N].

        logits: of `with_externals`. The position is in the cascade's order; without a cascade it is the last one.
        """
        if self.cascade:
            return self.cascade.apply(logits, self.stacker)
        return self.stacker.logit(logits), np.full(len(logits), len(self.stacker.members) - 1)

    def has_missing_logits(self, logits: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """Where a member that had to run gave no finite logit, bool [N]. Images that could not be read are included."""
        infinite = np.isinf(logits).any(axis=1)
        if not self.cascade:
            return infinite | np.isnan(logits).any(axis=1)
        known = np.where(infinite[:, None], np.nan, logits)
        return infinite | np.isnan(self.apply(self.with_externals(known, ids))[0])
