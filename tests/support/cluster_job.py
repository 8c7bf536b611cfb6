"""A tiny bundle and a list of images, scored by the command line on one machine or on a cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
from helpers import ROOT, exported_run
from pictures import HOSTILE_NAMES, encoded, noise
from tar_shards import write_tar

from export.inference import journal

SHARDS = 6
ROWS = SHARDS * journal.SHARD_ROWS - 5


def make(work: Path, side: int = 12, rows: int = ROWS) -> Path:
    """A bundle with rows to fit a cascade on; a list of images with hostile ids, some of which cannot be read."""
    exported_run(work, cascade=True)
    (work / "images").mkdir()
    for number in range(20):
        dark = noise(number, side, side).point(lambda value, by=1 + number % 3: value // by)
        (work / "images" / f"{number}.png").write_bytes(encoded(dark) if number % 7 else b"broken")
    keys = [f"{HOSTILE_NAMES[row % len(HOSTILE_NAMES)]} {row}" for row in range(rows)]
    lines = ['"{}",images/{}.png\n'.format(key.replace('"', '""'), row * 7 % 20) for row, key in enumerate(keys)]
    (work / "test.csv").write_text("id,path\n" + "".join(lines), encoding="utf-8")
    return work


def write_shards(work: Path, folder: Path, count: int = 300) -> None:
    """Images of the list again, as `tars` and as `sets` of Parquet files below a folder."""
    files = sorted((work / "images").iterdir())
    images = {f"{row:04}": files[row % len(files)].read_bytes() for row in range(count)}
    (folder / "sets").mkdir()
    for number, start in enumerate(range(0, count, 130)):
        part = list(images.items())[start : start + 130]
        write_tar(folder / "tars" / f"{number}.tar", {f"{key}.png": data for key, data in part})
        keys, data = zip(*part, strict=True)
        frame = pd.DataFrame({"id": keys, "image": data})
        frame.to_parquet(folder / "sets" / f"{number}.parquet", row_group_size=40)


def command(work: Path, output: Path, *more: object, source: object = "test.csv") -> list[str]:
    places = ["--bundle", work / "bundle", "--input", work / str(source), "--output", output]
    return [sys.executable, str(ROOT / "cli.py"), "infer", *map(str, places), "--device", "cpu", *map(str, more)]


def run(call: list[str], environment=None, cwd: Path = ROOT, code: int = 1) -> str:
    """Its standard output, or standard error where the code is 2; code 1: some images are broken."""
    done = subprocess.run(
        call, env=os.environ | (environment or {}), cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr if code == 2 else done.stdout


def written(output: Path) -> tuple[bytes, bytes]:
    """The scores and the list of failures; nothing of the journal is left."""
    assert not output.with_name(f"{output.name}.partial").exists()
    return output.read_bytes(), output.with_name(f"{output.stem}.errors.csv").read_bytes()
