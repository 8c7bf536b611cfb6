"""`infer` by the full stack and by the cascade in turns: images per second, and AUROC on labelled images.

    python bench/cascade.py --run runs/default --data data/labelled.csv --rounds 5

--data is a folder with one folder a class, or a CSV with id or path, label and optionally group: images that no member
was trained on. The run's bundle is exported first if it is out of date. Speeds are those that infer prints, decoding
and preparing included, loading left out; AUROC's difference has its 95 % interval over groups.
"""

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ensemble.commands import options  # noqa: E402
from ensemble.core import bootstrap  # noqa: E402
from ensemble.core.errors import ManyeyesError  # noqa: E402
from ensemble.data import sources  # noqa: E402
from ensemble.data.sources import LabelledImage  # noqa: E402

SPEED = re.compile(r", ([\d,.]+) images per second$", re.MULTILINE)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=Path, help="where a CSV's images lie")
    parser.add_argument("--group-column", default="group")
    parser.add_argument("--tolerance", default="0.001")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=1, help="score each image so many times, where there are few")
    parser.add_argument("infer", nargs="*", help="further options of infer, after --")
    return parser.parse_args()


def score(arguments: argparse.Namespace, listed: Path, output: Path, *more: str) -> str:
    """Run infer once; what it printed."""
    given = ("--run", arguments.run, "--onnx", "--input", listed, "--output", output, *more, *arguments.infer)
    command = [sys.executable, ROOT / "cli.py", "infer", *given]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"infer ended with exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def measure(
    arguments: argparse.Namespace, items: list[LabelledImage]
) -> tuple[dict[str, list[float]], dict[str, np.ndarray], str]:
    """Images per second by round, the targets of the images, and what the cascade's last run printed."""
    ways = {"full stack": (), "cascade": ("--cascade", arguments.tolerance)}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    targets, printed = {}, ""
    with TemporaryDirectory() as place:
        listed = Path(place) / "images.csv"
        paths = [str(item.file.absolute()) for item in items] * arguments.repeat
        pd.DataFrame({"id": range(len(paths)), "path": paths}).to_csv(listed, index=False)
        for number in range(arguments.rounds):
            for name, more in ways.items():
                output = Path(place) / f"{name}.parquet"
                printed = score(arguments, listed, output, *more)
                speeds[name].append(float(SPEED.findall(printed)[0].replace(",", "")))
                targets[name] = pd.read_parquet(output)["target"].to_numpy()[: len(items)]
                print(f"round {number + 1}, {name}: {speeds[name][-1]:,.1f} images per second", flush=True)
    return speeds, targets, printed


def main() -> None:
    arguments = parse()
    items, notes = sources.read_data(
        [arguments.data], sources.ReadOptions(arguments.images, group_column=arguments.group_column)
    )
    print("\n".join(notes))
    speeds, targets, printed = measure(arguments, items)
    labels = np.array([item.label for item in items])
    groups = [item.id if item.group is None else item.group for item in items]
    auroc = {
        name: bootstrap.score_intervals(labels, p, groups, names=("auroc",))["auroc"] for name, p in targets.items()
    }
    lost = bootstrap.paired_difference(labels, targets["full stack"], targets["cascade"], groups).difference
    print("\n" + printed)
    options.table(
        pd.DataFrame(
            [
                {"": name, "images/s": f"{statistics.median(speeds[name]):,.1f}", "AUROC": str(auroc[name])}
                for name in targets
            ]
        )
    )
    ratios = [b / a for a, b in zip(*speeds.values(), strict=True)]
    print(
        f"The cascade is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f} in "
        f"{len(ratios)} rounds) and loses {lost} of AUROC on {len(items):,} images of {len(set(groups)):,} groups."
    )


if __name__ == "__main__":
    try:
        main()
    except ManyeyesError as error:
        sys.exit(f"Error: {error}")
