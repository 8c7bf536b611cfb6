"""Two gloo processes on this CPU, as torchrun starts them, against one."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import run_cli
from small_job import ROOT, SHARES

from ensemble.training import distributed
from ensemble.training.distributed import ProcessGroup

SCRIPT = """
import sys
import numpy as np
from ensemble.training import distributed
from ensemble.core.errors import DataError

processes = distributed.init_process_group("cpu")
rows = distributed.shard_indices(processes, 5)
found = distributed.all_gather(processes, rows.astype(np.float32) * 10, 5)
assert found.tolist() == [0, 10, 20, 30, 40], found
assert distributed.run_on_main(processes, lambda: {"rank": processes.rank}) == {"rank": 0}
assert distributed.any_rank(processes, processes.rank == 1)
assert not distributed.any_rank(processes, False)
try:
    distributed.run_on_main(processes, lambda: (_ for _ in ()).throw(DataError("no images")))
except Exception as error:
    assert str(error) == "no images", error
else:
    raise AssertionError
try:
    distributed.run_on_main(processes, lambda: {}["broken"])
except KeyError:
    assert processes.is_main
except distributed.MainProcessError as error:
    assert str(error) == "the first process failed: 'broken'", error
else:
    raise AssertionError
distributed.destroy_process_group()
print(f"rank {processes.rank} of {processes.world_size}\\n", end="", flush=True)
"""


def launched(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def two_processes(*arguments):
    """Exit code, standard output and standard error of each: as torchrun starts them, without its own process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **group, "RANK": rank, "LOCAL_RANK": rank},
            **pipes,
        )
        for rank in ("0", "1")
    ]
    texts = [process.communicate(timeout=280) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def test_alone_there_is_nobody_to_ask():
    alone = ProcessGroup()
    assert alone.is_main
    assert distributed.shard_indices(alone, 3).tolist() == [0, 1, 2]
    values = np.arange(3.0)
    assert distributed.all_gather(alone, values, 3) is values
    assert distributed.run_on_main(alone, lambda: 7) == 7
    assert distributed.any_rank(alone, True)
    assert not distributed.is_launched()


def test_processes_share_rows_values_and_errors(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for rank, (code, out, err) in enumerate(two_processes(script)):
        assert (code, out) == (0, f"rank {rank} of 2\n"), err


@pytest.fixture(scope="module")
def arguments(work):
    """A member without batch norm, whose batches may be cut anywhere, three steps an epoch."""
    data = ("--data", work / "data" / "train.csv", "--group-column", "photo", *SHARES)
    # what is faster is tried out otherwise, and on a busy machine two commands may choose differently
    same = ("--set", "train.precision=fp32", "--set", "train.channels_last=false")
    changes = ("--set", "train.epochs=2", "--set", "train.ema=0.9", "--set", "train.accumulate=1", *same)
    return ("train", work / "recipes" / "tiny_vit.yaml", *data, *changes)


def trained(*arguments):
    """The command in this process, which has loaded torch already."""
    code, out, err = run_cli(*arguments)
    assert code == 0, out + err


def heldout(run):
    return pd.read_parquet(run / "members" / "tiny_vit" / "heldout.parquet")


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone")
    trained(*arguments, "--run", run)
    return run


def test_two_processes_train_the_member_that_one_does(arguments, alone, tmp_path):
    done = launched("cli.py", *arguments, "--run", tmp_path)
    assert done.stdout.count("tiny_vit: training") == 1, "one process talks"
    assert done.stdout.count("epoch 2/2") == 1
    expected, found = heldout(alone), heldout(tmp_path)
    assert list(found["id"]) == list(expected["id"]), "in order, none doubled"
    np.testing.assert_allclose(found["logit"], expected["logit"], atol=1e-3)
    histories = [json.loads((run / "members" / "tiny_vit" / "history.json").read_text()) for run in (alone, tmp_path)]
    scores = [[epoch["tune_log_loss"] for epoch in history["parts"][0]["epochs"]] for history in histories]
    np.testing.assert_allclose(*scores, atol=1e-3)


def test_another_learning_rate_would_show(arguments, alone, tmp_path):
    trained(*arguments, "--set", "train.lr=1e-3", "--run", tmp_path)
    assert np.abs(heldout(alone)["logit"] - heldout(tmp_path)["logit"]).max() > 1e-2


def test_an_error_of_the_first_process_ends_them_all(arguments, tmp_path):
    ended = two_processes("cli.py", *arguments, "--folds", "60", "--run", tmp_path)
    assert [code for code, _, _ in ended] == [2, 2]
    assert "Error: --folds 60: there are only" in ended[0][2]
    assert not (tmp_path / "members").exists()
