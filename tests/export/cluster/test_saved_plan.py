"""What was prepared for a job on a cluster is kept, and holds as long as the cluster has room for it; no Ray runs."""

from dataclasses import replace

import pytest
from helpers import exported_run

from ensemble.core.errors import ArtifactError
from ensemble.core.log import no_log
from export.cluster import bundle_transfer, saved_plan, worker
from export.cluster.placement import ClusterOptions, Node, WorkerPool, resume_workers
from export.cluster.saved_plan import SavedPlan
from export.cluster.worker import WorkerPlan
from export.inference import loading
from export.inference.plan import Plan, plan_bundle
from export.runtimes.capabilities import available
from export.runtimes.settings import RuntimeOptions

WANTED = RuntimeOptions(device="cpu", cascade=0.01)
NODES = (Node("a", 8), Node("b", 4))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = exported_run(tmp_path_factory.mktemp("run"), cascade=True) / "bundle"
    return bundle_transfer.describe_bundle(folder)


@pytest.fixture(scope="module")
def kept(source):
    machine = replace(available(), cores=2)
    plan = plan_bundle(source.folder, WANTED, no_log, machine)
    plan, runners = loading.open_plan(source.folder, plan, WANTED, no_log, machine)
    assert plan.cascade
    members = tuple(replace(member, path=member.path.relative_to(source.folder)) for member in plan.members)
    identity = loading.build_ensemble(source.folder, plan, runners).identity
    libraries = worker.libraries_of(plan)
    return SavedPlan(WorkerPlan(replace(plan, members=members), identity, libraries, ("a line", "é")), 2, 0.5)


def test_it_is_read_as_it_was_written(source, kept, tmp_path):
    assert saved_plan.read(tmp_path, source, WANTED, ClusterOptions()) is None
    saved_plan.write(tmp_path, source, WANTED, kept)
    assert saved_plan.read(tmp_path, source, WANTED, ClusterOptions()) == kept
    assert saved_plan.read(tmp_path, source, WANTED, ClusterOptions("auto", 7, 2, 0.5)) == kept


def test_other_cores_options_or_bundles_are_prepared_anew(source, kept, tmp_path):
    saved_plan.write(tmp_path, source, WANTED, kept)
    assert saved_plan.read(tmp_path, source, WANTED, ClusterOptions(cpus=1)) is None
    assert saved_plan.read(tmp_path, source, WANTED, ClusterOptions(gpus=0)) is None
    assert saved_plan.read(tmp_path, source, replace(WANTED, cascade=0.02), ClusterOptions()) is None
    assert saved_plan.read(tmp_path, replace(source, sha256="0" * 64), WANTED, ClusterOptions()) is None


@pytest.mark.parametrize("damage", [b"", b"{}", b"cascade", b"sha256", b"setting"])
def test_what_was_damaged_is_prepared_anew(source, kept, tmp_path, damage):
    saved_plan.write(tmp_path, source, WANTED, kept)
    file = tmp_path / saved_plan.FILE
    file.write_bytes(file.read_bytes().replace(damage, b"x") if len(damage) > 2 else damage)
    assert saved_plan.read(tmp_path, source, WANTED, ClusterOptions()) is None


def test_what_cannot_be_run_alike_is_prepared_anew(source, kept):
    (first, *others), plan = kept.worker_plan.plan.members, kept.worker_plan.plan
    assert worker.still_runs(source, kept.worker_plan)
    assert not worker.still_runs(source, replace(kept.worker_plan, libraries={"openvino": "0.1"}))
    lacking = replace(first, setting=replace(first.setting, runtime="cuda", precision="int8"))
    other = Plan(plan.stacker, (lacking, *others), plan.cascade)
    libraries = worker.libraries_of(other)
    assert not worker.still_runs(source, replace(kept.worker_plan, plan=other, libraries=libraries))
    with pytest.raises(ArtifactError, match="was changed meanwhile"):
        worker.still_runs(source, replace(kept.worker_plan, plan=replace(plan, members=(replace(first, sha256="0"),))))


@pytest.mark.parametrize(
    ("asked", "cpus", "expected"),
    [
        ({}, 2, WorkerPool(6, 2, 0)),
        ({"workers": 3}, 2, WorkerPool(3, 2, 0)),
        ({"workers": 9}, 4, WorkerPool(3, 4, 0)),  # a machine has gone
        ({}, 9, None),
    ],
)
def test_a_job_goes_on_with_the_cores_that_it_was_begun_with(asked, cpus, expected):
    assert resume_workers(NODES, ClusterOptions(**asked), cpus, 0) == expected
