"""Fit a cascade on labelled rows, and report how it scores rows that it was not fitted on. NumPy only.

The mathematics, in the order of the functions below. Members run in an order 1..M; t_k is what member k takes for an
image, s the full stack's calibrated logit, p = sigmoid(s).

Surrogate. After member k the stack's logit is estimated by ridge regression of s on the parts of members 1..k, that is
on what the stacker sums: calibrated probabilities, or logits (`surrogate_step`): g_k. Calibrated probabilities also
bound what the other members can still add, but too widely to be of use: of seven published detectors five have to run
before these bounds alone let 5 % of the images exit at an expected loss below 0.001.

Loss of an exit. Exchanging one row's s for g_k moves it past other rows; the pairs (ai, real) that change sides are
what AUROC loses. No label is needed: each row counts as ai with weight p and as real with 1 - p. Then, to first order
(one row moves, all others keep s), the expected loss times N of row i is (`expected_losses`)

    l_ik = N * ( p_i * (F_real(s_i) - F_real(g_ik)) / sum(p) + (1 - p_i) * (F_ai(g_ik) - F_ai(s_i)) / sum(1 - p) )

with F_real and F_ai the weighted shares of reals and of ai below a value, ties by half. Its mean over rows estimates
the AUROC that the cascade loses.

Optimal stopping. At a cost of c milliseconds for all of AUROC (`auroc_cost`), an image that exits after k has paid
t_1 + ... + t_k + c * l_ik. The policy of least expected cost comes from backward induction (Bellman): with V_M = t_M,
going on from step k is better where E[c * l_k - V_{k+1} | g_k] > 0, and V_k = t_k + (c * l_k if it exits else V_{k+1}).
The expectation given g_k is a moving average over the rows sorted by g_k (`_moving_average`). A step's limits are the
outermost values of g_k at which going on is better.

Regularisation path. `AUROC_COSTS` fall from one at which nearly no image exits; limits only ever move inwards along
the path, so the cascades are nested and each is at most as slow as the one before (`regularisation_path`).

Choice of the cost by cross-validation over quarters of the groups (`fit_steps`): along the path, as long as the
held-out loss of AUROC is within the tolerance with 90 % confidence.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Self

import numpy as np

from ensemble.cascade.cascade import Cascade, CascadeReport, CascadeStep, early_exit
from ensemble.core import bootstrap
from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import auroc, sigmoid
from ensemble.stacking.logit_table import LabelledLogits
from ensemble.stacking.stacker import Stacker

AUROC_COSTS = np.geomspace(1e5, 1, 51)  # of all of AUROC, in times of the full stack; at the first hardly any exit
WINDOW_SHARE, MIN_WINDOW = 0.1, 20  # rows of a moving average: this share of all, and no fewer than that
RIDGE = 1e-3  # of the members' mean variance
RESAMPLES, LOSS_QUANTILE = 300, 0.9  # the loss stays within the tolerance in this share of the bootstrap draws
FEW_ROWS = 100  # rows at which the expected loss counts twice; at 2,000 it counts 1.05 times
MIN_ROWS, MAX_ROWS = 100, 4000
PERMUTED_MEMBERS, SEARCH_TOLERANCE = 4, 0.002  # members whose every order is tried; the loss they are compared at
MIN_GROUPS = 2  # with rows of a class, in each quarter
MORE_ROWS_HINT = "export with more held-out images (train-all --heldout or --folds, or export --stack-on)"
REMEDY = f"{MORE_ROWS_HINT}, or score without --cascade"


@dataclass(frozen=True)
class CascadeData(LabelledLogits):
    """Rows to fit a cascade on, members in the order in which they run; `logits` holds their parts (`Stacker.parts`).

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
    """The steps at the lowest cost of AUROC at which the cross-validated loss stays within the tolerance.

    folds: bool [N] each, the held-out rows. The loss at a cost is that of steps fitted on all rows but a fold and
    applied to it. The search ends at the first cost where it is beyond the tolerance, and the path is nested: so a
    larger tolerance never takes more milliseconds.
    """
    paths = zip(regularisation_path(data), *(regularisation_path(data.subset(~fold)) for fold in folds), strict=True)
    best, *_ = next(paths)
    full_auroc = _auroc_draws(data, data.stack_logits, seed)
    for steps, *fold_steps in paths:
        oof_logits = np.empty(len(data.stack_logits))
        for fold, others in zip(folds, fold_steps, strict=True):
            oof_logits[fold] = early_exit(others, data.logits[fold], data.stack_logits[fold])[0]
        if not _within_tolerance(data, oof_logits, full_auroc, tolerance, seed):
            break
        best = steps
    return best


