"""The main job on labelled data: seconds and peak memory per stage, then scores on a labelled test set.

    python bench/main_job.py --data DATA/train.csv --test DATA/test.csv --labels DATA/labels.csv

Without --data it makes and uses the demo's own.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ensemble.stacking.scores import format_scores, score_frames, verdict  # noqa: E402


def stage(name: str, *arguments: object) -> dict[str, object]:
    """Run one command; its wall seconds and the peak resident memory of its process, in MiB."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / "cli.py"), *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        sys.exit(f"{name} ended with exit code {code}")
    return {"stage": name, "seconds": round(time.perf_counter() - started, 1), "peak MiB": usage.ru_maxrss // 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--labels", type=Path, help="CSV with id, label and optionally group")
    parser.add_argument("--recipes", type=Path, default=ROOT / "recipes" / "quick")
    parser.add_argument("--run", type=Path, default=Path("runs/bench"))
    options, more = parser.parse_known_args()
    if options.data is None:
        from ensemble.fetch.demo_data import make_demo_data
        from export.commands.demo import TRAINING

        more += TRAINING
        folder = options.run / "data"
        make_demo_data(folder, print)
        options.data, options.test, options.labels = (folder / f"{name}.csv" for name in ("train", "test", "labels"))
    run, onnx, torch = options.run, options.run / "onnx.csv", options.run / "torch.csv"
    test = ("infer", "--run", run, "--input", options.test, "--members")
    stages = [
        stage("train-all", "train-all", options.recipes, "--data", options.data, "--run", run, *more),
        stage("stack", "stack", "--run", run),
        stage("export", "export", "--run", run),
        stage("infer --onnx", *test, "--onnx", "--output", onnx),
        stage("infer (torch)", *test, "--output", torch),
    ]
    print("\n" + pd.DataFrame(stages).to_string(index=False))
    report(onnx, torch, options.labels)


def report(onnx: Path, torch: Path, labels: Path) -> None:
    """Scores of members, mean and stack on the test labels; the largest difference of ONNX and torch."""
    scores, other = (pd.read_csv(path, dtype={"id": str}) for path in (onnx, torch))
    truth = pd.read_csv(labels, dtype={"id": str})
    scored = score_frames(scores, truth)
    groups = truth["group" if "group" in truth else "id"].nunique()
    print(f"\nOn {len(scores)} test images in {groups} groups, 95 % intervals over groups:")
    print(format_scores(scored).to_string(index=False))
    print(verdict(scored))
    difference = np.abs(scores["target"] - other["target"]).max()
    print(f"Largest difference of target, ONNX against torch: {difference:.1e}")


if __name__ == "__main__":
    main()
