"""What scoring many images costs, in time and money, from measured images per second: numbers in, tables out.

    python bench/cluster_cost.py                               # the tables of docs/cluster.md
    python bench/cluster_cost.py --price 0.03 --images 1e7     # dollars an hour of a core, images in all
    python bench/cluster_cost.py --mine 250 1 2.50             # your own: images per second, on how many cores
                                                               # or GPUs, dollars an hour of each

Every figure in MEASURED and below it is measured, with where it is written down; prices are assumptions.
  hours of a core or GPU   images / (images per second / cores or GPUs) / 3600
  cost                     those hours * dollars an hour
  needed for a day         those hours / 24, rounded up
So twice the cores are taken to be twice as fast, which is not measured across machines.
"""

import argparse
from math import ceil
from typing import NamedTuple


class Speed(NamedTuple):
    """Images per second of `infer`, files to scores, on so many cores or GPUs; dollars an hour of one, if known."""

    name: str
    images: float
    units: float = 2
    price: float | None = None


MEASURED = (  # two cores of an AMD EPYC with AVX-512: bench/results/inference_speed.txt (int8's run), cascade.txt
    Speed("five full-size members, fp32 (ONNX Runtime's sessions in turn)", 0.93),
    Speed("the same by `infer`, bf16", 1.67),
    Speed("the same by `infer`, int8", 2.79),
    Speed("eight quick members, fp32", 23.3),
    Speed("the same, `--cascade 0.002`", 46.7),
    Speed("EfficientNet-Lite1 and the spectrum, cascade 0.01 (a point of `frontier`)", 107.9),
)
IMAGE = 46 * 1024  # bytes of a JPEG of 512x384: bench/results/prepare.txt
PIXELS = 8.08e-3  # seconds of a core to decode one and resize it for the five members: the same
ROW, SHARD, LINE = 91.1, 6_616, 22.0  # bytes: bench/results/long_list.txt
SHARD_ROWS = 128  # export/inference/journal.py
BLOCK = 4 << 20  # bytes of a request for tars: ensemble/data/storage.py
DAY = 86_400
NETWORKS = (10, 25, 100)  # Gbit/s
DISKS = (0.1e9, 1e9)  # bytes per second
GETS, GET, LIST = 5_500, 0.0004 / 1_000, 0.005 / 1_000  # AWS's for S3: per second and prefix; dollars


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=float, default=1e9)
    parser.add_argument("--job", type=float, default=1e7, help="images of one command")
    parser.add_argument("--price", type=float, default=0.05, help="dollars an hour of a core")
    parser.add_argument("--bytes", type=float, default=IMAGE, help="of an image")
    parser.add_argument("--mine", nargs=3, type=float, metavar=("SPEED", "UNITS", "PRICE"), help="in place of ours")
    return parser.parse_args()


def costs(speeds: tuple[Speed, ...], images: float, price: float) -> list[list[str]]:
    """The first table: what each of `speeds` takes for a million images, and for all."""
    head = ["what runs", "images/s measured", "of one core or GPU", "hours per million", "$ per million"]
    rows = [[*head, f"$ for {count(images)}", "cores or GPUs for a day"]]
    for speed in speeds:
        one = speed.images / speed.units
        hours, each = 1 / one / 3_600, price if speed.price is None else speed.price
        cells = (f"{one:.2f}", f"{1e6 * hours:,.0f}", f"{1e6 * hours * each:,.2f}", f"{images * hours * each:,.0f}")
        rows.append([speed.name, f"{speed.images:g}", *cells, f"{ceil(images * hours / 24):,}"])
    return rows


def needs(images: float, job: float, size: float) -> list[list[str]]:
    """The second table: what else images take, for all of them and for one job."""
    tars = 2 * size / BLOCK  # listed once, read once

    def row(name: str, told: str, value: float, unit: float = 1.0, form: str = ",.0f") -> list[str]:
        return [name, told, *(format(number * value / unit, form) for number in (images, job))]

    rows = [["", "of one image", count(images), f"a job of {count(job)}"]]
    rows.append(row("bytes to read, TB", f"{size:,.0f} bytes", size, 1e12, ",.2f"))
    ways = {f"{speed / 1e6:,.0f} MB/s": speed for speed in DISKS} | {f"{bits} Gbit/s": bits / 8e-9 for bits in NETWORKS}
    rows.extend(row(f"hours at {name}", "bytes / speed", size / speed, 3_600, ",.2f") for name, speed in ways.items())
    rows.append(row("hours at 5,500 GETs a second", "1 GET", 1 / GETS, 3_600, ",.2f"))
    rows.append(row("$ of GETs, each image an object", "1 GET, 1/1000 LIST", LIST / 1_000 + GET, 1, ",.2f"))
    rows.append(row("$ of GETs, in tars, read twice", "2 * bytes / 4 MiB", tars * GET, 1, ",.2f"))
    rows.append(row("cores for pixels, if all takes a day", f"{PIXELS * 1e3:.1f} ms", PIXELS, DAY, ",.1f"))
    rows.append(row("list of images, GB", f"{ROW} bytes", ROW, 1e9, ",.2f"))
    rows.append(row("files of the journal", "1 / 128", 1 / SHARD_ROWS))
    rows.append(row("journal, GB", f"{SHARD / SHARD_ROWS:.0f} bytes", SHARD / SHARD_ROWS, 1e9, ",.2f"))
    rows.append(row("scores as CSV, GB", f"{LINE} bytes", LINE, 1e9, ",.2f"))
    return rows


def count(images: float) -> str:
    """1e9 as `1 billion`."""
    for name, size in (("billion", 1e9), ("million", 1e6)):
        if images >= size:
            return f"{images / size:g} {name}"
    return f"{images:,.0f}"


def table(rows: list[list[str]]) -> str:
    """Rows as Markdown, the first its head."""
    head, *rest = [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def main() -> None:
    arguments = parse()
    speeds = (Speed("yours", *arguments.mine),) if arguments.mine else MEASURED
    print(table(costs(speeds, arguments.images, arguments.price)), end="\n\n")
    print(table(needs(arguments.images, arguments.job, arguments.bytes)))


if __name__ == "__main__":
    main()
