"""What should be said of a fitted stack, in words."""

import numpy as np

from ensemble.stack_run import Stacked
from ensemble.stack_table import Scored, signed
from ensemble.weights import COLLINEAR, DRAWS, near_collinear


def weights(done: Stacked) -> dict[str, str]:
    """Each member's weight as text, with its interval where it was estimated."""
    if done.weights is None:
        found = [f"{weight:+.4f}" for weight in done.stacker.coef]
    else:
        found = [signed(weight) for weight in done.weights]
    return dict(zip(done.stacker.members, found, strict=True))


def notes(done: Stacked) -> list[str]:
    """A better kind, twins among the members, calibration, threshold, and flips."""
    return [*_kind(done), *_weights(done), *_calibration(done), _threshold(done), *_flips(done)]


def _kind(done: Stacked) -> list[str]:
    better = [line for line in done.kinds if line.auroc_difference is not None and line.auroc_difference.low > 0]
    if not better:
        return []
    best = max(better, key=lambda line: line.auroc.value)
    return [f"{best.name} is clearly better than {done.stacker.kind} on these rows; take it with --kind {best.name}."]


def _weights(done: Stacked) -> list[str]:
    lines = []
    if done.weights is not None:
        lines.append(f"Weights: intervals from {DRAWS} draws of groups at the chosen penalty.")
    for one, other, correlation in near_collinear(done.material.names, done.material.fitting.logits):
        lines.append(
            f"{one} and {other} say nearly the same (correlation {correlation:.3f}, above {COLLINEAR}): "
            "their weights mean little apart, and one may do."
        )
    return lines


def _calibration(done: Stacked) -> list[str]:
    found = done.stacker.calibration
    if found.kind == "none":
        return [f"Calibration: none ({found.reason}); ECE {done.ece[0]:.4f}."]
    number = f"scale {found.scale:.3f}" if found.kind == "temperature" else f"shift {found.shift:+.3f}"
    return [
        f"Calibration: {found.kind}, {number} ({found.reason}); ECE {done.ece[0]:.4f} before, {done.ece[1]:.4f} after."
    ]


def _threshold(done: Stacked) -> str:
    stacker, labels = done.stacker, done.material.scored.labels
    called = done.stack_targets >= stacker.threshold
    return (
        f"Threshold: {stacker.threshold:.4f} ({stacker.threshold_rule}); on these rows it calls "
        f"{np.mean(called[labels == 1]):.1%} of ai and {np.mean(called[labels == 0]):.1%} of real images ai."
    )


def _flips(done: Stacked) -> list[str]:
    if done.flipped is None:
        return []
    lines = ["Averaging over mirrored images, change of log-loss (infer --tta does it where it helps):"]
    helped = done.stacker.flips or ()
    return lines + [_flip(line, line.name in helped) for line in done.flipped]


def _flip(line: Scored, helps: bool) -> str:
    return f"  {line.name}: {signed(line.log_loss_difference)}, {'helps' if helps else 'does not help beyond noise'}"
