"""What each member gets of a cluster, and what is refused before Ray is asked: without Ray."""

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from hashlib import sha256

import pytest
from helpers import run_cli
from hypothesis import given
from hypothesis import strategies as st

from ensemble import artifacts, events, ray_plan, ray_train, ray_worker, unfinished
from ensemble.board import Board
from ensemble.errors import TrainingError, UnavailableError
from ensemble.ray_cluster import Node
from ensemble.ray_worker import Order
from ensemble.recipe import Recipe

SMALL, LARGE = Node("small", 4, id="1", memory=8 * 2**30), Node("large", 16, id="2", gpus=4, memory=64 * 2**30)
NODES = st.lists(st.integers(1, 64), min_size=1, max_size=6).map(
    lambda counts: [Node("n", count, id=str(number)) for number, count in enumerate(counts)]
)


def recipe(name="vit", **train):
    values = {"lr": 1e-3, "epochs": 1, "batch_size": 4, **train}
    return Recipe.model_validate({"name": name, "backbone": {"architecture": "resnet"}, "train": values})


def order(run, **changes):
    digest = artifacts.file_sha256(artifacts.dataset_path(run)) if artifacts.dataset_path(run).exists() else ""
    values = {
        "recipe": recipe().model_dump(mode="json"), "run": str(run), "data_sha256": digest, "folder": str(run),
        "versions": ray_worker.versions(), "device": "cpu", "processes": 1, "cpus": 1, "beside": 1, "seed": 0,
        "report_to": (), "save_minutes": 10.0,
    }  # fmt: skip
    return Order(**values | changes)


def test_the_number_of_gpus_is_no_part_of_what_decides_a_member():
    one, two = recipe(), recipe(gpus=2)
    assert one != two
    assert one.sha256 == two.sha256
    assert unfinished.kind_of_work(one, "", 0, 1) == unfinished.kind_of_work(two, "", 0, 1)
    assert one.sha256 != recipe(seed=2).sha256


@given(st.integers(1, 30), NODES)
def test_cpus_are_as_many_as_let_all_members_run_at_once(members, nodes):
    cpus = ray_plan.cpus_each(members, nodes)

    def at_once(each):
        return sum(node.cpus // each for node in nodes)

    assert cpus == 1 or at_once(cpus) >= members
    assert at_once(cpus + 1) < members


@pytest.mark.parametrize(
    ("members", "nodes", "cpus"), [(1, [SMALL], 4), (2, [SMALL], 2), (9, [SMALL], 1), (2, [SMALL, LARGE], 8)]
)
def test_cpus_of_a_member(members, nodes, cpus):
    assert ray_plan.cpus_each(members, nodes) == cpus


def test_gpus_come_with_their_share_of_cpus_and_weights_with_memory():
    asked = [recipe("one"), recipe("two", gpus=2)]
    weights = {"one": 2**30, "two": 2**40}
    found = ray_plan.shares(asked, weights, [SMALL, LARGE], "cuda")
    assert found["one"] == ray_plan.Share(cpus=4, gpus=1, memory=7 * 2**30)
    assert found["two"] == ray_plan.Share(cpus=8, gpus=2, memory=LARGE.memory), "no more than any node has"
    assert ray_plan.together(found["one"], 9, [SMALL, LARGE]) == 4
    assert [node.name for node in (SMALL, LARGE) if ray_plan.holds(found["one"], node)] == ["large"]
    on_cpus = ray_plan.shares(asked, weights, [SMALL, LARGE], "cpu", cpus_per_member=3)
    assert [(share.cpus, share.gpus) for share in on_cpus.values()] == [(3, 0), (3, 0)]


def test_gpus_are_taken_where_the_cluster_has_any():
    assert ray_plan.check([recipe()], [SMALL], "auto") == "cpu"
    assert ray_plan.check([recipe(gpus=4)], [SMALL, LARGE], "auto") == "cuda"
    assert ray_plan.check([recipe(gpus=9)], [SMALL, LARGE], "cpu") == "cpu"


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
}  # fmt: skip


