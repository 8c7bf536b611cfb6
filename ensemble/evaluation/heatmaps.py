"""Heat maps of a member's evidence in an image, and a figure of them. Needs torch, captum and matplotlib.

HiResCAM: activation times gradient at the last layer with spatial positions, summed over channels. It also suits
tokens, and equals Grad-CAM where the head averages over positions (Draelos and Carin, "Use HiResCAM instead of
Grad-CAM", 2020). A network without such a layer is explained by occlusion: one part of the image after another is
covered. A heat map shows attention; it proves nothing.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from captum.attr import LayerGradientXActivation, Occlusion
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from ensemble.core import artifacts
from ensemble.images import preprocess
from ensemble.models.backbone import Member

MAX_SIDE_PIXELS = 512  # longer side of a heat map, in pixels
SPECIAL_TOKENS = 16  # at most so many stand before the places: a class token, registers
COVERED = 8  # an image without layers of places is covered in as many columns and rows
OPACITY = 0.65  # of the heat at its hottest
COLUMNS = 4  # of a figure
PANEL = 3.2  # width of a picture, in inches
LETTERS = 44  # of a name, so many fit above its picture
INK, QUIET = "#333333", "#777777"
# Inside attention and perceptrons, or changing nothing: their layer's output says what they do to it.
SKIPPED = (nn.Linear, nn.Dropout, nn.Identity, nn.Softmax)


@dataclass(frozen=True)
class TokenLayout:
    """How a layer's output [1, ...] holds its square of places: `first` tokens before them, channels first or last."""

    side: int
    first: int
    channels_first: bool

    def places(self, values: torch.Tensor) -> torch.Tensor:
        """A layer's output, summed over channels: [side, side]."""
        flat = values[0].flatten(1).sum(0) if self.channels_first else values[0].flatten(0, -2).sum(-1)
        return flat[self.first :].view(self.side, self.side)


