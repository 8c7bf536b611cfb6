"""The frontier of accuracy against speed of a bundle on this machine: stacks of some members, precisions, cascades.

`choose_point` and `write_operating_point` make the bundle run at one of its points; `plot_frontier` draws them, with
the numbers that the printed table has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ensemble.cascade import pareto
from ensemble.cascade.cascade import Cascade
from ensemble.cascade.fit import fit_cascade
from ensemble.cascade.pareto import Costs, Point, PointScores, Study
from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, join_limited
from ensemble.core.log import Log, no_log
from ensemble.images.decode import ImageSource
from ensemble.models import external
from ensemble.stacking.stacker import Stacker, read_stacker_values
from export.bundle import bundle, check_images, heldout_rows, member_logits, operating_point
from export.bundle.certificate import MAX_IMAGES, MIN_IMAGES, compare_scores
from export.bundle.low_precision_files import FP32
from export.bundle.operating_point import CertifiedFiles, OperatingPoint
from export.inference import benchmark
from export.inference.plan import PlannedMember, plan_bundle
from export.runtimes import capabilities, devices
from export.runtimes.settings import RuntimeOptions

Plans = Mapping[str, Sequence[PlannedMember]]
FittedPoint = tuple[Stacker, Cascade | None]  # fitted on all rows; written into the bundle for a point


@dataclass(frozen=True)
class Frontier:
    """All points tried, and the best: those that no other beats in both accuracy and speed, from the fastest on.

    best: with each point's scores on the other half of the rows, and its fit on all rows. full: the stack of all
    members, and its scores. runtime: that was asked for, or auto. plans: how members run, by precision. rows and
    groups: of the half that the scores are of. left_out: why other points are not among the best. made_from: the
    bundle that this holds for, as `operating_point.identity` gives it. uncertified: precisions that the bundle allows
    without a certificate. proven: whether points below fp32 passed the checks of a certificate here.
    """

    tried: Sequence[Point]
    best: Mapping[Point, tuple[PointScores, FittedPoint]]
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
class CheckLogits:
    """Logits float64 [N] of labelled images, by member, to certify a stack below fp32.

    fp32: of all members. lower: of the members that run below fp32, at that precision.
    """

    fp32: Mapping[str, np.ndarray]
    lower: Mapping[str, np.ndarray]
    labels: np.ndarray


def compute_frontier(
    folder: Path, run: Path | None, options: RuntimeOptions, sources: Sequence[ImageSource], log: Log
) -> Frontier:
    """A bundle's frontier on this machine, timed on these images. run: the run that the bundle is of, if any."""
    values = bundle.open_bundle(folder)
    # now: the bundle may change while this runs
    made_from = operating_point.identity(folder, values["members"], values["files"])
    own = bundle.bundle_stacker(folder)
    study = pareto.prepare_study(heldout_rows.read_rows(folder, own.members, "frontier"), own)
    plans = _plans(folder, replace(options, full=True), log)
    costs = benchmark.measure_costs(plans, sources, log)
    logits = _check_logits(folder, run, plans, log)
    stacks = pareto.subset_points(study, costs)
    unproven = {key for key, names in costs.lower.items() if names and logits is None}
    stacks = [point for point in stacks if point.precision not in unproven or point.members == own.members]
    calibration = read_stacker_values(folder / "stacker.json", bundle.REMEDY).get("calibration_asked", "none")
    fit = _fitter(study, costs, logits, str(calibration))
    best_stacks, _ = pareto.select_frontier(stacks, fit)
    if not best_stacks:
        raise ArtifactError("no stack of these members tells ai from real beyond chance on half of the held-out images")
    tried = [*stacks, *pareto.cascade_points(study, list(best_stacks), costs)]
    best, left_out = pareto.select_frontier(tried, fit)
    uncertified = {key for key, each in values.get("precisions", {}).items() if not each["certified"]}
    full = min((point for point in stacks if point.members == own.members), key=lambda point: point.milliseconds)
    other_half = study.rows.groups[~study.first]
    return Frontier(
        tried=tried,
        best={point: (pareto.score_point(study, point), fitted) for point, fitted in best.items()},
        full=(full, pareto.score_point(study, full)),
        runtime=options.runtime,
        plans=plans,
        rows=len(other_half),
        groups=len(np.unique(other_half)),
        left_out=left_out,
        made_from=made_from,
        uncertified=frozenset(key for key, plan in plans.items() if any(str(m.setting) in uncertified for m in plan)),
        proven=logits is not None,
    )


def choose_point(computed: Frontier, budget: float) -> Point:
    """The most accurate of the best points that are predicted to reach `budget` images a second."""
    fast = [point for point in computed.best if point.images_per_second >= budget]
    if not fast:
        fastest = next(iter(computed.best))
        raise ArtifactError(
            f"no point reaches {budget:g} images/s here: the fastest ({join_limited(fastest.members)} at "
            f"{fastest.precision}) is predicted to make {fastest.images_per_second:.1f}; give a smaller --budget"
        )
    return max(fast, key=lambda point: point.auroc)


