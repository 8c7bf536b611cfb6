"""The operating point that `frontier --budget` chose for a bundle: members, their stacker, precisions, a cascade.

It is stored in the bundle as point.json, and is valid for the members and the stack that it was chosen for. No torch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.cascade.cascade import Cascade, CascadeReport
from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, ManyeyesError, join_limited
from ensemble.core.log import Log
from ensemble.core.metrics import Interval
from ensemble.core.names import is_member_name
from ensemble.stacking.stacker import Stacker, read_stacker_values
from export.bundle import bundle
from export.bundle.bundle import POINT_FILE
from export.runtimes import devices
from export.runtimes.settings import ON_CPU, ON_GPU, parse_config

RECHOOSE_HINT = "choose again: python cli.py frontier --budget N"


@dataclass(frozen=True)
class CertifiedFiles:
    """Members that may run below fp32 in a point's stack. files: SHA-256 of each member's certified file. by: versions
    of the libraries that ran them.
    """

    by: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class OperatingPoint:
    """A point of the frontier.

    runtime: the --runtime of frontier. precisions: which members may run below fp32, by "runtime precision".
    images_per_second: predicted on `machine`, where it was chosen to reach `budget`. lost: AUROC of the full
    stack minus AUROC of the point, with a 95 % interval, on rows that it was not chosen on. made_from: a
    hash of the members and the full stack, as `identity` gives it.
    """

    stacker: Stacker
    runtime: str
    precisions: Mapping[str, CertifiedFiles]
    cascade: Cascade | None
    budget: float
    images_per_second: float
    lost: Interval
    machine: str
    made_from: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            **vars(self),
            "stacker": self.stacker.to_dict(),
            "precisions": {key: asdict(certified) for key, certified in self.precisions.items()},
            "cascade": self.cascade and self.cascade.to_dict(),
            "lost": self.lost.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OperatingPoint":
        """The point from `to_dict`'s values; KeyError, TypeError, ValueError or ArtifactError for others."""
        cascade = values["cascade"]
        return cls(
            Stacker.from_dict(values["stacker"]),
            values["runtime"],
            {str(parse_config(key)): CertifiedFiles(**certified) for key, certified in values["precisions"].items()},
            None if cascade is None else Cascade.from_dict(cascade),
            float(values["budget"]),
            float(values["images_per_second"]),
            Interval.from_dict(values["lost"]),
            str(values["machine"]),
            str(values["made_from"]),
        )


def read(folder: Path, values: Mapping[str, Any]) -> OperatingPoint | None:
    """The point of a bundle, whose bundle.json holds `values`; None if it has none.

    ArtifactError for a damaged one, and for one that was chosen for another bundle.
    """
    if POINT_FILE not in values["files"]:
        return None
    path = folder / POINT_FILE
    remedy = f"choose another: python cli.py frontier --bundle {folder} --budget N, or --reset to run all members"
    try:
        chosen = OperatingPoint.from_dict(artifacts.read_json(path, remedy))
        if not _is_valid(chosen):
            raise ValueError(POINT_FILE)
    except (ManyeyesError, AttributeError, KeyError, TypeError, ValueError, ArithmeticError, RecursionError):
        raise ArtifactError(f"{path} is damaged; {remedy}") from None
    known = {*values["members"], *(n for n in chosen.stacker.members if bundle.external_file(n) in values["files"])}
    if unknown := set(chosen.stacker.members) - known:
        raise ArtifactError(f"{path} names members that the bundle lacks ({join_limited(sorted(unknown))}); {remedy}")
    if chosen.made_from != identity(folder, values["members"], values["files"]):
        raise ArtifactError(f"{path} was chosen for other members or another stack; {remedy}")
    return chosen


def write(folder: Path, chosen: OperatingPoint) -> None:
    """Write the point into a bundle in place of an older one; a kill in between leaves the bundle without a point."""
    remove(folder)
    artifacts.write_json(folder / POINT_FILE, chosen.to_dict())
    values = bundle.read_contents(folder)
    bundle.write_contents(
        folder, {**values, "files": {**values["files"], POINT_FILE: artifacts.file_sha256(folder / POINT_FILE)}}
    )


def remove(folder: Path) -> bool:
    """Remove the point from a bundle, so that all members run; returns whether there was one."""
    values = bundle.read_contents(folder)
    if POINT_FILE not in values["files"]:
        return False
    bundle.write_contents(folder, {**values, "files": {k: v for k, v in values["files"].items() if k != POINT_FILE}})
    (folder / POINT_FILE).unlink(missing_ok=True)
    return True


