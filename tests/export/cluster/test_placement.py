"""Workers for a cluster, tasks for workers, and the options that ask for them; no Ray runs."""

import PIL
import pytest
from helpers import ROOT, exported_run, run_cli, run_python, write_image
from hypothesis import given
from hypothesis import strategies as st

from ensemble.cluster.nodes import check_versions, node_versions
from ensemble.core.errors import UnavailableError
from export.cluster.driver import split_tasks
from export.cluster.placement import ClusterOptions, Node, WorkerPool, plan_workers

PLAIN = (Node("a", 8), Node("b", 4))
WITH_GPUS = (Node("head", 4), Node("a", 16, 4), Node("b", 16, 2))


def size(nodes, gpus_may=True, gpus_must=False, **asked):
    return plan_workers(nodes, ClusterOptions(**asked), gpus_may, gpus_must)


@pytest.mark.parametrize(
    ("nodes", "asked", "expected"),
    [
        (PLAIN, {}, WorkerPool(2, 4, 0)),
        (PLAIN, {"workers": 3}, WorkerPool(3, 4, 0)),
        (PLAIN, {"workers": 4}, WorkerPool(4, 2, 0)),
        (PLAIN, {"workers": 1}, WorkerPool(1, 4, 0)),
        (PLAIN, {"cpus": 1}, WorkerPool(12, 1, 0)),
        (PLAIN, {"cpus": 6}, WorkerPool(1, 6, 0)),
        (PLAIN, {"cpus": 2, "workers": 5}, WorkerPool(5, 2, 0)),
        (WITH_GPUS, {}, WorkerPool(6, 4, 1)),
        (WITH_GPUS, {"gpus": 0.5}, WorkerPool(12, 2, 0.5)),
        (WITH_GPUS, {"gpus": 2}, WorkerPool(3, 8, 2)),
        (WITH_GPUS, {"gpus": 0}, WorkerPool(3, 4, 0)),
        (WITH_GPUS, {"workers": 2}, WorkerPool(2, 16, 1)),
        (WITH_GPUS, {"gpus_may": False}, WorkerPool(3, 4, 0)),
    ],
)
def test_workers_share_what_there_is(nodes, asked, expected):
    assert size(nodes, **asked) == expected


@pytest.mark.parametrize(
    ("nodes", "asked", "message"),
    [
        (PLAIN, {"gpus": 1}, "no node has room for a worker of 1 core and 1 GPU: the cluster has 12 cores and 0 GPUs"),
        (PLAIN, {"gpus_must": True}, "members should run on GPUs, and the cluster has 12 cores and 0 GPUs on 2 nodes"),
        (WITH_GPUS, {"gpus": 0, "gpus_must": True}, "members should run on GPUs"),
        (WITH_GPUS, {"gpus": 8}, "no node has room for a worker of 1 core and 8 GPUs: the cluster has 36 cores and 6"),
        (WITH_GPUS, {"gpus": 1.5}, "--gpus-per-worker 1.5: above 1 only whole GPUs"),
        *(
            (WITH_GPUS, {"gpus": gpus}, f"--gpus-per-worker is 0, or from 0.0001 on, not {gpus:g}")
            for gpus in (float("inf"), float("nan"), 1e-05)
        ),
        (WITH_GPUS, {"workers": 7}, "there is no room for 7 workers of 1 core and 1 GPU, only for 6: the cluster has"),
        (PLAIN, {"workers": 13}, "there is no room for 13 workers of 1 core, only for 12: the cluster has 12 cores"),
        (
            PLAIN,
            {"cpus": 9},
            "no node has room for a worker of 9 cores: the cluster has 12 cores and 0 GPUs on 2 nodes",
        ),
        ((), {}, "no node has room for a worker of 1 core: the cluster has 0 cores and 0 GPUs on 0 nodes"),
    ],
)
def test_more_than_there_is_room_for_is_told_with_what_there_is(nodes, asked, message):
    with pytest.raises(UnavailableError) as error:
        size(nodes, **asked)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


machines = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 4)), min_size=1, max_size=4)
maybe = st.none() | st.integers(1, 9)