def write_operating_point(folder: Path, computed: Frontier, point: Point, budget: float) -> OperatingPoint:
    """Write a point into the bundle, which runs at it from then on; ArtifactError if the bundle has changed."""
    values = bundle.open_bundle(folder)
    if operating_point.identity(folder, values["members"], values["files"]) != computed.made_from:
        raise ArtifactError(f"the bundle {folder} changed meanwhile; run frontier again")
    measured, (stacker, cascade) = computed.best[point]
    plan = [member for member in computed.plans[point.precision] if member.name in point.members]
    lower = [member for member in plan if member.setting.precision != "fp32"]
    files = {member.name: member.sha256 for member in lower}
    chosen = OperatingPoint(
        stacker,
        computed.runtime,
        {str(m.setting): CertifiedFiles(devices.version(m.setting.runtime), files) for m in lower[:1]},
        cascade,
        budget,
        point.images_per_second,
        measured.loss,
        capabilities.available().where(plan[0].setting.runtime),
        computed.made_from,
    )
    operating_point.write(folder, chosen)
    return chosen


def _plans(folder: Path, options: RuntimeOptions, log: Log) -> Plans:
    """How all members run, by precision: at fp32, and if some may run below it, at the lower precision."""
    plan = plan_bundle(folder, options, log).members
    precision = min({member.setting.precision for member in plan} - {"fp32"}, default="fp32")
    if options.precision != "auto":
        return {precision: plan}
    # a point without a certificate runs as with --precision fp32, and is timed as such
    fp32 = plan_bundle(folder, replace(options, precision="fp32"), no_log).members
    return {"fp32": fp32} if precision == "fp32" else {"fp32": fp32, precision: plan}


def _fitter(
    study: Study, costs: Costs, logits: CheckLogits | None, calibration: str
) -> Callable[[Point], tuple[Point, FittedPoint]]:
    """A function that fits a point on all rows, and gives it the speed of the fit.

    The function raises ArtifactError if the fitted stack is not certified below fp32.
    """
    refit = cache(partial(pareto.refit_on_all_rows, study, calibration=calibration))

    def fit(point: Point) -> tuple[Point, FittedPoint]:
        stacker: Stacker = refit(point.members)
        lower = costs.lower[point.precision] & set(point.members)
        if lower and logits:
            fp32 = np.column_stack([logits.fp32[name] for name in stacker.members])
            mixed = [(logits.lower if name in lower else logits.fp32)[name] for name in stacker.members]
            scores = stacker.logit(fp32), stacker.logit(np.column_stack(mixed))
            if failed := compare_scores(*scores, logits.labels, stacker.threshold).failed:
                raise ArtifactError(f"{' + '.join(stacker.members)} at {point.precision}: {', '.join(failed)}")
        if point.cascade is None:
            return point, (stacker, None)
        member_costs = costs.running(point.precision, point.members)
        cascade = fit_cascade(stacker, study.rows.select(point.members), member_costs, point.cascade.tolerance)
        milliseconds = costs.milliseconds(point.precision, cascade.order, cascade.report.shares)
        return replace(point, milliseconds=milliseconds), (stacker, cascade)

    return fit


def _check_logits(folder: Path, run: Path | None, plans: Plans, log: Log) -> CheckLogits | None:
    """Logits of the run's held-out images, from the cache of `export` where it has them; None with too few images."""
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
        readable, logits, _ = member_logits.compute_logits(given.files, columns, "certify")
        given = given.subset(readable)
    if given is None or len(given.labels) < MIN_IMAGES:
        here = f"{len(given.labels)} can be read" if given else "a bundle has none: name its run with --run"
        log(
            "Below fp32 only all members together are tried: a stack of some of them is certified on "
            f"{MIN_IMAGES} held-out images of the run or more, and {here}."
        )
        return None
    looked_up = {
        e.name: given.external_logits(e) for e in external.read_externals(folder, bundle.bundle_stacker(folder).members)
    }
    fp32 = dict(zip([m.name for m in plan], logits.T, strict=False))
    return CheckLogits({**fp32, **looked_up}, dict(zip(lower, logits.T[len(plan) :], strict=True)), given.labels)


INK, GRID = "#333333", "#bbbbbb"
STACKS, CASCADES, BEST, BUDGET = "#4269d0", "#2f8f5b", "#111111", "#d0632a"
HEADROOM = 0.35  # of the frontier's own height, left free below it: far worse points are cut off


def plot_frontier(
    tried: Sequence[Point],
    best: Mapping[Point, PointScores],
    full: Point,
    budget: float | None,
    chosen: Point | None,
    path: Path,
) -> None:
    """Write a PNG: every point tried, faint; the best as a line with 95 % intervals; budget and chosen point."""
    figure = Figure(figsize=(8.6, 5.2), dpi=120)
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.11, top=0.97)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for cascades, colour, marker, label in (
        (False, STACKS, "o", "stacks of some members"),
        (True, CASCADES, "^", "with a cascade"),
    ):
        shown = [point for point in tried if bool(point.cascade) is cascades]
        x, y = [point.images_per_second for point in shown], [point.other_auroc for point in shown]
        axes.scatter(x, y, 14, color=colour, marker=marker, alpha=0.3, linewidths=0, label=label, zorder=2)
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
    axes.plot(
        full.images_per_second, full.other_auroc, "s", color=INK, markersize=9, fillstyle="none", label="all members"
    )
    if budget:
        axes.axvline(budget, color=BUDGET, linestyle="--", linewidth=1.2, label=f"budget: {budget:g} images/s")
    if chosen:
        axes.plot(
            chosen.images_per_second,
            chosen.other_auroc,
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
