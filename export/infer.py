"""Score images with a loaded ensemble and write the result. Runs without torch."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ensemble import artifacts, metrics
from ensemble.errors import ArtifactError, some
from ensemble.score import Runner, score_images
from ensemble.stack import Stacker
from export.inputs import Inputs


@dataclass(frozen=True)
class Ensemble:
    """Members ready to run, in the stacker's order, the stacker, and where they run (cpu or cuda)."""

    runners: tuple[Runner, ...]
    stacker: Stacker
    device: str


def infer(
    inputs: Inputs,
    ensemble: Ensemble,
    with_members: bool = False,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score every image once: (`id`, `target` and each member's p if asked; errors).

    The first frame has the rows and order of the input; `target` is P(ai), float64, NaN
    for an image that could not be read. The second lists those: `id`, `path`, `error`.
    """
    logits, failed = score_images(inputs.files, ensemble.runners, batch_size, progress=progress)
    result = pd.DataFrame({"id": pd.Series(inputs.ids, dtype=object), "target": ensemble.stacker.target(logits)})
    if with_members:
        for column, runner in enumerate(ensemble.runners):
            result[runner.name] = metrics.sigmoid(logits[:, column])
    errors = pd.DataFrame(
        [{"id": inputs.ids[row], "path": str(inputs.files[row]), "error": text} for row, text in failed.items()],
        columns=["id", "path", "error"],
    )
    _check(inputs, result, errors)
    return result, errors


def _check(inputs: Inputs, result: pd.DataFrame, errors: pd.DataFrame) -> None:
    """Rows and order are the input's, and only unreadable images lack a target."""
    if tuple(result["id"]) != inputs.ids:
        raise AssertionError("rows or order changed while scoring")
    if lost := sorted(set(result.loc[result["target"].isna(), "id"]) - set(errors["id"])):
        raise ArtifactError(f"a member gave no finite logit for images it could read ({some(lost)}); train it again")


def write_result(path: Path, result: pd.DataFrame, errors: pd.DataFrame, fill: float | None = None) -> Path | None:
    """Write the CSV, and beside it NAME.errors.csv if images failed (its path is returned).

    Their `target`, and members' p, is empty, or `fill`.
    """
    if fill is not None:
        result = result.fillna({column: fill for column in result.columns if column != "id"})
    _write_csv(path, result)
    listing = path.with_name(f"{path.stem}.errors.csv")
    if errors.empty:
        listing.unlink(missing_ok=True)
        return None
    _write_csv(listing, errors)
    return listing


def _write_csv(path: Path, frame: pd.DataFrame) -> None:
    # csv leaves a carriage return unquoted, which readers take for the end of a row
    returns = frame["id"].str.contains("\r").any()
    with artifacts.replacing(path) as temporary:
        frame.to_csv(
            temporary,
            index=False,
            float_format="%.9g",
            quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL,
        )


def average(name: str) -> Stacker:
    """The stacker of a single member: its own probability."""
    return Stacker(members=(name,), coef=(1.0,), intercept=0.0)