@pytest.mark.parametrize(("recipes", "nodes", "device", "cpus", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_node_can_give_is_refused(recipes, nodes, device, cpus, message):
    with pytest.raises(UnavailableError) as raised:
        ray_plan.check(recipes, nodes, device, cpus)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (("--address", "head:6379"), {}, "--address needs --engine ray"),
        (("--cpus-per-member", "2"), {}, "--cpus-per-member needs --engine ray"),
        (("--engine", "ray", "--dry-run"), {}, "--dry-run times steps on this machine; leave --engine ray out"),
        (("--engine", "ray"), {"WORLD_SIZE": "1"}, "--engine ray starts the processes itself; start this command with"),
        (("--engine", "ray", "--address", "head"), {}, "--address head is not HOST:PORT, and not auto"),
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
    here, digest = ray_worker.versions(), "0" * 64
    assert "does not see" in ray_worker.problem(here, tmp_path, digest, patience=0)
    path.write_bytes(b"rows")
    assert f"has another {path}; put --run" in ray_worker.problem(here, tmp_path, digest, patience=0)
    assert ray_worker.problem(here, tmp_path, artifacts.file_sha256(path), patience=0) == ""
    other = ray_worker.problem({**here, "torch": "1.0"}, tmp_path, digest, patience=0)
    assert other == f"it has torch {here['torch']} (here 1.0); install the same versions on all nodes"


def test_a_file_that_appears_late_is_waited_for(tmp_path):
    path = artifacts.dataset_path(tmp_path)
    threading.Timer(0.3, path.write_bytes, [b"rows"]).start()
    digest = sha256(b"rows").hexdigest()
    assert ray_worker.problem(ray_worker.versions(), tmp_path, digest, patience=10) == ""


@pytest.mark.parametrize("tries", [1, 3, 4])
def test_a_member_whose_process_is_lost_again_and_again_is_given_up(tmp_path, monkeypatch, tries):
    artifacts.dataset_path(tmp_path).write_bytes(b"rows")
    path = artifacts.beside_work_path(tmp_path, "vit", "events")
    for attempt in range(1, tries):
        events.Events(path).tell("begin", node="a", node_id="1", attempt=attempt)
    artifacts.ensure_folder(path.parent)
    dies = [sys.executable, "-c", "import os; print('loading', flush=True); os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(ray_worker, "command", lambda order: dies)
    monkeypatch.setattr(ray_worker, "_node_id", lambda: "1")
    again = ray_worker.LostError if tries < ray_worker.TRIES else TrainingError
    told = r"^its process ended without a result on .*: killed by signal 9 \(out of memory\?\); it last said: loading "
    with pytest.raises(again, match=told) as raised:
        ray_worker.train(order(tmp_path))
    assert type(raised.value) is again
    with pytest.raises(again if tries < ray_worker.TRIES - 1 else TrainingError):
        ray_worker.train(order(tmp_path))


def test_a_worker_that_is_lost_again_and_again_is_given_up(tmp_path):
    artifacts.dataset_path(tmp_path).write_bytes(b"rows")
    told = events.Events(artifacts.beside_work_path(tmp_path, "vit", "events"))
    for attempt in range(1, ray_worker.TRIES + 1):
        told.tell("begin", node="a", node_id="1", attempt=attempt)
    with pytest.raises(TrainingError, match=r"^its worker was lost 4 times: fewer members at once"):
        ray_worker.train(order(tmp_path))


def test_several_gpus_are_torchrun_and_their_threads_shared(tmp_path):
    one, two = order(tmp_path, cpus=8), order(tmp_path, cpus=8, processes=2)
    assert ray_worker.command(one)[1:3] == ["-m", "ensemble.one_member"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ensemble.one_member"]
    assert ray_worker.command(two)[1:-1] == launcher
    assert json.loads(ray_worker.command(two)[-1])["recipe"] == two.recipe
    threads = [ray_worker.environment(o)["OMP_NUM_THREADS"] for o in (one, two)]
    assert threads == ["8", "4"]


def test_events_carry_to_another_board_what_the_training_tells(tmp_path):
    path, now, lines = tmp_path / "events", [100.0], []
    told = events.Events(path, clock=lambda: now[0])
    told.tell("begin", node="a", node_id="1", attempt=1)
    told.part("", 2, 100)
    for step in range(1, 51):
        now[0] += 0.25
        told.step(step, 1 / step, 1e-3, 8)
    scored = told.scoring("tune", 20)
    for _ in range(20):
        now[0] += 0.25
        scored(1)
    told.epoch({"epoch": 1, "train_loss": 0.5, "tune_auroc": 0.75}, better=True)
    with path.open("ab") as file:
        file.write(b'{"what": "sa')  # not whole yet
    found, end = events.read(path)
    assert events.read(path, end) == ([], end)
    assert sum(event["images"] for event in found if event["what"] == "step") == 400, "none lost"
    assert len(found) < 30, "and few written"
    task, clock = ray_train._Task("vit", tmp_path), ray_train._Clock()
    artifacts.ensure_folder(task.path.parent)
    path.rename(task.path)
    with Board(["vit"], lines.append, clock=clock, several=True) as board:
        ray_train._replay(task, board, clock, {"vit": "[1/1] vit: training on "})
        left = board._running["vit"].line(time.monotonic())
        assert left.startswith("epoch 2/2 on a, step 50/100, loss 0.0200, lr 0.001, 32 images/s, "), left
    assert lines == [
        "[1/1] vit: training on a",
        "  vit: epoch 1/2: train loss 0.5000, tune AUROC 0.7500, best",
    ]


def test_a_member_is_trained_by_one_process_at_a_time(tmp_path):
    said, order_of = [], []

    def second():
        with unfinished.held(tmp_path, "vit", said.append):
            order_of.append("second")

    with unfinished.held(tmp_path, "vit", said.append), unfinished.held(tmp_path, "other", said.append):
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
from ensemble import ray_worker
import threading
threading.Thread(target=ray_worker.end_with_input, daemon=True).start()
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
    whole = order(tmp_path, report_to=("tensorboard",))
    values = json.loads(json.dumps(asdict(whole)))
    assert replace(Order(**values), report_to=tuple(values["report_to"])) == whole
    assert Recipe.model_validate(values["recipe"]) == recipe()
