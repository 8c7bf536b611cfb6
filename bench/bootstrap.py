"""How long the intervals of all scores take: `score_intervals` on simulated rows, on one core.

python bench/bootstrap.py [--rows 10000] [--resamples 2000]
"""

import argparse
import os
import resource
import sys
import time
from datetime import date
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402

from ensemble.core import bootstrap, metrics  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--resamples", type=int, default=2000)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    labels = np.arange(options.rows) % 2
    p = metrics.sigmoid(rng.normal(size=options.rows) + labels)
    print(f"{date.today()}; one core; NumPy {np.__version__}; {options.rows} rows, {options.resamples} resamples")
    for rows_a_group in (1, 5):
        groups = np.arange(options.rows) // rows_a_group
        for title, names in (("all scores", metrics.SCORES), ("AUROC", ("auroc",))):
            start = time.perf_counter()
            bootstrap.score_intervals(labels, p, groups, resamples=options.resamples, names=names)
            seconds = time.perf_counter() - start
            print(f"{title}, {groups[-1] + 1} groups: {seconds:.2f} s")
    start = time.perf_counter()
    bootstrap.paired_difference(labels, p, p[::-1], groups, resamples=options.resamples)
    print(f"paired AUROC, {groups[-1] + 1} groups: {time.perf_counter() - start:.2f} s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
