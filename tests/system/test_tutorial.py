"""docs/tutorial.ipynb, as a reader would run it: its code cells in order, in one namespace, in an empty folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"
KEPT = 20_000  # bytes of outputs that a page may carry


def cells_of(notebook):
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def code_of(notebook):
    """Sources of the code cells, in order."""
    return ["".join(cell["source"]) for cell in cells_of(notebook) if cell["cell_type"] == "code"]


def run_cells(sources, folder):
    """What a fresh Python says that executes the sources one after the other in `folder`."""
    script = (
        "import json, sys\nspace = {'__name__': '__main__'}\nfor cell in json.load(sys.stdin):\n    exec(cell, space)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=900,
        check=False,
    )


def test_the_notebook_is_valid_and_small():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    outputs = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(json.dumps(outputs)) < KEPT
    for source in code_of(NOTEBOOK):
        compile(source, NOTEBOOK.name, "exec")


def test_cells_share_a_namespace_and_a_broken_one_is_seen(tmp_path):
    assert run_cells(["a = 1", "print(a + 1)"], tmp_path).stdout == "2\n"
    broken = run_cells(["a = 1", "print(b)"], tmp_path)
    assert broken.returncode == 1
    assert "NameError" in broken.stderr


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(tmp_path):
    done = run_cells(code_of(NOTEBOOK), tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "no shortcut found" in done.stdout
    assert "The stack" in done.stdout
    assert "160 rows, 0 unreadable" in done.stdout
    difference = done.stdout.split("largest difference to infer: ")[1].split()[0]
    assert float(difference) < 1e-5
    assert "blur 1" in done.stdout
    assert "P(ai)" in done.stdout
    assert (tmp_path / "explain.png").is_file()
    scores = pd.read_csv(tmp_path / "scores.csv")
    labels = pd.read_csv(tmp_path / "data" / "labels.csv")
    assert scores["id"].tolist() == labels["id"].tolist()
    assert scores["target"][labels["label"] == 1].mean() > scores["target"][labels["label"] == 0].mean() + 0.3
