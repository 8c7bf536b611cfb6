"""Fit a cascade on labelled rows, and report what it does on rows that it was not fitted on. NumPy only.

The limits of a cascade: by optimal stopping at a price of AUROC in milliseconds, the price by cross-validation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from ensemble.core import bootstrap
from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import auroc, sigmoid
from ensemble.stacking.cascade import Cascade, CascadeReport, CascadeStep, early_exit
from ensemble.stacking.logit_table import LabelledLogits
from ensemble.stacking.stacker import Stacker

AUROC_COSTS = np.geomspace(1e5, 1, 51)  # of all AUROC, in milliseconds of the full stack; at the first hardly any leave
WINDOW_SHARE, MIN_WINDOW = 0.1, 20  # rows that are averaged over: this share of all, and no fewer than that
RIDGE = 1e-3  # of the members' mean variance
RESAMPLES, LOSS_QUANTILE = 300, 0.9  # the loss stays within the tolerance in this share of the draws
FEW_ROWS = 100  # rows that the expected loss is not trusted on: it counts twice at 100 rows, 1.05 times at 2,000


@dataclass(frozen=True)
class CascadeData(LabelledLogits):
    """Rows to fit a cascade on, members in the order in which they run.

    stack_logits: of the full stack, calibrated, float64 [N]. milliseconds: of each member an image, float64 [members].
    """

    stack_logits: np.ndarray
    milliseconds: np.ndarray

    def subset(self, rows: np.ndarray) -> Self:
        """The rows that a bool [N] selects."""
        return replace(super().subset(rows), stack_logits=self.stack_logits[rows])

    def select(self, members: Sequence[str]) -> Self:
        """The same rows with these members, in this order."""
        columns = [self.members.index(name) for name in members]
        return replace(super().select(members), milliseconds=self.milliseconds[columns])

    def mean_milliseconds(self, steps: tuple[CascadeStep, ...]) -> float:
        """What these steps take for an image, on average over the rows."""
        return float(np.cumsum(self.milliseconds)[early_exit(steps, self.logits, self.stack_logits)[1]].mean())


def fit_steps(data: CascadeData, folds: Sequence[np.ndarray], tolerance: float, seed: int) -> tuple[CascadeStep, ...]:
    """The steps at the lowest price of AUROC at which the loss stays within the tolerance.

    That loss is of steps fitted on all but a fold, bool [N], and applied to it, by its upper
    bound over draws of groups. Prices fall and limits only close in until it is beyond the
    tolerance, so a larger one never costs more milliseconds, on any rows.
    """
    ways = zip(regularisation_path(data), *(regularisation_path(data.subset(~held)) for held in folds), strict=True)
    sound, *_ = next(ways)
    before = _drawn(data, data.stack_logits, seed)
    for steps, *others in ways:
        found = np.empty(len(data.stack_logits))
        for held, other in zip(folds, others, strict=True):
            found[held] = early_exit(other, data.logits[held], data.stack_logits[held])[0]
        if not _within(data, found, before, tolerance, seed):
            break
        sound = steps
    return sound


def order_by_cost(data: CascadeData) -> tuple[str, ...]:
    """The members from cheap to expensive."""
    return tuple(data.members[k] for k in np.argsort(data.milliseconds, kind="stable"))


def order_by_gain(data: CascadeData) -> tuple[str, ...]:
    """The members in an order in which the next one always explains most of the full stack's logit a millisecond.

    Explained is variance that a guess from the members before it leaves. Those that cost nothing come first.
    """
    order = np.flatnonzero(data.milliseconds == 0).tolist()
    while rest := [k for k in range(len(data.members)) if k not in order]:
        left = [_unexplained(data, [*order, k]) for k in rest]
        before = _unexplained(data, order)
        worth = [(before - after) / data.milliseconds[k] for after, k in zip(left, rest, strict=True)]
        order.append(rest[int(np.argmax(worth))])
    return tuple(data.members[k] for k in order)


def regularisation_path(data: CascadeData) -> Iterator[tuple[CascadeStep, ...]]:
    """The steps at no price, under which nobody leaves, then at each of PRICES; limits only close in."""
    steps = tuple(surrogate_step(data, count) for count in range(1, len(data.members)))
    yield steps
    guesses = [step.surrogate_logit(data.logits) for step in steps]
    orders = [np.argsort(guess, kind="stable") for guess in guesses]
    losses = [_losses(data.stack_logits, guess) for guess in guesses]
    low, high = np.full(len(steps), -np.inf), np.full(len(steps), np.inf)
    for price in AUROC_COSTS * data.milliseconds.sum():
        onward = np.full(len(data.stack_logits), data.milliseconds[-1])  # what each row costs from the next member on
        for k in reversed(range(len(steps))):
            better = np.flatnonzero(_smooth((price * losses[k] - onward)[orders[k]]) > 0)  # to go on, by rank of guess
            first, last = (better[0], better[-1]) if len(better) else (len(onward), -1)
            ranked = guesses[k][orders[k]]
            if first > 0:
                low[k] = max(low[k], ranked[first - 1])
            if last < len(onward) - 1:
                high[k] = min(high[k], ranked[last + 1])
            leaves = (guesses[k] <= low[k]) | (guesses[k] >= high[k])
            onward = data.milliseconds[k] + np.where(leaves, price * losses[k], onward)
        yield tuple(replace(step, low=float(a), high=float(b)) for step, a, b in zip(steps, low, high, strict=True))


def surrogate_step(data: CascadeData, count: int) -> CascadeStep:
    """Least squares with a small ridge from the first `count` members' logits onto the full stack's."""
    x, y = data.logits[:, :count].astype(np.float64), data.stack_logits
    middle, centre = x.mean(axis=0), y.mean()
    x, y = x - middle, y - centre
    # einsum, which adds in one order whatever the number of threads
    gram, cross = np.einsum("ni,nj->ij", x, x), np.einsum("ni,n->i", x, y)
    ridge = RIDGE * np.trace(gram) / count + np.finfo(float).tiny
    coef = np.linalg.solve(gram + ridge * np.eye(count), cross)
    return CascadeStep(data.members[count - 1], tuple(coef.tolist()), float(centre - np.sum(coef * middle)))


def _unexplained(data: CascadeData, chosen: list[int]) -> float:
    """The variance of the full stack's logit that a guess from these members leaves."""
    if not chosen:
        return float(np.var(data.stack_logits))
    some = data.select([data.members[k] for k in chosen])
    return float(np.var(some.stack_logits - surrogate_step(some, len(chosen)).surrogate_logit(some.logits)))


