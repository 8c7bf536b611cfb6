"""A bundle's cascade: fitted on the rows that the bundle holds, for what its members cost on this machine."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ensemble.stacking.cascade import Cascade
from ensemble.stacking.cascade_fit import check_rows, drawn, fit_cascade
from ensemble.stacking.stacker import Stacker
from export.bundle.heldout_rows import read_rows


def fit_bundle(
    folder: Path, stacker: Stacker, seconds: Mapping[str, float], tolerance: float, say: Callable[[str], object]
) -> Cascade:
    """The cascade for members that take these seconds an image; those that are not named are looked up, for nothing."""
    milliseconds = {name: 1000 * seconds.get(name, 0.0) for name in stacker.members}
    rows = read_rows(folder, stacker.members)
    check_rows(rows)
    say(f"Fitting the cascade on {len(drawn(rows).labels):,} held-out images")
    return fit_cascade(stacker, rows, milliseconds, tolerance)


def told(cascade: Cascade) -> list[str]:
    """What to expect of it, in lines."""
    report = cascade.report
    full, less = report.milliseconds
    steps = [
        f"  {name}: {cost:.2f} ms an image, {share:.1%} leave"
        for name, cost, share in zip(cascade.order, cascade.milliseconds, report.shares, strict=True)
    ]
    lines = [
        f"Cascade, from cheap to dear, to lose at most {cascade.tolerance:g} of AUROC:",
        *steps,
        f"  Expected: members take {less:.2f} ms an image in place of {full:.2f}, {full / less:.1f} times as fast"
        if less
        else "  Expected: no member has to run",
        f"  On {report.rows:,} images of {report.groups:,} groups, by limits fitted on other groups: AUROC "
        f"{report.auroc[1]:.4f} in place of {report.auroc[0]:.4f}, lost {report.loss}; "
        f"{report.flips:.1%} change sides at the threshold",
    ]
    if report.loss.value > cascade.tolerance:
        lines.append("  It lost more than allowed on these images, which are too few to be sure.")
    elif report.loss.high > cascade.tolerance:
        lines.append(f"  These images are too few to show that no more than {cascade.tolerance:g} is lost.")
    return lines


def seen(cascade: Cascade, counts: Sequence[int] | np.ndarray) -> str:
    """How many of the images that were scored left after each member, in one line."""
    total = max(int(np.sum(counts)), 1)
    shares = ", ".join(f"{count / total:.1%} after {name}" for name, count in zip(cascade.order, counts, strict=True))
    return f"Left the cascade: {shares}"
