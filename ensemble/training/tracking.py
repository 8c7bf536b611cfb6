"""Experiment tracking: TensorBoard, any tracker of accelerate, and a plot of a member's training curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter

from ensemble.core import artifacts
from ensemble.core.errors import UnavailableError, error_line
from ensemble.training.checkpoint import flatten

PROJECT = "manyeyes"
# What each tracker calls the name of a run within a project; the others go by the project alone.
RUN_NAMES = {"wandb": "name", "mlflow": "run_name", "trackio": "name", "swanlab": "experiment_name"}
FLUSH_SECONDS = 30  # seconds; what a kill may lose of the event file


@dataclass(frozen=True)
class Trackers:
    """Open trackers of one fit."""

    writer: SummaryWriter | None
    others: Sequence[GeneralTracker]

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step, by name."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        for tracker in self.others:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is not written yet."""
        if self.writer is not None:
            self.writer.close()
        for tracker in self.others:
            tracker.finish()


def check_trackers(report_to: Sequence[str]) -> None:
    """UnavailableError for a tracker that is unknown, or whose package is absent; "none" is none."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in report_to:
        if name != "none" and name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise UnavailableError(f"no tracker {name!r}; it is none, or some of: {known}")
        if name != "none" and name not in available:
            ready = ", ".join(available)
            raise UnavailableError(
                f"the tracker {name} is not installed (there is: {ready}); run: pip install {name.replace('_', '-')}"
            )


def open_trackers(
    report_to: Sequence[str], folder: Path, name: str, config: Mapping[str, Any], done: int = 0
) -> Trackers:
    """Open, or continue, the logs of one fit; in the main process alone.

    TensorBoard's event files lie in folder/name, where `name` may be "NAME/fit" or "NAME/fold-2". done: steps of an
    earlier run that are kept; TensorBoard drops what was logged of later ones. config: shown by the other trackers,
    nested values under dotted names.
    """
    check_trackers(report_to)
    names = [tracker for tracker in dict.fromkeys(report_to) if tracker != "none"]
    writer = None
    if "tensorboard" in names:
        writer = SummaryWriter(str(folder / name), purge_step=done + 1, flush_secs=FLUSH_SECONDS)
    return Trackers(writer, [_open(tracker, folder, name, config) for tracker in names if tracker != "tensorboard"])


def _open(tracker: str, folder: Path, name: str, config: Mapping[str, Any]) -> GeneralTracker:
    PartialState()  # accelerate's trackers ask it whether this is the main process
    kind = LOGGER_TYPE_TO_CLASS[tracker]
    options: dict[str, Any] = {RUN_NAMES[tracker]: name} if tracker in RUN_NAMES else {}
    if kind.requires_logging_directory:
        options["logging_dir"] = str(folder)
    opened = kind(PROJECT, **options)
    try:
        opened.start()
        # trackers take numbers, text and None
        values = {
            name: value if value is None or isinstance(value, int | float | str) else str(value)
            for name, value in flatten(config).items()
        }
        opened.store_init_configuration(values)
    except Exception as error:
        # An account, a server or a setting of the tracker's own: its message says what it lacks.
        raise UnavailableError(f"the tracker {tracker} did not start: {error_line(error, first=True)}") from error
    return opened


SMOOTHING_SHARE = 0.05  # share of a part's steps in the window of the moving mean
INK, QUIET = "#333333", "#bbbbbb"
LOSS, TUNE, AUROC, SCORE = "#4269d0", "#d0632a", "#2f8f5b", "#7a4fb0"


def draw_curves(history: Mapping[str, Any], path: Path) -> None:
    """Write history.json's parts as a PNG: the same bytes for the same history.

    Folds are thin lines, a single fit or the refit is a strong one; a ring marks the epoch that
    was chosen. The last logged step is taken for the end of the last epoch.
    """
    figure = Figure(figsize=(13, 3.8), dpi=110)
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.13, top=0.92, wspace=0.16)
    canvas = FigureCanvasAgg(figure)
    losses, rates, scores = figure.subplots(1, 3)
    parts = history["parts"]
    for number, part in enumerate(parts):
        width, strength = (0.9, 0.55) if len(parts) > 1 and part["title"] != "refit" else (1.8, 1.0)
        style = {"linewidth": width, "alpha": strength}
        _draw_losses(losses, part, style, named=number == 0)
        rates.plot(_column(part["steps"], "step"), _column(part["steps"], "lr"), color=INK, **style)
        _draw_scores(scores, part, style, named=number == 0)
    _finish(losses, "loss (thin: folds, strong: refit)" if len(parts) > 1 else "loss", "step")
    _finish(rates, "learning rate", "step")
    _finish(scores, "tune scores (ring: the chosen epoch)", "epoch")
    rates.yaxis.set_major_formatter("{x:.2g}")
    with artifacts.replacing(path) as temporary:
        canvas.print_png(temporary, metadata={"Software": None})


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Moving mean over `window` values, float [N] -> float [N]; at the ends over those that are there."""
    ones = np.ones(min(window, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _draw_losses(axes: Axes, part: Mapping[str, Any], style: Mapping[str, Any], named: bool) -> None:
    steps, loss = _column(part["steps"], "step"), _column(part["steps"], "loss")
    epochs = _column(part["epochs"], "epoch")
    if len(steps):
        window = max(round(len(loss) * SMOOTHING_SHARE), 1)
        axes.plot(steps, loss, color=LOSS, linewidth=0.6, alpha=0.2 * style["alpha"])
        axes.plot(steps, smooth(loss, window), color=LOSS, label="train loss, smoothed" if named else None, **style)
        epochs = epochs * steps[-1] / max(epochs, default=1)
    _per_epoch(axes, epochs, part, "tune_log_loss", TUNE, "tune log-loss" if named else None, style)


def _draw_scores(axes: Axes, part: Mapping[str, Any], style: Mapping[str, Any], named: bool) -> None:
    epochs = _column(part["epochs"], "epoch")
    _per_epoch(axes, epochs, part, "tune_auroc", AUROC, "AUROC" if named else None, style)
    auroc, log_loss, score = (_column(part["epochs"], f"tune_{name}") for name in ("auroc", "log_loss", "score"))
    if not (np.array_equal(score, auroc, equal_nan=True) or np.array_equal(abs(score), log_loss)):
        _per_epoch(axes, epochs, part, "tune_score", SCORE, "score that chooses" if named else None, style)


def _per_epoch(
    axes: Axes,
    at: np.ndarray,
    part: Mapping[str, Any],
    key: str,
    color: str,
    label: str | None,
    style: Mapping[str, Any],
) -> None:
    values = _column(part["epochs"], key)
    axes.plot(at, values, color=color, marker=".", markersize=4, label=label, **style)
    best = _column(part["epochs"], "epoch") == part["best"]
    axes.plot(at[best], values[best], "o", markersize=8, color=color, fillstyle="none", alpha=style["alpha"])


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One value a row, float64 [N]; NaN where there is none."""
    return np.array([row.get(key) for row in rows], dtype=np.float64)


def _finish(axes: Axes, title: str, along: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xlabel(along, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.grid(color=QUIET, alpha=0.35, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(QUIET)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    if not any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", color=QUIET)