def _losses(full: np.ndarray, guess: np.ndarray) -> np.ndarray:
    """What AUROC is expected to lose, times N, if this row alone had its guess for a logit: float64 [N].

    Each row counts as ai with the full stack's p, as real with the rest: where the guess moves
    it past others, pairs change sides. To first order these sum to the loss of many rows.
    """
    p = sigmoid(full)
    order = np.argsort(full, kind="stable")

    def share_below(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        total = np.r_[0.0, np.cumsum(weights[order])]
        sides = [total[np.searchsorted(full[order], values, side)] for side in ("left", "right")]
        return (sides[0] + sides[1]) / (2 * total[-1])

    as_ai = share_below(1 - p, full) - share_below(1 - p, guess)
    as_real = share_below(p, guess) - share_below(p, full)
    return len(full) * (p * as_ai / p.sum() + (1 - p) * as_real / (1 - p).sum())


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over windows of neighbours [N], narrower at the ends."""
    half = max(round(WINDOW_SHARE * len(values)), MIN_WINDOW) // 2
    total = np.r_[0.0, np.cumsum(values)]
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _within(data: CascadeData, found: np.ndarray, before: np.ndarray, tolerance: float, seed: int) -> bool:
    """Whether the BOUND point of the AUROC that logits [N] lose, over draws of groups, is within the tolerance.

    before: the full stack's AUROC in the same draws. The loss that the full stack's own p expects
    has to be within it, too: where few rows are told apart without an error, all draws agree
    that nothing is lost. The fewer rows, the more of it: simulated limits of 100 rows lost more
    than the tolerance in one case of five without that.
    """
    if (1 + FEW_ROWS / len(found)) * float(_losses(data.stack_logits, found).mean()) > tolerance:
        return False  # draws take far longer
    return float(np.nanquantile(before - _drawn(data, found, seed), LOSS_QUANTILE)) <= tolerance


def _drawn(data: CascadeData, logits: np.ndarray, seed: int) -> np.ndarray:
    """The AUROC of logits [N] in draws of groups, the same for any logits: float64 [RESAMPLES]."""
    labels, groups = data.labels, data.groups
    return bootstrap.bootstrap_scores(labels, [logits], groups, ("auroc",), resamples=RESAMPLES, seed=seed)["auroc"][0]


MIN_ROWS, MAX_ROWS = 100, 4000
MIN_GROUPS = 2  # with rows of a class, in each quarter
MORE_ROWS_HINT = "export with more held-out images (train-all --heldout or --folds, or export --stack-on)"
REMEDY = f"{MORE_ROWS_HINT}, or score without --cascade"


def fit_cascade(
    stacker: Stacker, rows: LabelledLogits, milliseconds: Mapping[str, float], tolerance: float, seed: int = 0
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
    rows = subsample(rows, seed)
    spent = np.array([milliseconds[name] for name in stacker.members])
    data = CascadeData(stacker.members, rows.logits, rows.labels, rows.groups, stacker.logit(rows.logits), spent)
    orders = [data.select(order) for order in dict.fromkeys([order_by_cost(data), order_by_gain(data)])]
    fitted = [(ordered, _fitted(ordered, tolerance, seed)) for ordered in orders]
    data, steps = min(fitted, key=lambda each: each[0].mean_milliseconds(each[1]))  # of equal ones the first
    logits, left = np.empty(len(rows.labels)), np.empty(len(rows.labels), dtype=int)
    for held in split_quarters(data.labels, data.groups, seed):
        others = _fitted(data.subset(~held), tolerance, seed)
        logits[held], left[held] = early_exit(others, data.logits[held], data.stack_logits[held])
    told = report_cascade(data, logits, left, stacker.threshold, seed)
    if told.loss.low > tolerance:
        raise ArtifactError(
            f"the cascade loses {told.loss} of AUROC on {told.rows} images by limits that were not fitted on them, "
            f"more than {tolerance:g}: allow more, or score without --cascade"
        )
    return Cascade(steps, data.members[-1], tuple(data.milliseconds.tolist()), tolerance, told)


def report_cascade(
    data: CascadeData, found: np.ndarray, left: np.ndarray, threshold: float, seed: int = 0
) -> CascadeReport:
    """What a cascade does on labelled rows, members in its order: their logits [N], and the steps [N] they left at."""
    calls = [sigmoid(logit) >= threshold for logit in (data.stack_logits, found)]
    labels, groups, spent = data.labels, data.groups, np.cumsum(data.milliseconds)
    return CascadeReport(
        len(labels),
        data.group_count,
        (auroc(labels, data.stack_logits), auroc(labels, found)),
        bootstrap.paired_difference(labels, data.stack_logits, found, groups, seed=seed).difference,
        tuple((np.bincount(left, minlength=len(spent)) / len(left)).tolist()),
        (float(spent[-1]), float(spent[left].mean())),
        float(np.mean(calls[0] != calls[1])),
    )


def split_halves(labels: np.ndarray, groups: np.ndarray, seed: int = 0) -> np.ndarray:
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


def split_quarters(labels: np.ndarray, groups: np.ndarray, seed: int) -> list[np.ndarray]:
    """The rows of each quarter, bool [N]: halves of the halves."""
    number = 2 * split_halves(labels, groups, seed)
    for half in (number == 0, number == 2):
        number[half] += split_halves(labels[half], groups[half], seed)
    return [number == each for each in np.unique(number)]


def _fitted(data: CascadeData, tolerance: float, seed: int) -> tuple[CascadeStep, ...]:
    return fit_steps(data, split_quarters(data.labels, data.groups, seed), tolerance, seed)


def check_rows(rows: LabelledLogits, seed: int = 0) -> None:
    """ArtifactError, saying what to do, where rows, or the groups of a quarter, are too few for a cascade."""
    if lacking := _lacking(rows, seed):
        raise ArtifactError(f"{lacking}: {REMEDY}")


def subsample(rows: LabelledLogits, seed: int = 0) -> LabelledLogits:
    """At most MOST_ROWS of them, in whole groups that the seed draws; all where such groups would be too few.

    More would fit hardly another cascade, and take minutes.
    """
    if len(rows.labels) <= MAX_ROWS:
        return rows
    _, codes = np.unique(rows.groups, return_inverse=True)
    sizes, left = np.bincount(codes), MAX_ROWS
    chosen = np.zeros(len(sizes), dtype=bool)
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[group] <= left:
            chosen[group], left = True, left - sizes[group]
    kept = chosen[codes]
    part = rows.subset(kept)
    return rows if _lacking(part, seed) else part


def _lacking(rows: LabelledLogits, seed: int) -> str:
    """What rows lack for a cascade, in words; nothing where they are enough."""
    if len(rows.labels) < MIN_ROWS:
        return f"a cascade is fitted on {MIN_ROWS} held-out images or more, and here are {len(rows.labels)}"
    if lack := describe_missing_groups(rows, split_quarters(rows.labels, rows.groups, seed), MIN_GROUPS):
        return (
            "a cascade is fitted on three quarters of the held-out groups and tried on the fourth; one quarter "
            f"has {lack}, and {MIN_GROUPS} are needed"
        )
    return ""


def describe_missing_groups(rows: LabelledLogits, parts: Sequence[np.ndarray], least: int) -> str:
    """The class of which a part, bool [N] each, has fewer groups than that, as "1 group with ai images"; else ""."""
    for part in parts:
        for label, name in enumerate(("real", "ai")):
            if (found := len(np.unique(rows.groups[part & (rows.labels == label)]))) < least:
                return f"{found} group{'s' * (found != 1)} with {name} images"
    return ""
