"""Score images with a loaded ensemble and write the result. Runs without torch."""

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from ensemble import artifacts, metrics
from ensemble.errors import ArtifactError, some
from ensemble.external import External, test_column
from ensemble.score import Runner, score_images, with_flip
from ensemble.shift import names_sha256
from ensemble.stack import Stacker
from export.inputs import Inputs


@dataclass(frozen=True)
class Ensemble:
    """Members ready to run, in the stacker's order, the stacker, and where they run (cpu or cuda).

    externals: members of the stacker that were trained elsewhere, whose scores are looked up by id.
    """

    runners: tuple[Runner, ...]
    stacker: Stacker
    device: str
    externals: tuple[External, ...] = ()


def with_flips(ensemble: Ensemble, remedy: str) -> Ensemble:
    """Members that mirrored images helped on held-out rows, averaged over both; ArtifactError if none was measured."""
    flips = ensemble.stacker.flips
    if flips is None:
        raise ArtifactError(f"--tta: it was not measured which members mirrored images help; {remedy}")
    runners = (with_flip(runner) if runner.name in flips else runner for runner in ensemble.runners)
    return replace(ensemble, runners=tuple(runners))


def infer(
    inputs: Inputs,
    ensemble: Ensemble,
    with_members: bool = False,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda count: None,
    adapted: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score every image once: (`id`, `target` and each member's p if asked; errors).

    The first frame has the rows and order of the input; `target` is P(ai), float64, NaN
    for an image that could not be read. The second lists those: `id`, `path`, `error`.
    `adapted` adds the stacker's stored shift.
    """
    logits, failed = member_logits(inputs, ensemble, batch_size, progress)
    result = pd.DataFrame(
        {"id": pd.Series(inputs.ids, dtype=object), "target": ensemble.stacker.target(logits, adapted)}
    )
    if with_members:
        for column, name in enumerate(ensemble.stacker.members):
            result[name] = metrics.sigmoid(logits[:, column])
    errors = pd.DataFrame(
        [{"id": inputs.ids[row], "path": str(inputs.files[row]), "error": text} for row, text in failed.items()],
        columns=["id", "path", "error"],
    )
    _check(inputs, result, errors)
    return result, errors


def member_logits(
    inputs: Inputs,
    ensemble: Ensemble,
    batch_size: int = 16,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Logits [images, members], members in the stacker's order, and why images could not be read, by row.

    Members that were trained elsewhere are looked up first, so that an id without a score is said at once.
    """
    looked_up = {member.name: test_column(member, inputs.ids) for member in ensemble.externals}
    logits, failed = score_images(inputs.files, ensemble.runners, batch_size, progress=progress)
    columns = {runner.name: logits[:, column] for column, runner in enumerate(ensemble.runners)} | looked_up
    table = np.column_stack([columns[name] for name in ensemble.stacker.members])
    table[list(failed)] = np.nan
    return table, failed


def adaptation(inputs: Inputs, ensemble: Ensemble) -> str:
    """What `adapted` adds to these images' target, in one line; ArtifactError where nothing was estimated."""
    shift = ensemble.stacker.adaptation()
    known = f"share of ai {shift.prior:.2f}{', as given' if shift.estimator == 'share' else ''}"
    same = shift.names == names_sha256([file.name for file in inputs.files])
    return (
        f"Adapted: {shift.shift:+.2f} on the stack's logit, from {shift.images} images of {shift.data} ({known})"
        f"{'' if same else '; the images scored now are others'}."
    )


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
