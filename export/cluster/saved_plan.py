"""The plan of a job on a cluster, stored beside its journal: a resumed job runs by it though the cluster changed.

NAME.csv.partial/prepared.json: the plan, with the settings of each member and the cascade, and the size of a worker.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ensemble.cascade.cascade import Cascade
from ensemble.core import artifacts
from ensemble.core.errors import ManyeyesError
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.stacking.stacker import Stacker
from export.cluster.bundle_transfer import BundleSource
from export.cluster.placement import ClusterOptions
from export.cluster.worker import WorkerPlan
from export.inference.plan import Plan, PlannedMember
from export.runtimes.settings import RuntimeConfig, RuntimeOptions

FILE = "prepared.json"


@dataclass(frozen=True)
class SavedPlan:
    """A plan, and the cores and GPUs of the worker that made it."""

    worker_plan: WorkerPlan
    cpus: int
    gpus: float


def write(workdir: Path, source: BundleSource, runtime: RuntimeOptions, saved: SavedPlan) -> None:
    """Store the plan of a bundle in the journal's folder."""
    worker_plan, plan = saved.worker_plan, saved.worker_plan.plan
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
    prepared = {
        "plan": {"stacker": plan.stacker.to_dict(), "members": members, "cascade": cascade},
        "identity": worker_plan.identity,
        "libraries": dict(worker_plan.libraries),
        "lines": list(worker_plan.lines),
    }
    values = {"key": _key(source, runtime), "cpus": saved.cpus, "gpus": saved.gpus, "prepared": prepared}
    artifacts.write_json(workdir / FILE, values)


def read(workdir: Path, source: BundleSource, runtime: RuntimeOptions, options: ClusterOptions) -> SavedPlan | None:
    """The stored plan of this bundle for the same options; None without one, or for other cores or GPUs."""
    with suppress(ManyeyesError, OSError, KeyError, TypeError, ValueError, AttributeError):  # none yet, or damaged
        values = artifacts.read_json(workdir / FILE, "")
        prepared = values["prepared"]
        lines, stored = tuple(map(str, prepared["lines"])), prepared["plan"]
        members = tuple(
            PlannedMember(
                member["name"],
                Path(PurePosixPath(member["path"])),
                member["sha256"],
                PreprocessConfig.from_dict(member["contract"]),
                member["gflop"],
                RuntimeConfig(**member["setting"]),
            )
            for member in stored["members"]
        )
        cascade = stored["cascade"] and Cascade.from_dict(stored["cascade"])
        plan = Plan(Stacker.from_dict(stored["stacker"]), members, cascade)
        worker_plan = WorkerPlan(plan, str(prepared["identity"]), dict(prepared["libraries"]), lines)
        saved = SavedPlan(worker_plan, int(values["cpus"]), float(values["gpus"]))
        same = options.cpus in (None, saved.cpus) and options.gpus in (None, saved.gpus)
        return saved if same and values["key"] == _key(source, runtime) else None
    return None


def _key(source: BundleSource, runtime: RuntimeOptions) -> dict[str, Any]:
    return {"bundle": source.sha256, "wanted": asdict(runtime)}
