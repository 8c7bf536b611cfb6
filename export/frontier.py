"""Which members a bundle could do without on this machine, at which precision, in which cascade; and one is chosen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np

from ensemble import artifacts, external, frontier
from ensemble.cascade import Cascade
from ensemble.cascade_fit import Rows, fit_cascade
from ensemble.errors import ArtifactError, some
from ensemble.frontier import Costs, Measured, Point, Study
from ensemble.stack import Stacker
from export import bundle, costs, evidence, hardware, heldout_rows, member_logits, points
from export.certificate import LEAST_IMAGES, MOST_IMAGES, compare
from export.plan import Planned, Say, plan_bundle
from export.points import Chosen
from export.precisions import FP32
from export.setting import Wanted

Plans = Mapping[str, Sequence[Planned]]


@dataclass(frozen=True)
class Shipped:
    """What a point is written as: fitted on all rows."""

    stacker: Stacker
    cascade: Cascade | None


@dataclass(frozen=True)
class Frontier:
    """What was tried, and of that, from the fastest, what nothing beats: how it does and what it ships as.

    full: the stack of all members, and how it does. plans: how members run, by precision. rows
    and groups: that the scores are of. left_out: why others are not among the best.
    """

    tried: Sequence[Point]
    best: Mapping[Point, tuple[Measured, Shipped]]
    full: tuple[Point, Measured]
    plans: Plans
    rows: int
    groups: int
    left_out: Sequence[str]


@dataclass(frozen=True)
class Proof:
    """Logits float64 [N] of each member at fp32, below it for those that run so, and labels: to judge stacks by."""

    fp32: Mapping[str, np.ndarray]
    lower: Mapping[str, np.ndarray]
    labels: np.ndarray


def explore(folder: Path, run: Path | None, wanted: Wanted, sources: Sequence[Path | bytes], say: Say) -> Frontier:
    """A bundle's frontier on this machine, timed on these images. run: that it is of, if it is of one."""
    own = bundle.stacker_of(folder)
    study = frontier.begin(heldout_rows.read_rows(folder, own.members, "frontier"), own)
    plans = _plans(folder, replace(wanted, full=True), say)
    taken = costs.measure(plans, sources, say)
    proof = _proof(folder, run, plans, say)
    stacks = frontier.stacks(study, taken)
    unproven = {key for key, names in taken.lower.items() if names and proof is None}
    stacks = [point for point in stacks if point.precision not in unproven or point.members == own.members]
    asked = artifacts.read_json(folder / "stacker.json", bundle.REMEDY).get("calibration_asked", "none")
    ship = _shipper(study, taken, proof, str(asked))
    plain, _ = frontier.settle(stacks, ship)
    if not plain:
        raise ArtifactError("no stack of these members tells ai from real beyond chance on half of the held-out images")
    tried = [*stacks, *frontier.cascades(study, list(plain), taken)]
    best, left_out = frontier.settle(tried, ship)
    full = min((point for point in stacks if point.members == own.members), key=lambda point: point.milliseconds)
    other = study.material.fitting.groups[~study.first]
    return Frontier(
        tried,
        {point: (frontier.measure(study, point), best[point]) for point in frontier.apart(list(best))},
        (full, frontier.measure(study, full)),
        plans,
        len(other),
        len(np.unique(other)),
        left_out,
    )


def pick(found: Frontier, budget: float) -> Point:
    """The most accurate point that is predicted to make so many images a second."""
    fast = [point for point in found.best if point.images_per_second >= budget]
    if not fast:
        fastest = next(iter(found.best))
        raise ArtifactError(
            f"no point reaches {budget:g} images/s here: the fastest ({some(fastest.members)} at {fastest.precision}) "
            f"is predicted to make {fastest.images_per_second:.1f}; give a smaller --budget"
        )
    return max(fast, key=lambda point: point.auroc)