def order_by_gain(data: CascadeData) -> tuple[str, ...]:
    """Greedy order: next is the member that explains most variance of the full stack's logit a millisecond.

    Explained is variance that the surrogate of the members before it leaves. Members that cost nothing come first.
    """
    order = np.flatnonzero(data.milliseconds == 0).tolist()
    while rest := [k for k in range(len(data.members)) if k not in order]:
        before = _unexplained_variance(data, order)
        after = [_unexplained_variance(data, [*order, k]) for k in rest]
        gains = [(before - each) / data.milliseconds[k] for each, k in zip(after, rest, strict=True)]
        order.append(rest[int(np.argmax(gains))])
    return tuple(data.members[k] for k in order)


def search_order(data: CascadeData) -> tuple[str, ...]:
    """The order that is predicted to be fastest, of all that permute the first PERMUTED_MEMBERS of `order_by_gain`.

    The other members follow from cheap to expensive. Predicted without cross-validation, by the expected loss alone, at
    one tolerance for all, so that a larger one never takes more milliseconds.
    """
    gain, costs = order_by_gain(data), dict(zip(data.members, data.milliseconds, strict=True))
    rest = sorted(gain[PERMUTED_MEMBERS:], key=costs.__getitem__)
    orders = [(*first, *rest) for first in permutations(gain[:PERMUTED_MEMBERS])]
    return min(orders, key=lambda order: _expected_milliseconds(data.select(order)))  # of equal ones the first


def _expected_milliseconds(data: CascadeData) -> float:
    """What an image takes by the last steps of the path whose expected loss is within SEARCH_TOLERANCE."""
    milliseconds = float(data.milliseconds.sum())
    for steps in regularisation_path(data):
        logits, exits = early_exit(steps, data.logits, data.stack_logits)
        if weighted_expected_loss(data, logits) > SEARCH_TOLERANCE:
            break
        milliseconds = float(np.cumsum(data.milliseconds)[exits].mean())
    return milliseconds


def regularisation_path(data: CascadeData) -> Iterator[tuple[CascadeStep, ...]]:
    """Steps at which no image exits, then the steps at each of AUROC_COSTS; limits only move inwards."""
    steps = tuple(surrogate_step(data, count) for count in range(1, len(data.members)))
    yield steps
    surrogates = [step.surrogate_logit(data.logits) for step in steps]
    orders = [np.argsort(surrogate, kind="stable") for surrogate in surrogates]
    losses = [expected_losses(data.stack_logits, surrogate) for surrogate in surrogates]
    low, high = np.full(len(steps), -np.inf), np.full(len(steps), np.inf)
    for auroc_cost in AUROC_COSTS * data.milliseconds.sum():
        value = np.full(len(data.stack_logits), data.milliseconds[-1])  # V_{k+1} of each row
        for k in reversed(range(len(steps))):
            gain = _moving_average((auroc_cost * losses[k] - value)[orders[k]])
            go_on = np.flatnonzero(gain > 0)  # by rank of the surrogate
            first, last = (go_on[0], go_on[-1]) if len(go_on) else (len(value), -1)
            ranked = surrogates[k][orders[k]]
            if first > 0:
                low[k] = max(low[k], ranked[first - 1])
            if last < len(value) - 1:
                high[k] = min(high[k], ranked[last + 1])
            exits = (surrogates[k] <= low[k]) | (surrogates[k] >= high[k])
            value = data.milliseconds[k] + np.where(exits, auroc_cost * losses[k], value)
        yield tuple(replace(step, low=float(a), high=float(b)) for step, a, b in zip(steps, low, high, strict=True))


def surrogate_step(data: CascadeData, count: int) -> CascadeStep:
    """Ridge regression of the full stack's logit on the first `count` members' parts; no limits yet."""
    x, y = data.logits[:, :count].astype(np.float64), data.stack_logits
    x_mean, y_mean = x.mean(axis=0), y.mean()
    x, y = x - x_mean, y - y_mean
    # einsum adds in one order whatever the number of threads
    gram, cross = np.einsum("ni,nj->ij", x, x), np.einsum("ni,n->i", x, y)
    ridge = RIDGE * np.trace(gram) / count + np.finfo(float).tiny
    coef = np.linalg.solve(gram + ridge * np.eye(count), cross)
    return CascadeStep(data.members[count - 1], tuple(coef.tolist()), float(y_mean - np.sum(coef * x_mean)))


def _unexplained_variance(data: CascadeData, chosen: list[int]) -> float:
    """The variance of the full stack's logit that the surrogate of these members leaves unexplained."""
    if not chosen:
        return float(np.var(data.stack_logits))
    data = data.select([data.members[k] for k in chosen])
    return float(np.var(data.stack_logits - surrogate_step(data, len(chosen)).surrogate_logit(data.logits)))


