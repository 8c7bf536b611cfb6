"""Fit a cascade on one part of labelled rows, and report what it does on the other. NumPy only."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ensemble import bootstrap
from ensemble.cascade import Cascade, Report, Step, leave
from ensemble.cascade_limits import Material, by_cost, by_worth, fit_steps
from ensemble.errors import ArtifactError
from ensemble.metrics import auroc, sigmoid
from ensemble.stack import Stacker

LEAST_ROWS = 100  # in both parts together
LEAST_GROUPS = 4  # with rows of a class, in each part
REMEDY = "export with more held-out images (train-all --heldout, or export --stack-on), or score without --cascade"


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

    milliseconds: each member's, an image; 0 for those whose scores are looked up. Half of the
    groups serve to fit order, guesses and limits, the other half to report. Members run from
    cheap to dear, or by what they tell a millisecond where that costs less. ArtifactError where
    there are too few rows, and where the report says that the loss is larger.

    That the stacker may have been fitted on the same rows flatters the full stack, not the cascade.
    """
    if len(stacker.members) < 2:
        raise ArtifactError("a cascade needs two members or more; score without --cascade")
    first = halves(rows.labels, rows.groups, seed)
    check(rows, first, "a cascade is fitted on", REMEDY)
    spent = np.array([milliseconds[name] for name in stacker.members])
    both = Material(stacker.members, rows.logits, stacker.logit(rows.logits), rows.labels, rows.groups, spent)
    fitting = both.part(first)
    fold = _quarters(fitting.labels, fitting.groups, seed)
    found = []
    for order in dict.fromkeys([by_cost(spent), by_worth(fitting)]):
        steps = fit_steps(fitting.ordered(order), fold, tolerance, seed)
        found.append((fitting.ordered(order).cost(steps), order, steps))
    _, order, steps = min(found, key=lambda each: each[0])  # the first of those that cost the same
    told = report(steps, both.part(~first).ordered(order), stacker.threshold, seed)
    if told.loss.low > tolerance:
        raise ArtifactError(
            f"the cascade loses {told.loss} of AUROC on {told.rows} held-out images that its limits were not fitted "
            f"on, more than {tolerance:g}: allow more, or score without --cascade"
        )
    return Cascade(steps, stacker.members[order[-1]], tuple(spent[list(order)].tolist()), tolerance, told)


def report(steps: tuple[Step, ...], material: Material, threshold: float, seed: int = 0) -> Report:
    """What a cascade's steps do on labelled rows that they were not fitted on, members in its order."""
    found, left = leave(steps, material.logits, material.full)
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


def _quarters(labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Halves of the halves, int [N] of 0 to 3."""
    first = halves(labels, groups, seed)
    quarters = 2 * first
    for half in (first, ~first):
        quarters[half] += halves(labels[half], groups[half], seed)
    return quarters


def check(rows: Rows, first: np.ndarray, needs: str, remedy: str) -> None:
    """ArtifactError, by what `needs` them, where rows or one of their halves are too few to fit on and to report on."""
    if len(rows.labels) < LEAST_ROWS:
        raise ArtifactError(f"{needs} {LEAST_ROWS} held-out images or more, and here are {len(rows.labels)}: {remedy}")
    for label, name in enumerate(("real", "ai")):
        for half in (first, ~first):
            if (found := len(np.unique(rows.groups[half & (rows.labels == label)]))) < LEAST_GROUPS:
                raise ArtifactError(
                    f"{needs} half of the held-out images and reports on the other half; one half has {found} groups "
                    f"with {name} images, and {LEAST_GROUPS} are needed: {remedy}"
                )
