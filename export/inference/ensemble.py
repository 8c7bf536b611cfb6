"""Members that run together, and their logits -> the stack's, whatever of them ran."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.models.external import External, test_column
from ensemble.models.runner import Runner
from ensemble.stacking.cascade import Cascade
from ensemble.stacking.stacker import Stacker


@dataclass(frozen=True)
class Ensemble:
    """Members ready to run, in the order they run in, the stacker, and where they run (cpu or cuda).

    externals: members of the stacker that were trained elsewhere, whose scores are looked up by id.
    identity: a hash of all that decides the logits: weights, contracts, settings, and the
    versions of the libraries that run them.
    cascade: which images need which members; without it all need all.
    settings: how each member is run, such as ("swin", "openvino bf16").
    """

    runners: tuple[Runner, ...]
    stacker: Stacker
    device: str
    externals: tuple[External, ...] = ()
    identity: str = ""
    cascade: Cascade | None = None
    settings: tuple[tuple[str, str], ...] = ()


def runner_names(ensemble: Ensemble) -> list[str]:
    """Names of the members that run, in the order they run in."""
    return [runner.name for runner in ensemble.runners]


def table(
    ensemble: Ensemble, logits: np.ndarray, keys: Sequence[str], members: Sequence[str] | None = None
) -> np.ndarray:
    """The runners' logits [N, runners] with those that are looked up by id: [N, members], the stacker's by default."""
    columns = {name: column for column, name in enumerate(runner_names(ensemble))}
    externals = {member.name: member for member in ensemble.externals}
    return np.column_stack(
        [
            logits[:, columns[name]] if name in columns else test_column(externals[name], keys)
            for name in (ensemble.stacker.members if members is None else members)
        ]
    )


def apply(ensemble: Ensemble, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stack's logit float64 [N] of logits from `table`, and the place of the last member that counts, int [N].

    That place is in the cascade's order; without a cascade all count.
    """
    if ensemble.cascade:
        return ensemble.cascade.apply(logits, ensemble.stacker)
    return ensemble.stacker.logit(logits), np.full(len(logits), len(ensemble.stacker.members) - 1)


def needs(ensemble: Ensemble, cascade: Cascade, number: int, logits: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """Which images that needed the runner before this one need this one too, bool [N].

    logits: [N, runners], of which those of the runners before it count.
    """
    names = runner_names(ensemble)
    place = cascade.order.index(names[number])
    asked = cascade.order.index(names[number - 1]) if number else 0  # by what is looked up in between, too
    stays = np.ones(len(logits), dtype=bool)
    if asked < place:
        known = table(ensemble, logits, keys, cascade.order[:place])
        for step in cascade.steps[asked:place]:
            stays &= ~step.exits(step.surrogate_logit(known))
    return stays


def silent(ensemble: Ensemble, logits: np.ndarray, keys: Sequence[str]) -> np.ndarray:
    """Where a member that had to run gave no finite logit, bool [N]; images that could not be read are among them."""
    endless = np.isinf(logits).any(axis=1)
    if not ensemble.cascade:
        return endless | np.isnan(logits).any(axis=1)
    known = np.where(endless[:, None], np.nan, logits)
    return endless | np.isnan(apply(ensemble, table(ensemble, known, keys))[0])
