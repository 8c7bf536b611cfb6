"""Which members a bundle could do without on this machine, at which precision, in which cascade; and one is chosen.

Accuracy against speed as a picture. Points have numbers, by which the table names them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, join_limited
from ensemble.core.log import Log
from ensemble.images.decode import ImageSource
from ensemble.models import external
from ensemble.stacking import frontier
from ensemble.stacking.cascade import Cascade
from ensemble.stacking.cascade_fit import fit_cascade
from ensemble.stacking.frontier import Costs, Point, PointScores, Study
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle, check_images, heldout_rows, member_logits, operating_point
from export.bundle.certificate import MAX_IMAGES, MIN_IMAGES, compare_scores
from export.bundle.operating_point import CertifiedFiles, OperatingPoint
from export.bundle.precisions import FP32
from export.inference import benchmark
from export.inference.plan import PlannedMember, plan_bundle
from export.runtimes import capabilities, devices
from export.runtimes.settings import RuntimeOptions

Plans = Mapping[str, Sequence[PlannedMember]]


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
    best: Mapping[Point, tuple[PointScores, Shipped]]
    full: tuple[Point, PointScores]
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


def explore(
    folder: Path, run: Path | None, wanted: RuntimeOptions, sources: Sequence[ImageSource], log: Log
) -> Frontier:
    """A bundle's frontier on this machine, timed on these images. run: that it is of, if it is of one."""
    values = bundle.open_bundle(folder)
    made_from = operating_point.identity(
        folder, values["members"], values["files"]
    )  # now: it may change while this runs
    own = bundle.bundle_stacker(folder)
    study = frontier.prepare_study(heldout_rows.read_rows(folder, own.members, "frontier"), own)
    plans = _plans(folder, replace(wanted, full=True), log)
    taken = benchmark.measure(plans, sources, log)
    proof = _proof(folder, run, plans, log)
    stacks = frontier.subset_points(study, taken)
    unproven = {key for key, names in taken.lower.items() if names and proof is None}
    stacks = [point for point in stacks if point.precision not in unproven or point.members == own.members]
    asked = artifacts.read_json(folder / "stacker.json", bundle.REMEDY).get("calibration_asked", "none")
    ship = _shipper(study, taken, proof, str(asked))
    plain, _ = frontier.select_frontier(stacks, ship)
    if not plain:
        raise ArtifactError("no stack of these members tells ai from real beyond chance on half of the held-out images")
    tried = [*stacks, *frontier.cascade_points(study, list(plain), taken)]
    best, left_out = frontier.select_frontier(tried, ship)
    full = min((point for point in stacks if point.members == own.members), key=lambda point: point.milliseconds)
    other = study.rows.groups[~study.first]
    return Frontier(
        tried,
        {point: (frontier.score_point(study, point), shipped) for point, shipped in best.items()},
        (full, frontier.score_point(study, full)),
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
            f"no point reaches {budget:g} images/s here: the fastest ({join_limited(fastest.members)} at "
            f"{fastest.precision}) "
            f"is predicted to make {fastest.images_per_second:.1f}; give a smaller --budget"
        )
    return max(fast, key=lambda point: point.auroc)


def write(folder: Path, found: Frontier, point: Point, budget: float) -> OperatingPoint:
    """Put a point into the bundle, for what runs it from then on; ArtifactError where the bundle is another by now."""
    values = bundle.open_bundle(folder)
    if operating_point.identity(folder, values["members"], values["files"]) != found.made_from:
        raise ArtifactError(f"the bundle {folder} changed meanwhile; run frontier again")
    measured, shipped = found.best[point]
    plan = [member for member in found.plans[point.precision] if member.name in point.members]
    lower = [member for member in plan if member.setting.precision != "fp32"]
    files = {member.name: member.sha256 for member in lower}
    chosen = OperatingPoint(
        shipped.stacker,
        found.runtime,
        {str(m.setting): CertifiedFiles(devices.version(m.setting.runtime), files) for m in lower[:1]},
        shipped.cascade,
        budget,
        point.images_per_second,
        measured.lost,
        capabilities.available().where(plan[0].setting.runtime),
        found.made_from,
    )
    operating_point.write(folder, chosen)
    return chosen


def _plans(folder: Path, wanted: RuntimeOptions, log: Log) -> Plans:
    """How all members run, by precision: at fp32, and where some may run below it, so."""
    plan = plan_bundle(folder, wanted, log).members
    lower = sorted({member.setting.precision for member in plan} - {"fp32"})
    plans = {lower[0]: plan} if lower else {"fp32": plan}
    if wanted.precision == "auto":  # a point without a certificate runs as if fp32 were asked for, so it is timed so
        return {"fp32": plan_bundle(folder, replace(wanted, precision="fp32"), lambda line: None).members} | {
            precision: plan for precision, plan in plans.items() if precision != "fp32"
        }
    return plans


def _by_word(values: Mapping[str, Any], member: PlannedMember) -> bool:
    return not values.get("precisions", {}).get(str(member.setting), {"certified": True})["certified"]


def _shipper(
    study: Study, taken: Costs, proof: Proof | None, calibration: str
) -> Callable[[Point], tuple[Point, Shipped]]:
    """What gives a point the speed it ships at, and makes what is written of it.

    It raises ArtifactError where that does not hold what the point says.
    """
    refit = cache(partial(frontier.refit_on_all_rows, study, calibration=calibration))

    def ship(point: Point) -> tuple[Point, Shipped]:
        stacker: Stacker = refit(point.members)
        lower = taken.lower[point.precision] & set(point.members)
        if lower and proof:
            _judge(stacker, lower, proof, point.precision)
        if point.cascade is None:
            return point, Shipped(stacker, None)
        spent = taken.running(point.precision, point.members)
        cascade = fit_cascade(stacker, study.rows.select(point.members), spent, point.cascade.tolerance)
        milliseconds = taken.milliseconds(point.precision, cascade.order, cascade.report.shares)
        return replace(point, milliseconds=milliseconds), Shipped(stacker, cascade)

    return ship


