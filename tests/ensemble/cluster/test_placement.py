"""What each member gets of a cluster, and what is refused before Ray is asked: without Ray."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import run_cli, run_python
from hypothesis import given
from hypothesis import strategies as st
from train_orders import order, recipe

from ensemble.cluster import connect, local_ray, nodes, placement, train_driver, train_worker
from ensemble.cluster.connect import Node
from ensemble.cluster.train_worker import TrainRequest
from ensemble.core import artifacts
from ensemble.core.errors import TrainingError, UnavailableError
from ensemble.core.recipe import Backbone, Recipe
from ensemble.models import checkpoints
from ensemble.training import checkpoint, train_all
from ensemble.training.progress import LiveProgress

SMALL, LARGE = Node("small", 4, id="1", memory=8 * 2**30), Node("large", 16, id="2", gpus=4, memory=64 * 2**30)
NODES = st.lists(st.integers(1, 64), min_size=1, max_size=6).map(
    lambda counts: [Node("n", count, id=str(number)) for number, count in enumerate(counts)]
)


def test_the_number_of_gpus_is_no_part_of_what_decides_a_member():
    one, two = recipe(), recipe(gpus=2)
    assert one != two
    assert one.sha256 == two.sha256
    assert checkpoint.training_fingerprint(one, "", 0, 1) == checkpoint.training_fingerprint(two, "", 0, 1)
    assert one.sha256 != recipe(seed=2).sha256


@given(st.integers(1, 30), NODES)
def test_cpus_are_as_many_as_let_all_members_run_at_once(members, nodes):
    cpus = placement.cpus_for_parallel(members, nodes)

    def at_once(each):
        return sum(node.cpus // each for node in nodes)

    assert cpus == 1 or at_once(cpus) >= members
    assert at_once(cpus + 1) < members


@pytest.mark.parametrize(
    ("members", "nodes", "cpus"), [(1, [SMALL], 4), (2, [SMALL], 2), (9, [SMALL], 1), (2, [SMALL, LARGE], 8)]
)
def test_cpus_of_a_member(members, nodes, cpus):
    assert placement.cpus_for_parallel(members, nodes) == cpus


@pytest.mark.parametrize(
    ("members", "gib", "cpus"), [(5, 2, 3), (5, 6.5, 16), (5, 4, 8), (5, 3, 5), (5, 100, 16), (1, 1, 16)]
)
def test_cpus_of_a_member_leave_none_idle_where_memory_is_short(members, gib, cpus):
    assert placement.cpus_for_parallel(members, [Node("a", 16, memory=10 * 2**30)], int(gib * 2**30)) == cpus


def test_gpus_come_with_their_share_of_cpus_and_weights_with_memory():
    asked = [recipe("one"), recipe("two", gpus=2)]
    weights = {"one": 2**30, "two": 2**40}
    found = placement.resource_requests(asked, weights, [SMALL, LARGE], "cuda")
    assert found["one"] == placement.ResourceRequest(cpus=4, gpus=1, memory=7 * 2**30)
    assert found["two"] == placement.ResourceRequest(cpus=8, gpus=2, memory=LARGE.memory), "no more than any node has"
    assert placement.members_per_node(found["one"], 9, [SMALL, LARGE]) == 4
    assert [node.name for node in (SMALL, LARGE) if placement.node_capacity(found["one"], node)] == ["large"]
    on_cpus = placement.resource_requests(asked, weights, [SMALL, LARGE], "cpu", cpus_per_member=3)
    assert [(share.cpus, share.gpus) for share in on_cpus.values()] == [(3, 0), (3, 0)]


def test_memory_is_no_more_than_a_node_has_that_may_take_the_member():
    gib = 2**30
    nodes = [Node("cpu", 64, memory=256 * gib, id="1"), Node("gpu", 16, gpus=4, memory=16 * gib, id="2")]
    share = placement.resource_requests([recipe()], {"vit": 5 * gib}, nodes, "cuda")["vit"]
    assert share == placement.ResourceRequest(cpus=4, gpus=1, memory=16 * gib)
    assert [placement.node_capacity(share, node) for node in nodes] == [0, 1]
    assert placement.node_capacity(placement.ResourceRequest(4, 0, 9 * gib), nodes[1]) == 1, "by memory, not by CPUs"


@given(st.integers(1, 30), NODES)
def test_the_disk_is_asked_for_what_is_trained_at_once(members, nodes):
    asked = [recipe(f"m{number}") for number in range(members)]
    shares = placement.resource_requests(asked, {each.name: 0 for each in asked}, nodes, "cpu", 1).values()
    assert placement.parallel_members(shares, nodes) == min(members, sum(node.cpus for node in nodes))


def test_gpus_are_taken_where_the_cluster_has_any():
    assert placement.check_resources([recipe()], [SMALL], "auto") == "cpu"
    assert placement.check_resources([recipe(gpus=4)], [SMALL, LARGE], "auto") == "cuda"
    assert placement.check_resources([recipe(gpus=9)], [SMALL, LARGE], "cpu") == "cpu"


REFUSED = {
    "more GPUs than a node has": ([recipe("big", gpus=5)], [SMALL, LARGE], "auto", None,
        "big asks for 5 GPUs (train.gpus), and the cluster has small: 4 CPUs; large: 16 CPUs, 4 GPUs; "
        "lower it, or add --device cpu"),
    "several GPUs where there are none": ([recipe("big", gpus=2)], [SMALL], "auto", None,
        "big asks for 2 GPUs (train.gpus), and the cluster has small: 4 CPUs; lower it, or add --device cpu"),
    "a GPU where there are none": ([recipe()], [SMALL], "cuda", None,
        "the cluster has no GPU (small: 4 CPUs); use --device cpu, or start Ray where GPUs are"),
    "too many CPUs": ([recipe()], [SMALL], "cpu", 5,
        "--cpus-per-member 5: the cluster has small: 4 CPUs; choose fewer"),
    "no CPU at all": ([recipe()], [Node("head", 0)], "auto", None,
        "no node of the cluster has a CPU for tasks; add one: ray start --num-cpus N"),
    "no node": ([recipe(gpus=2)], [], "cuda", None,
        "no node of the cluster has a CPU for tasks; add one: ray start --num-cpus N"),
}  # fmt: skip


@pytest.mark.parametrize(("recipes", "nodes", "device", "cpus", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_node_can_give_is_refused(recipes, nodes, device, cpus, message):
    with pytest.raises(UnavailableError) as raised:
        placement.check_resources(recipes, nodes, device, cpus)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (("--address", "head:6379"), {}, "--address is for a Ray cluster: add --engine ray"),
        (("--cpus-per-member", "2"), {}, "--cpus-per-member is for a Ray cluster: add --engine ray"),
        (("--engine", "ray", "--dry-run"), {}, "--dry-run times steps on this machine; leave --engine ray out"),
        (("--engine", "ray"), {"WORLD_SIZE": "1"}, "--engine ray starts the processes itself; start this command with"),
        (("--engine", "ray", "--address", "head"), {}, "--address head is not HOST:PORT, and not auto"),
        (("--engine", "ray", "--address", ""), {}, "--address  is not HOST:PORT, and not auto"),
        (("--engine", "ray", "--address", "localhost:²"), {}, "--address localhost:² is not HOST:PORT, and not auto"),
        (
            ("--engine", "ray", "--address", f"localhost:{'9' * 5000}"),
            {},
            f"no Ray cluster at localhost:{'9' * 5000} (",
        ),
        (
            ("--engine", "ray", "--address", "127.0.0.1:1"),
            {},
            "no Ray cluster at 127.0.0.1:1 (Connection refused); ",
        ),
    ],
)
def test_what_cannot_be_is_one_line_before_the_data_is_read(tmp_path, monkeypatch, options, environment, message):
    pytest.importorskip("ray")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "vit.yaml").write_text(
        "backbone: {architecture: resnet}\ntrain: {lr: 1e-3, epochs: 1, batch_size: 4}\n"
    )
    started = time.monotonic()
    code, out, err = run_cli("train-all", tmp_path, "--run", tmp_path / "run", *options)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"Error: {message}")
    assert time.monotonic() - started < 15
    assert not (tmp_path / "run").exists()


def test_missing_ray_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "vit.yaml").write_text(
        "backbone: {architecture: resnet}\ntrain: {lr: 1e-3, epochs: 1, batch_size: 4}\n"
    )
    code, _, err = run_cli("train-all", tmp_path, "--run", tmp_path / "run", "--engine", "ray")
    assert (code, err) == (2, "Error: Ray is not installed; run: pip install 'manyeyes[cluster]'\n")


def test_a_node_says_what_it_lacks(tmp_path):
    path = artifacts.dataset_path(tmp_path)
    assert "does not see" in train_worker.node_problem(tmp_path, "0" * 64, (), wait_seconds=0)
    path.write_bytes(b"rows")
    assert f"has another {path}; put --run" in train_worker.node_problem(tmp_path, "0" * 64, (), wait_seconds=0)
    digest, network = artifacts.file_sha256(path), tmp_path / "org" / "net"
    assert train_worker.node_problem(tmp_path, digest, (), wait_seconds=0) == ""
    assert f"does not see {network}; put checkpoints" in train_worker.node_problem(tmp_path, digest, (str(network),), 0)
    network.mkdir(parents=True)
    assert train_worker.node_problem(tmp_path, digest, (str(network),), wait_seconds=0) == ""


def test_checkpoints_and_weights_of_this_machine_are_named_with_their_place(tmp_path, monkeypatch):
    """So that a node that lacks them says so, and does not ask the Hub for their name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "net").mkdir(parents=True)
    (tmp_path / "w.safetensors").write_bytes(b"")
    assert checkpoints.local_paths(Backbone(checkpoint="org/net")) == (str(tmp_path / "org" / "net"),)
    weights = Backbone(architecture="resnet", weights="w.safetensors")
    assert checkpoints.local_paths(weights) == (str(tmp_path / "w.safetensors"),)
    for elsewhere in (Backbone(checkpoint="org/other"), Backbone(architecture="resnet", weights="package:timm/x")):
        assert checkpoints.local_paths(elsewhere) == ()