@given(machines, maybe, maybe, st.sampled_from([None, 0.0, 0.25, 0.5, 1.0, 2.0]))
def test_whatever_is_asked_has_room_or_is_refused(machines, workers, cpus, gpus):
    nodes = [Node(str(number), *machine) for number, machine in enumerate(machines)]
    try:
        found = size(nodes, workers=workers, cpus=cpus, gpus=gpus)
    except UnavailableError:
        return
    assert found.workers == workers or (workers is None and found.workers > 0)
    assert found.cpus == cpus or (cpus is None and found.cpus > 0)
    per = {0.0: None, 0.25: 4, 0.5: 2, 1.0: 1, 2.0: 0.5}[found.gpus]
    room = sum(min(n.cpus // found.cpus, n.cpus if per is None else int(n.gpus * per)) for n in nodes)
    assert room >= found.workers


@given(st.sets(st.integers(0, 200)), st.integers(1, 9))
def test_tasks_are_the_missing_shards_in_order_and_enough_for_all_workers(shards, workers):
    parts = split_tasks(sorted(shards), workers)
    assert [shard for part in parts for shard in part] == sorted(shards)
    assert all(1 <= len(part) <= 8 for part in parts)
    assert len(parts) >= min(len(shards), 4 * workers)


def test_many_shards_are_few_tasks():
    assert [len(part) for part in split_tasks(range(1000), 2)] == [8] * 125
    assert [len(part) for part in split_tasks([0, 1, 5, 6, 7], 1)] == [1] * 5
    assert [len(part) for part in split_tasks([*range(8), *range(20, 28)], 1)] == [4] * 4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    run = exported_run(tmp_path_factory.mktemp("run"))
    write_image(run / "images" / "a.png")
    return ["infer", "--bundle", run / "bundle", "--input", run / "images", "--output", run / "out.csv"]


@pytest.mark.parametrize(
    "option", ["--address=auto", "--workers=2", "--cpus-per-worker=1", "--gpus-per-worker=0.5", "--gpus-per-worker=0"]
)
def test_options_of_a_cluster_need_one(bundle, option):
    code, _, err = run_cli(*bundle, option)
    assert code == 2
    assert f"Error: {option.partition('=')[0]} is for a Ray cluster: add --engine ray" in err


def test_a_cluster_runs_bundles_alone(tmp_path):
    code, _, err = run_cli("infer", "--input", tmp_path, "--engine", "ray")
    assert code == 2
    assert "Error: --engine ray runs a bundle: add --onnx, or name one with --bundle" in err


@pytest.mark.parametrize("option", ["--input", "--images"])
def test_what_lies_in_one_process_is_no_input_for_several(tmp_path, option):
    code, _, err = run_cli("infer", "--bundle", tmp_path, option, "memory://a/b", "--engine", "ray")
    assert code == 2
    assert "Error: memory:// is of one process alone" in err


def test_versions_differ_by_sources_and_libraries_not_by_how_ours_are_installed():
    here = {"manyeyes": "0.1.0 (0a1b)", "Pillow": "13.0", "numpy": "2.4"}
    check_versions("node (ip)", here, here | {"manyeyes": "none (0a1b)"})
    with pytest.raises(UnavailableError) as error:
        check_versions("node (ip)", here, here | {"manyeyes": "0.1.0 (ffff)", "numpy": "2.3"})
    assert str(error.value).startswith(
        "node (ip) has other versions: manyeyes 0.1.0 (ffff) there, 0.1.0 (0a1b) here; numpy 2.3 there, 2.4 here; "
    )


def test_what_is_here_is_told_by_the_standard_library_alone(tmp_path):
    """On a machine that has nothing of ours, too."""
    source = (ROOT / "ensemble/cluster/nodes.py").read_text(encoding="utf-8")
    (tmp_path / "seen.py").write_text(f"{source}\nprint(node_versions(['Pillow']))", encoding="utf-8")
    done = run_python("-S", "-I", tmp_path / "seen.py")
    assert done.returncode == 0, done.stderr
    assert "'Pillow': 'none'" in done.stdout
    assert node_versions(["Pillow"])["Pillow"] == PIL.__version__
    assert node_versions([])["manyeyes"] not in done.stdout


def test_without_ray_it_is_named(bundle):
    blocked = "import sys; sys.modules['ray'] = None; import cli; cli.main()"
    done = run_python("-c", blocked, *bundle, "--engine", "ray")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: Ray is not installed; run: pip install 'manyeyes[cluster]'\n"
    done = run_python("-c", blocked, *bundle)
    assert done.returncode == 0, done.stderr


def test_scoring_on_one_machine_imports_no_ray(bundle):
    code = "import sys, cli\ntry:\n    cli.main()\nfinally:\n    assert 'ray' not in sys.modules"
    done = run_python("-c", code, *bundle)
    assert done.returncode == 0, done.stderr
