"""Registration of thumbnails: the window of one picture that another shows, and how alike two planes are.

Gauss-Newton on the four edges of a window, with gain and offset (Lucas and Kanade 1981; Baker and Matthews 2004).
All functions take C pairs at once.
"""

from dataclasses import dataclass

import numpy as np

STEPS = (4, 3)  # Gauss-Newton steps at half size, at full size
MAX_STEP = 0.06  # of the side, per step and edge
MAX_CUT = 0.2  # of the side, per edge
RIDGE = 1.0  # keeps edges where they are that the picture says nothing about, in (grey values / pixel)^2


@dataclass(frozen=True)
class PlaneSimilarity:
    """Two float32 planes [C, n, n] over their overlap: correlation, gain, strengths and difference, each [C]."""

    correlation: np.ndarray
    gain: np.ndarray
    strength: np.ndarray  # root mean square about the mean, of the fainter
    difference: np.ndarray  # root mean square


def register(images: np.ndarray, others: np.ndarray, windows: np.ndarray, steps: int) -> np.ndarray:
    """float32 [C, 4]: `windows` moved so that what the images, float32 [C, n, n], show in them is like the others."""
    size = images.shape[1]
    along = ((np.arange(size) + 0.5) / size).astype(np.float32)
    down, across = np.gradient(images, axis=(1, 2))
    edges = np.array([1, 1, 1, 1, 0, 0], dtype=np.float32)  # against gain and offset
    for _ in range(steps):
        vertical, horizontal, overlap = _samplers(windows, size)
        seen, dx, dy = (vertical @ plane @ horizontal for plane in (images, across, down))
        by_left, by_right = dx * (size * (1 - along)), dx * (-size * along)
        by_top, by_bottom = dy * (size * (1 - along))[:, None], dy * (-size * along)[:, None]
        columns = np.stack([by_left, by_right, by_top, by_bottom, seen, np.ones_like(seen)], axis=1)
        columns = (columns * overlap[:, None]).reshape(len(images), 6, -1)
        target = (others * overlap).reshape(len(images), -1, 1)
        # others = gain * (seen + edges' derivatives * step) + offset, linear in gain * step, gain and offset
        normal = columns @ columns.swapaxes(1, 2)
        slope = np.trace(normal[:, :4, :4], axis1=1, axis2=2)[:, None] / 4
        normal[:, range(6), range(6)] += edges * (RIDGE * size * size + 0.002 * slope) + 1e-3
        solved = np.linalg.solve(normal, columns @ target)[..., 0]
        step = solved[:, :4] / np.maximum(solved[:, 4:5], 0.3)
        windows = np.clip(windows + np.clip(step, -MAX_STEP, MAX_STEP), -MAX_CUT, MAX_CUT).astype(np.float32)
    return windows


def warp_planes(images: np.ndarray, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What float32 [C, n, n] shows in its windows, and where it shows anything (1, else 0), both of that shape."""
    vertical, horizontal, overlap = _samplers(windows, images.shape[1])
    return vertical @ images @ horizontal, overlap


def _samplers(windows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices [C, n, n] that resample from the left and from the right, bilinearly, and where both are inside."""
    along = ((np.arange(size) + 0.5) / size).astype(np.float32)
    first, last = windows[:, [0, 2], None], windows[:, [1, 3], None]
    places = (first + along * (1 - first - last)) * size - 0.5  # [C, (x, y), n]
    inside = ((places > -0.5) & (places < size - 0.5)).astype(np.float32)
    clipped = np.clip(places, 0, size - 1)[..., None]
    x, y = np.moveaxis(np.maximum(1 - np.abs(clipped - np.arange(size, dtype=np.float32)), 0), 1, 0)
    return y, x.swapaxes(1, 2), inside[:, 1, :, None] * inside[:, 0, None, :]


def plane_similarity(a: np.ndarray, b: np.ndarray, overlap: np.ndarray) -> PlaneSimilarity:
    """Compare planes float32 [C, n, n] where `overlap`, of that shape, is 1 and not 0."""
    axes = (1, 2)
    area = np.maximum(overlap.sum(axis=axes, keepdims=True), 1)
    x, y = ((p - (p * overlap).sum(axis=axes, keepdims=True) / area) * overlap for p in (a, b))
    xx, yy, xy = (x * x).sum(axis=axes), (y * y).sum(axis=axes), (x * y).sum(axis=axes)
    area = area[:, 0, 0]
    return PlaneSimilarity(
        correlation=xy / np.sqrt(xx * yy + 1e-6),
        gain=xy / np.maximum(xx, 1e-6),
        strength=np.sqrt(np.minimum(xx, yy) / area),
        difference=np.sqrt((((a - b) * overlap) ** 2).sum(axis=axes) / area),
    )


def fine_detail(planes: np.ndarray) -> np.ndarray:
    """Planes float32 [C, n, n] without their broad shading."""
    broad = planes
    for _ in range(6):
        broad = blur_planes(broad)
    return planes - broad


def blur_planes(planes: np.ndarray) -> np.ndarray:
    """Planes [C, n, n] after a 3x3 binomial filter."""
    # Odd reflection goes on with a slope, so that a plain gradient has no detail at its borders.
    padded = np.pad(planes, ((0, 0), (1, 1), (1, 1)), mode="reflect", reflect_type="odd")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    return np.asarray((rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4)


def halve_planes(planes: np.ndarray) -> np.ndarray:
    """Planes [C, n, n] at half size: means of 2x2 pixels."""
    count, size, _ = planes.shape
    return np.asarray(planes.reshape(count, size // 2, 2, size // 2, 2).mean(axis=(2, 4)))