def test_a_file_that_appears_late_is_waited_for(tmp_path):
    path = artifacts.dataset_path(tmp_path)
    threading.Timer(0.3, path.write_bytes, [b"rows"]).start()
    digest = sha256(b"rows").hexdigest()
    assert train_worker.node_problem(tmp_path, digest, (), wait_seconds=10) == ""


NODE = ("a (10.0.0.1)", "1")
OUTCOME = '{"name": "vit", "status": "trained"}'


def task(request, resources=placement.ResourceRequest(1, 0, 0)):  # noqa: B008
    return train_driver.Task(request, resources, "[1/1] vit: training on ")


def begun(request, tries, first=1):
    """Writes to the task's log what a worker does when it begins."""
    for attempt in range(first, first + tries):
        train_worker.append_line(request.log_path, f"== try {attempt} on a, node 1 ==")


def test_what_another_command_on_the_same_run_tells_is_not_read(tmp_path, monkeypatch):
    artifacts.dataset_path(tmp_path).write_bytes(b"rows")
    mine, other = order(tmp_path), order(tmp_path, job="b")
    begun(other, train_worker.MAX_TRIES)
    outcome = f"open({str(mine.outcome_path)!r}, 'w').write('{OUTCOME}')"
    monkeypatch.setattr(train_worker, "command", lambda request: [sys.executable, "-c", outcome])
    monkeypatch.setattr(train_worker, "_node", lambda: NODE)
    assert train_worker.train(mine) == {"name": "vit", "status": "trained"}
    assert len(train_worker.read_lines(other.log_path)[0]) == train_worker.MAX_TRIES
    assert train_worker.read_lines(mine.log_path)[0] == ["== try 1 on a (10.0.0.1), node 1 =="]
    assert not mine.outcome_path.exists()


