"""The exported file against the member it was made from, on real images."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ensemble.errors import ArtifactError
from ensemble.score import Runner

TOLERANCE = 1e-3  # largest difference of a logit, fp32
BATCH_SIZES = (1, 2, 7)
IMAGES = 14  # two batches of seven


def certify(
    original: Runner,
    exported: Runner,
    pixels: np.ndarray,
    tolerance: float = TOLERANCE,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> dict[str, Any]:
    """Compare logits of the same pixels, uint8 [N, S, S, 3], at several batch sizes.

    Returns what goes into certificate.json; raises ArtifactError where any logit is not
    finite or differs by more than `tolerance`.
    """
    expected = original.run(pixels).astype(np.float64)
    differences = {}
    for size in batch_sizes:
        parts = [exported.run(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        differences[size] = np.abs(np.concatenate(parts).astype(np.float64) - expected)
    largest = {size: float(difference.max()) for size, difference in differences.items()}
    # written so that NaN fails too
    if not all(value <= tolerance for value in largest.values()):
        seen = ", ".join(f"{value:.2g} at batch {size}" for size, value in largest.items())
        raise ArtifactError(
            f"{exported.name}: the exported file's logits differ from the member's by {seen} "
            f"(tolerance {tolerance:g}); it was not kept"
        )
    return {
        "images": len(pixels),
        "batch_sizes": list(batch_sizes),
        "max_abs_difference": max(largest.values()),
        "mean_abs_difference": float(np.mean(list(differences.values()))),
        "tolerance": tolerance,
    }
