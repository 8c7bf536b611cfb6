"""The folder that a fetch fills: images by class, data.csv with a row for each, fetch.json with where they came from.

An image is written whole or not at all, and its row is appended right after it, so a kill at any
moment leaves a data.csv that can be used and gone on from.
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
from ensemble.fetch.catalogue import Source
from ensemble.images.decode import format_name

COLUMNS = ("id", "path", "label", "source", "generator", "original")
MIN_FREE_BYTES = 256 << 20
_SUFFIX_OF = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}


class Store:
    """The images of one source in `folder`, and their rows; open it with `opened`."""

    def __init__(self, folder: Path, source: Source) -> None:
        self.folder, self.source = folder, source
        self.rows: dict[str, dict[str, str]] = {}  # by `original`, in the order they were stored
        self.counts = Counter[int]()
        artifacts.ensure_writable(folder)
        for row in _read_rows(folder):
            self.rows[row["original"]] = row
            self.counts[int(row["label"])] += 1
        self._rewrite()

    @property
    def partial(self) -> Path:
        """Where what was downloaded of an archive is kept until it has been read."""
        return self.folder / ".partial"

    @property
    def table(self) -> Path:
        """The CSV that `--data` takes."""
        return self.folder / "data.csv"

    def add(self, original: str, label: int, data: bytes) -> None:
        """Write an image's bytes as they are, then its row. ImageError if its header is not an image's."""
        kind = format_name(data)
        require_room(self.folder)
        path = f"{LABELS[label]}/{local_name(original, kind)}"
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
        with self.table.open("a", encoding="utf-8", newline="") as file:
            file.write(_as_csv([row]))
        self.rows[original] = row
        self.counts[label] += 1

    def drop(self, originals: Collection[str]) -> None:
        """Take images back that turned out to come from broken data."""
        gone = [self.rows.pop(original) for original in originals if original in self.rows]
        self._rewrite()
        for row in gone:
            self.counts[int(row["label"])] -= 1
            (self.folder / row["path"]).unlink(missing_ok=True)

    def read_state(self) -> dict[str, Any]:
        """What fetch.json says of earlier fetches; DataError if they were of something else."""
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
        text = ",".join(COLUMNS) + "\n" + _as_csv(self.rows.values())
        if self.table.is_file() and self.table.read_text(encoding="utf-8") == text:
            return
        with artifacts.replacing(self.table) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")


@contextmanager
def opened(folder: Path, source: Source) -> Iterator[Store]:
    """The store in `folder`, made if need be; a new one without anything in it is not left behind."""
    fresh = not folder.exists()
    store = Store(folder, source)
    try:
        yield store
    finally:
        if fresh and not store.rows and not any(path.stat().st_size for path in store.partial.glob("*")):
            shutil.rmtree(folder, ignore_errors=True)


def local_name(original: str, kind: str) -> str:
    """A file name that is safe anywhere and differs for every `original`: its stem in ASCII and a hash of the whole.

    `kind` is the image's format, such as "JPEG"; it gives the suffix where `original` has none of an image.
    """
    base = re.split(r"[\\/]", original)[-1]
    stem, dot, suffix = base.rpartition(".")
    if not dot or f".{suffix.lower()}" not in IMAGE_SUFFIXES:
        stem, suffix = base, _SUFFIX_OF.get(kind, f".{kind.lower()}")[1:]
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-")[:60]
    digest = sha256(original.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{plain or 'image'}-{digest}.{suffix.lower()}"


def require_room(folder: Path, needed: int = 0) -> None:
    """DataError where `needed` bytes do not fit on the disk, or it is all but full: better now than half-way."""
    free = shutil.disk_usage(folder).free
    if free < needed + MIN_FREE_BYTES:
        wanted = f" of about {needed / 1e9:,.0f} GB; ask for fewer with --limit" if needed else "; make room"
        raise DataError(f"only {free / 1e9:,.1f} GB are free below {folder}{wanted}, then run the command again")


def _read_rows(folder: Path) -> list[dict[str, str]]:
    """The rows whose image is there; a row that a crash cut short is left out."""
    try:
        text = (folder / "data.csv").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / 'data.csv'} cannot be read ({error}); choose another --output") from None
    header, *rows = csv.reader(io.StringIO(text[: text.rfind("\n") + 1] or "\n", newline=""))
    if tuple(header) != COLUMNS:
        raise DataError(f"{folder / 'data.csv'} was not written by fetch; choose another --output")
    whole = [dict(zip(COLUMNS, row, strict=True)) for row in rows if len(row) == len(COLUMNS)]
    return [row for row in whole if _is_ours(row) and (folder / row["path"]).is_file()]


def _is_ours(row: Mapping[str, str]) -> bool:
    return row["label"] in ("0", "1") and re.fullmatch(rf"({'|'.join(LABELS)})/[\w-]+\.\w+", row["path"]) is not None


def _as_csv(rows: Iterable[Mapping[str, str]]) -> str:
    text = io.StringIO(newline="")
    csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(rows)
    return text.getvalue()
