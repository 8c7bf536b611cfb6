"""What to score: a CSV or a folder -> ids as given and the file each one means."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ensemble.errors import DataError, some
from ensemble.files import list_images
from ensemble.sources import locate, read_table


@dataclass(frozen=True)
class Inputs:
    """Images to score, in the order of the input: ids as their text, and files."""

    ids: tuple[str, ...]
    files: tuple[Path, ...]


def read_inputs(source: Path, images: Path | None = None) -> Inputs:
    """Read a folder (ids are relative POSIX paths) or a CSV with `id` or `path`.

    Raises DataError for a missing input, no images, or ids missing, doubled or ambiguous.
    """
    if source.is_dir():
        paths = list_images(source)
        if not paths:
            raise DataError(f"{source} holds no images")
        return Inputs(tuple(paths), tuple(source / path for path in paths))
    if not source.is_file():
        raise DataError(f"no input at {source}; give a CSV with a column id, or a folder of images")
    return resolve_table(read_table(source), source, images)


def resolve_table(frame: pd.DataFrame, table: Path, images: Path | None) -> Inputs:
    """Ids and files of a table's rows; `table` is where relative paths count from."""
    root, paths = locate(frame, table, images)
    ids = frame["id"] if "id" in frame else pd.Series(paths)
    if repeated := sorted(set(ids[ids.duplicated()])):
        raise DataError(f"{table}: ids given more than once: {some(map(repr, repeated))}; each image is scored once")
    return Inputs(tuple(ids), tuple(root / path for path in paths))
