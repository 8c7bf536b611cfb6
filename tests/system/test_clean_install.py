"""`pip install .` without extras, in an environment of its own, scores a bundle."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, STACKER, expected_logits, exported_run, read_csv, write_image

pytestmark = pytest.mark.slow

TRAINING = ("torch", "torchvision", "transformers", "timm", "sklearn", "onnx", "safetensors", "scipy")
FACTS = """
import importlib.metadata, importlib.util, json, sys

print(json.dumps({
    "present": [name for name in sys.argv[1:] if importlib.util.find_spec(name)],
    "packages": sorted(found.name.lower() for found in importlib.metadata.distributions()),
    "own": [str(path) for path in importlib.metadata.files("manyeyes")],
    "folder": next(path for path in sys.path if path.endswith("site-packages")),
}))
"""
NOTEBOOK = """
import sys
import pandas as pd
from export import Predictor

frame = pd.DataFrame({"id": ["b", "a"]})
print(*Predictor.load(sys.argv[1], device="cpu").predict(frame, images=sys.argv[2])["target"].map(repr))
"""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a fresh environment's commands; the environment, about 1 GB, goes afterwards."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", ROOT], check=True)
    yield folder / "bin"
    shutil.rmtree(folder)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    exported_run(tmp_path / "run")
    for name, brightness in (("a", 30), ("b", 220)):
        write_image(tmp_path / "images" / f"{name}.png", brightness)
    return tmp_path


def called(work: Path, *command: object) -> str:
    """What a command prints; nothing of this repository is on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    texts = list(map(str, command))
    return subprocess.run(texts, cwd=work, env=environment, check=True, capture_output=True, text=True).stdout


def targets(work: Path) -> np.ndarray:
    files = [work / "images" / name for name in ("a.png", "b.png")]
    return STACKER.target(expected_logits(files))


def test_nothing_of_training_is_installed_and_one_onnxruntime(clean, work):
    facts = json.loads(called(work, clean / "python", "-c", FACTS, *TRAINING))
    assert facts["present"] == []
    page = {path.name for path in (Path(facts["folder"]) / "export" / "web" / "page").iterdir()}
    assert page == {"index.html", "page.js", "style.css"}
    own = {path.parts[0] for path in map(Path, facts["own"]) if not path.parts[0].endswith(".dist-info")}
    assert own == {"cli.py", "ensemble", "export", "..", "__pycache__"}  # no docs, no tests; .. is the command
    assert len({"onnxruntime", "onnxruntime-gpu"} & set(facts["packages"])) == 1
    sizes = {path: path.lstat().st_size for path in Path(facts["folder"]).rglob("*") if path.is_file()}
    total = sum(size for path, size in sizes.items() if "__pycache__" not in path.parts) / 1e6
    print(f"\ninstalled: {total:.0f} MB in {len(facts['packages'])} packages")
    assert total < 1200


@pytest.mark.parametrize("command", [["manyeyes"], ["python", "-m", "cli"]])
def test_a_bundle_is_scored_by_the_command(clean, work, command):
    options = ["infer", "--onnx", "--run", "run", "--input", "images", "--output", "out.csv"]
    said = called(work, clean / command[0], *command[1:], *options)
    assert "2 images scored -> out.csv" in said
    scored = read_csv(work / "out.csv")
    assert list(scored["id"]) == ["a.png", "b.png"]
    np.testing.assert_allclose(scored["target"].astype(float), targets(work), atol=1e-6)


def test_a_bundle_is_scored_from_python(clean, work):
    printed = called(work, clean / "python", "-c", NOTEBOOK, work / "run" / "bundle", work / "images")
    np.testing.assert_allclose([float(value) for value in printed.split()], targets(work)[::-1], atol=1e-6)
