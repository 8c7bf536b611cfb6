"""Leakage checks: test images that a run was trained on, or that its training images were selected by."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, DataError, join_limited
from ensemble.core.parallel import ordered_map
from ensemble.data.sources import LabelledImage
from ensemble.data.tables import read_table

TRACKS = ("inductive", "transductive")
UNSEEN = "unseen"  # the split that nothing was fitted on


def trained_rows(run: Path, sha256s: Sequence[str]) -> np.ndarray:
    """Which files the run was fitted on, bool [N]: its members, their choice of epoch, or its stacker."""
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
    fitted = set(frame.loc[frame["split"] != UNSEEN, "sha256"])
    return np.array([digest in fitted for digest in sha256s], dtype=bool)


def check_untrained(
    run: Path | None, items: Sequence[LabelledImage], track: str, allow_trained: bool
) -> tuple[list[str], int]:
    """SHA-256 of each file, empty for one that cannot be read, and how many the run was trained on.

    DataError where the images cannot be a test: the run was trained on them, or its training images were selected to
    resemble them and the track is called inductive.
    """

    def digest(item: LabelledImage) -> str:
        try:
            return artifacts.file_sha256(item.file)
        except OSError:
            return ""

    bar = tqdm(ordered_map(digest, items), "hash", len(items), unit="image", leave=False, disable=None)
    sha256s = list(bar)
    if run is None:
        return sha256s, 0
    trained = trained_rows(run, sha256s)
    if trained.any() and not allow_trained:
        names = join_limited(item.id for item, seen in zip(items, trained, strict=True) if seen)
        raise DataError(
            f"{trained.sum()} of {len(items)} images were in this run's training, so scores on them are no test "
            f"({names}); remove them, or score them all the same with --allow-trained"
        )
    if track == TRACKS[0] and (selections := selected_for(run, items)):
        raise DataError(
            "training images of this run were selected to resemble these very images "
            f"({join_limited(selections)}), so this is not the inductive track; add --track transductive"
        )
    return sha256s, int(trained.sum())


def selected_for(run: Path, items: Sequence[LabelledImage]) -> list[str]:
    """Records of `select` by which training images of the run were chosen to resemble these images.

    A record speaks of these images where its test is the folder or the CSV's folder that one of
    them lies in, or where the ids that drew something are all among theirs.
    """
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
    files = [item.file.resolve() for item in items]
    ids = {item.id for item in items} | {Path(item.path).stem for item in items} | {item.path for item in items}
    records = []
    for root in sorted(set(frame["root"])):
        record = Path(root) / "selection.json"
        if not record.is_file():
            continue
        try:
            test = Path(str(artifacts.read_json(record, "run select again").get("test", "")))
            drew = set(read_table(record.with_name("selection.csv")).get("test_id", pd.Series(dtype=str)))
        except (ArtifactError, DataError):
            continue
        folder = (test if test.is_dir() else test.parent).resolve()
        named = test.exists() and any(file.is_relative_to(folder) for file in files)
        if named or (drew and drew <= ids):
            records.append(str(record))
    return records
