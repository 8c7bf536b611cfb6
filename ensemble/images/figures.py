"""Figures of pages as SVG. Needs matplotlib. A figure holds no text of the user's, so nothing in it needs escaping."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ensemble.images import html

INK, GRID = "#333333", "#bbbbbb"
CLASS_COLOURS = ((0, "real", "#1f5fae"), (1, "ai", "#b3261e"))  # label, name, colour
SIZE = (4.4, 3.6)  # inches: it still reads on a phone


@dataclass(frozen=True)
class Plot:
    """A picture with its heading and what it shows in words, for those who do not see it."""

    title: str
    uri: str
    alt: str


def new_figure(along: str, up: str) -> tuple[Figure, Axes]:
    """A figure of one pair of axes, with their labels."""
    figure = Figure(figsize=SIZE)
    figure.subplots_adjust(left=0.14, right=0.97, bottom=0.13, top=0.97)
    axes = figure.add_subplot()
    axes.set_xlabel(along, color=INK, fontsize=9)
    axes.set_ylabel(up, color=INK, fontsize=9)
    axes.grid(color=GRID, alpha=0.35, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    return figure, axes


def svg_uri(figure: Figure) -> str:
    """The figure as the data URI of an SVG."""
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return html.data_uri("image/svg+xml", buffer.getvalue())


def radial_spectra(spectra: Mapping[int, np.ndarray]) -> Plot:
    """Mean log power by radius for both classes, [images, bins] by label, with one standard deviation."""
    figure, axes = new_figure("cycles a pixel", "log10 power")
    for label, name, colour in CLASS_COLOURS:
        mean, spread = spectra[label].mean(axis=0), spectra[label].std(axis=0)
        at = (np.arange(len(mean)) + 0.5) / len(mean) / 2
        axes.fill_between(at, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
        axes.plot(at, mean, color=colour, label=name)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    alt = "Mean log power of real and of ai images by spatial frequency, with one standard deviation."
    return Plot("Spectra by radius", svg_uri(figure), alt)
