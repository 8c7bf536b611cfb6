"""What each training option is worth: one recipe with an option changed, over seeds, on labelled test photographs.

    python bench/options.py --data DATA/train.csv --test DATA/test.csv --labels DATA/labels.csv

Every variant trains on the same rows with the same seeds as the base; the table gives its
scores, mean over seeds, and the difference to the base with its 95 % interval over the
groups of the test (paired bootstrap) and by seed. What is done is kept in --output, so an
interrupted run goes on.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

from ensemble.core import metrics  # noqa: E402
from ensemble.core.recipe import load_recipes, recipes_folder  # noqa: E402
from ensemble.data import dataset, sources  # noqa: E402
from ensemble.data.splits import Fractions  # noqa: E402
from ensemble.models.members import load_member  # noqa: E402
from ensemble.models.runner import score_images  # noqa: E402
from ensemble.models.torch_runner import torch_runner  # noqa: E402
from ensemble.selection.ablation import paired_interval  # noqa: E402
from ensemble.training import precision  # noqa: E402
from ensemble.training.distributed import ProcessGroup  # noqa: E402
from ensemble.training.progress import LiveProgress  # noqa: E402
from ensemble.training.train_member import TrainContext, train_member  # noqa: E402

CHAIN = ["augment.chain=[1, 3]", "augment.webp=[50, 100]", "augment.blur=[0, 1.5]", "augment.resize=[0.7, 1.4]"]
CHAIN += ["augment.noise=[0, 0.03]", "augment.crop=[0.8, 1.0]"]
VARIANTS: dict[str, list[str]] = {
    "base": [],
    "ema 0.99": ["train.ema=0.99"],
    "layer decay 0.9": ["train.layer_decay=0.9"],
    "drop path 0.1": ["backbone.drop_path=0.1"],
    "label smoothing 0.1": ["train.label_smoothing=0.1"],
    "no jpeg": ["augment.jpeg=null"],
    "chain of six": CHAIN,
    "no flips or turns": ["augment.flip=false", "augment.quarter_turns=false"],
    "no warm-up": ["train.warmup=0"],
    "constant lr": ["train.schedule=constant"],
    "no clipping": ["train.clip=1e9"],
    "no weight decay": ["train.weight_decay=0"],
    "chosen by log-loss": ["train.tune_score=log_loss"],
    "stem stride 1": ["backbone.stem_stride=1", "image.size=64"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True, help="CSV with id, label and group")
    parser.add_argument("--recipe", type=Path, default=recipes_folder() / "quick" / "mobilenet_v2.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="of every variant")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of: " + ", ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/options"))
    options = parser.parse_args()
    precision.keep_freed_memory()
    labelled, _ = sources.read_data([options.data])
    labelled, indexed = dataset.index_items(labelled)
    frame = dataset.assemble(labelled, indexed, dataset.near_pairs(indexed), Fractions(), 0)
    test = pd.read_csv(options.test, dtype={"id": str}).merge(pd.read_csv(options.labels, dtype={"id": str}), on="id")
    files = [options.test.parent / path for path in test["path"]]
    chosen = [name.strip() for name in options.variants.split(",")]
    logits: dict[str, list[np.ndarray]] = {name: [] for name in chosen}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for seed in range(options.seeds):
        for name in chosen:
            path = options.output / f"{name.replace(' ', '_')}.{seed}.npz"
            if not path.exists():
                overrides = [*options.overrides, *VARIANTS[name]]
                _run(options.recipe, overrides, frame, files, seed, path)
            with np.load(path, allow_pickle=False) as kept:
                logits[name].append(kept["logits"])
                seconds[name].append(float(kept["seconds"]))
    report(logits, seconds, test["label"].to_numpy(), test["group"].to_numpy(dtype=str), options)


def _run(
    recipe_file: Path, overrides: list[str], frame: pd.DataFrame, files: list[Path], seed: int, path: Path
) -> None:
    """Train one variant with one seed and keep its logits of the test images."""
    [recipe] = load_recipes([recipe_file], overrides)
    run, started = path.with_suffix(""), time.monotonic()
    with LiveProgress([recipe.name], lambda line: print(f"{path.stem}:{line}", flush=True)) as progress:
        progress.begin_member(recipe.name, "cpu")
        train_member(recipe, None, frame, run, TrainContext(seed, ProcessGroup(device="cpu")), progress)
    elapsed = time.monotonic() - started
    runner = torch_runner(recipe.name, load_member(run, recipe.name), torch.device("cpu"))
    found, errors = score_images(files, [runner])
    assert not errors, errors  # noqa: S101
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".tmp.npz"), logits=found[:, 0].astype(np.float64), seconds=elapsed)
    os.replace(path.with_suffix(".tmp.npz"), path)


def report(
    logits: dict[str, list[np.ndarray]],
    seconds: dict[str, list[float]],
    labels: np.ndarray,
    groups: np.ndarray,
    options: argparse.Namespace,
) -> None:
    """The table: a row a variant."""
    base, rows = np.stack(logits["base"]), []
    scores = {"AUROC": "auroc", "log-loss": "log_loss"}
    for name, values in logits.items():
        row: dict[str, str] = {"": name}
        for title, score in scores.items():
            interval = partial(paired_interval, score, labels, groups=groups)
            row[title] = f"{interval(np.stack(values), None, resamples=1).value:.4f}"
            if name != "base":
                found = interval(np.stack(values), base)
                row[f"{title}, difference"] = f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        each = [metrics.auroc(labels, a) - metrics.auroc(labels, b) for a, b in zip(values, base, strict=True)]
        row["AUROC by seed"] = " ".join(f"{value:+.3f}" for value in each) if name != "base" else ""
        row["seconds"] = f"{np.mean(seconds[name]):.0f}"
        rows.append(row)
    recipe = " ".join([options.recipe.stem, *options.overrides])
    print(
        f"\n{recipe}; {options.seeds} seeds; {len(labels)} test images in {len(set(groups))} groups; "
        f"torch {torch.__version__}"
    )
    print(pd.DataFrame(rows).fillna("").to_string(index=False))


if __name__ == "__main__":
    main()
