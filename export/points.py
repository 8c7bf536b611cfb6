"""The point of the frontier that a bundle's members run at: some of them, their stacker, precisions, a cascade.

It lies in the bundle as point.json, and holds for the members and the stack that it was chosen for. No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble import artifacts
from ensemble.cascade import Cascade
from ensemble.errors import ArtifactError, UnavailableError, some
from ensemble.metrics import Interval
from ensemble.names import is_member_name
from ensemble.stack import Stacker
from export import bundle
from export.setting import named

FILE = bundle.POINT


@dataclass(frozen=True)
class Chosen:
    """A point of the frontier.

    precisions: members that may run below fp32 in this stack, by "runtime precision".
    images_per_second: predicted where it was chosen, on `machine`, to reach `budget`. auroc, and
    lost, the full stack's minus it, with 95 % intervals: on held-out rows that it was not chosen
    on. made_from: a hash of the members and the full stack, as `identity` gives it.
    """

    stacker: Stacker
    precisions: Mapping[str, tuple[str, ...]]
    cascade: Cascade | None
    budget: float
    images_per_second: float
    auroc: Interval
    lost: Interval
    machine: str
    made_from: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            **vars(self),
            "stacker": self.stacker.to_dict(),
            "precisions": {key: list(names) for key, names in self.precisions.items()},
            "cascade": self.cascade and self.cascade.to_dict(),
            "auroc": self.auroc.to_dict(),
            "lost": self.lost.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Chosen":
        """The point from `to_dict`'s values; KeyError, TypeError, ValueError or ArtifactError for others."""
        cascade = values["cascade"]
        return cls(
            Stacker.from_dict(values["stacker"]),
            {str(named(key)): tuple(names) for key, names in values["precisions"].items()},
            None if cascade is None else Cascade.from_dict(cascade),
            float(values["budget"]),
            float(values["images_per_second"]),
            _interval(values["auroc"]),
            _interval(values["lost"]),
            str(values["machine"]),
            str(values["made_from"]),
        )


def read(folder: Path, values: Mapping[str, Any]) -> Chosen | None:
    """The point of a bundle, whose bundle.json holds `values`; None if it has none.

    ArtifactError for one that was not chosen for this bundle, and for one that no frontier writes.
    """
    if FILE not in values["files"]:
        return None
    path = folder / FILE
    remedy = f"choose another: python cli.py frontier --bundle {folder} --budget N, or --reset to run all members"
    try:
        chosen = Chosen.from_dict(artifacts.read_json(path, remedy))
        _check(chosen)
    except (ArtifactError, UnavailableError, AttributeError, KeyError, TypeError, ValueError):
        raise ArtifactError(f"{path} is damaged; {remedy}") from None
    known = {*values["members"], *(n for n in chosen.stacker.members if bundle.external_file(n) in values["files"])}
    if strange := set(chosen.stacker.members) - known:
        raise ArtifactError(f"{path} names members that the bundle lacks ({some(sorted(strange))}); {remedy}")
    if chosen.made_from != identity(folder, values["members"], values["files"]):
        raise ArtifactError(f"{path} was chosen for other members or another stack; {remedy}")
    return chosen


def write(folder: Path, chosen: Chosen) -> None:
    """Put the point into a bundle, in place of an older one; a kill leaves the bundle without any."""
    remove(folder)
    artifacts.write_json(folder / FILE, chosen.to_dict())
    values = bundle.contents(folder)
    bundle.write_contents(folder, {**values, "files": {**values["files"], FILE: artifacts.file_sha256(folder / FILE)}})


def remove(folder: Path) -> bool:
    """Take the point out of a bundle: all members run. Whether there was one."""
    values = bundle.contents(folder)
    if FILE not in values["files"]:
        return False
    bundle.write_contents(folder, {**values, "files": {k: v for k, v in values["files"].items() if k != FILE}})
    (folder / FILE).unlink(missing_ok=True)
    return True


def identity(folder: Path, entries: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    """A hash of the fp32 files, their contracts and the stacker, but for the shift that `adapt` stores beside it.

    entries and hashes: of bundle.json; the folder holds stacker.json.
    """
    stacker = artifacts.read_json(folder / "stacker.json", bundle.REMEDY)
    stacker.pop("adapted", None)
    files = [[name, hashes[entry["file"]], entry["contract"]] for name, entry in entries.items()]
    return artifacts.json_sha256([files, stacker])


def allowed(chosen: Chosen, values: Mapping[str, Any]) -> dict[tuple[str, str], frozenset[str]]:
    """As `bundle.may_run`, for the point's stack: a precision that the bundle has since withdrawn from one member
    is withdrawn from all, since their stack was certified together.
    """
    may = bundle.may_run(values)
    found = {}
    for key, names in chosen.precisions.items():
        setting = named(key)
        pair = (setting.runtime, setting.precision)
        if set(names) <= may.get(pair, frozenset()):
            found[pair] = frozenset(names)
    return found


def told(chosen: Chosen, total: int) -> str:
    """What runs, of how many members, and how to run all, in one line."""
    count, tolerance = len(chosen.stacker.members), chosen.cascade and chosen.cascade.tolerance
    cascade = f" in a cascade of tolerance {tolerance:g}" if tolerance else ""
    return f"{count} of {total} members{cascade}, as frontier chose for {chosen.budget:g} images/s; --full runs all"


def _interval(values: Mapping[str, Any]) -> Interval:
    return Interval(*(np.nan if values[end] is None else float(values[end]) for end in ("value", "low", "high")))


def _check(chosen: Chosen) -> None:
    """ValueError where its parts do not fit together: a digest proves nothing of who wrote it."""
    members, cascade = chosen.stacker.members, chosen.cascade
    sound = len(set(members)) == len(members) and all(map(is_member_name, members)) and chosen.budget > 0
    if cascade:
        numbers = [number for step in cascade.steps for number in (*step.coef, step.intercept, *cascade.milliseconds)]
        limits = [limit for step in cascade.steps for limit in (step.low, step.high)]
        sound = (
            sound
            and sorted(cascade.order) == sorted(members)
            and [len(step.coef) for step in cascade.steps] == list(range(1, len(members)))
            and 0 < cascade.tolerance < 0.5
            and bool(np.isfinite(numbers).all())
            and not np.isnan(limits).any()
        )
    if not sound:
        raise ValueError
