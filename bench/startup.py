"""How long `cli.py --help` takes beside a bare click group with as many commands."""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 21

sys.path.insert(0, str(ROOT))
from cli import COMMANDS  # noqa: E402


def bare_group(folder: Path) -> Path:
    lines = ["import click", "@click.group()", "def cli(): pass"]
    for name in COMMANDS:
        lines += [f"@cli.command({name!r})", f"def {name.replace('-', '_')}(): 'One line of help.'"]
    path = folder / "bare.py"
    path.write_text("\n".join([*lines, "cli()"]) + "\n")
    return path


def seconds(script: Path) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, script, "--help"], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bare = bare_group(Path(folder))
        pairs = [(seconds(ROOT / "cli.py"), seconds(bare)) for _ in range(REPEATS)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"cli.py --help      {1000 * ours:6.0f} ms")
    print(f"bare click group   {1000 * theirs:6.0f} ms   (medians of {REPEATS}, {len(COMMANDS)} commands)")
    print(f"ratio              {ours / theirs:6.2f}")


if __name__ == "__main__":
    main()
