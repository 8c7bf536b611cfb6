"""train-all on a real Ray of this machine: the members of one process, whatever is killed meanwhile."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import run_cli
from small_job import ROOT, SHARES
from train_orders import order

from ensemble.cluster import connect, local_ray, nodes, placement, train_driver, train_worker
from ensemble.core import artifacts
from ensemble.core.errors import UnavailableError
from ensemble.core.recipe import load_recipes
from ensemble.training import checkpoint

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.cluster,
    # Ray leaves files and sockets open in the process that starts it
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::DeprecationWarning:ray"),
]

HOST = socket.gethostname()
NAMES = ("tiny_convnext", "tiny_vit")
FP32 = "train.precision=fp32"  # auto is timed, and answers by how busy the machine is
LONG = ("--set", "train.epochs=40", "--save-every", "0")
LONGER = ("--set", "train.epochs=400", "--save-every", "0")  # where none may end, however late the other begins


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    os.environ.update(connect.QUIET_ENVIRONMENT)
    head = {"num_cpus": 2, "object_store_memory": local_ray.OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def data(work):
    places = ("--data", work / "data" / "train.csv", "--group-column", "photo")
    return (*places, *SHARES, "--device", "cpu", "--set", FP32)


@pytest.fixture(scope="module")
def local(work, data, tmp_path_factory):
    """Both members, trained one after the other by this process."""
    run = tmp_path_factory.mktemp("local")
    assert run_cli("train-all", work / "recipes", *data, "--run", run)[0] == 0
    return run


@pytest.fixture(scope="module")
def long(work, data, local, tmp_path_factory):
    """The same, trained long enough to be killed meanwhile."""
    run = new_run(local, tmp_path_factory.mktemp("long"))
    assert run_cli("train-all", work / "recipes", *data, *LONG, "--run", run)[0] == 0
    return run


def new_run(local, run):
    shutil.copy(artifacts.audit_path(local), run)  # half a minute less
    return run


@pytest.fixture
def run(local, tmp_path):
    return new_run(local, tmp_path)


def start(cluster, *arguments):
    engine = ("--engine", "ray", *(("--address", cluster.address) if cluster else ()))
    # what runs in the background of a shell is deaf to interrupts
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import cli; cli.main()"
    command = [sys.executable, "-c", code, *map(str, (*arguments, *engine))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)


def finish(process, code=0):
    out, err = process.communicate(timeout=280)
    assert process.returncode == code, out + err
    assert "Traceback" not in out + err
    return out, err


def trainings(run):
    """The processes that train this run's members now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "ensemble.cluster.train_process" in line and f'"{run}"' in line[-1]:
            found.append(process)
    return found


def training(run, name):
    """The process of a member that has saved some of its work, and has told so."""
    wait_for(lambda: any(" epoch " in line for line in told(run, name)))
    (process,) = [process for process in trainings(run) if f'"name": "{name}"' in process.info["cmdline"][-1]]
    return process


def wait_for(true, seconds=120):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def told(run, name="*"):
    """What was told of the members, as far as it is still there."""
    logs = (run / "work").glob(f".{name}.*.{train_worker.TASK_LOG}")
    return [line for path in logs for line in train_worker.read_lines(path)[0]]


def logits(run, name):
    scores = artifacts.read_parquet(artifacts.member_path(run, name) / "heldout.parquet", "")
    return scores.set_index("id")["logit"].sort_index().to_numpy()


def same(run, expected, name):
    """Whether the members have the same files, in what is no time or place."""
    folders = [artifacts.member_path(place, name) for place in (run, expected)]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    kept = [name for name in names[0] if name not in ("member.json", "curves.png")]
    return names[0] == names[1] and all((folders[0] / n).read_bytes() == (folders[1] / n).read_bytes() for n in kept)


def test_members_side_by_side_are_those_of_one_process(cluster, work, data, local, run):
    driver = start(cluster, "train-all", work / "recipes", *data, "--run", run)
    wait_for(lambda: len(trainings(run)) == 2)
    out, err = finish(driver)
    assert err == ""
    assert f"[1/2] tiny_convnext: training on {HOST} (" in out
    assert "  tiny_vit: epoch 3/3: train loss " in out
    assert out.count(" trained ") == 2
    assert [same(run, local, name) for name in NAMES] == [True, True]
    assert not told(run)
    code, out, _ = run_cli("train-all", work / "recipes", *data, "--run", run)
    assert (code, out.count("unchanged, not trained again")) == (0, 2)
    out, _ = finish(start(cluster, "train-all", work / "recipes", *data, "--run", run))
    assert out.count("unchanged, not trained again") == 2


