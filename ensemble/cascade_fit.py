"""Fit a cascade on labelled rows, and report what it does on rows that it was not fitted on. NumPy only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.cascade import Cascade, Report, Step, leave
from ensemble.cascade_limits import Material, by_cost, by_worth, fit_steps
from ensemble.core import bootstrap
from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import auroc, sigmoid
from ensemble.stack import Stacker

LEAST_ROWS, MOST_ROWS = 100, 4000
LEAST_GROUPS = 2  # with rows of a class, in each quarter
MORE_ROWS = "export with more held-out images (train-all --heldout or --folds, or export --stack-on)"
REMEDY = f"{MORE_ROWS}, or score without --cascade"


@dataclass(frozen=True)
class Rows:
    """Labelled rows that no member was fitted on: logits [N, members] in the stacker's order, labels and groups [N]."""

    logits: np.ndarray
    labels: np.ndarray
    groups: np.ndarray


def fit_cascade(
    stacker: Stacker, rows: Rows, milliseconds: Mapping[str, float], tolerance: float, seed: int = 0
) -> Cascade:
    """A cascade whose AUROC is to lie at most `tolerance` below the full stack's.

    milliseconds: each member's, an image; 0 for those whose scores are looked up. Members run
    from cheap to dear, or by what they tell a millisecond where that costs less. That order,
    guesses and limits are fitted on all rows (of very many, on `drawn`); the report is
    cross-fitted, but for the order: each quarter of the groups leaves by steps that were fitted
    in the same way on the other three. ArtifactError where the report is sure of a larger
    loss: all of its interval lies beyond. Whether rows are enough is for `check_rows` to say.

    That the stacker may have been fitted on the same rows flatters the full stack, not the cascade.
    """
    if len(stacker.members) < 2:
        raise ArtifactError("a cascade needs two members or more; score without --cascade")
    rows = drawn(rows, seed)
    spent = np.array([milliseconds[name] for name in stacker.members])
    material = Material(stacker.members, rows.logits, stacker.logit(rows.logits), rows.labels, rows.groups, spent)
    found = []
    for order in dict.fromkeys([by_cost(spent), by_worth(material)]):
        ordered = material.ordered(order)
        found.append((ordered, order, _fitted(ordered, tolerance, seed)))
    material, order, steps = min(found, key=lambda each: each[0].cost(each[2]))  # the first of those that cost the same
    logits, left = np.empty(len(rows.labels)), np.empty(len(rows.labels), dtype=int)
    for held in quarters(material.labels, material.groups, seed):
        others = _fitted(material.part(~held), tolerance, seed)
        logits[held], left[held] = leave(others, material.logits[held], material.full[held])
    told = report(material, logits, left, stacker.threshold, seed)
    if told.loss.low > tolerance:
        raise ArtifactError(
            f"the cascade loses {told.loss} of AUROC on {told.rows} images by limits that were not fitted on them, "
            f"more than {tolerance:g}: allow more, or score without --cascade"
        )
    return Cascade(steps, stacker.members[order[-1]], tuple(spent[list(order)].tolist()), tolerance, told)


def report(material: Material, found: np.ndarray, left: np.ndarray, threshold: float, seed: int = 0) -> Report:
    """What a cascade does on labelled rows, members in its order: their logits [N], and the steps [N] they left at."""
    calls = [sigmoid(logit) >= threshold for logit in (material.full, found)]
    labels, groups, spent = material.labels, material.groups, np.cumsum(material.milliseconds)
    return Report(
        len(labels),
        len(np.unique(groups)),
        (auroc(labels, material.full), auroc(labels, found)),
        bootstrap.paired(labels, material.full, found, groups, seed=seed).difference,
        tuple((np.bincount(left, minlength=len(spent)) / len(left)).tolist()),
        (float(spent[-1]), float(spent[left].mean())),
        float(np.mean(calls[0] != calls[1])),
    )


def halves(labels: np.ndarray, groups: np.ndarray, seed: int = 0) -> np.ndarray:
    """Whether a row is in the first half, bool [N]: whole groups, of each mix of classes alike, decided by the seed.

    Large groups are dealt first, each to the half that has fewer rows of its mix.
    """
    _, codes = np.unique(groups, return_inverse=True)
    size, ai = np.bincount(codes), np.bincount(codes, weights=labels == 1)
    mix = (ai > 0) + 2 * (ai < size)
    shuffled = np.random.default_rng(seed).permutation(len(size))
    first, ahead = np.zeros(len(size), bool), 0  # rows that the first half has more
    for kind in np.unique(mix):
        ahead = int(np.sign(ahead))  # an odd group of one mix is made good by the next
        for group in sorted(shuffled[mix[shuffled] == kind], key=lambda group: -size[group]):
            first[group] = ahead <= 0
            ahead += size[group] if first[group] else -size[group]
    return first[codes]


def quarters(labels: np.ndarray, groups: np.ndarray, seed: int) -> list[np.ndarray]:
    """The rows of each quarter, bool [N]: halves of the halves."""
    number = 2 * halves(labels, groups, seed)
    for half in (number == 0, number == 2):
        number[half] += halves(labels[half], groups[half], seed)
    return [number == each for each in np.unique(number)]


def _fitted(material: Material, tolerance: float, seed: int) -> tuple[Step, ...]:
    return fit_steps(material, quarters(material.labels, material.groups, seed), tolerance, seed)


def check_rows(rows: Rows, seed: int = 0) -> None:
    """ArtifactError, saying what to do, where rows, or the groups of a quarter, are too few for a cascade."""
    if lacking := _lacking(rows, seed):
        raise ArtifactError(f"{lacking}: {REMEDY}")


def drawn(rows: Rows, seed: int = 0) -> Rows:
    """At most MOST_ROWS of them, in whole groups that the seed draws; all where such groups would be too few.

    More would fit hardly another cascade, and take minutes.
    """
    if len(rows.labels) <= MOST_ROWS:
        return rows
    _, codes = np.unique(rows.groups, return_inverse=True)
    sizes, left = np.bincount(codes), MOST_ROWS
    chosen = np.zeros(len(sizes), dtype=bool)
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[group] <= left:
            chosen[group], left = True, left - sizes[group]
    kept = chosen[codes]
    part = Rows(rows.logits[kept], rows.labels[kept], rows.groups[kept])
    return rows if _lacking(part, seed) else part


def _lacking(rows: Rows, seed: int) -> str:
    """What rows lack for a cascade, in words; nothing where they are enough."""
    if len(rows.labels) < LEAST_ROWS:
        return f"a cascade is fitted on {LEAST_ROWS} held-out images or more, and here are {len(rows.labels)}"
    if lack := lacking_groups(rows, quarters(rows.labels, rows.groups, seed), LEAST_GROUPS):
        return (
            "a cascade is fitted on three quarters of the held-out groups and tried on the fourth; one quarter "
            f"has {lack}, and {LEAST_GROUPS} are needed"
        )
    return ""


def lacking_groups(rows: Rows, parts: Sequence[np.ndarray], least: int) -> str:
    """The class of which a part, bool [N] each, has fewer groups than that, as "1 group with ai images"; else ""."""
    for part in parts:
        for label, name in enumerate(("real", "ai")):
            if (found := len(np.unique(rows.groups[part & (rows.labels == label)]))) < least:
                return f"{found} group{'s' * (found != 1)} with {name} images"
    return ""
