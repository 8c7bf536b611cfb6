"""Memory does not grow with the number of images to score. Not by ru_maxrss: it starts at what the parent held."""

import sys

import pytest
from helpers import exported_run, run_python, write_image

COMMAND = """
import re
from pathlib import Path
import cli
try:
    cli.main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def peak(work, rows, *options):
    """Peak memory of the command in KiB, scoring one image under many ids."""
    table = work / f"{rows}.csv"
    with table.open("w") as file:
        file.write("id,path\n")
        file.writelines(f"a-rather-long-name-{row:09},image.png\n" for row in range(rows))
    places = [
        "--bundle",
        work / "bundle",
        "--input",
        table,
        "--output",
        work / f"{rows}.csv.out.csv",
        "--device",
        "cpu",
    ]
    done = run_python("-c", COMMAND, "infer", *places, *options)
    assert done.returncode == 0, done.stderr
    assert f"{rows} images scored" in done.stdout
    return int(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("options", [(), ("--cascade", "0.01")], ids=["all", "cascade"])
def test_memory_does_not_grow_with_the_images(tmp_path, options):
    exported_run(tmp_path, cascade=True)
    write_image(tmp_path / "image.png")
    few, many = (peak(tmp_path, rows, "--members", *options) for rows in (1000, 20_000))
    assert many < 1.05 * few, f"{few} KiB for 1,000 images, {many} for 20,000"