def identity(folder: Path, entries: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    """A hash of the fp32 files, their preprocessing and the stacker, without the shift that `adapt` stores in it.

    entries and hashes: of bundle.json; the folder holds stacker.json.
    """
    stacker = read_stacker_values(folder / "stacker.json", bundle.REMEDY)
    stacker.pop("adapted", None)
    files = [[name, hashes[entry["file"]], entry["contract"]] for name, entry in entries.items()]
    return artifacts.json_sha256([files, stacker])


def certified_precisions(
    chosen: OperatingPoint, values: Mapping[str, Any], pairs: Collection[tuple[str, str]], log: Log
) -> dict[tuple[str, str], frozenset[str]]:
    """As `bundle.certified_precisions`, for the point's stack at some pairs; what no longer holds is logged.

    Its members were certified together: where the bundle no longer allows a precision for one of
    them, or has another file for it, all of them run at fp32.
    """
    allowed, valid = bundle.certified_precisions(values), {}
    for key, certified in chosen.precisions.items():
        config = parse_config(key)
        pair = (config.runtime, config.precision)
        if pair not in pairs:
            continue
        if set(certified.files) <= allowed.get(pair, frozenset()) and all(
            bundle.has_model_file(entry := values["members"][name], config)
            and values["files"][bundle.model_file(entry, config)] == digest
            for name, digest in certified.files.items()
        ):
            valid[pair] = frozenset(certified.files)
            if certified.by != devices.version(config.runtime):
                log(f"Still allowed, though certified with other versions of libraries than those here: {key}")
        else:
            log(
                f"What frontier chose for {key} runs at fp32: its files or what the bundle allows have changed; "
                f"{RECHOOSE_HINT}"
            )
    return valid


def describe(chosen: OperatingPoint, total: int) -> str:
    """One line of text: the members that run of `total`, speed and loss, and how to run all."""
    count, tolerance = len(chosen.stacker.members), chosen.cascade and chosen.cascade.tolerance
    cascade = f" in a cascade of tolerance {tolerance:g}" if tolerance else ""
    return (
        f"{count} of {total} members{cascade}, as frontier chose for {chosen.budget:g} images/s "
        f"({chosen.images_per_second:.1f} predicted on {chosen.machine}; AUROC lost against all: {chosen.lost}); "
        "--full runs all"
    )


def _is_valid(chosen: OperatingPoint) -> bool:
    """Whether all parts fit together and can be run and printed: a digest does not prove who wrote the file.

    TypeError or ValueError where a number is none.
    """
    members, cascade = chosen.stacker.members, chosen.cascade
    return (
        len(set(members)) == len(members)
        and all(map(is_member_name, members))
        and chosen.runtime in ("auto", *ON_CPU, *ON_GPU)
        and chosen.budget > 0
        and chosen.images_per_second > 0
        and chosen.machine.isprintable()
        and all(set(dict(certified.files)) <= set(members) for certified in chosen.precisions.values())
        and (cascade is None or (_is_cascade_of(cascade, members) and _is_report_of(cascade.report, len(members))))
    )


def _is_cascade_of(cascade: Cascade, members: Sequence[str]) -> bool:
    """Whether it has a step for each of these members but the last, with finite coefficients."""
    limits = [limit for step in cascade.steps for limit in (step.low, step.high)]
    return (
        sorted(cascade.order) == sorted(members)
        and [len(step.coef) for step in cascade.steps] == list(range(1, len(members)))
        and all(np.isfinite([*step.coef, step.intercept]).all() for step in cascade.steps)
        and not np.isnan(limits).any()
        and len(cascade.milliseconds) == len(members)
        and _not_negative(cascade.milliseconds)
        and 0 < cascade.tolerance < 0.5
    )


def _is_report_of(report: CascadeReport, members: int) -> bool:
    """Whether a cascade's report is of this number of members, with numbers that can be printed."""
    loss = report.loss
    return (
        all(type(count) is int and count > 0 for count in (report.rows, report.groups))
        and [len(each) for each in (report.auroc, report.shares, report.milliseconds)] == [2, members, 2]
        and _not_negative([*report.auroc, *report.shares, *report.milliseconds, report.decision_changes])
        and not np.isinf([loss.value, loss.low, loss.high]).any()  # NaN: it could not be resampled
    )


def _not_negative(numbers: Sequence[float]) -> bool:
    """Whether all are finite numbers of 0 or more."""
    return bool(np.isfinite(numbers).all()) and min(numbers) >= 0
