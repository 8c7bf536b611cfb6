"""The notebook of kaggle-kernel, run as Kaggle would: its own wheels, an environment of its own, no network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import exported_run, read_csv, run_cli, write_csv, write_image
from pictures import PHOTOS, photo_file

pytestmark = pytest.mark.slow

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
IDS = ["007", "é 写真", "1,2", *(Path(name).stem for name in PHOTOS)]
# Kaggle's image has packages of other versions, which must not be used; here they cannot even be imported
OTHER = "raise RuntimeError('a package of the image was imported')"
NO_SOCKETS = """
import socket

def refuse(*arguments, **options):
    raise OSError("the network is closed")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
"""
RUN = """
import json, sys

names = {}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]).replace("/kaggle/input", sys.argv[2]), cell["id"], "exec"), names)
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """What `kaggle-kernel` made, the competition's files, and infer's own scores of them."""
    folder = tmp_path_factory.mktemp("kernel")
    exported_run(folder / "run")
    made = folder / "kaggle"
    code, _, err = run_cli("kaggle-kernel", made, "--run", folder / "run", "--user", "ann", "--python", PYTHON)
    assert code == 0, err
    competition = folder / "input" / "competitions" / "detect-ai"
    for number, name in enumerate(IDS[:3]):
        write_image(competition / "images" / f"{name}.png", 100 * number)
    for name in PHOTOS:
        shutil.copy(photo_file(name), competition / "images" / name)
    write_csv(competition / "test.csv", id=IDS)
    write_csv(competition / "sample_submission.csv", id=IDS, target=["0.5"] * len(IDS))
    shutil.move(made / "dataset", folder / "input" / "manyeyes")
    scored = ("--run", folder / "run", "--input", competition / "test.csv", "--output", folder / "expected.csv")
    assert run_cli("infer", "--onnx", *scored)[0] == 0
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An environment like Kaggle's without a network."""
    folder = tmp_path_factory.mktemp("image") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    packages = folder / "lib" / f"python{PYTHON}" / "site-packages"
    (packages / "sitecustomize.py").write_text(NO_SOCKETS)
    for name in ("PIL", "numpy", "pandas", "click"):
        (packages / f"{name}.py").write_text(OTHER)
    return folder / "bin" / "python"


def closed(python, folder, *arguments):
    """Run in `folder`, with nothing of this environment's; in a network namespace too where that is allowed."""
    apart = ["unshare", "-rn"] if shutil.which("unshare") else []
    if apart and subprocess.run([*apart, "true"], capture_output=True).returncode:
        apart = []
    environment = {"PATH": os.defpath, "HOME": str(folder), "LANG": "C.UTF-8"}
    command = [*apart, *map(str, (python, *arguments))]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_network_is_closed_and_the_images_packages_are_useless(python, tmp_path):
    for statement, message in (
        ("import urllib.request as r; r.urlopen('http://127.0.0.1:9')", "the network is closed"),
        ("import PIL", "a package of the image was imported"),
    ):
        done = closed(python, tmp_path, "-c", statement)
        assert done.returncode == 1
        assert message in done.stderr
    assert closed(python, tmp_path, "-m", "pip", "download", "--retries", "0", "click").returncode != 0


def test_the_notebook_writes_what_infer_writes(python, work, tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    done = closed(python, tmp_path, "run.py", work / "kaggle" / "kernel" / "submission.ipynb", work / "input")
    assert done.returncode == 0, done.stderr
    assert "7 images scored -> scores.csv" in done.stdout
    assert (tmp_path / "submission.csv").read_bytes() == (work / "expected.csv").read_bytes()
    assert list(read_csv(tmp_path / "submission.csv")["id"]) == IDS
    made = json.loads((tmp_path / "submission.csv.json").read_text())["made"]
    assert made["bundle"] == json.loads((work / "run" / "bundle" / "bundle.json").read_text())["digest"]


def test_an_image_that_cannot_be_read_stops_it(python, work, tmp_path):
    broken = shutil.copytree(work / "input", tmp_path / "input")
    (broken / "competitions" / "detect-ai" / "images" / "007.png").write_bytes(b"")
    (tmp_path / "run.py").write_text(RUN)
    done = closed(python, tmp_path, "run.py", work / "kaggle" / "kernel" / "submission.ipynb", broken)
    assert done.returncode == 1
    assert "infer failed" in done.stderr
    assert not (tmp_path / "submission.csv").exists()
