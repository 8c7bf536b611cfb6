"""Near-duplicates: recall by change, false groups among different pictures, seconds and peak memory.

    python bench/duplicates.py [FOLDER...] [--count 10000] [--bases 1000] [--grids 1 2 4 8 16]

Pictures are the photographs of each FOLDER and those inside scikit-image and scikit-learn, whole and cut into
grids of 2, 4, 8 and 16 tiles a side. Tiles of one grid do not overlap, and one of a finer grid is a quarter of
one before it, so each pair that is found is false. (Other grids do overlap; they are good for larger counts.)
Tiles of a single colour are left out: if equal, they are rightly one picture.
"""

import argparse
import io
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from ensemble.images import duplicate_candidates

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ensemble.core.parallel import ordered_map  # noqa: E402
from ensemble.images import near_duplicates  # noqa: E402

SKIMAGE = (
    "astronaut brick camera chelsea coffee coins grass gravel moon motorcycle_left hubble_deep_field retina rocket"
)
SKLEARN = "china flower"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
GRIDS = (1, 2, 4, 8, 16)
SMALLEST = 96  # pixels, the shorter side of a tile
SMALLEST_CHANGED = 160  # of one that is changed
LARGEST = 640  # pixels, what larger ones are reduced to before they are changed
TURNS = list(Image.Transpose)

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def photographs(folders: list[Path]) -> list[Path]:
    names = {"skimage": SKIMAGE.split(), "sklearn": SKLEARN.split()}
    files = []
    for package, chosen in names.items():
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            inside = sorted(Path(spec.origin).parent.glob("*/*.*")) + sorted(Path(spec.origin).parent.glob("*/*/*.*"))
            files += [path for path in inside if path.suffix in SUFFIXES and path.stem in chosen]
    return files + [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES]


