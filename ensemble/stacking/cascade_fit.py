"""Fit a cascade on labelled rows, and report what it does on rows that it was not fitted on. NumPy only.

The limits of a cascade: by optimal stopping at a price of AUROC in milliseconds, the price by cross-validation.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ensemble.core import bootstrap
from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import auroc, sigmoid
from ensemble.stacking.cascade import Cascade, Report, Step, leave
from ensemble.stacking.stacker import Stacker

PRICES = np.geomspace(1e5, 1, 51)  # of all AUROC, in milliseconds of the full stack; at the first hardly any leave
WINDOW, LEAST_WINDOW = 0.1, 20  # rows that are averaged over: this share of all, and no fewer than that
RIDGE = 1e-3  # of the members' mean variance
RESAMPLES, BOUND = 300, 0.9  # the loss stays within the tolerance in this share of the draws
FEW = 100  # rows that the expected loss is not trusted on: it counts twice at 100 rows, 1.05 times at 2,000


@dataclass(frozen=True)
class Material:
    """Rows to fit on, members in the cascade's order.

    logits [N, members], the full stack's calibrated logits float64 [N], labels and groups [N],
    and each member's milliseconds an image [members].
    """

    names: tuple[str, ...]
    logits: np.ndarray
    full: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    milliseconds: np.ndarray

    def part(self, chosen: np.ndarray) -> "Material":
        """The rows that a bool [N] names."""
        rows = {name: getattr(self, name)[chosen] for name in ("logits", "full", "labels", "groups")}
        return replace(self, **rows)

    def ordered(self, order: Sequence[int]) -> "Material":
        """Those of the members, in this order."""
        names, columns = tuple(self.names[k] for k in order), list(order)
        return replace(self, names=names, logits=self.logits[:, columns], milliseconds=self.milliseconds[columns])

    def cost(self, steps: tuple[Step, ...]) -> float:
        """Milliseconds an image."""
        return float(np.cumsum(self.milliseconds)[leave(steps, self.logits, self.full)[1]].mean())


def fit_steps(material: Material, folds: Sequence[np.ndarray], tolerance: float, seed: int) -> tuple[Step, ...]:
    """The steps at the lowest price of AUROC at which the loss stays within the tolerance.

    That loss is of steps fitted on all but a fold, bool [N], and applied to it, by its upper
    bound over draws of groups. Prices fall and limits only close in until it is beyond the
    tolerance, so a larger one never costs more milliseconds, on any rows.
    """
    ways = zip(path(material), *(path(material.part(~held)) for held in folds), strict=True)
    sound, *_ = next(ways)
    before = _drawn(material, material.full, seed)
    for steps, *others in ways:
        found = np.empty(len(material.full))
        for held, other in zip(folds, others, strict=True):
            found[held] = leave(other, material.logits[held], material.full[held])[0]
        if not _within(material, found, before, tolerance, seed):
            break
        sound = steps
    return sound


def by_cost(milliseconds: np.ndarray) -> tuple[int, ...]:
    """The members from cheap to dear."""
    return tuple(np.argsort(milliseconds, kind="stable").tolist())


def by_worth(material: Material) -> tuple[int, ...]:
    """The members in an order in which the next one always explains most of the full stack's logit a millisecond.

    Explained is variance that a guess from the members before it leaves. Those that cost nothing come first.
    """
    order = np.flatnonzero(material.milliseconds == 0).tolist()
    while rest := [k for k in range(len(material.names)) if k not in order]:
        left = [_unexplained(material, [*order, k]) for k in rest]
        before = _unexplained(material, order)
        worth = [(before - after) / material.milliseconds[k] for after, k in zip(left, rest, strict=True)]
        order.append(rest[int(np.argmax(worth))])
    return tuple(order)


def path(material: Material) -> Iterator[tuple[Step, ...]]:
    """The steps at no price, under which nobody leaves, then at each of PRICES; limits only close in."""
    steps = tuple(guess_step(material, count) for count in range(1, len(material.names)))
    yield steps
    guesses = [step.guess(material.logits) for step in steps]
    orders = [np.argsort(guess, kind="stable") for guess in guesses]
    losses = [_losses(material.full, guess) for guess in guesses]
    low, high = np.full(len(steps), -np.inf), np.full(len(steps), np.inf)
    for price in PRICES * material.milliseconds.sum():
        onward = np.full(len(material.full), material.milliseconds[-1])  # what each row costs from the next member on
        for k in reversed(range(len(steps))):
            better = np.flatnonzero(_smooth((price * losses[k] - onward)[orders[k]]) > 0)  # to go on, by rank of guess
            first, last = (better[0], better[-1]) if len(better) else (len(onward), -1)
            ranked = guesses[k][orders[k]]
            if first > 0:
                low[k] = max(low[k], ranked[first - 1])
            if last < len(onward) - 1:
                high[k] = min(high[k], ranked[last + 1])
            leaves = (guesses[k] <= low[k]) | (guesses[k] >= high[k])
            onward = material.milliseconds[k] + np.where(leaves, price * losses[k], onward)
        yield tuple(replace(step, low=float(a), high=float(b)) for step, a, b in zip(steps, low, high, strict=True))


def guess_step(material: Material, count: int) -> Step:
    """Least squares with a small ridge from the first `count` members' logits onto the full stack's."""
    x, y = material.logits[:, :count].astype(np.float64), material.full
    middle, centre = x.mean(axis=0), y.mean()
    x, y = x - middle, y - centre
    # einsum, which adds in one order whatever the number of threads
    gram, cross = np.einsum("ni,nj->ij", x, x), np.einsum("ni,n->i", x, y)
    ridge = RIDGE * np.trace(gram) / count + np.finfo(float).tiny
    coef = np.linalg.solve(gram + ridge * np.eye(count), cross)
    return Step(material.names[count - 1], tuple(coef.tolist()), float(centre - np.sum(coef * middle)))


def _unexplained(material: Material, chosen: list[int]) -> float:
    """The variance of the full stack's logit that a guess from these members leaves."""
    if not chosen:
        return float(np.var(material.full))
    some = material.ordered(chosen)
    return float(np.var(some.full - guess_step(some, len(chosen)).guess(some.logits)))


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
    half = max(round(WINDOW * len(values)), LEAST_WINDOW) // 2
    total = np.r_[0.0, np.cumsum(values)]
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _within(material: Material, found: np.ndarray, before: np.ndarray, tolerance: float, seed: int) -> bool:
    """Whether the BOUND point of the AUROC that logits [N] lose, over draws of groups, is within the tolerance.

    before: the full stack's AUROC in the same draws. The loss that the full stack's own p expects
    has to be within it, too: where few rows are told apart without an error, all draws agree
    that nothing is lost. The fewer rows, the more of it: simulated limits of 100 rows lost more
    than the tolerance in one case of five without that.
    """
    if (1 + FEW / len(found)) * float(_losses(material.full, found).mean()) > tolerance:
        return False  # draws take far longer
    return float(np.nanquantile(before - _drawn(material, found, seed), BOUND)) <= tolerance


def _drawn(material: Material, logits: np.ndarray, seed: int) -> np.ndarray:
    """The AUROC of logits [N] in draws of groups, the same for any logits: float64 [RESAMPLES]."""
    labels, groups = material.labels, material.groups
    return bootstrap.draws(labels, [logits], groups, ("auroc",), resamples=RESAMPLES, seed=seed)["auroc"][0]


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
