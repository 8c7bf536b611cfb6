"""The stacker: a weighted sum of the members' calibrated probabilities, calibrated again, with its threshold.

NumPy only; fit.py fits it. Runs and bundles of before hold stackers of format version 1, which sum the members' logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import sigmoid
from ensemble.core.names import is_member_name
from ensemble.stacking.label_shift import LabelShift

METHODS = ("logistic", "logit", "nonnegative", "mean", "best")  # the first is the default
LOGIT_METHODS = ("logit", "best")  # methods whose weights apply to logits
# what fits a stack anew as a stacker of format version 1 was fitted: all of its methods sum logits
METHODS_OF_VERSION_1 = {
    "logistic": "logit",
    "nonnegative": "logit-nonnegative",
    "mean": "logit-mean",
    "best": "logit-best",
}
INPUTS = ("logit", "probability")
FORMAT_VERSIONS = (1, 2)  # of stacker.json
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
class MemberCalibration:
    """A member's calibrated probability is sigmoid(scale * logit + shift), scale >= 0.

    missing: the logit that stands for the member where it gave no answer; there its calibrated probability is the mean
    of those of the fitting rows.
    """

    scale: float
    shift: float
    missing: float


@dataclass(frozen=True)
class Stacker:
    """target = sigmoid(calibration of (intercept + sum of coef * part)), members in this order.

    A member's part is its calibrated probability; its logit for LOGIT_METHODS and in format version 1.
    threshold: target at or above it means ai; threshold_rule says how it was chosen.
    tta_members: those whose logit is averaged with that of the mirrored image under `infer --tta`;
    None where that was not measured.
    adapted: a shift for target images, applied only when asked.
    member_calibrations: one of each member; none in format version 1.
    inputs: whether it was fitted on a table of logits or of probabilities.
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
    member_calibrations: tuple[MemberCalibration, ...] = ()
    inputs: str = INPUTS[0]

    @property
    def format_version(self) -> int:
        """1 without calibrated members, as files of before; else 2."""
        return 2 if self.member_calibrations else 1

    @property
    def refit_method(self) -> str:
        """The method of fit.py by which the same kind of stack is fitted on other rows or members."""
        return self.method if self.member_calibrations else METHODS_OF_VERSION_1[self.method]

    @property
    def bounded(self) -> bool:
        """Whether each member's part lies in 0..1."""
        return bool(self.member_calibrations) and self.method not in LOGIT_METHODS

    def parts(self, logits: np.ndarray, members: Sequence[str] | None = None) -> np.ndarray:
        """What each member adds per unit of its weight, float64 [N, members]: its calibrated probability or logit.

        members: those of the columns, by default the stacker's.
        """
        if not self.bounded:
            return np.asarray(logits, dtype=np.float64)
        by_name = dict(zip(self.members, self.member_calibrations, strict=False))
        chosen = self.member_calibrations if members is None else [by_name[name] for name in members]
        return calibrated_probabilities(logits, chosen)

    def contributions(self, logits: np.ndarray) -> np.ndarray:
        """What each member adds to the raw logit, beside the intercept: float64 [N, members]."""
        return np.array(self.coef) * self.parts(logits)

    def fill_missing(self, logits: np.ndarray) -> np.ndarray:
        """Logits [N, members] with each NaN replaced by what stands for the member; rows without any stay NaN."""
        if not self.member_calibrations:
            return logits
        missing = np.isnan(logits)
        return np.where(
            missing & ~missing.all(axis=1, keepdims=True), [one.missing for one in self.member_calibrations], logits
        )

    def mean_logit(self, logits: np.ndarray) -> np.ndarray:
        """The logit float64 [N] of the members' mean calibrated probability; in format version 1 their mean logit."""
        if not self.member_calibrations:
            return np.asarray(logits, dtype=np.float64).mean(axis=1)
        p = calibrated_probabilities(logits, self.member_calibrations).mean(axis=1)
        return np.log(p) - np.log1p(-p)

    def logit(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated, float64 [N], from member logits [N, members]."""
        return self.calibration.apply(self.raw_logit(logits))

    def raw_logit(self, logits: np.ndarray) -> np.ndarray:
        """Before calibration, float64 [N], from member logits [N, members]."""
        return weighted_sum(self.parts(logits), self.coef, self.intercept)

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
        """JSON-ready values. Those of format version 1 are as they were, since hashes of them are compared."""
        calibrated = {
            "format_version": 2,
            "inputs": self.inputs,
            "member_calibrations": [asdict(one) for one in self.member_calibrations],
        }
        return {
            **(calibrated if self.member_calibrations else {}),
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
            version = values.get("format_version", 1)
            if version not in FORMAT_VERSIONS:
                raise ArtifactError("stacker.json was written by another version of manyeyes; run stack again")
            member_calibrations = values["member_calibrations"] if version == 2 else []
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
                tuple(
                    MemberCalibration(float(one["scale"]), float(one["shift"]), float(one["missing"]))
                    for one in member_calibrations
                ),
                str(values["inputs"]) if version == 2 else INPUTS[0],
            )
            problem = _problem(stacker, version)
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


def read_stacker_values(path: Path, missing: str) -> dict[str, Any]:
    """What a stacker.json of either format version holds; ArtifactError if it is not there or damaged."""
    return artifacts.read_json(path, missing, FORMAT_VERSIONS)


def calibrated_probabilities(logits: np.ndarray, calibrations: Sequence[MemberCalibration]) -> np.ndarray:
    """sigmoid(scale * logit + shift), float64 [N, members], from logits [N, members]; NaN stays NaN."""
    scale, shift = np.reshape([(one.scale, one.shift) for one in calibrations], (-1, 2)).T
    return sigmoid(np.asarray(logits, dtype=np.float64) * scale + shift)


def _names(values: Any) -> tuple[str, ...]:
    """Different names that members may have, or ValueError."""
    if not isinstance(values, list) or not all(isinstance(name, str) and is_member_name(name) for name in values):
        raise ValueError("names of members")
    if len(set(values)) < len(values):
        raise ValueError("a member twice")
    return tuple(values)


def _problem(stacker: Stacker, version: int) -> str:
    """What cannot be true of a stacker that was written whole; empty if nothing."""
    calibration = stacker.calibration
    numbers: Sequence[float] = [*stacker.coef, stacker.intercept, calibration.scale, calibration.shift]
    if not 0 < len(stacker.members) == len(stacker.coef) or not np.isfinite(numbers).all():
        return "coefficients"
    methods = METHODS if version == 2 else METHODS_OF_VERSION_1
    if stacker.method not in methods or calibration.kind not in CALIBRATIONS or calibration.scale <= 0:
        return "kind or calibration"
    if not 0 <= stacker.threshold <= 1:
        return "threshold"
    if version == 2 and (
        len(stacker.member_calibrations) != len(stacker.members)
        or not np.isfinite([(one.scale, one.shift, one.missing) for one in stacker.member_calibrations]).all()
        or any(one.scale < 0 for one in stacker.member_calibrations)
        or stacker.inputs not in INPUTS
    ):
        return "member_calibrations or inputs"
    return "flips" if set(stacker.tta_members or ()) - set(stacker.members) else ""
