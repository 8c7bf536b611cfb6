"""`infer --engine ray` beside `infer` alone, and two workers beside one, in turns: what Ray costs, and what it brings.

    python bench/cluster_speed.py --output runs/cluster_speed
    python bench/cluster_speed.py --output runs/cluster_speed --kinds swin --images 512 --rounds 1     # to try it

The members are those of bench/full_size.py with random weights (timing does not depend on them), made and exported
here without certificates, so that all run at fp32. The images are links to --photos JPEGs. Each side is the whole
command, with Ray started for it and stopped after it; a Ray with one worker of one core, and all that belongs to it,
is held on one core (taskset), since threads that decode would use a second one that is idle.
  overhead    seconds of the whole command by Ray with one worker on all cores / by infer alone
  scaling     images per second, as infer prints them, of two workers on two cores / of one worker on one core
Every side must write the same scores. It needs the packages of manyeyes[demo,cluster] and two cores.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import full_size  # noqa: E402

SPEED = re.compile(r", ([\d,.]+) images per second$", re.MULTILINE)
ONE_CORE = ("--engine", "ray", "--cpus-per-worker", "1", "--workers")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the bundle, the images and the scores")
    parser.add_argument("--kinds", default="swin_tiny", help=f"members, of: {', '.join(full_size.KINDS)}")
    parser.add_argument("--bundle", type=Path, help="a bundle of your own, in place of --kinds")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--photos", type=int, default=64, help="JPEGs that the images are links to")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--overhead", action="store_true", help="leave out the sides on one core, and so the scaling")
    return parser.parse_args()


def make(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The bundle and the folder of images, kept from before."""
    kinds = arguments.kinds.split(",")
    bundle: Path = arguments.bundle or arguments.output / f"bundle-{'-'.join(kinds)}"
    if not (bundle / "bundle.json").is_file():
        if arguments.bundle:
            sys.exit(f"no bundle at {bundle}")
        folders = [full_size.write_classifier(arguments.output / "hub" / kind, full_size.KINDS[kind]) for kind in kinds]
        members = [f"--member={kind}={folder}" for kind, folder in zip(kinds, folders, strict=True)]
        subprocess.run([sys.executable, ROOT / "cli.py", "export", *members, "--bundle", bundle], check=True)
    photos = full_size.write_photos(arguments.output / "photos", arguments.photos)
    images = arguments.output / f"images-{arguments.images}"
    images.mkdir(exist_ok=True)
    for number in range(arguments.images):
        link = images / f"{number:06}.jpg"
        if not link.is_symlink():
            link.symlink_to(photos[number % len(photos)].resolve())
    return bundle, images


def score(bundle: Path, images: Path, output: Path, cores: int, *more: str) -> tuple[float, float]:
    """Seconds of the whole command on so many cores, and the images per second that it printed."""
    places = ("--bundle", bundle, "--input", images, "--output", output, "--device", "cpu", "--precision", "fp32")
    command = [str(part) for part in (sys.executable, ROOT / "cli.py", "infer", *places, *more)]
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(every)[:cores])
    try:
        began = time.perf_counter()
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"RAY_ADDRESS": ""}
        )
        seconds = time.perf_counter() - began
    finally:
        os.sched_setaffinity(0, every)
    found = SPEED.search(done.stdout)
    if not found:
        sys.exit(f"infer printed no speed:\n{done.stdout}")
    return seconds, float(found[1].replace(",", ""))


def main() -> None:
    arguments = parse()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two cores are needed")
    arguments.output.mkdir(parents=True, exist_ok=True)
    bundle, images = make(arguments)
    cores = len(os.sched_getaffinity(0))
    sides = {
        "alone": (cores, ()),
        "ray, one worker": (cores, ("--engine", "ray", "--workers", "1", "--cpus-per-worker", str(cores))),
    }
    if not arguments.overhead:
        sides["ray, one worker on one core"] = (1, (*ONE_CORE, "1"))
        sides["ray, two workers on two cores"] = (2, (*ONE_CORE, "2"))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    written: dict[str, bytes] = {}
    for _ in range(arguments.rounds):
        for name, (count, more) in sides.items():
            output = arguments.output / f"{name.replace(', ', '-').replace(' ', '-')}.csv"
            found[name].append(score(bundle, images, output, count, *more))
            written[name] = output.read_bytes()
            print(f"{name}: {found[name][-1][0]:.1f} s, {found[name][-1][1]:.1f} images per second", flush=True)
    seconds = {name: statistics.median(taken for taken, _ in each) for name, each in found.items()}
    speeds = {name: statistics.median(speed for _, speed in each) for name, each in found.items()}
    overhead = seconds["ray, one worker"] / seconds["alone"] - 1
    members = arguments.bundle or arguments.kinds
    print(f"{arguments.images} images, {members}, medians of {arguments.rounds} rounds, {cores} cores")
    print(f"overhead of Ray with one worker: {overhead:+.1%} (at most 10 % wanted)")
    same = written["alone"] == written["ray, one worker"]
    if not arguments.overhead:
        scaling = speeds["ray, two workers on two cores"] / speeds["ray, one worker on one core"]
        print(f"two workers beside one: {scaling:.2f} times (at least 1.8 wanted)")
        same &= written["ray, one worker on one core"] == written["ray, two workers on two cores"]
    print(f"the same bytes: {'yes' if same else 'NO'}")


if __name__ == "__main__":
    main()