def test_an_outcome_of_an_earlier_try_is_not_taken(tmp_path, monkeypatch):
    artifacts.dataset_path(tmp_path).write_bytes(b"rows")
    request = order(tmp_path)
    begun(request, 1)
    request.outcome_path.write_text(OUTCOME)
    monkeypatch.setattr(train_worker, "command", lambda request: [sys.executable, "-c", "raise SystemExit(3)"])
    monkeypatch.setattr(train_worker, "_node", lambda: NODE)
    with pytest.raises(train_worker.WorkerLostError, match="exit code 3"):
        train_worker.train(request)


def test_a_node_of_other_versions_refuses_and_names_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(train_worker, "_node", lambda: NODE)
    here = nodes.node_versions(train_worker.COMPARED_PACKAGES)
    other = order(tmp_path, versions={**here, "manyeyes": "0.1 (00000000)", "torch": "1.0"})
    with pytest.raises(
        UnavailableError, match=r"^a \(10\.0\.0\.1\) has other versions: manyeyes .* torch .* 1\.0 here; "
    ):
        train_worker.train(other)


@pytest.mark.parametrize("bad", ["1", "2"])
def test_nodes_of_one_name_are_all_asked(tmp_path, monkeypatch, bad):
    alike = [Node("vm (10.0.0.1)", 2, id="1"), Node("vm (10.0.0.1)", 2, id="2")]
    ray = SimpleNamespace(
        exceptions=SimpleNamespace(RayError=OSError), get=lambda node, timeout: "lacks it" if node == bad else ""
    )
    monkeypatch.setattr(train_driver.connect, "nodes", lambda ray: alike)
    monkeypatch.setattr(nodes, "check_nodes", lambda *given: None)
    monkeypatch.setattr(nodes, "on_node", lambda ray, node, work: SimpleNamespace(remote=lambda *given: node))
    with pytest.raises(UnavailableError, match=r"^vm \(10\.0\.0\.1\) lacks it$"):
        train_driver._check_nodes(ray, [task(order(tmp_path))])