def test_another_training_would_show(work, data, local, run):
    changed = ("--set", "train.lr=1e-3")
    assert run_cli("train", work / "recipes" / "tiny_vit.yaml", *data, *changed, "--run", run)[0] == 0
    assert not same(run, local, "tiny_vit")


def test_a_member_that_fails_is_told_and_not_repeated_and_the_other_is_trained(
    cluster, work, data, local, run, tmp_path
):
    recipes = shutil.copytree(work / "recipes", tmp_path / "recipes")
    wild = "{lr: 0.99, epochs: 3, batch_size: 16, optimizer: sgd, clip: 1.0e+30, warmup: 0, seed: 1}"
    text = (recipes / "tiny_vit.yaml").read_text().partition("train:")[0]
    (recipes / "tiny_wild.yaml").write_text(
        f"{text}train: {wild}\n".replace("depth: 1", "depth: 1, init_values: 1.0e+30")
    )
    out, err = finish(start(cluster, "train-all", recipes, *data, "--run", run), code=1)
    assert "  tiny_wild: failed: the loss is no longer a number in epoch 1, step " in out
    assert err.startswith("Error: tiny_wild: the loss is no longer a number")
    assert err.count("\n") == 1
    assert out.count("the loss is no longer a number") == 1
    assert "(try 2)" not in out
    assert [same(run, local, name) for name in NAMES] == [True, True]


def test_a_killed_member_is_repeated_and_goes_on(cluster, work, data, long, run):
    driver = start(cluster, "train-all", work / "recipes", *data, *LONG, "--run", run)
    training(run, "tiny_vit").kill()
    out, _ = finish(driver)
    assert re.search(rf"^\[2/2\] tiny_vit: training on {re.escape(HOST)} \([0-9.]+\) \(try 2\)$", out, re.MULTILINE)
    assert out.count("  tiny_vit: epoch 1/40:") == 1, "it goes on"
    for name in NAMES:
        np.testing.assert_allclose(logits(run, name), logits(long, name), atol=1e-5)


def test_a_killed_driver_leaves_no_orphans_and_the_same_command_goes_on(cluster, work, data, long, run):
    driver = start(cluster, "train-all", work / "recipes", *data, *LONG, "--run", run)
    for name in NAMES:
        training(run, name)
    driver.kill()
    driver.communicate()
    wait_for(lambda: not trainings(run), seconds=60)
    out, _ = finish(start(cluster, "train-all", work / "recipes", *data, *LONG, "--run", run))
    assert f"[2/2] tiny_vit: going on with its training on {HOST} (" in out
    assert "epoch 1/40:" not in out
    for name in NAMES:
        np.testing.assert_allclose(logits(run, name), logits(long, name), atol=1e-5)


def test_a_member_that_another_process_trains_is_waited_for(cluster, work, data, local, run):
    with checkpoint.member_lock(run, "tiny_vit", print):
        driver = start(cluster, "train", work / "recipes" / "tiny_vit.yaml", *data, "--run", run)
        wait_for(lambda: any("another process trains it" in line for line in told(run)))
        shutil.copytree(artifacts.member_path(local, "tiny_vit"), artifacts.member_path(run, "tiny_vit"))
    out, _ = finish(driver)
    assert "  tiny_vit: another process trains it; waiting for that one to end" in out
    assert "epoch 1/3" not in out, "what that one has trained is taken"
    assert same(run, local, "tiny_vit")


def test_interrupted_it_ends_the_members_and_says_how_to_go_on(cluster, work, data, run):
    driver = start(cluster, "train-all", work / "recipes", *data, *LONGER, "--run", run)
    for name in NAMES:
        training(run, name)
    driver.send_signal(signal.SIGINT)
    _, err = finish(driver, code=130)
    assert err.strip() == "Stopped. What was finished is kept; the same command goes on from there."
    wait_for(lambda: not trainings(run), seconds=5)
    for name in NAMES:
        assert (artifacts.work_path(run, name) / "fit" / "state.safetensors").exists()


def folders():
    return set(Path("/tmp").glob(f"{local_ray.FOLDER_PREFIX}*"))  # noqa: S108 where Ray's own files go


