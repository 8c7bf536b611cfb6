"""Which members a bundle could do without on this machine, at which precision, in which cascade; and one is chosen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, some
from ensemble.images.decode import Source
from ensemble.models import external
from ensemble.stacking import frontier
from ensemble.stacking.cascade import Cascade
from ensemble.stacking.cascade_fit import Rows, fit_cascade
from ensemble.stacking.frontier import Costs, Measured, Point, Study
from ensemble.stacking.stacker import Stacker
from export import costs
from export.bundle import bundle, check_images, heldout_rows, member_logits, operating_point
from export.bundle.certificate import LEAST_IMAGES, MOST_IMAGES, compare
from export.bundle.operating_point import Certified, Chosen
from export.bundle.precisions import FP32
from export.plan import Planned, Say, plan_bundle
from export.runtimes import capabilities
from export.runtimes.settings import Wanted

Plans = Mapping[str, Sequence[Planned]]


@dataclass(frozen=True)
class Shipped:
    """What a point is written as: fitted on all rows."""

    stacker: Stacker
    cascade: Cascade | None


@dataclass(frozen=True)
class Frontier:
    """What was tried, and of that, from the fastest, what nothing beats: how it does and what it ships as.

    full: the stack of all members, and how it does. runtime: that was asked for, or auto. plans: how
    members run, by precision. rows and groups: that the scores are of. left_out: why others are not
    among the best. made_from: the bundle that this holds for, as `points.identity` gives it.
    uncertified: precisions that the bundle allows by the user's word alone. proven: whether points
    below fp32 passed here all the same.
    """

    tried: Sequence[Point]
    best: Mapping[Point, tuple[Measured, Shipped]]
    full: tuple[Point, Measured]
    runtime: str
    plans: Plans
    rows: int
    groups: int
    left_out: Sequence[str]
    made_from: str
    uncertified: frozenset[str]
    proven: bool


@dataclass(frozen=True)
class Proof:
    """Logits float64 [N] of each member at fp32, below it for those that run so, and labels: to judge stacks by."""

    fp32: Mapping[str, np.ndarray]
    lower: Mapping[str, np.ndarray]
    labels: np.ndarray


def explore(folder: Path, run: Path | None, wanted: Wanted, sources: Sequence[Source], say: Say) -> Frontier:
    """A bundle's frontier on this machine, timed on these images. run: that it is of, if it is of one."""
    values = bundle.open_bundle(folder)
    made_from = operating_point.identity(
        folder, values["members"], values["files"]
    )  # now: it may change while this runs
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
        {point: (frontier.measure(study, point), shipped) for point, shipped in best.items()},
        (full, frontier.measure(study, full)),
        wanted.runtime,
        plans,
        len(other),
        len(np.unique(other)),
        left_out,
        made_from,
        frozenset(key for key, plan in plans.items() if any(_by_word(values, member) for member in plan)),
        proof is not None,
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
    """Put a point into the bundle, for what runs it from then on; ArtifactError where the bundle is another by now."""
    values = bundle.open_bundle(folder)
    if operating_point.identity(folder, values["members"], values["files"]) != found.made_from:
        raise ArtifactError(f"the bundle {folder} changed meanwhile; run frontier again")
    measured, shipped = found.best[point]
    plan = [member for member in found.plans[point.precision] if member.name in point.members]
    lower = [member for member in plan if member.setting.precision != "fp32"]
    files = {member.name: member.sha256 for member in lower}
    chosen = Chosen(
        shipped.stacker,
        found.runtime,
        {str(m.setting): Certified(capabilities.version(m.setting.runtime), files) for m in lower[:1]},
        shipped.cascade,
        budget,
        point.images_per_second,
        measured.lost,
        capabilities.available().where(plan[0].setting.runtime),
        found.made_from,
    )
    operating_point.write(folder, chosen)
    return chosen


def _plans(folder: Path, wanted: Wanted, say: Say) -> Plans:
    """How all members run, by precision: at fp32, and where some may run below it, so."""
    plan = plan_bundle(folder, wanted, say).members
    lower = sorted({member.setting.precision for member in plan} - {"fp32"})
    plans = {lower[0]: plan} if lower else {"fp32": plan}
    if wanted.precision == "auto":  # a point without a certificate runs as if fp32 were asked for, so it is timed so
        return {"fp32": plan_bundle(folder, replace(wanted, precision="fp32"), lambda line: None).members} | {
            precision: plan for precision, plan in plans.items() if precision != "fp32"
        }
    return plans


def _by_word(values: Mapping[str, Any], member: Planned) -> bool:
    return not values.get("precisions", {}).get(str(member.setting), {"certified": True})["certified"]


def _shipper(
    study: Study, taken: Costs, proof: Proof | None, calibration: str
) -> Callable[[Point], tuple[Point, Shipped]]:
    """What gives a point the speed it ships at, and makes what is written of it.

    It raises ArtifactError where that does not hold what the point says.
    """
    refit = cache(partial(frontier.refit, study, calibration=calibration))
    part = study.material.fitting

    def ship(point: Point) -> tuple[Point, Shipped]:
        stacker: Stacker = refit(point.members)
        lower = taken.lower[point.precision] & set(point.members)
        if lower and proof:
            _judge(stacker, lower, proof, point.precision)
        if point.cascade is None:
            return point, Shipped(stacker, None)
        rows = Rows(study.logits(point.members), part.labels, part.groups)
        spent = taken.running(point.precision, point.members)
        cascade = fit_cascade(stacker, rows, spent, point.cascade.tolerance)
        milliseconds = taken.milliseconds(point.precision, cascade.order, cascade.report.shares)
        return replace(point, milliseconds=milliseconds), Shipped(stacker, cascade)

    return ship


def _judge(stacker: Stacker, lower: frozenset[str], proof: Proof, precision: str) -> None:
    """ArtifactError unless the stack passes below fp32 as `export` asks it."""
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
    given = check_images.draw(check_images.heldout(run), MOST_IMAGES) if run else None
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
