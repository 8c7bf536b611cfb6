"""The folder that selection writes: links or copies by class, selection.csv, a picture."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import DataError, join_limited
from ensemble.core.names import LABELS
from ensemble.data.sources import LabelledImage
from ensemble.selection.contact_sheet import Row, write_picture
from ensemble.selection.select import UNLABELLED, Selection

TABLE, PICTURE, RECORD, ABLATION = "selection.csv", "selection.jpg", "selection.json", "ablation.json"
OURS = {TABLE, PICTURE, RECORD, ABLATION, "images", *LABELS}
MOST_ROWS = 12  # of the picture
MOST_DRAWN = 6


def check_output(output: Path, inputs: Sequence[Path]) -> None:
    """Raise before any work where `output` cannot be written, or holds what is not ours to replace."""
    target = output.resolve()
    for path in inputs:
        folder = path.resolve() if path.is_dir() else path.resolve().parent
        if target == folder or (path.is_dir() and target.is_relative_to(folder)):
            raise DataError(f"--output {output} lies in {path}, which is read; choose a folder elsewhere")
    if target.is_file():
        raise DataError(f"--output {output} is a file; name a folder")
    if target.is_dir():
        present = {entry.name for entry in target.iterdir()}
        if present and (RECORD not in present or present - OURS):
            strange = join_limited(sorted(present - OURS) or sorted(present))
            raise DataError(
                f"--output {output} holds what no selection wrote ({strange}); choose an empty or another folder"
            )
    artifacts.ensure_writable(target.parent)


def write_selection(
    output: Path,
    items: Sequence[LabelledImage],
    chosen: Selection,
    test: Sequence[LabelledImage],
    copy: bool,
    record: Mapping[str, Any],
) -> pd.DataFrame:
    """Write the folder, in place of an older selection, and return what selection.csv holds.

    items and test: the pool's and the test's images, by the rows of `chosen`. A kill leaves
    the old folder or the new one whole.
    """
    target = output.resolve()
    work = target.with_name(f".{target.name}.new")
    shutil.rmtree(work, ignore_errors=True)
    artifacts.ensure_folder(work)
    frame = _table(items, chosen, test)
    for path, source in zip(frame["path"], frame["original"], strict=True):
        (work / path).parent.mkdir(exist_ok=True)
        _place(Path(source), work / path, copy)
    shown = frame if (frame["label"] != UNLABELLED).any() else frame.drop(columns="label")
    shown.to_csv(work / TABLE, index=False)
    write_picture(_picture_rows(frame, items, chosen, test), work / PICTURE)
    artifacts.write_json(work / RECORD, record)
    artifacts.replace_folder(work, target)
    return frame


def _table(items: Sequence[LabelledImage], chosen: Selection, test: Sequence[LabelledImage]) -> pd.DataFrame:
    rows = []
    numbers = dict.fromkeys((UNLABELLED, 0, 1), 0)
    for row, drawer, distance in zip(chosen.rows, chosen.test, chosen.distances, strict=True):
        item = items[row]
        folder = "images" if item.label == UNLABELLED else LABELS[item.label]
        rows.append(
            {
                "id": item.id,
                "path": f"{folder}/{_safe_name(item.path, numbers[item.label])}",
                "label": item.label,
                "group": item.group or "",
                "source": item.source or "",
                "generator": item.generator or "",
                "distance": round(float(distance), 6),
                "test_id": test[drawer].id,
                "original": str(item.file.resolve()),
            }
        )
        numbers[item.label] += 1
    return pd.DataFrame(rows)


def _safe_name(path: str, number: int) -> str:
    """A name that every file system takes; the number, counted by class, makes it unique."""
    stem, suffix = os.path.splitext(path.rpartition("/")[2])
    return f"{number:06d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', stem)[:60]}{suffix.lower()}"


def _place(source: Path, path: Path, copy: bool) -> None:
    try:
        if copy:
            shutil.copyfile(source, path)
        else:
            path.symlink_to(source)
    except OSError as error:
        remedy = "make room or rights there" if copy else "where links are not allowed, add --copy"
        raise DataError(f"cannot put {source} into {path.parent}: {error.strerror}; {remedy}") from None


def _picture_rows(
    frame: pd.DataFrame, items: Sequence[LabelledImage], chosen: Selection, test: Sequence[LabelledImage]
) -> list[Row]:
    """Test images spread evenly over those that drew something, from the nearest draws to the farthest."""
    drawn = frame.assign(item=chosen.rows, test=chosen.test).groupby("test", sort=False)
    order = drawn["distance"].mean().sort_values(kind="stable").index.tolist()
    shown = min(MOST_ROWS, len(order))
    picked = [order[round(i * (len(order) - 1) / max(shown - 1, 1))] for i in range(shown)]
    rows = []
    for number in picked:
        part = drawn.get_group(number).sort_values("distance", kind="stable").head(MOST_DRAWN)
        columns = zip(part["item"], part["distance"], part["label"], strict=True)
        captions = [
            (items[item].file, f"{distance:.3f}" + (f" {LABELS[label]}" if label != UNLABELLED else ""))
            for item, distance, label in columns
        ]
        rows.append(Row(test[number].file, test[number].id, captions))
    return rows
