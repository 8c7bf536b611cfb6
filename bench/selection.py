"""Does selection find the pool images of the test's own sources among distractors?

    python bench/selection.py --data DATA --photos FOLDER... [--ablate recipes/quick/efficientnet_lite0.yaml]

DATA holds train/train.csv and test/test.csv with test/labels.csv (id, label, group, source, generator). The pool is
its training set mixed into as many crops of the photographs in FOLDER (by default those inside scikit-image and
scikit-learn), half of them as they are and half reduced and enlarged again, which stand in the class ai. Prints how
many of the chosen come from the source of the test image that drew them, against random draws.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ensemble.core.errors import ImageError  # noqa: E402
from ensemble.data.files import list_images  # noqa: E402
from ensemble.data.sources import ReadOptions  # noqa: E402
from ensemble.images import decode  # noqa: E402
from ensemble.selection import ablation, select  # noqa: E402
from ensemble.selection.data import SelectOptions  # noqa: E402
from ensemble.selection.run import SelectionResult, ablate_selection, select_images  # noqa: E402

TILE = 256  # pixels, as the benchmark's own
SMALLEST = 400  # shorter side of a photograph that crops are taken from


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photos", type=Path, nargs="*", default=[])
    parser.add_argument("--embedder", help="as of the command select")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--distractors", type=int, help="how many crops; as many as training images by default")
    parser.add_argument("--draws", type=int, default=20, help="random draws to compare with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ablate", type=Path, metavar="RECIPE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        train = options.data / "train" / "train.csv"
        count = options.distractors or len(pd.read_csv(train))
        distractors = write_distractors(photographs(options.photos), work / "distractors", count, options.seed)
        job = SelectOptions(
            test=options.data / "test" / "test.csv",
            pools=[train, distractors],
            count=options.count,
            output=work / "selection",
            reading=ReadOptions(),
            embedder=options.embedder,
            recipe=options.ablate,
            test_labels=options.data / "test" / "labels.csv",
            seeds=options.seeds,
            overrides=options.overrides,
            seed=options.seed,
        )
        run(job if options.ablate else SelectOptions(**{**vars(job), "test_labels": None}), options)


def run(job: SelectOptions, options: argparse.Namespace) -> None:
    started = time.perf_counter()
    result = select_images(job, lambda line: None)
    data = result.data
    print(f"{len(data.test_items)} test images, {len(data.items)} in the pool, {job.count} chosen")
    print(f"{time.perf_counter() - started:.0f} seconds (features that were kept are not computed again)\n")
    labels = pd.read_csv(options.data / "test" / "labels.csv", dtype={"id": str})
    report(result, labels, options.draws)
    if job.recipe is not None:
        found = ablate_selection(job, result, print)
        print(f"\nOn half B, {found['half_b']} images in {found['half_b_groups']} groups, mean of {job.seeds} seeds:")
        print(ablation.as_table(found).to_string(index=False))
        print("difference in AUROC by seed:", " ".join(f"{x:+.4f}" for x in found["auroc"]["difference_by_seed"]))
        print(ablation.verdict(found))


def photographs(folders: list[Path]) -> list[Image.Image]:
    """The colour photographs below the folders, each at most 2,000 pixels wide or high."""
    if not folders:
        for package, inner in (("skimage", "data"), ("sklearn", "datasets/images")):
            spec = find_spec(package)
            folders += [Path(place) / inner for place in (spec.submodule_search_locations or [])] if spec else []
    found = []
    for folder in folders:
        for path in list_images(folder, Counter()):
            try:
                image = decode.decode(folder / path)
            except ImageError:
                continue
            image.thumbnail((2000, 2000))
            pixels = np.asarray(image.convert("RGB"), dtype=np.int16)
            colour = np.abs(pixels[:, :, 0] - pixels[:, :, 2]).mean()
            if min(image.size) >= SMALLEST and colour > 3:
                found.append(image.convert("RGB"))
    return found


def write_distractors(photos: list[Image.Image], folder: Path, count: int, seed: int) -> Path:
    """CSV of `count` crops, in turn of every photograph, real and ai by turns."""
    rng = np.random.default_rng(seed)
    rows = []
    folder.mkdir(parents=True)
    for number in range(count):
        photo, label = photos[(number // 2) % len(photos)], number % 2
        left, top = (int(rng.integers(0, side - TILE + 1)) for side in photo.size)
        tile = photo.crop((left, top, left + TILE, top + TILE))
        if label:
            small = tile.resize((TILE // 2, TILE // 2), Image.Resampling.BICUBIC)
            tile = small.resize((TILE, TILE), Image.Resampling.BICUBIC)
        name = f"{number:05d}.jpg"
        tile.save(folder / name, quality=int(rng.integers(60, 99)))
        group = f"distractor{(number // 2) % len(photos)}"
        rows.append({"id": f"distractor_{number:05d}", "path": name, "label": label, "group": group})
    frame = pd.DataFrame(rows).assign(
        source="distractors", generator=["none", "bicubic"] * (count // 2) + ["none"] * (count % 2)
    )
    frame.to_csv(folder / "distractors.csv", index=False)
    print(f"{count} distractors from {len(photos)} photographs")
    return folder / "distractors.csv"


def report(result: SelectionResult, labels: pd.DataFrame, draws: int) -> None:
    """Shares of picks from the sources of the test, chosen against drawn at random."""
    source_of = labels.set_index("id")["source"]
    data = result.data
    drawn_by = np.array([source_of[data.test_items[row].id] for row in result.chosen.test_rows])
    pool = np.array([item.source for item in data.items])
    seeds = range(draws)
    picks = {"chosen": [result.chosen.rows], "random draw": [draw(result, seed) for seed in seeds]}
    tests = np.array([source_of[item.id] for item in data.test_items])
    rows = []
    for name, many in picks.items():
        scores = np.array([shares(pool[rows], drawn_by, tests) for rows in many])
        texts = [f"{value:.3f}" for value in scores.mean(axis=0)]
        if len(many) > 1:
            texts = [f"{text} +- {spread:.3f}" for text, spread in zip(texts, scores.std(axis=0, ddof=1), strict=True)]
        rows.append([name, *texts])
    columns = ["", "no distractor", "same source", "same, mean of sources", "overlap of sources"]
    print(pd.DataFrame(rows, columns=columns).to_string(index=False))
    print(
        "\nno distractor: share of picks from the training set; same source: share from the source of the test image\n"
        "that drew it (a random pick is paired with the same test images); mean of sources: that share for the test\n"
        "images of each source, averaged, so that the largest source does not decide; overlap: of the sources' shares\n"
        f"among picks with their shares among test images. Random: mean and deviation over {draws} draws.\n"
    )
    for name, quartiles in result.quartiles.items():
        print(f"1 - cosine, {name}: quartiles {' '.join(f'{value:.3f}' for value in quartiles.values())}")
    drew = pd.Series(result.chosen.test_rows).value_counts()
    print(
        f"{len(drew)} of {len(result.data.test_items)} test images drew something, {drew.max()} at most; "
        f"near-duplicates dropped: {result.dropped_test} of test images, {result.chosen.duplicates} of other chosen "
        "images"
    )


def draw(result: SelectionResult, seed: int) -> np.ndarray:
    data = result.data
    rows = select.random_rows(data.pool, result.counts, seed)
    return np.random.default_rng(seed).permutation(rows)


def shares(picked: np.ndarray, drawn_by: np.ndarray, tests: np.ndarray) -> tuple[float, float, float, float]:
    same = picked == drawn_by
    by_source = [float(same[drawn_by == source].mean()) for source in np.unique(drawn_by)]
    sources = np.unique(np.concatenate([picked, tests]))
    overlap = sum(min(np.mean(picked == source), np.mean(tests == source)) for source in sources)
    return float(np.mean(picked != "distractors")), float(same.mean()), float(np.mean(by_source)), float(overlap)


if __name__ == "__main__":
    main()