def write(folder: Path, found: Frontier, point: Point, budget: float) -> Chosen:
    """Put a point into the bundle, for what runs it from then on."""
    measured, shipped = found.best[point]
    plan = [member for member in found.plans[point.precision] if member.name in point.members]
    lower = [member for member in plan if member.setting.precision != "fp32"]
    values = bundle.open_bundle(folder)
    chosen = Chosen(
        shipped.stacker,
        {str(lower[0].setting): tuple(member.name for member in lower)} if lower else {},
        shipped.cascade,
        budget,
        point.images_per_second,
        measured.auroc,
        measured.lost,
        hardware.available().where(plan[0].setting.runtime),
        points.identity(folder, values["members"], values["files"]),
    )
    points.write(folder, chosen)
    return chosen


def _plans(folder: Path, wanted: Wanted, say: Say) -> Plans:
    """How all members run, by precision: at fp32, and where some may run below it, so."""
    plan = plan_bundle(folder, wanted, say).members
    lower = sorted({member.setting.precision for member in plan} - {"fp32"})
    plans = {lower[0]: plan} if lower else {"fp32": plan}
    if lower and wanted.precision == "auto":
        return {"fp32": plan_bundle(folder, replace(wanted, precision="fp32"), lambda line: None).members, **plans}
    return plans


def _shipper(study: Study, taken: Costs, proof: Proof | None, calibration: str) -> Callable[[Point], Shipped]:
    """What makes of a point what is written; it raises ArtifactError where that does not hold what the point says."""
    refit = cache(partial(frontier.refit, study, calibration=calibration))
    part = study.material.fitting

    def ship(point: Point) -> Shipped:
        stacker: Stacker = refit(point.members)
        lower = taken.lower[point.precision] & set(point.members)
        if lower and proof and point.members != study.own.members:
            _judge(stacker, lower, proof, point.precision)
        if point.cascade is None:
            return Shipped(stacker, None)
        rows = Rows(study.logits(point.members), part.labels, part.groups)
        spent = taken.running(point.precision, point.members)
        return Shipped(stacker, fit_cascade(stacker, rows, spent, point.cascade.tolerance))

    return ship


def _judge(stacker: Stacker, lower: frozenset[str], proof: Proof, precision: str) -> None:
    """ArtifactError unless the stack passes below fp32 as `export` asks it of all members' stack."""
    fp32 = np.column_stack([proof.fp32[name] for name in stacker.members])
    mixed = np.column_stack([(proof.lower if name in lower else proof.fp32)[name] for name in stacker.members])
    change = compare(stacker.logit(fp32), stacker.logit(mixed), proof.labels, stacker.threshold)
    if change.failed:
        raise ArtifactError(f"{' + '.join(stacker.members)} at {precision}: {', '.join(change.failed)}")


def _proof(folder: Path, run: Path | None, plans: Plans, say: Say) -> Proof | None:
    """Logits of the run's held-out images, as far as they are not kept from `export`; None for want of images."""
    lower = {m.name: m for plan in plans.values() for m in plan if m.setting.precision != "fp32"}
    if not lower:
        return None
    given = evidence.draw(evidence.heldout(run), MOST_IMAGES) if run else None
    (*_, plan) = plans.values()
    if given:
        entries = bundle.contents(folder)["members"]
        columns = [member_logits.column(m.name, folder / entries[m.name]["file"], m.contract, FP32) for m in plan]
        columns += [member_logits.column(m.name, m.path, m.contract, m.setting) for m in lower.values()]
        logits, errors = member_logits.compute(given.files, columns, "certify")
        read = [row for row in range(len(given.labels)) if row not in errors]
        given, logits = given.rows(read), logits[read].astype(np.float64)
    if given is None or len(given.labels) < LEAST_IMAGES:
        here = f"{len(given.labels)} can be read" if given else "a bundle has none: name its run with --run"
        say(
            "Below fp32 only all members together are tried: a stack of some of them is certified on "
            f"{LEAST_IMAGES} held-out images of the run or more, and {here}."
        )
        return None
    looked_up = {e.name: given.scores(e) for e in external.externals_of(folder, bundle.stacker_of(folder).members)}
    fp32 = dict(zip([m.name for m in plan], logits.T, strict=False))
    return Proof({**fp32, **looked_up}, dict(zip(lower, logits.T[len(plan) :], strict=True)), given.labels)
