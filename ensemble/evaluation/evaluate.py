"""The images and the name of an evaluation, checked, and its record of images and stacker."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ensemble.core import artifacts
from ensemble.core.errors import DataError
from ensemble.core.names import LABELS
from ensemble.data.sources import LabelledImage
from ensemble.evaluation.leakage import TRACKS
from ensemble.evaluation.protocol import CLEAN
from ensemble.stacking.stacker import Stacker


def sample_images(items: Sequence[LabelledImage], limit: int | None, seed: int) -> list[LabelledImage]:
    """The images, sorted by id; with a limit, as many of each class as there are, drawn at random."""
    items = sorted(items, key=lambda item: item.id)
    if limit is None or limit >= len(items):
        return items
    rng = np.random.default_rng(seed)
    by_class = [rng.permutation([i for i, item in enumerate(items) if item.label == label]) for label in (0, 1)]
    fewer = min(by_class, key=len)
    few = min(len(fewer), limit // 2)
    sample = [part[: few if part is fewer else limit - few] for part in by_class]
    return [items[int(i)] for i in np.sort(np.concatenate(sample))]


def check_classes(items: Sequence[LabelledImage], stress: bool) -> None:
    """DataError for no images, for one class unless it is a stress set, and for two where it is one."""
    if not items:
        raise DataError("no images to score")
    present = [name for label, name in enumerate(LABELS) if any(item.label == label for item in items)]
    if len(present) < 2 and not stress:
        raise DataError(
            f"all images are {present[0]}, and most scores need both classes; for how many of them fall on the wrong "
            "side add --stress, or add the other class with another --data"
        )
    if len(present) == 2 and stress:
        raise DataError("--stress is for images of one class, and these are of both; leave it out")


def evaluation_name(data: Sequence[Path], name: str | None, limit: int | None, track: str) -> str:
    """The evaluation's name, safe as a folder's: as given, or from the data's own names, the limit and the track."""
    if name is None:
        paths = [path.resolve() for path in data]
        name = "+".join(path.stem if path.is_file() else path.name for path in paths)
        if len(paths) == 1 and paths[0].is_file() and name.casefold() in ("labels", "test", "data", "images"):
            name = f"{paths[0].parent.name}-{name}"
        name += f"-{limit}" if limit is not None else ""  # a quick look replaces no full evaluation
        name += f"-{track}" if track != TRACKS[0] else ""
    return artifacts.safe_name(name)


def output_folder(run: Path | None, output: Path | None, name: str) -> Path:
    """Where the evaluation is written; DataError for a model outside a run without --output."""
    if output is not None:
        return output
    if run is None:
        raise DataError("a model outside a run has no place for its evaluations; name a folder with --output")
    return artifacts.evaluation_path(run, name)


def count_images(frame: pd.DataFrame, errors: Mapping[str, str]) -> dict[str, Any]:
    """The images that were scored, and those that could not be."""
    clean = frame[frame["cell"] == CLEAN]
    ai = int((clean["label"] == 1).sum())
    return {
        "images": len(clean),
        "real": len(clean) - ai,
        "ai": ai,
        "groups": int(clean["group"].nunique()),
        "unreadable": [{"id": key, "error": message} for key, message in errors.items()],
    }


def describe_stacker(stacker: Stacker) -> dict[str, Any]:
    """The stacker's fingerprint, members and threshold; a shift for target images is no part of what is scored."""
    return {
        "sha256": artifacts.json_sha256({key: v for key, v in stacker.to_dict().items() if key != "adapted"}),
        "members": list(stacker.members),
        "kind": stacker.method,
        "calibration": stacker.calibration.kind,
        "threshold": stacker.threshold,
        "threshold_rule": stacker.threshold_rule,
    }
