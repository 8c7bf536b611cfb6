"""What a list of many images takes where `infer` was started, before and after they are scored: no image is read.

    python bench/long_list.py --rows 2000000

Rows of tars in a store are listed to a file and looked through for ids given twice, as `infer` does, in a process of
its own; then one shard of the journal with five members and a CSV of 10,000 scores are written, to see their sizes.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from ensemble.data import image_list  # noqa: E402
from export.inference import journal, outputs  # noqa: E402

TAR = 20_000  # images


def listed(count: int, place: Path) -> None:
    """List `count` rows to `place`, and tell what it took."""
    began = time.perf_counter()
    found = (
        image_list.ImageEntry(
            f"{row:09}", f"s3://bucket/shards/{row // TAR:05}.tar:{row:09}.jpg", 47_104, -1, row % TAR * 47_616 + 512
        )
        for row in range(count)
    )
    kept = image_list.write_list(found, place)
    repeated = len(list(image_list.ids_that_may_repeat(kept)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = time.perf_counter() - began
    print(f"{count:,} rows, {repeated} ids that may repeat: {place.stat().st_size / count:.1f} bytes a row on disk, "
          f"peak {peak:.0f} MiB, {seconds:.1f} s")  # fmt: skip


def sizes(folder: Path) -> None:
    """Tell the bytes of a shard with five members, and of a line of scores."""
    draw = np.random.default_rng(0)
    names = [f"{row:09}" for row in range(10_000)]
    members = ("swin_tiny", "swinv2_tiny", "vit_base_clip_384", "swin_base", "convnext_large_384")
    opened = journal.Journal(folder, members, journal.SHARD_ROWS, "0" * 64)
    logits = draw.normal(size=(journal.SHARD_ROWS, len(members))).astype(np.float32)
    shard = opened.encode(0, journal.ScoredBatch(names[: journal.SHARD_ROWS], logits, {}))
    outputs.write_scores(folder / "scores.csv", [pd.DataFrame({"id": names, "target": draw.random(len(names))})])
    line = (folder / "scores.csv").stat().st_size / len(names)
    print(f"a shard of {opened.count} rows and five members: {len(shard):,} bytes; a line of scores: {line:.1f} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--listed", type=Path, help=argparse.SUPPRESS)  # in the child
    arguments = parser.parse_args()
    if arguments.listed:
        listed(arguments.rows, arguments.listed)
        return
    with tempfile.TemporaryDirectory() as folder:
        for count in (1_000, arguments.rows):
            place = Path(folder) / f"{count}.arrow"
            subprocess.run([sys.executable, __file__, "--rows", str(count), "--listed", str(place)], check=True)
        sizes(Path(folder))


if __name__ == "__main__":
    main()