def expected_losses(full: np.ndarray, surrogate: np.ndarray) -> np.ndarray:
    """N times the AUROC that is expected to be lost if one row alone had its surrogate logit: float64 [N].

    full: logits [N] of the full stack. The formula for l_ik is at the top of this module.
    """
    p = sigmoid(full)
    order = np.argsort(full, kind="stable")

    def share_below(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        total = np.r_[0.0, np.cumsum(weights[order])]
        sides = [total[np.searchsorted(full[order], values, side)] for side in ("left", "right")]
        return (sides[0] + sides[1]) / (2 * total[-1])

    as_ai = share_below(1 - p, full) - share_below(1 - p, surrogate)
    as_real = share_below(p, surrogate) - share_below(p, full)
    return len(full) * (p * as_ai / p.sum() + (1 - p) * as_real / (1 - p).sum())


def weighted_expected_loss(data: CascadeData, logits: np.ndarray) -> float:
    """The AUROC that the cascade's logits [N] are expected to lose, weighted by 1 + FEW_ROWS / N."""
    return (1 + FEW_ROWS / len(logits)) * float(expected_losses(data.stack_logits, logits).mean())


def _moving_average(values: np.ndarray) -> np.ndarray:
    """Means of values [N] over windows of neighbours, narrower at the ends."""
    half = max(round(WINDOW_SHARE * len(values)), MIN_WINDOW) // 2
    total = np.r_[0.0, np.cumsum(values)]
    positions = np.arange(len(values))
    first, last = np.maximum(positions - half, 0), np.minimum(positions + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _within_tolerance(
    data: CascadeData, logits: np.ndarray, full_auroc: np.ndarray, tolerance: float, seed: int
) -> bool:
    """Whether the cascade's logits [N] lose at most the tolerance, by two tests.

    The LOSS_QUANTILE quantile of the loss of AUROC over bootstrap draws of groups; full_auroc: the full stack's AUROC
    in the same draws. And the expected loss, weighted by 1 + FEW_ROWS / N: where few rows are separated without an
    error, all draws agree that nothing is lost. In simulations with 100 rows, one cascade of five lost more than the
    tolerance without the second test.
    """
    if weighted_expected_loss(data, logits) > tolerance:
        return False  # first, since draws take far longer
    return float(np.nanquantile(full_auroc - _auroc_draws(data, logits, seed), LOSS_QUANTILE)) <= tolerance


def _auroc_draws(data: CascadeData, logits: np.ndarray, seed: int) -> np.ndarray:
    """The AUROC of logits [N] in bootstrap draws of groups, the same draws for any logits: float64 [RESAMPLES]."""
    labels, groups = data.labels, data.groups
    return bootstrap.bootstrap_scores(labels, [logits], groups, ("auroc",), resamples=RESAMPLES, seed=seed)["auroc"][0]


def fit_cascade(
    stacker: Stacker, rows: LabelledLogits, milliseconds: Mapping[str, float], tolerance: float, seed: int = 0
) -> Cascade:
    """A cascade whose AUROC is meant to lie at most `tolerance` below the full stack's.

    rows: member logits in the stacker's order. milliseconds: each member's, an image; 0 for those whose scores are
    looked up. Members run from cheap to expensive, by gain or as `search_order` says, whichever is fastest. The order,
    surrogates and limits are fitted on all rows (of very many, on a `subsample`). The report is cross-fitted, but for
    the order: each quarter of the groups is scored by steps that were fitted in the same way on the other three.
    ArtifactError where the whole 95 % interval of the report's loss is beyond the tolerance. Whether rows are enough:
    `check_rows`.

    If the stacker was fitted on the same rows, that flatters the full stack, not the cascade.
    """
    if len(stacker.members) < 2:
        raise ArtifactError("a cascade needs two members or more; score without --cascade")
    rows = subsample(rows, seed)
    costs = np.array([milliseconds[name] for name in stacker.members])
    data = CascadeData(
        stacker.members, stacker.parts(rows.logits), rows.labels, rows.groups, stacker.logit(rows.logits), costs
    )
    by_cost = tuple(sorted(data.members, key=milliseconds.__getitem__))
    names = dict.fromkeys([by_cost, order_by_gain(data), search_order(data)])
    orders = [data.select(order) for order in names]
    fitted = [(ordered, _fit(ordered, tolerance, seed)) for ordered in orders]
    data, steps = min(fitted, key=lambda each: each[0].mean_milliseconds(each[1]))  # of equal ones the first
    logits, exits = np.empty(len(rows.labels)), np.empty(len(rows.labels), dtype=int)
    for quarter in split_quarters(data.labels, data.groups, seed):
        others = _fit(data.subset(~quarter), tolerance, seed)
        logits[quarter], exits[quarter] = early_exit(others, data.logits[quarter], data.stack_logits[quarter])
    report = report_cascade(data, logits, exits, stacker.threshold, seed)
    if report.loss.low > tolerance:
        raise ArtifactError(
            f"the cascade loses {report.loss} of AUROC on {report.rows} images by limits that were not fitted on them, "
            f"more than {tolerance:g}: allow more, or score without --cascade"
        )
    return Cascade(steps, data.members[-1], tuple(data.milliseconds.tolist()), tolerance, report)


def report_cascade(
    data: CascadeData, logits: np.ndarray, exits: np.ndarray, threshold: float, seed: int = 0
) -> CascadeReport:
    """The scores of a cascade on labelled rows, from its logits [N] and the steps [N] after which rows exit."""
    before, after = (sigmoid(each) >= threshold for each in (data.stack_logits, logits))
    labels, groups, milliseconds = data.labels, data.groups, np.cumsum(data.milliseconds)
    return CascadeReport(
        len(labels),
        data.group_count,
        (auroc(labels, data.stack_logits), auroc(labels, logits)),
        bootstrap.paired_difference(labels, data.stack_logits, logits, groups, seed=seed).difference,
        tuple((np.bincount(exits, minlength=len(milliseconds)) / len(exits)).tolist()),
        (float(milliseconds[-1]), float(milliseconds[exits].mean())),
        float(np.mean(before != after)),
    )


def split_halves(labels: np.ndarray, groups: np.ndarray, seed: int = 0) -> np.ndarray:
    """Which rows are in the first half, bool [N]: whole groups, stratified by their classes, random by the seed.

    Groups are of three kinds: ai alone, real alone, and both. Within a kind the large ones are dealt first, each to
    the half that has fewer rows.
    """
    _, codes = np.unique(groups, return_inverse=True)
    size, ai = np.bincount(codes), np.bincount(codes, weights=labels == 1)
    kinds = (ai > 0) + 2 * (ai < size)
    shuffled = np.random.default_rng(seed).permutation(len(size))
    first, surplus = np.zeros(len(size), bool), 0  # rows that the first half has more than the second
    for kind in np.unique(kinds):
        surplus = int(np.sign(surplus))  # an odd group of one kind is balanced by the next kind
        for group in sorted(shuffled[kinds[shuffled] == kind], key=lambda group: -size[group]):
            first[group] = surplus <= 0
            surplus += size[group] if first[group] else -size[group]
    return first[codes]


def split_quarters(labels: np.ndarray, groups: np.ndarray, seed: int) -> list[np.ndarray]:
    """The rows of each quarter, bool [N]: halves of the halves."""
    number = 2 * split_halves(labels, groups, seed)
    for half in (number == 0, number == 2):
        number[half] += split_halves(labels[half], groups[half], seed)
    return [number == each for each in np.unique(number)]


def _fit(data: CascadeData, tolerance: float, seed: int) -> tuple[CascadeStep, ...]:
    return fit_steps(data, split_quarters(data.labels, data.groups, seed), tolerance, seed)


def check_rows(rows: LabelledLogits, seed: int = 0) -> None:
    """ArtifactError, saying what to do, where rows, or the groups of a quarter, are too few for a cascade."""
    if shortage := _shortage(rows, seed):
        raise ArtifactError(f"{shortage}: {REMEDY}")


def subsample(rows: LabelledLogits, seed: int = 0) -> LabelledLogits:
    """At most MAX_ROWS rows, in whole groups drawn at random by the seed; all rows if such groups are too few.

    More rows would hardly change the cascade, and take minutes.
    """
    if len(rows.labels) <= MAX_ROWS:
        return rows
    _, codes = np.unique(rows.groups, return_inverse=True)
    sizes, remaining = np.bincount(codes), MAX_ROWS
    chosen = np.zeros(len(sizes), dtype=bool)
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[group] <= remaining:
            chosen[group], remaining = True, remaining - sizes[group]
    part = rows.subset(chosen[codes])
    return rows if _shortage(part, seed) else part


def _shortage(rows: LabelledLogits, seed: int) -> str:
    """Why rows are too few for a cascade, in words; empty if they are enough."""
    if len(rows.labels) < MIN_ROWS:
        return f"a cascade is fitted on {MIN_ROWS} held-out images or more, and here are {len(rows.labels)}"
    if missing := describe_missing_groups(rows, split_quarters(rows.labels, rows.groups, seed), MIN_GROUPS):
        return (
            "a cascade is fitted on three quarters of the held-out groups and tried on the fourth; one quarter "
            f"has {missing}, and {MIN_GROUPS} are needed"
        )
    return ""


def describe_missing_groups(rows: LabelledLogits, parts: Sequence[np.ndarray], minimum: int) -> str:
    """A part, bool [N] each, with too few groups of a class, as "1 group with ai images"; empty if there is none."""
    for part in parts:
        for label, name in enumerate(("real", "ai")):
            if (count := len(np.unique(rows.groups[part & (rows.labels == label)]))) < minimum:
                return f"{count} group{'s' * (count != 1)} with {name} images"
    return ""