def _judge(stacker: Stacker, lower: frozenset[str], proof: Proof, precision: str) -> None:
    """ArtifactError unless the stack passes below fp32 as `export` asks it."""
    fp32 = np.column_stack([proof.fp32[name] for name in stacker.members])
    mixed = np.column_stack([(proof.lower if name in lower else proof.fp32)[name] for name in stacker.members])
    change = compare_scores(stacker.logit(fp32), stacker.logit(mixed), proof.labels, stacker.threshold)
    if change.failed:
        raise ArtifactError(f"{' + '.join(stacker.members)} at {precision}: {', '.join(change.failed)}")


def _proof(folder: Path, run: Path | None, plans: Plans, log: Log) -> Proof | None:
    """Logits of the run's held-out images, as far as they are not kept from `export`; None for want of images."""
    lower = {m.name: m for plan in plans.values() for m in plan if m.setting.precision != "fp32"}
    if not lower:
        return None
    given = check_images.stratified_sample(check_images.heldout_images(run), MAX_IMAGES) if run else None
    (*_, plan) = plans.values()
    if given:
        entries = bundle.read_contents(folder)["members"]
        columns = [
            member_logits.logit_column(m.name, folder / entries[m.name]["file"], m.preprocess_config, FP32)
            for m in plan
        ]
        columns += [member_logits.logit_column(m.name, m.path, m.preprocess_config, m.setting) for m in lower.values()]
        logits, errors = member_logits.compute_logits(given.files, columns, "certify")
        read = [row for row in range(len(given.labels)) if row not in errors]
        given, logits = given.subset(read), logits[read].astype(np.float64)
    if given is None or len(given.labels) < MIN_IMAGES:
        here = f"{len(given.labels)} can be read" if given else "a bundle has none: name its run with --run"
        log(
            "Below fp32 only all members together are tried: a stack of some of them is certified on "
            f"{MIN_IMAGES} held-out images of the run or more, and {here}."
        )
        return None
    looked_up = {
        e.name: given.external_logits(e) for e in external.externals_of(folder, bundle.bundle_stacker(folder).members)
    }
    fp32 = dict(zip([m.name for m in plan], logits.T, strict=False))
    return Proof({**fp32, **looked_up}, dict(zip(lower, logits.T[len(plan) :], strict=True)), given.labels)


INK, GRID = "#333333", "#bbbbbb"
STACKS, CASCADES, BEST, BUDGET = "#4269d0", "#2f8f5b", "#111111", "#d0632a"
HEADROOM = 0.35  # of the frontier's own height, left free below it: far worse points are cut off


def draw(
    tried: Sequence[Point],
    best: Mapping[Point, PointScores],
    full: Point,
    budget: float | None,
    chosen: Point | None,
    path: Path,
) -> None:
    """Write a PNG: every point tried, faintly; the best as a line with 95 % intervals; the budget and the choice."""
    figure = Figure(figsize=(8.6, 5.2), dpi=120)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.11, top=0.97)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _faint(axes, [point for point in tried if not point.cascade], STACKS, "o", "stacks of some members")
    _faint(axes, [point for point in tried if point.cascade], CASCADES, "^", "with a cascade")
    speeds = [point.images_per_second for point in best]
    values = [measured.auroc.value for measured in best.values()]
    low = [max(m.auroc.value - m.auroc.low, 0.0) for m in best.values()]
    high = [max(m.auroc.high - m.auroc.value, 0.0) for m in best.values()]
    axes.errorbar(
        speeds,
        values,
        [low, high],
        color=BEST,
        linewidth=1.4,
        elinewidth=0.9,
        capsize=2.5,
        marker="o",
        markersize=4.5,
        zorder=3,
        label="the frontier, with 95 % intervals",
    )
    for number, (speed, value) in enumerate(zip(speeds, values, strict=True), start=1):
        axes.annotate(str(number), (speed, value), (5, 5), textcoords="offset points", color=BEST, fontsize=9, zorder=5)
    axes.plot(full.images_per_second, full.other, "s", color=INK, markersize=9, fillstyle="none", label="all members")
    if budget:
        axes.axvline(budget, color=BUDGET, linestyle="--", linewidth=1.2, label=f"budget: {budget:g} images/s")
    if chosen:
        axes.plot(
            chosen.images_per_second,
            chosen.other,
            "o",
            color=BUDGET,
            markersize=14,
            markeredgewidth=2,
            fillstyle="none",
            label="chosen",
        )
    _finish(axes, values, low, high)
    with artifacts.replacing(path) as temporary:
        canvas.print_png(temporary, metadata={"Software": None})


def _faint(axes: Axes, points: Sequence[Point], colour: str, marker: str, label: str) -> None:
    speeds, values = [point.images_per_second for point in points], [point.other for point in points]
    axes.scatter(speeds, values, 14, color=colour, marker=marker, alpha=0.3, linewidths=0, label=label, zorder=2)


def _finish(axes: Axes, values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> None:
    bottom = min(value - less for value, less in zip(values, low, strict=True))
    top = max(value + more for value, more in zip(values, high, strict=True))
    room = max(top - bottom, 0.01)
    axes.set_ylim(bottom - HEADROOM * room, top + 0.08 * room)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("images a second, predicted for this machine", color=INK)
    axes.set_ylabel("AUROC on images that no stack or limit was fitted on", color=INK)
    axes.grid(color=GRID, alpha=0.35, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower left")