def test_without_an_address_a_ray_is_started_and_ends_with_the_command(work, data, run):
    before = folders()
    driver = start(None, "train-all", work / "recipes", *data, *LONG, "--run", run)
    wait_for(lambda: trainings(run))
    (own,) = folders() - before
    assert own.stat().st_mode & 0o077 == 0, "no other user reaches its sockets"
    driver.send_signal(signal.SIGTERM)
    finish(driver, code=143)
    wait_for(lambda: not trainings(run), seconds=5)
    assert not own.exists()
    assert not told(run)


def test_a_lost_node_s_member_goes_on_elsewhere(cluster, work, data, long, run):
    node = cluster.add_node(num_cpus=3, object_store_memory=local_ray.OBJECT_STORE_BYTES)
    cluster.wait_for_nodes()
    more = ("--cpus-per-member", 3)  # only the new node has them
    driver = start(cluster, "train", work / "recipes" / "tiny_vit.yaml", *data, *LONG, *more, "--run", run)
    training(run, "tiny_vit")
    cluster.remove_node(node, allow_graceful=False)
    other = cluster.add_node(num_cpus=3, object_store_memory=local_ray.OBJECT_STORE_BYTES)
    out, _ = finish(driver)
    cluster.remove_node(other)
    assert "(try 2)" in out
    assert out.count("  tiny_vit: epoch 1/40:") == 1
    assert np.abs(logits(run, "tiny_vit") - logits(long, "tiny_vit")).max() < 1e-2  # three threads add in another order


def test_a_node_that_cannot_train_is_named_before_any_training(cluster, tmp_path, monkeypatch):
    def by_value(packages):
        import ray

        return {"torch": "0.1" if ray.get_runtime_context().get_task_id() else "0.2"}

    artifacts.dataset_path(tmp_path).write_bytes(b"rows")

    def task(request):
        return train_driver.Task(request, placement.ResourceRequest(cpus=1, gpus=0, memory=0), "")

    here = order(tmp_path)
    with connect.connected(cluster.address) as connected:
        train_driver._check_nodes(connected, [task(here)])
        with pytest.raises(UnavailableError, match=r"^.+ \(.+\) does not see .*dataset\.parquet; put --run"):
            train_driver._check_nodes(connected, [task(replace(here, run=str(tmp_path / "elsewhere")))])
        monkeypatch.setattr(nodes, "node_versions", by_value)
        with pytest.raises(UnavailableError, match=r"^.+ \(.+\) has other versions: torch 0\.1 there, 0\.2 here; "):
            train_driver._check_nodes(connected, [task(here)])


@pytest.fixture
def both(work, data, run):
    """What orders tiny_vit of two processes: as on two GPUs, by gloo on CPUs; no cluster is asked."""
    assert run_cli("train-all", work / "recipes", *data, "--set", "train.epochs=1", "--run", run)[0] == 0  # its data

    def ordered(*changes):
        (recipe,) = load_recipes([work / "recipes" / "tiny_vit.yaml"], [FP32, *changes])
        more = {"processes": 2, "cpus": 2, "seed": int(SHARES[-1]), "folder": str(ROOT)}
        return order(run, recipe=recipe.model_dump(mode="json"), **more)

    return ordered


def train(two, run):
    """The exit code of torchrun, and the outcome that the processes wrote, if any."""
    code = train_worker._run(train_worker.command(two), train_worker.environment(two), ROOT, run / "log")
    return code, json.loads(two.outcome_path.read_text()) if two.outcome_path.exists() else None


def test_several_processes_train_the_member_that_one_does(local, both, run):
    code, outcome = train(both(), run)
    assert code == 0, (run / "log").read_text()
    assert outcome["status"] == "trained"
    np.testing.assert_allclose(logits(run, "tiny_vit"), logits(local, "tiny_vit"), atol=1e-3)


def test_one_of_several_processes_that_is_killed_is_no_failure_of_the_member(both, run):
    def kill():
        state = artifacts.work_path(run, "tiny_vit") / "fit" / "state.safetensors"
        wait_for(state.exists)
        next(process for process in trainings(run) if process.environ().get("RANK") == "1").kill()

    killer = threading.Thread(target=kill)
    killer.start()
    code, outcome = train(both("train.epochs=200"), run)
    killer.join()
    assert (code, outcome) == (1, None)
    assert not trainings(run)


def test_an_error_of_ours_is_a_failure_of_the_member_in_several_processes_too(both, run):
    code, outcome = train(both("train.accumulate=1", "train.batch_size=1"), run)
    assert code == 1
    assert outcome["error"] == "2 processes share steps of 1 images; start fewer processes"
