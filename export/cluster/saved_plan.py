"""What a worker decided for a job, kept beside its journal: by it the job goes on, on a cluster that changed meanwhile.

NAME.csv.partial/prepared.json: the plan, with the settings of each member and the cascade, and what each worker had.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ensemble.core import artifacts
from ensemble.core.errors import ManyeyesError
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.stacking.cascade import Cascade
from ensemble.stacking.stacker import Stacker
from export.cluster.bundle_transfer import Source
from export.cluster.placement import ClusterOptions
from export.cluster.worker import WorkerPlan
from export.inference.plan import Plan, Planned
from export.runtimes.settings import RuntimeConfig, RuntimeOptions

FILE = "prepared.json"


@dataclass(frozen=True)
class SavedPlan:
    """What was prepared, on a worker of cpus cores and gpus GPUs."""

    prepared: WorkerPlan
    cpus: int
    gpus: float


def write(folder: Path, source: Source, wanted: RuntimeOptions, kept: SavedPlan) -> None:
    """Keep what was prepared of a bundle in the held folder of a journal."""
    found = kept.prepared
    prepared = {
        "plan": _plan_dict(found.plan),
        "identity": found.identity,
        "libraries": dict(found.libraries),
        "lines": list(found.lines),
    }
    values = {"key": _key(source, wanted), "cpus": kept.cpus, "gpus": kept.gpus, "prepared": prepared}
    artifacts.write_json(folder / FILE, values)


def read(folder: Path, source: Source, wanted: RuntimeOptions, asked: ClusterOptions) -> SavedPlan | None:
    """What was prepared of this bundle for the same options; None if nothing was, or for other cores or GPUs."""
    with suppress(ManyeyesError, OSError, KeyError, TypeError, ValueError, AttributeError):  # none yet, or damaged
        values = artifacts.read_json(folder / FILE, "")
        found = values["prepared"]
        lines, plan = tuple(map(str, found["lines"])), _plan(found["plan"])
        prepared = WorkerPlan(plan, str(found["identity"]), dict(found["libraries"]), lines)
        kept = SavedPlan(prepared, int(values["cpus"]), float(values["gpus"]))
        same = asked.cpus in (None, kept.cpus) and asked.gpus in (None, kept.gpus)
        return kept if same and values["key"] == _key(source, wanted) else None
    return None


def _key(source: Source, wanted: RuntimeOptions) -> dict[str, Any]:
    return {"bundle": source.sha256, "wanted": asdict(wanted)}


def _plan_dict(plan: Plan) -> dict[str, Any]:
    members = [
        {
            "name": member.name,
            "path": member.path.as_posix(),
            "sha256": member.sha256,
            "contract": member.preprocess_config.to_dict(),
            "gflop": member.gflop,
            "setting": asdict(member.setting),
        }
        for member in plan.members
    ]
    cascade = plan.cascade and plan.cascade.to_dict()
    return {"stacker": plan.stacker.to_dict(), "members": members, "cascade": cascade}


def _plan(values: Mapping[str, Any]) -> Plan:
    members = tuple(
        Planned(
            member["name"],
            Path(PurePosixPath(member["path"])),
            member["sha256"],
            PreprocessConfig.from_dict(member["contract"]),
            member["gflop"],
            RuntimeConfig(**member["setting"]),
        )
        for member in values["members"]
    )
    cascade = values["cascade"] and Cascade.from_dict(values["cascade"])
    return Plan(Stacker.from_dict(values["stacker"]), members, cascade)
