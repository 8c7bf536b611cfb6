"""The folder that `select` writes: links or copies by class, selection.csv, a contact sheet."""

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
from ensemble.data.sources import UNLABELLED, LabelledImage
from ensemble.selection.contact_sheet import SheetRow, write_contact_sheet
from ensemble.selection.select import Selection

TABLE, CONTACT_SHEET, RECORD, ABLATION = "selection.csv", "selection.jpg", "selection.json", "ablation.json"
OUTPUT_NAMES = {TABLE, CONTACT_SHEET, RECORD, ABLATION, "images", *LABELS}
MAX_SHEET_ROWS = 12  # test images on the contact sheet
MAX_SHEET_MATCHES = 6  # pool images beside each


def check_output(output: Path, inputs: Sequence[Path]) -> None:
    """Raise, before any work, where `output` cannot be written or holds files that no selection wrote."""
    target = output.resolve()
    for path in inputs:
        folder = path.resolve() if path.is_dir() else path.resolve().parent
        if target == folder or (path.is_dir() and target.is_relative_to(folder)):
            raise DataError(f"--output {output} lies in {path}, which is read; choose a folder elsewhere")
    if target.is_file():
        raise DataError(f"--output {output} is a file; name a folder")
    if target.is_dir():
        present = {entry.name for entry in target.iterdir()}
        if present and (RECORD not in present or present - OUTPUT_NAMES):
            foreign = join_limited(sorted(present - OUTPUT_NAMES) or sorted(present))
            raise DataError(
                f"--output {output} holds what no selection wrote ({foreign}); choose an empty or another folder"
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
    """Write the folder, atomically in place of an older selection; returns the rows of selection.csv.

    items and test: the images of the pool and of the test, which the rows of `chosen` index.
    """
    target = output.resolve()
    work = target.with_name(f".{target.name}.new")
    shutil.rmtree(work, ignore_errors=True)
    artifacts.ensure_folder(work)
    frame = _table(items, chosen, test)
    for path, source in zip(frame["path"], frame["original"], strict=True):
        link = work / path
        link.parent.mkdir(exist_ok=True)
        try:
            if copy:
                shutil.copyfile(source, link)
            else:
                link.symlink_to(source)
        except OSError as error:
            remedy = "make room or rights there" if copy else "where links are not allowed, add --copy"
            raise DataError(f"cannot put {source} into {link.parent}: {error.strerror}; {remedy}") from None
    shown = frame if (frame["label"] != UNLABELLED).any() else frame.drop(columns="label")
    shown.to_csv(work / TABLE, index=False)
    write_contact_sheet(_sheet_rows(frame, items, chosen, test), work / CONTACT_SHEET)
    artifacts.write_json(work / RECORD, record)
    artifacts.replace_folder(work, target)
    return frame


def _table(items: Sequence[LabelledImage], chosen: Selection, test: Sequence[LabelledImage]) -> pd.DataFrame:
    rows = []
    numbers = dict.fromkeys((UNLABELLED, 0, 1), 0)
    for row, test_row, distance in zip(chosen.rows, chosen.test_rows, chosen.distances, strict=True):
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
                "test_id": test[test_row].id,
                "original": str(item.file.resolve()),
            }
        )
        numbers[item.label] += 1
    return pd.DataFrame(rows)


def _safe_name(path: str, number: int) -> str:
    """A file name that every file system accepts; the number, counted by class, makes it unique."""
    stem, suffix = os.path.splitext(path.rpartition("/")[2])
    return f"{number:06d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', stem)[:60]}{suffix.lower()}"


def _sheet_rows(
    frame: pd.DataFrame, items: Sequence[LabelledImage], chosen: Selection, test: Sequence[LabelledImage]
) -> list[SheetRow]:
    """Test images with their chosen images, evenly spaced from the smallest mean distance to the largest."""
    by_test = frame.assign(item=chosen.rows, test=chosen.test_rows).groupby("test", sort=False)
    order = by_test["distance"].mean().sort_values(kind="stable").index.tolist()
    count = min(MAX_SHEET_ROWS, len(order))
    spaced = [order[round(i * (len(order) - 1) / max(count - 1, 1))] for i in range(count)]
    rows: list[SheetRow] = []
    for test_row in spaced:
        part = by_test.get_group(test_row).sort_values("distance", kind="stable").head(MAX_SHEET_MATCHES)
        columns = zip(part["item"], part["distance"], part["label"], strict=True)
        captions = [
            (items[item].file, f"{distance:.3f}" + (f" {LABELS[label]}" if label != UNLABELLED else ""))
            for item, distance, label in columns
        ]
        rows.append([(test[test_row].file, test[test_row].id), *captions])
    return rows
