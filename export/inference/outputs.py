"""Write scores and failures as CSV or Parquet files, batch by batch."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.data.image_list import os_file

FORMATS = {".csv": "csv", ".parquet": "parquet"}
ROW_GROUP_ROWS = 1 << 16  # of a Parquet file, at least


@dataclass(frozen=True)
class Failure:
    """An image that could not be read, and why."""

    id: str
    path: str
    error: str


def output_format(output: Path) -> str:
    """ "csv" or "parquet", by the suffix; ArtifactError for another."""
    if output.suffix.lower() not in FORMATS:
        raise ArtifactError(f"cannot write {output}; end its name in {' or '.join(FORMATS)}")
    return FORMATS[output.suffix.lower()]


def write_scores(
    output: Path,
    frames: Iterable[pd.DataFrame],
    members: Sequence[str] = (),
    returns: bool = False,
    fill: float | None = None,
) -> None:
    """Write frames of `id`, `target` and the members' columns atomically, in the format of the suffix.

    NaN becomes an empty cell, or `fill` in rows without a target. returns: whether an id holds a carriage return
    (`ImageList.has_carriage_returns`). A CSV has nine significant digits, a Parquet file all.
    """
    parquet = output_format(output) == "parquet"
    columns = ["id", "target", *members]
    if fill is not None:
        values = dict.fromkeys(columns[1:], fill)
        frames = (frame.where(frame["target"].notna(), frame.fillna(values)) for frame in frames)
    with artifacts.replacing(output) as temporary:
        if not parquet:
            write_csv(temporary, columns, frames, returns)
            return
        schema = pa.schema([(name, pa.float64() if position else pa.string()) for position, name in enumerate(columns)])
        with os_file(temporary, "wb") as opened, pq.ParquetWriter(opened, schema) as writer:
            for group in _groups(frames):
                writer.write_table(pa.Table.from_pandas(group, schema, preserve_index=False))


def write_csv(file: Path, columns: list[str], frames: Iterable[pd.DataFrame], returns: bool) -> None:
    """Write frames of `columns` as one CSV, numbers with nine significant digits; `returns` as in `write_scores`."""
    # csv leaves a carriage return unquoted, which readers take for the end of a row
    quoting: Literal[0, 2] = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    with file.open("w", encoding="utf-8", newline="") as opened:
        pd.DataFrame(columns=columns).to_csv(opened, index=False, quoting=quoting)
        for frame in frames:
            frame.to_csv(opened, index=False, header=False, float_format="%.9g", quoting=quoting)


def _groups(frames: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """The same rows in frames of ROW_GROUP_ROWS rows or a little more."""
    pending: list[pd.DataFrame] = []
    for frame in frames:
        pending.append(frame)
        if sum(map(len, pending)) >= ROW_GROUP_ROWS:
            yield pd.concat(pending)
            pending = []
    if pending:
        yield pd.concat(pending)


def failures_path(output: Path) -> Path:
    """NAME.errors.csv beside `output`."""
    return output.with_name(f"{output.stem}.errors.csv")


def write_failures(output: Path, failures: Iterable[Failure]) -> Path | None:
    """Write `failures_path`, atomically; None, and no such file, if there are no failures."""
    listing = failures_path(output)
    rest = iter(failures)
    first = next(rest, None)
    if first is None:
        listing.unlink(missing_ok=True)
        return None
    with artifacts.replacing(listing) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        plain = csv.writer(file, lineterminator=os.linesep)
        quoted = csv.writer(file, lineterminator=os.linesep, quoting=csv.QUOTE_ALL)
        plain.writerow(["id", "path", "error"])
        for failure in chain([first], rest):
            cells = (failure.id, failure.path, failure.error)
            (quoted if any("\r" in cell for cell in cells) else plain).writerow(cells)
    return listing
