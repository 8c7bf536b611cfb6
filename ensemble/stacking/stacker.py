"""The stacker: a weighted sum of member logits, calibrated, with its threshold. NumPy only; fit.py fits it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import sigmoid
from ensemble.core.names import is_member_name
from ensemble.stacking.label_shift import LabelShift

METHODS = ("logistic", "nonnegative", "mean", "best")  # the first is the default
CALIBRATIONS = ("none", "temperature", "shift")
DEFAULT_RULE = "default 0.5"


@dataclass(frozen=True)
class Calibration:
    """scale * z + shift in place of the stack's logit z; `reason` says why this kind."""

    kind: str = "none"
    scale: float = 1.0
    shift: float = 0.0
    reason: str = ""

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated logits, of the same shape."""
        return self.scale * logits + self.shift


@dataclass(frozen=True)
class Stacker:
    """target = sigmoid(calibration of (intercept + sum of coef * logit)), members in this order.

    threshold: target at or above it means ai; threshold_rule says how it was chosen.
    tta_members: those whose logit is averaged with that of the mirrored image under `infer --tta`;
    None where that was not measured.
    adapted: a shift for target images, applied only when asked.
    """

    members: tuple[str, ...]
    coef: tuple[float, ...]
    intercept: float
    threshold: float = 0.5
    method: str = METHODS[0]
    calibration: Calibration = Calibration()
    threshold_rule: str = DEFAULT_RULE
    tta_members: tuple[str, ...] | None = None
    adapted: LabelShift | None = None

    def logit(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated, float64 [N], from member logits [N, members]."""
        return self.calibration.apply(self.raw_logit(logits))

    def raw_logit(self, logits: np.ndarray) -> np.ndarray:
        """Before calibration, float64 [N], from member logits [N, members]."""
        return weighted_sum(logits, self.coef, self.intercept)

    def target(self, logits: np.ndarray, adapted: bool = False) -> np.ndarray:
        """Calibrated P(ai), float64 [N], from member logits [N, members]; `adapted` adds the stored shift."""
        return self.target_of(self.logit(logits), adapted)

    def target_of(self, logit: np.ndarray, adapted: bool = False) -> np.ndarray:
        """P(ai), float64 [N], from calibrated stack logits [N]; `adapted` adds the stored shift."""
        return sigmoid(logit + (self.adaptation().shift if adapted else 0.0))

    def adaptation(self) -> LabelShift:
        """The stored shift; ArtifactError if there is none."""
        if self.adapted is None:
            raise ArtifactError(
                "this stack is not adapted to target images; run: python cli.py adapt --images DIR, with the same --run"
            )
        return self.adapted

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "members": list(self.members),
            "kind": self.method,
            "coef": list(self.coef),
            "intercept": self.intercept,
            "calibration": asdict(self.calibration),
            "threshold": self.threshold,
            "threshold_rule": self.threshold_rule,
            "flips": None if self.tta_members is None else list(self.tta_members),
            **({"adapted": asdict(self.adapted)} if self.adapted else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Stacker":
        """The stacker from `to_dict`'s values, or ArtifactError; what older files lack takes its default."""
        try:
            flips, calibration = values.get("flips"), values["calibration"]
            stacker = cls(
                _names(values["members"]),
                tuple(float(c) for c in values["coef"]),
                float(values["intercept"]),
                float(values["threshold"]),
                str(values.get("kind", METHODS[0])),
                Calibration(
                    str(calibration["kind"]),
                    float(calibration.get("scale", 1)),
                    float(calibration.get("shift", 0)),
                    str(calibration.get("reason", "")),
                ),
                str(values.get("threshold_rule", DEFAULT_RULE)),
                None if flips is None else _names(flips),
                LabelShift.from_dict(values["adapted"]) if "adapted" in values else None,
            )
            problem = _problem(stacker)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"stacker.json is damaged ({error!r}); run stack again") from None
        if problem:
            raise ArtifactError(f"stacker.json is damaged ({problem}); run stack again")
        return stacker


def weighted_sum(logits: np.ndarray, coef: Sequence[float], intercept: float) -> np.ndarray:
    """intercept + sum of coef * logit, float64 [N], over the first columns of logits [N, members]."""
    # summed member by member: the same sum for one row as for a thousand
    total = np.full(len(logits), intercept, dtype=np.float64)
    for column, weight in enumerate(coef):
        total += weight * np.asarray(logits[:, column], dtype=np.float64)
    return total


def _names(values: Any) -> tuple[str, ...]:
    """Different names that members may have, or ValueError."""
    if not isinstance(values, list) or not all(isinstance(name, str) and is_member_name(name) for name in values):
        raise ValueError("names of members")
    if len(set(values)) < len(values):
        raise ValueError("a member twice")
    return tuple(values)


def _problem(stacker: Stacker) -> str:
    """What cannot be true of a stacker that was written whole; empty if nothing."""
    calibration = stacker.calibration
    numbers: Sequence[float] = [*stacker.coef, stacker.intercept, calibration.scale, calibration.shift]
    if not 0 < len(stacker.members) == len(stacker.coef) or not np.isfinite(numbers).all():
        return "coefficients"
    if stacker.method not in METHODS or calibration.kind not in CALIBRATIONS or calibration.scale <= 0:
        return "kind or calibration"
    if not 0 <= stacker.threshold <= 1:
        return "threshold"
    return "flips" if set(stacker.tta_members or ()) - set(stacker.members) else ""
