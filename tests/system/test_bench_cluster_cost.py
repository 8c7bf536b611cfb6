"""bench/cluster_cost.py, and docs/cluster.md: its tables are what the script prints."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def printed(*options):
    command = [sys.executable, ROOT / "bench" / "cluster_cost.py", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cells(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def unlike(page, text):
    """Tables of `text` that the page does not have."""
    return [table for table in text.strip().split("\n\n") if f"\n\n{table}\n\n" not in page]


def test_the_pages_tables_are_what_the_script_prints():
    page, text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8"), printed()
    assert text.count("\n\n") == 1, "two tables"
    assert unlike(page, text) == [], "renew them: python bench/cluster_cost.py"
    assert len(unlike(page, printed("--price", "0.06"))) == 1, "another price is seen"
    assert len(unlike(page, printed("--bytes", "50000"))) == 1


def test_costs_follow_from_speed_units_and_price():
    # 100 images a second of two: a million takes 20,000 s of one, and a billion in a day needs 231.5
    assert cells(printed("--mine", "100", "2", "0.9"), "yours") == ["100", "50.00", "6", "5.00", "5,000", "232"]
    assert cells(printed("--mine", "100", "2", "0.9", "--images", "1e7"), "yours")[4:] == ["50", "3"]


def test_what_else_images_take_follows_from_their_number_and_size():
    text = printed("--bytes", "1000000", "--images", "3.6e7", "--job", "3.6e6")
    assert cells(text, "bytes to read, TB") == ["1,000,000 bytes", "36.00", "3.60"]
    assert cells(text, "hours at 1,000 MB/s")[1:] == ["10.00", "1.00"]
    assert cells(text, "hours at 10 Gbit/s")[1:] == ["8.00", "0.80"]
    assert cells(text, "files of the journal")[1:] == ["281,250", "28,125"]
