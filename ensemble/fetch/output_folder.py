"""The folder that a fetch fills: images by class, data.csv with one row each, fetch.json with their source.

Each image is written atomically and its row is appended right after it, so a fetch that is killed at
any moment leaves a valid data.csv and can resume.
"""

import csv
import io
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from ensemble.core import artifacts
from ensemble.core.errors import DataError
from ensemble.core.names import LABELS
from ensemble.data.files import IMAGE_SUFFIXES
from ensemble.fetch.catalogue import ImageSource
from ensemble.images.decode import format_name

COLUMNS = ("id", "path", "label", "source", "generator", "original")
MIN_FREE_BYTES = 256 << 20
_SUFFIX_OF = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


class OutputFolder:
    """The images of one source in `folder`, and their rows in data.csv. Open it with `open_output_folder`."""

    def __init__(self, folder: Path, source: ImageSource) -> None:
        self.folder, self.source = folder, source
        self.csv_path = folder / "data.csv"  # for `--data`
        self.partial_folder = folder / ".partial"  # downloaded parts of an archive, until they have been read
        self.rows: dict[str, dict[str, str]] = {}  # by `original`, in the order of storing
        self.counts = Counter[int]()
        artifacts.ensure_writable(folder)
        for row in _read_rows(folder):
            self.rows[row["original"]] = row
            self.counts[int(row["label"])] += 1
        self._rewrite()

    def add(self, original: str, label: int, data: bytes) -> None:
        """Write an image's bytes as they are, then its row. ImageError if the bytes do not begin as an image's do."""
        image_format = format_name(data)
        require_disk_space(self.folder)
        path = f"{LABELS[label]}/{safe_file_name(original, image_format)}"
        with artifacts.replacing(self.folder / path) as temporary:
            temporary.write_bytes(data)
        row = {
            "id": f"{self.source.name}/{path}",
            "path": path,
            "label": str(label),
            "source": self.source.name,
            "generator": self.source.generator if label else "",
            "original": original,
        }
        with self.csv_path.open("a", encoding="utf-8", newline="") as file:
            file.write(_to_csv([row]))
        self.rows[original] = row
        self.counts[label] += 1

    def remove(self, originals: Collection[str]) -> None:
        """Remove images that turned out to come from corrupt data."""
        removed = [self.rows.pop(original) for original in originals if original in self.rows]
        self._rewrite()
        for row in removed:
            self.counts[int(row["label"])] -= 1
            (self.folder / row["path"]).unlink(missing_ok=True)

    def read_state(self) -> dict[str, Any]:
        """What fetch.json says of earlier fetches. DataError if they were of another source."""
        path = self.folder / "fetch.json"
        state = artifacts.read_json(path, "choose another --output") if path.exists() else {}
        if not state and self.rows:
            raise DataError(f"{self.folder} holds a data.csv but no fetch.json; choose another --output")
        if state and state["source"] != self.source.identity:
            theirs = state["source"].get("name")
            changed = [key for key, value in self.source.identity.items() if state["source"].get(key) != value]
            what = theirs if theirs != self.source.name else f"{theirs} with another {', '.join(changed)}"
            raise DataError(f"{self.folder} holds images of {what}; choose another --output")
        return state

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Write fetch.json."""
        licence = {"licence": self.source.licence, "url": self.source.url}
        artifacts.write_json(self.folder / "fetch.json", {"source": self.source.identity, **licence, **state})

    def _rewrite(self) -> None:
        text = ",".join(COLUMNS) + "\n" + _to_csv(self.rows.values())
        if self.csv_path.is_file() and self.csv_path.read_text(encoding="utf-8") == text:
            return
        with artifacts.replacing(self.csv_path) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")


@contextmanager
def open_output_folder(folder: Path, source: ImageSource) -> Iterator[OutputFolder]:
    """The output folder, made if it is missing; a new one is removed again if nothing was stored in it."""
    is_new = not folder.exists()
    output = OutputFolder(folder, source)
    try:
        yield output
    finally:
        if is_new and not output.rows and not any(path.stat().st_size for path in output.partial_folder.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)


def safe_file_name(original: str, image_format: str) -> str:
    """A file name safe on every file system and unique to `original`: its stem in ASCII and a hash of all of it.

    image_format: such as "JPEG"; gives the suffix where `original` has no image suffix.
    """
    base = re.split(r"[\\/]", original)[-1]
    stem, dot, suffix = base.rpartition(".")
    if not dot or f".{suffix.lower()}" not in IMAGE_SUFFIXES:
        stem, suffix = base, _SUFFIX_OF.get(image_format, f".{image_format.lower()}")[1:]
    ascii_stem = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")[:60]
    digest = sha256(original.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{ascii_stem or 'image'}-{digest}.{suffix.lower()}"


def require_disk_space(folder: Path, needed_bytes: int = 0) -> None:
    """DataError where the disk has less than `needed_bytes` and MIN_FREE_BYTES free."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes + MIN_FREE_BYTES:
        remedy = (
            f" of about {needed_bytes / 1e9:,.0f} GB; ask for fewer with --limit" if needed_bytes else "; make room"
        )
        raise DataError(f"only {free_bytes / 1e9:,.1f} GB are free below {folder}{remedy}, then run the command again")


def _read_rows(folder: Path) -> list[dict[str, str]]:
    """The rows whose image exists, without a last row that a crash cut short."""
    try:
        text = (folder / "data.csv").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / 'data.csv'} cannot be read ({error}); choose another --output") from None
    header, *rows = csv.reader(io.StringIO(text[: text.rfind("\n") + 1] or "\n", newline=""))
    if tuple(header) != COLUMNS:
        raise DataError(f"{folder / 'data.csv'} was not written by fetch; choose another --output")
    complete = [dict(zip(COLUMNS, row, strict=True)) for row in rows if len(row) == len(COLUMNS)]
    valid_path = re.compile(rf"({'|'.join(LABELS)})/[\w-]+\.\w+")
    valid = [row for row in complete if row["label"] in ("0", "1") and valid_path.fullmatch(row["path"])]
    return [row for row in valid if (folder / row["path"]).is_file()]


def _to_csv(rows: Iterable[Mapping[str, str]]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue()
