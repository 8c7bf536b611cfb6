"""Peak memory of `infer` at many images against few: it must not grow with their number.

    python bench/memory.py --images 100000
    python bench/memory.py --images 100000 --bundle runs/default/bundle

The same few JPEGs stand in a CSV under as many ids as are asked for. Without --bundle two tiny graphs score them,
so that the time goes into reading, decoding and writing. Each count runs in a process of its own.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOAL = 1.05
FEW = 1_000
JPEGS = 8
# In a child: what these imports leave in memory would count for `infer`, whose peak starts from its parent's.
MAKE = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/bench"]
import full_size, helpers
folder = Path({folder!r})
full_size.write_photos(folder / "photos", {jpegs})
if {tiny}:
    helpers.exported_run(folder / "run")
"""


def write_rows(folder: Path, count: int) -> Path:
    """A CSV of `count` ids and the photographs' paths in turn."""
    photos = sorted(path.name for path in (folder / "photos").iterdir())
    table = folder / f"{count}.csv"
    with table.open("w") as file:
        file.write("id,path\n")
        file.writelines(f"{row:08},{photos[row % len(photos)]}\n" for row in range(count))
    return table


def infer(folder: Path, count: int, bundle: Path, more: list[str]) -> tuple[int, float]:
    """Peak resident memory in KiB and seconds of `infer` on `count` rows."""
    command = [sys.executable, str(ROOT / "cli.py"), "infer", "--bundle", str(bundle), *more]
    command += ["--input", str(write_rows(folder, count)), "--images", str(folder / "photos")]
    command += ["--output", str(folder / f"{count}.out.csv")]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        sys.exit(f"infer ended with exit code {code}")
    return usage.ru_maxrss, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--bundle", type=Path, help="[default: two tiny graphs]")
    options, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        made = MAKE.format(root=str(ROOT), folder=work, jpegs=JPEGS, tiny=options.bundle is None)
        subprocess.run([sys.executable, "-c", made], check=True)
        bundle = (options.bundle or folder / "run" / "bundle").absolute()
        found = {count: infer(folder, count, bundle, more) for count in (FEW, options.images)}
    for count, (peak, seconds) in found.items():
        print(f"{count:9,} images  peak {peak / 1024:7.0f} MiB  {seconds:7.1f} s  {count / seconds:6.0f} images/s")
    ratio = found[options.images][0] / found[FEW][0]
    print(f"ratio of the peaks {ratio:.3f}, goal below {GOAL}: {'reached' if ratio < GOAL else 'MISSED'}")


if __name__ == "__main__":
    main()