def heatmaps(member: Member, image: Image.Image) -> np.ndarray:
    """Evidence for what the member says, ai where its logit is above 0 and else real: float32 [H, W] in 0..1.

    image: decoded, at H x W or larger: the longer side of the map is at most 512. The hottest
    place is 1 unless nothing speaks for it. Several crops are pasted back, averaged where they
    overlap; what no crop shows is 0.
    """
    member.eval()
    shown = shrink(image)
    pixels = torch.from_numpy(preprocess.to_pixels(image, member.preprocess_config)).to(member.mean.device)
    with torch.inference_mode():
        side = 1.0 if member(pixels).mean() > 0 else -1.0
    chosen = _last_layer(member, pixels[:1])
    views = [_view_heat(member, view.float(), side, chosen) for view in pixels.split(1)]
    boxes = preprocess.view_boxes(image.size, member.preprocess_config)
    heat = _pasted(views, boxes, shown, image.size)
    return heat / heat.max() if heat.max() > 0 else heat


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The image in grey, so that only heat has colour, at the size of `heat`, [H, W] in 0..1; mode RGB."""
    height, width = heat.shape
    grey = preprocess.flatten(image, (255, 255, 255)).resize((width, height)).convert("L")
    under = np.asarray(grey, dtype=np.float64)[..., None]
    colours = matplotlib.colormaps["inferno"](heat)[..., :3] * 255
    strength = OPACITY * heat[..., None]
    return Image.fromarray((under * (1 - strength) + colours * strength).round().astype(np.uint8))


def shrink(image: Image.Image) -> Image.Image:
    """The image as RGB, made smaller where its longer side is over 512."""
    rgb = preprocess.flatten(image, (255, 255, 255))
    return rgb.resize(_limited(*rgb.size, MAX_SIDE_PIXELS))


def downsample(heat: np.ndarray, cells: int) -> np.ndarray:
    """A heat map averaged into at most `cells` cells along its longer side, float64 [rows, columns] in 0..1."""
    size = _limited(heat.shape[1], heat.shape[0], cells)
    return np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BOX), dtype=np.float64).clip(0, 1)


def _limited(width: int, height: int, longest: int) -> tuple[int, int]:
    """Width and height scaled down alike to at most `longest`, and each to no less than 1."""
    scale = min(1.0, longest / max(width, height))
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _view_heat(
    member: Member, view: torch.Tensor, side: float, chosen: tuple[nn.Module, TokenLayout] | None
) -> np.ndarray:
    """What speaks for `side` in one view, float [1, S, S, 3]: float32 [places, places], not below 0."""

    def score(pixels: torch.Tensor) -> torch.Tensor:
        return side * member(pixels)

    if chosen is None:
        part = math.ceil(view.shape[1] / COVERED)
        covered = Occlusion(score).attribute(
            view,
            sliding_window_shapes=(part, part, 3),
            strides=(part, part, 3),
            baselines=view.mean(dim=(1, 2), keepdim=True).expand_as(view),
            perturbations_per_eval=COVERED,
        )
        heat = covered[0, ..., 0]
    else:
        layer, layout = chosen
        heat = layout.places(LayerGradientXActivation(score, layer).attribute(view.requires_grad_()))
    return heat.detach().clamp(min=0).float().cpu().numpy()


def _pasted(
    views: list[np.ndarray], boxes: list[tuple[float, float, float, float]], shown: Image.Image, size: tuple[int, int]
) -> np.ndarray:
    """The mean of views at their boxes in an image of `size` (W, H), on a map of the shape of `shown`."""
    across, down = shown.width / size[0], shown.height / size[1]
    total, count = (np.zeros((shown.height, shown.width), dtype=np.float32) for _ in range(2))
    for heat, (left, top, right, bottom) in zip(views, boxes, strict=True):
        corner = round(left * across), round(top * down)
        wide, high = max(round(right * across) - corner[0], 1), max(round(bottom * down) - corner[1], 1)
        large = Image.fromarray(heat).resize((wide, high), Image.Resampling.BILINEAR)
        for added, piece in ((total, large), (count, Image.new("F", large.size, 1))):
            canvas = Image.new("F", shown.size)
            canvas.paste(piece, corner)
            added += np.asarray(canvas)
    return total / np.maximum(count, 1)


def _last_layer(member: Member, pixels: torch.Tensor) -> tuple[nn.Module, TokenLayout] | None:
    """The last layer whose output has places that the logit depends on, for one view uint8 [1, S, S, 3]."""
    with _outputs(member) as seen:
        logit = member(pixels.float().requires_grad_())
    if not seen:
        return None
    gradients = torch.autograd.grad(logit.sum(), [values for _, values, _ in seen], allow_unused=True)
    for (layer, _, layout), gradient in zip(reversed(seen), reversed(gradients), strict=True):
        if gradient is not None and layout.places(gradient.abs()).any():
            return layer, layout
    return None


@contextmanager
def _outputs(member: Member) -> Iterator[list[tuple[nn.Module, torch.Tensor, TokenLayout]]]:
    """What layers that have places put out while the member runs, in order; layers that run twice are left out."""
    seen: list[tuple[nn.Module, torch.Tensor, TokenLayout]] = []

    def keep(layer: nn.Module, inputs: object, output: object) -> None:
        patches = next((layout.side for _, values, layout in seen if values.dim() == 4), 0)
        if isinstance(output, torch.Tensor) and output.requires_grad and (layout := _layout(output, patches)):
            seen.append((layer, output, layout))

    layers = [layer for layer in member.backbone.modules() if not isinstance(layer, SKIPPED)]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
        runs = [layer for layer, _, _ in seen]
        seen[:] = [entry for entry in seen if runs.count(entry[0]) == 1]


def _layout(output: torch.Tensor, patches: int) -> TokenLayout | None:
    """How an output for one image holds places, None if it holds none; patches: the side of the first map, or 0."""
    shape = output.shape
    if shape[0] != 1 or output.dim() not in (3, 4) or shape[-1] == 1:
        return None
    if output.dim() == 4:
        if shape[2] == shape[3]:
            return TokenLayout(shape[2], 0, channels_first=True)
        return TokenLayout(shape[1], 0, channels_first=False) if shape[1] == shape[2] > 1 else None
    side = patches if 0 <= shape[1] - patches**2 <= SPECIAL_TOKENS else math.isqrt(shape[1])
    first = shape[1] - side**2
    return TokenLayout(side, first, channels_first=False) if side > 1 and first <= SPECIAL_TOKENS else None


@dataclass(frozen=True)
class Panel:
    """A picture, what stands above it in strong letters, and the line below that."""

    picture: Image.Image
    name: str
    line: str


def write_figure(panels: Sequence[Panel], title: str, note: str, path: Path) -> None:
    """Write pictures of one size side by side as a PNG; no text is read as mathematics."""
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    first = panels[0].picture
    tall = PANEL * min(max(first.height / first.width, 0.3), 2.0)
    size = (columns * PANEL + 0.4, rows * (tall + 0.55) + 1.0)
    figure = Figure(figsize=size, dpi=120)
    canvas = FigureCanvasAgg(figure)
    figure.subplots_adjust(
        left=0.2 / size[0],
        right=1 - 0.2 / size[0],
        bottom=0.4 / size[1],
        top=1 - 1.0 / size[1],
        hspace=0.55 / tall,
        wspace=0.05,
    )
    for axes in figure.subplots(rows, columns, squeeze=False).flatten():
        axes.set_axis_off()
    for axes, panel in zip(figure.axes, panels, strict=False):
        axes.imshow(panel.picture)
        for text, points, weight in ((printable_text(panel.name), 17, "bold"), (panel.line, 4, "normal")):
            axes.annotate(
                text,
                (0, 1),
                (0, points),
                xycoords="axes fraction",
                textcoords="offset points",
                color=INK,
                fontsize=8,
                weight=weight,
                parse_math=False,
            )
    style: dict[str, Any] = {"x": 0.2 / size[0], "parse_math": False}
    figure.text(
        y=1 - 0.3 / size[1], s=printable_text(title, 30 * columns), color=INK, fontsize=12, va="center", **style
    )
    figure.text(y=0.2 / size[1], s=printable_text(note, 60 * columns), color=QUIET, fontsize=8, va="center", **style)
    with artifacts.replacing(path) as temporary:
        canvas.print_png(temporary, metadata={"Software": None})


def printable_text(text: str, longest: int = LETTERS) -> str:
    """A text on one line, of letters that the font has, its beginning left out where it is too long."""
    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    shown = "".join(letter if ord(letter) in known and letter.isprintable() else "?" for letter in text)
    return shown if len(shown) <= longest else f"...{shown[3 - longest :]}"