def tiles(path: Path, grids: Sequence[int] = GRIDS) -> list[tuple[int, Image.Image]]:
    """(grid, picture) of one photograph."""
    image = Image.open(path).convert("RGB")
    found = []
    for grid in grids:
        width, height = image.width // grid, image.height // grid
        if grid > 1 and min(width, height) < SMALLEST:
            continue
        for y, x in np.ndindex(grid, grid):
            found.append((grid, image.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))))
    return found


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def half(image: Image.Image) -> Image.Image:
    return image.resize((max(image.width // 2, 1), max(image.height // 2, 1)), Image.Resampling.LANCZOS)


def cropped(image: Image.Image, shares: np.ndarray) -> Image.Image:
    left, top, right, bottom = shares * (image.width, image.height, image.width, image.height)
    return image.crop((round(left), round(top), round(image.width - right), round(image.height - bottom)))


def turn(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.transpose(TURNS[rng.integers(len(TURNS))])


def side(rng: np.random.Generator, share: float) -> np.ndarray:
    return np.eye(4)[rng.integers(4)] * share


MIRROR = Image.Transpose.FLIP_LEFT_RIGHT
CHANGES: dict[str, Change] = {
    "JPEG 95": lambda image, _: jpeg(image, 95),
    "JPEG 75": lambda image, _: jpeg(image, 75),
    "JPEG 50": lambda image, _: jpeg(image, 50),
    "half size": lambda image, _: half(image),
    "mirrored": lambda image, _: image.transpose(MIRROR),
    "one of the other 7 turns": turn,
    "2 % off each side": lambda image, _: cropped(image, np.full(4, 0.02)),
    "5 % off each side": lambda image, _: cropped(image, np.full(4, 0.05)),
    "10 % off each side": lambda image, _: cropped(image, np.full(4, 0.1)),
    "5 % off one side": lambda image, rng: cropped(image, side(rng, 0.05)),
    "10 % off one side": lambda image, rng: cropped(image, side(rng, 0.1)),
    "0 to 5 % off each": lambda image, rng: cropped(image, rng.uniform(0, 0.05, 4)),
    "0 to 10 % off each": lambda image, rng: cropped(image, rng.uniform(0, 0.1, 4)),
    "mirror, half, JPEG 60": lambda image, _: jpeg(half(image.transpose(MIRROR)), 60),
    "turn, half, JPEG 60": lambda image, rng: jpeg(half(turn(image, rng)), 60),
    "0 to 5 % off, half, JPEG 60": lambda image, rng: jpeg(half(cropped(image, rng.uniform(0, 0.05, 4))), 60),
    "0 to 5 % off, turn, half, JPEG 60": lambda image, rng: jpeg(
        half(turn(cropped(image, rng.uniform(0, 0.05, 4)), rng)), 60
    ),
}


def versions(job: tuple[int, int, Image.Image]) -> tuple[bool, np.ndarray]:
    """Whether a picture is a whole photograph, and thumbnails of it and each change, uint8 [1 + changes, 32, 32, 3]."""
    seed, grid, image = job
    rng = np.random.default_rng(seed)
    image.thumbnail((LARGEST, LARGEST))
    changed = [near_duplicates.thumbnail(change(image, rng)) for change in CHANGES.values()]
    return grid == 1, np.stack([near_duplicates.thumbnail(image), *changed])


def recall(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """bool [N]: whether image n after the change is found as image n before it."""
    rows = np.arange(len(before))
    a, b = duplicate_candidates.describe(before, rows), duplicate_candidates.describe(after, rows)
    found = {
        i
        for x, y in ((a, b), (b, a))
        for i, _ in near_duplicates.matching_pairs(x, y, lambda image, other: image == other)
    }
    equal = (before == after).all(axis=(1, 2, 3))
    return equal | np.isin(rows, list(found))


def groups_of(count: int, pairs: list[tuple[int, int]]) -> str:
    sizes = [size for size in Counter(near_duplicates.connected_components(count, pairs)).values() if size > 1]
    return f"{sum(sizes)} images in {len(sizes)} groups, the largest of {max(sizes, default=0)}"


def pictures(files: list[Path], grids: Sequence[int]) -> Iterator[tuple[int, int, Image.Image]]:
    """(photograph, grid, picture) of all."""
    for photo, found in enumerate(ordered_map(lambda path: tiles(path, grids), files)):
        yield from ((photo, grid, picture) for grid, picture in found)


def report_false_groups(thumbnails: np.ndarray, photo: np.ndarray) -> None:
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file.name, thumbnails)
        thumbs = np.load(file.name, mmap_mode="r")
        hashes = [near_duplicates.perceptual_hash(thumb) for thumb in thumbs]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started, busy = time.perf_counter(), time.process_time()
        pairs = near_duplicates.near_duplicates(hashes, thumbs)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(f"{len(photo):,} different pictures of {len(set(photo))} photographs:")
    print(f"  {seconds:.1f} s ({busy:.1f} s of one core), {more:.0f} MiB of memory more")
    different = [(a, b) for a, b in pairs if photo[a] != photo[b]]
    same = [(a, b) for a, b in pairs if photo[a] == photo[b]]
    print("False groups, of different photographs:", groups_of(len(photo), different))
    print("False groups, of tiles of one photograph:", groups_of(len(photo), same))


def report_recall(whole: np.ndarray, stacks: np.ndarray) -> None:
    print(f"\nRecall in % of                       {whole.sum():>6} photographs {(~whole).sum():>6} tiles")
    for number, name in enumerate(CHANGES, start=1):
        found = recall(stacks[:, 0], stacks[:, number])
        print(f"{name:<36}{100 * found[whole].mean():>18.2f}{100 * found[~whole].mean():>13.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=10_000, help="different pictures, at most")
    parser.add_argument(
        "--bases", type=int, default=1000, help="tiles drawn to be changed, beside the photographs; 0: none"
    )
    parser.add_argument("--grids", nargs="+", type=int, default=GRIDS, help="tiles a side")
    options = parser.parse_args()
    files = photographs(options.folders)
    rng = np.random.default_rng(0)

    all_photos, thumbnails = [], []
    for photo, _, picture in pictures(files, options.grids):
        thumb = near_duplicates.thumbnail(picture)
        if np.ptp(thumb.reshape(-1, 3), axis=0).max() > 1:
            all_photos.append(photo)
            thumbnails.append(thumb)
    chosen = np.sort(rng.permutation(len(thumbnails))[: options.count])
    report_false_groups(np.stack([thumbnails[i] for i in chosen]), np.array(all_photos)[chosen])

    if not options.bases:
        return
    share = options.bases / len(thumbnails)
    jobs = (
        (seed, grid, picture)
        for seed, (_, grid, picture) in enumerate(pictures(files, options.grids))
        if grid == 1 or (min(picture.size) >= SMALLEST_CHANGED and rng.random() < share)
    )
    whole, stacks = zip(*ordered_map(versions, jobs), strict=True)
    report_recall(np.array(whole), np.stack(stacks))


if __name__ == "__main__":
    main()
