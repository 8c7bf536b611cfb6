"""Accuracy against speed as a picture. Points have numbers, by which the table names them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ensemble.core import artifacts
from ensemble.stacking.frontier import Measured, Point

INK, GRID = "#333333", "#bbbbbb"
STACKS, CASCADES, BEST, BUDGET = "#4269d0", "#2f8f5b", "#111111", "#d0632a"
HEADROOM = 0.35  # of the frontier's own height, left free below it: far worse points are cut off


def draw(
    tried: Sequence[Point],
    best: Mapping[Point, Measured],
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
