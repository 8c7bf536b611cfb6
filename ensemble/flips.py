"""Whether averaging a member's logit with that of the mirrored image helps it, on held-out rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL.Image import Image
from tqdm import tqdm

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, some
from ensemble.core.metrics import sigmoid
from ensemble.data import dataset
from ensemble.images import canonical, decode
from ensemble.models.runner import Runner, score_images, with_flip
from ensemble.stack_table import Scored, score_models


def measure(run: Path, names: Sequence[str], rows: pd.DataFrame) -> list[Scored]:
    """A line for each member: its scores with flips, and how far they lie from those without. Needs torch."""
    import torch

    from ensemble.models.members import load_member
    from ensemble.models.torch_runner import choose_device, torch_runner

    device = torch.device(choose_device("auto"))
    runners = [torch_runner(name, load_member(run, name), device) for name in names]
    return compare(runners, run, rows)


def compare(runners: Sequence[Runner], run: Path, rows: pd.DataFrame) -> list[Scored]:
    """As `measure`, for members ready to run; images are read as in training, in their canonical form if so."""
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first").set_index("id", drop=False)
    plan = canonical.read_plan(artifacts.canonical_path(run))

    def read(row: int, file: Path) -> Image:
        return decode.decode(file) if plan is None else canonical.read_canonical(file, plan, (0, row))

    both = [*runners, *map(with_flip, runners)]
    with tqdm(total=len(rows), desc="flips", unit="image", leave=False, disable=None) as bar:
        files = dataset.files(frame.loc[rows["id"]])
        logits, errors = score_images(files, both, progress=bar.update, read=read)
    if errors:
        raise ArtifactError(f"held-out images cannot be read: {some(errors.values(), 2)}; put them back")
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy(dtype=str)
    p = sigmoid(np.asarray(logits, dtype=np.float64))
    lines = []
    for column, runner in enumerate(runners):
        pair = {runner.name: p[:, len(runners) + column], "": p[:, column]}
        lines.append(score_models(pair, "", labels, groups)[0])
    return lines


def helped(lines: Sequence[Scored]) -> tuple[str, ...]:
    """Members whose log-loss flips lower, with an interval that excludes 0."""
    return tuple(
        line.name for line in lines if line.log_loss_difference is not None and line.log_loss_difference.high < 0
    )
