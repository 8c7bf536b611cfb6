"""The preprocessing of a member as plain data: how a decoded image becomes its pixels.

It is read from the checkpoint, overridden by the recipe, stored in member.json and bundle.json, and executed by
`preprocess.to_pixels` and `prepare` alone.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

GEOMETRIES = ("squash", "center_crop", "native_crops")
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
CROP_COUNTS = (1, 4, 5, 9, 16)
LARGEST = 4096  # pixels: beyond every network there is, and 50 MB an image


@dataclass(frozen=True)
class PreprocessConfig:
    """How one member sees an image.

    size: side of the square input, in pixels.
    geometry: `squash` resizes to size x size; `center_crop` resizes the shorter side to
        size / crop_pct and cuts the centre; `native_crops` cuts `count` squares without resizing.
    filter: the resampling filter of the resize, by its Pillow name.
    mean, std: per channel, for pixels scaled to [0, 1]; applied inside the model's graph.
    background: RGB in 0..255 on which transparent images are laid.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    geometry: str = "squash"
    filter: str = "bicubic"
    crop_pct: float = 1.0
    count: int = 1
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        problems = self._wrong_types()
        if problems:
            raise ValueError("; ".join(problems))
        if not 1 <= self.size <= LARGEST:
            problems.append(f"size must be 1 to {LARGEST}, not {self.size}")
        if self.geometry not in GEOMETRIES:
            problems.append(f"geometry must be one of {', '.join(GEOMETRIES)}, not {self.geometry!r}")
        if self.filter not in FILTERS:
            problems.append(f"filter must be one of {', '.join(FILTERS)}, not {self.filter!r}")
        if not 0 < self.crop_pct <= 1:
            problems.append(f"crop_pct must be in (0, 1], not {self.crop_pct}")
        elif self.size > LARGEST * self.crop_pct:
            problems.append(f"size / crop_pct must be {LARGEST} at most")
        if self.count not in CROP_COUNTS:
            problems.append(f"count must be one of {CROP_COUNTS}, not {self.count}")
        if self.count != 1 and self.geometry != "native_crops":
            problems.append(f"count is for native_crops; {self.geometry} has one view")
        if min(self.std) <= 0:
            problems.append("std must be positive")
        if problems:
            raise ValueError("; ".join(problems))

    def _wrong_types(self) -> list[str]:
        """Messages for values that are no numbers, or not three of them: they are read from strangers' files."""
        problems = [
            f"{name} must be a whole number, not {value!r}"
            for name, value in (("size", self.size), ("count", self.count))
            if type(value) is not int
        ]
        if not _is_number(self.crop_pct):
            problems.append(f"crop_pct must be a number, not {self.crop_pct!r}")
        for name, fits, what in (
            ("mean", _is_number, "numbers"),
            ("std", _is_number, "numbers"),
            ("background", lambda value: type(value) is int and 0 <= value <= 255, "whole numbers in 0..255"),
        ):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) != 3 or not all(map(fits, value)):
                problems.append(f"{name} must be three {what}, not {value!r}")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PreprocessConfig":
        """From `to_dict`'s values; an unknown or missing key raises ValueError."""
        if unknown := set(values) - {field.name for field in fields(cls)}:
            raise ValueError(f"unknown keys in the preprocessing: {sorted(unknown)}")
        tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**tuples)
        except TypeError as error:
            raise ValueError(f"the preprocessing is incomplete: {error}") from None

    @property
    def short_side(self) -> int:
        """For center_crop: the shorter side after the resize, in pixels, rounded down as timm does."""
        return int(self.size / self.crop_pct + 1e-6)  # a crop_pct read from two sides must give them back

    @property
    def view(self) -> tuple[Any, ...]:
        """What decides the uint8 pixels: members with equal views can share them."""
        filter_name = None if self.geometry == "native_crops" else self.filter
        crop_pct = self.crop_pct if self.geometry == "center_crop" else None
        return (self.size, self.geometry, filter_name, crop_pct, self.count, self.background)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6  # neither NaN nor beyond float32
