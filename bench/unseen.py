"""How well members tell a generator that they were not trained on: AUROC of its test images against all real ones.

    python bench/unseen.py --data DATA/train.csv --test DATA/test.csv --labels DATA/labels.csv
        --generator waifu2x-photo-x2 --recipe recipes/quick/spectrum.yaml --recipe recipes/quick/mobilenet_v2.yaml

The generator's images are left out of the training CSV (id, path, label, generator); the photographs they were made
from stay, as real images. More arguments go to `train`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ensemble.core.bootstrap import score_intervals  # noqa: E402


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, str(ROOT / "cli.py"), *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "test", "labels"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--generator", required=True)
    parser.add_argument("--recipe", type=Path, action="append", required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/unseen"))
    options, more = parser.parse_known_args()
    folder = options.run / options.generator
    folder.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(options.data, dtype={"id": str})
    kept = rows[rows["generator"] != options.generator]
    left_out = len(rows) - len(kept)
    if not left_out:
        sys.exit(f"{options.data} has no images of {options.generator}")
    kept.assign(path=[options.data.parent.resolve() / path for path in kept["path"]]).to_csv(
        folder / "train.csv", index=False
    )
    for recipe in options.recipe:
        run("train", recipe, "--data", folder / "train.csv", "--run", folder, *more)
    run("stack", "--run", folder)
    run("infer", "--run", folder, "--input", options.test, "--members", "--output", folder / "scores.csv")
    truth = pd.read_csv(options.labels, dtype={"id": str}).set_index("id")
    scores = pd.read_csv(folder / "scores.csv", dtype={"id": str}).set_index("id")
    truth = truth.loc[scores.index]
    asked = (truth["label"] == 0) | (truth["generator"] == options.generator)
    truth, scores = truth[asked], scores[asked]
    print(f"\n{options.generator}, {left_out} images left out of training: {int(truth['label'].sum())} test images")
    print(f"against {int((truth['label'] == 0).sum())} real ones; 95 % intervals over groups")
    for name in scores.columns:
        found = score_intervals(
            truth["label"].to_numpy(), scores[name].to_numpy(), truth["group"].to_numpy(dtype=str), names=("auroc",)
        )
        print(f"{name:>20} {found['auroc']}")


if __name__ == "__main__":
    main()