def test_a_wait_for_room_is_said_once(tmp_path, monkeypatch):
    lines, looks = [], iter(range(8))
    ray = SimpleNamespace(
        wait=lambda tasks, **how: (tasks if next(looks) == 7 else [], []),
        get=lambda reference: {"name": "vit", "status": "trained"},
    )
    monkeypatch.setattr(train_driver.connect, "nodes", lambda ray: [SMALL])
    monkeypatch.setattr(train_driver, "CAPACITY_HINT_SECONDS", 0.03)
    monkeypatch.setattr(train_driver, "POLL_SECONDS", 0.02)
    tasks = {1: task(order(tmp_path), placement.ResourceRequest(4, 0, 2**31))}
    assert [found.status for found in train_driver._follow(ray, tasks, lines.append)] == ["trained"]
    assert lines == [
        "  waiting for room: vit needs 4 CPUs, 2.0 GiB of memory; the cluster has small: 4 CPUs, which others may use"
    ]


HOLDS = """
import sys, time
from ensemble.cluster import local_ray
with local_ray.private_folder() as found:
    print(found, flush=True)
    time.sleep(60)
"""


def test_folders_of_killed_processes_are_removed_and_of_no_others(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", HOLDS], stdout=subprocess.PIPE, text=True) as process:
        other = Path(process.stdout.readline().strip())
        assert other.stat().st_mode & 0o077 == 0, "nobody else's"
        monkeypatch.setattr(local_ray, "LOCK_GRACE_SECONDS", -1)
        with local_ray.private_folder() as mine:
            assert mine.exists()
            assert other.exists(), "its process lives"
            process.kill()
            process.wait()
            with local_ray.private_folder():
                assert mine.exists()
                assert not other.exists()
    assert not mine.exists()


def test_a_folder_that_is_being_made_is_left_alone():
    with tempfile.TemporaryDirectory(prefix=local_ray.FOLDER_PREFIX, dir="/tmp") as made, local_ray.private_folder():
        assert Path(made).exists()


def test_a_head_that_is_gone_is_told_once(monkeypatch, capsys):
    monkeypatch.setattr(connect, "POLL_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with connect._head_watched(address):
            time.sleep(0.5)
            assert capsys.readouterr().err == ""
            server.close()
            time.sleep(1)
    err = capsys.readouterr().err
    assert err.startswith(f"The head of the cluster at {address} is gone. ")
    assert err.count("\n") == 1


def test_a_ray_of_our_own_needs_a_process_that_has_not_loaded_it():
    pytest.importorskip("ray")
    code = "from ensemble.cluster import connect\nconnect.load_ray()\nwith connect.connected('local'): pass"
    done = run_python("-c", code)
    assert done.returncode == 1
    assert "UnavailableError: Ray was loaded in this process before" in done.stderr


@pytest.mark.parametrize("tries", [1, 3, 4])
def test_a_member_whose_process_is_lost_again_and_again_is_given_up(tmp_path, monkeypatch, tries):
    artifacts.dataset_path(tmp_path).write_bytes(b"rows")
    begun(order(tmp_path), tries - 1)
    artifacts.ensure_folder(order(tmp_path).log_path.parent)
    dies = [sys.executable, "-c", "import os; print('loading', flush=True); os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(train_worker, "command", lambda request: dies)
    monkeypatch.setattr(train_worker, "_node", lambda: NODE)
    again = train_worker.WorkerLostError if tries < train_worker.MAX_TRIES else TrainingError
    told = r"^its process ended without a result on .*: killed by signal 9 \(out of memory\?\); it last said: loading "
    with pytest.raises(again, match=told) as raised:
        train_worker.train(order(tmp_path))
    assert type(raised.value) is again
    with pytest.raises(again if tries < train_worker.MAX_TRIES - 1 else TrainingError):
        train_worker.train(order(tmp_path))


def test_a_worker_that_is_lost_again_and_again_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(train_worker, "_node", lambda: NODE)
    artifacts.dataset_path(tmp_path).write_bytes(b"rows")
    begun(order(tmp_path), train_worker.MAX_TRIES)
    with pytest.raises(TrainingError, match=r"^its worker was lost 4 times: fewer members at once"):
        train_worker.train(order(tmp_path))


def test_several_gpus_are_torchrun_and_their_threads_shared(tmp_path):
    one, two = order(tmp_path, cpus=8), order(tmp_path, cpus=8, processes=2)
    assert train_worker.command(one)[1:3] == ["-m", "ensemble.cluster.train_process"]
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "ensemble.cluster.train_process",
    ]
    assert train_worker.command(two)[1:-1] == launcher
    assert json.loads(train_worker.command(two)[-1])["recipe"] == two.recipe
    threads = [train_worker.environment(o)["OMP_NUM_THREADS"] for o in (one, two)]
    assert threads == ["8", "4"]


def test_a_member_s_process_imports_nothing_of_the_working_directory(tmp_path):
    for name in ("random", "ensemble"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(7)")
    call = [sys.executable, "-m", "ensemble.cluster.nodes"]  # light, as a member's is not
    safe = train_worker.environment(order(tmp_path))
    for environment, code in ((safe, 0), (safe | {"PYTHONSAFEPATH": ""}, 7)):
        done = subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr


def test_the_last_words_are_those_of_this_try(tmp_path):
    log = tmp_path / "log"
    log.write_text("ValueError: of last week\n")
    start = log.stat().st_size
    assert train_worker._log_tail(log, start) == ""
    with log.open("a") as file:
        file.write("x" * 10_000 + "\nnow\n")
    assert train_worker._log_tail(log, start) == f"; it last said: now (more in {log})"
    assert train_worker._log_tail(tmp_path / "none", 0) == ""


def test_logs_of_a_killed_job_are_removed_after_a_day(tmp_path):
    old, young, other = (
        artifacts.beside_work_path(tmp_path, name, f"{job}.{train_worker.TASK_LOG}")
        for name, job in (("vit", "a"), ("vit", "b"), ("vit_2", "a"))
    )
    artifacts.ensure_folder(old.parent)
    for path in (old, young, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 90_000,) * 2)
    train_driver._remove_stale_logs(tmp_path, ["vit"])
    assert [path.exists() for path in (old, young, other)] == [False, True, True]


def test_other_machines_say_themselves_in_what_they_compute(monkeypatch):
    monkeypatch.setattr(train_all.precision, "_bf16_capable", lambda device: False)
    for device in ("cpu", "cuda"):
        train_all.check_ready([recipe(precision="bf16")], device, remote=True)
    with pytest.raises(UnavailableError, match="fp16 needs a GPU"):
        train_all.check_ready([recipe(precision="fp16")], "cpu", remote=True)
    with pytest.raises(UnavailableError, match="does not compute in bf16"):
        train_all.check_ready([recipe(precision="bf16")], "cpu")


def test_whole_lines_of_a_log_are_read_once(tmp_path):
    path = tmp_path / "work" / "log"
    assert train_worker.read_lines(path) == ([], 0)
    train_worker.append_line(path, "  epoch 1/3: ü\u2028x")
    with path.open("ab") as file:
        file.write(b"  epoch 2/3")  # not whole yet
    found, end = train_worker.read_lines(path)
    assert found == ["  epoch 1/3: ü x"]
    assert train_worker.read_lines(path, end) == ([], end)
    train_worker.append_line(path, ": done")
    assert train_worker.read_lines(path, end)[0] == ["  epoch 2/3: done"]


def test_the_driver_prints_a_member_s_log_and_where_it_is_trained(tmp_path):
    lines, request = [], order(tmp_path)
    one = task(request)
    train_driver._print_log(one, lines.append)
    assert (lines, one.node_id) == ([], "")
    begun(request, 1)
    with LiveProgress(["vit"], partial(train_worker.append_line, request.log_path), clock=lambda: 0.0) as progress:
        progress.log("  vit: another process trains it; waiting for that one to end")
        progress.begin_member("vit", "cpu")
        progress.on_fit_begin("", epochs=2, steps=100)
        progress.on_epoch_end({"epoch": 1, "train_loss": 0.5, "tune_auroc": 0.75}, better=True)
    train_driver._print_log(one, lines.append)
    assert one.node_id == "1"
    begun(request, 1, first=2)
    train_driver._print_log(one, lines.append)
    train_driver._print_log(one, lines.append)
    assert lines == [
        "[1/1] vit: training on a",
        "  vit: another process trains it; waiting for that one to end",
        "  vit: epoch 1/2: train loss 0.5000, tune AUROC 0.7500, best",
        "[1/1] vit: training on a (try 2)",
    ]


def test_a_member_whose_node_is_gone_is_told_once(tmp_path, monkeypatch):
    lines, one = [], task(order(tmp_path))
    monkeypatch.setattr(train_driver.connect, "nodes", lambda ray: [LARGE])
    train_driver._report_lost_nodes(None, [one], lines.append)
    assert lines == [], "it has not begun"
    one.node_id = SMALL.id
    for _ in range(2):
        train_driver._report_lost_nodes(None, [one], lines.append)
    assert lines == ["  vit: its node is gone; it goes on from its last saved state where there is room"]


def test_a_member_is_trained_by_one_process_at_a_time(tmp_path):
    said, order_of = [], []

    def second():
        with checkpoint.member_lock(tmp_path, "vit", said.append):
            order_of.append("second")

    with checkpoint.member_lock(tmp_path, "vit", said.append), checkpoint.member_lock(tmp_path, "other", said.append):
        assert said == [], "other members are free"
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order_of.append("first")
    thread.join(10)
    assert order_of == ["first", "second"]
    assert said == ["  vit: another process trains it; waiting for that one to end"]


WAITS = """
import sys, time
from ensemble.cluster import train_worker
train_worker.end_with_input()
print("up", flush=True)
while True:
    time.sleep(0.1)
"""


def test_a_training_ends_with_its_pipe():
    command = [sys.executable, "-c", WAITS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        time.sleep(0.5)
        assert process.poll() is None, "not before"
        process.stdin.close()
        assert process.wait(15) != 0
        assert b"KeyboardInterrupt" in process.stderr.read()


def test_an_order_travels_as_json(tmp_path):
    whole = order(tmp_path, report_to=("tensorboard",), local_paths=("/a",))
    assert TrainRequest.from_json(json.dumps(asdict(whole))) == whole
    assert Recipe.model_validate(whole.recipe) == recipe()
