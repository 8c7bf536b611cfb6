#!/usr/bin/env python3
"""Indexing a folder against a plain Pillow loop in the same run, and its peak memory as the folder grows.

    python bench/index.py [FOLDER] [--counts 10000,100000]

FOLDER holds any images (default: the photographs of installed packages, cut into tiles);
larger counts are links to the same images. Each stage runs in a process of its own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STAGES = {
    "pillow": "plain Pillow loop (open, decode, SHA-256, thumbnail)",
    "first": "index, first pass",
    "again": "index, second pass, from the cache",
    "groups": "index from the cache, then groups and splits",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--counts", default="10000,100000")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        measure(options.stage, options.folder)
        return
    with tempfile.TemporaryDirectory() as work:
        folder = options.folder or cut_tiles(Path(work) / "tiles")
        for count in map(int, options.counts.split(",")):
            compare(folder, count, Path(work) / str(count))


def compare(folder: Path, count: int, work: Path) -> None:
    """Run every stage on `count` links to the folder's images and print them beside the plain loop."""
    links(folder, count, work)
    print(f"{count:,} files, links to {len(images_of(folder)):,} images, {os.cpu_count()} cores")
    environment = os.environ | {"MANYEYES_CACHE": str(work / "cache")}
    plain = 0.0
    for stage, what in STAGES.items():
        command = [sys.executable, __file__, str(work / "links"), "--stage", stage]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        values = json.loads(done.stdout.splitlines()[-1])
        plain = plain or values["seconds"]
        print(
            f"  {what:55}{values['seconds']:8.1f} s {count / values['seconds']:8.0f} files/s "
            f"{plain / values['seconds']:6.2f}x {values['mib']:6.0f} MiB"
        )


def measure(stage: str, folder: Path) -> None:
    """One stage, in this process: seconds and peak MiB as JSON."""
    files = images_of(folder)
    started = time.perf_counter()
    if stage == "pillow":
        plain_loop(files)
    else:
        from ensemble.data import dataset
        from ensemble.data.sources import LabelledImage
        from ensemble.data.splits import Fractions

        names = [path.relative_to(folder).as_posix() for path in files]
        # one label for all copies of an image
        items = [LabelledImage(name, str(folder), name, hash_label(name)) for name in names]
        kept, indexed = dataset.index_items(items)
        if stage == "groups":
            near = dataset.near_pairs(indexed)
            frame = dataset.assemble(kept, indexed, near, Fractions(), 0, check=False)
            print(f"{frame['group'].nunique()} groups")
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def hash_label(name: str) -> int:
    """A label by the image that a link leads to."""
    return int(name.rpartition("_")[2].partition(".")[0]) % 2


def plain_loop(files: list[Path]) -> None:
    """What a user would write: open, decode, hash, keep a thumbnail."""
    from hashlib import sha256

    from PIL import Image

    for file in files:
        data = file.read_bytes()
        sha256(data).hexdigest()
        with Image.open(file) as image:
            image.convert("RGB").resize((32, 32), Image.Resampling.BOX).tobytes()


def images_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".jpg", ".png"} and p.is_file())


def links(folder: Path, count: int, work: Path) -> None:
    (work / "links").mkdir(parents=True)
    files = images_of(folder)
    for number in range(count):
        source = files[number % len(files)].resolve()
        (work / "links" / f"{number // len(files):05}_{number % len(files)}{source.suffix}").symlink_to(source)


def cut_tiles(folder: Path, side: int = 256) -> Path:
    """JPEG tiles of the photographs that scikit-image and scikit-learn ship."""
    from ensemble.fetch.demo_data import packaged_photos

    folder.mkdir(parents=True)
    for name, photo in packaged_photos().items():
        for top in range(0, photo.height - side + 1, side // 2):
            for left in range(0, photo.width - side + 1, side // 2):
                tile = photo.crop((left, top, left + side, top + side))
                tile.save(folder / f"{name}_{top}_{left}.jpg", quality=90)
    return folder


if __name__ == "__main__":
    main()
