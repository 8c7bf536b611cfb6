"""One shift of the stack's logit for target images whose share of ai is another than the stacker was fitted on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from ensemble.core.bootstrap import percentile_interval
from ensemble.core.errors import ArtifactError, DataError
from ensemble.core.metrics import Interval, sigmoid

MIN_IMAGES = 10  # images
BISECTION_STEPS = 35  # of the interval that holds the estimate


@dataclass(frozen=True)
class LabelShift:
    """What is added to the stack's calibrated logit, and what it was estimated on.

    prior: share of ai among those images, estimated or, where estimator is "share", given.
    data: the folder or CSV, as the user wrote it. names: SHA-256 of its images' file names.
    """

    shift: float
    prior: float
    images: int
    data: str
    estimator: str = "em"
    names: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LabelShift":
        """The shift from the values of its fields, or ArtifactError."""
        try:
            shift = cls(
                float(values["shift"]),
                float(values["prior"]),
                int(values["images"]),
                str(values["data"]),
                str(values["estimator"]),
                str(values["names"]),
            )
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"stacker.json is damaged (adapted: {error!r}); run adapt again") from None
        if not np.isfinite([shift.shift, shift.prior]).all():
            raise ArtifactError("stacker.json is damaged (adapted); run adapt again")
        return shift


@dataclass(frozen=True)
class ShiftEstimate:
    """A shift and the share of ai, each with its 95 % interval over images; at_edge: the share is as good as 0 or 1."""

    shift: Interval
    prior: Interval
    at_edge: bool


def estimate_prior(logits: np.ndarray, fitted_prior: float) -> float:
    """The share of ai under which calibrated logits, float [N], are likeliest.

    fitted_prior: the share of ai in what the logits were calibrated on. The maximum that the
    EM of Saerens, Latinne and Decaestecker climbs to ("Adjusting the Outputs of a Classifier
    to New a Priori Probabilities", 2002); the likelihood is concave, so halving its slope's
    interval finds it sooner, and exactly at the edges. It assumes that only the share
    changed: images of each class score as they did in the fitted rows.
    """
    p = sigmoid(logits)
    ai, real = p / fitted_prior, (1 - p) / (1 - fitted_prior)
    low, high = 0.0, 1.0
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        rising = np.sum((ai - real) / (middle * ai + (1 - middle) * real)) > 0
        low, high = (middle, high) if rising else (low, middle)
    # Laplace's rule: of N images none can show a share beyond these
    return float(np.clip((low + high) / 2, 1 / (len(p) + 2), (len(p) + 1) / (len(p) + 2)))


def shift_to_prior(logits: np.ndarray, share: float) -> float:
    """The shift after which the mean P(ai) of logits, float [N], is `share`."""
    edge = float(np.abs(logits).max()) + abs(log_odds(share)) + 1
    low, high = -edge, edge
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(logits + middle).mean() < share else (low, middle)
    return (low + high) / 2


def estimate_shift(
    logits: np.ndarray, fitted_prior: float, share: float | None = None, resamples: int = 500, seed: int = 0
) -> ShiftEstimate:
    """The shift for calibrated stack logits, float [N], of unlabelled images, with bootstrap intervals.

    share: of ai among them, where it is known; else it is estimated. DataError for fewer than MIN_IMAGES, and for NaN.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if len(logits) < MIN_IMAGES:
        raise DataError(f"{len(logits)} readable images are too few to estimate a shift; give {MIN_IMAGES} or more")
    if not np.isfinite(logits).all():
        raise DataError("a member gave no finite logit for images it could read; train it again")
    rng = np.random.default_rng(seed)
    drawn = [logits[rng.integers(len(logits), size=len(logits))] for _ in range(resamples)]
    if share is not None:
        shift = percentile_interval(
            shift_to_prior(logits, share), np.array([shift_to_prior(draw, share) for draw in drawn])
        )
        return ShiftEstimate(shift, Interval(share, share, share), at_edge=False)
    shares = np.array([estimate_prior(draw, fitted_prior) for draw in drawn])
    prior = percentile_interval(estimate_prior(logits, fitted_prior), shares)
    shift = Interval(*(log_odds(value) - log_odds(fitted_prior) for value in (prior.value, prior.low, prior.high)))
    return ShiftEstimate(shift, prior, at_edge=not 1 < prior.value * (len(logits) + 2) < len(logits) + 1)


def log_odds(share: float) -> float:
    """The logit of a share in (0, 1)."""
    return float(np.log(share) - np.log1p(-share))


def names_sha256(names: Iterable[str]) -> str:
    """SHA-256 of file names in any order, in hex: the sum of each name's, so that none need be held."""
    hashes = (sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names)
    return f"{sum(int.from_bytes(digest) for digest in hashes) % 2**256:064x}"
