"""Fit a run's stacker on its members' held-out logits, score it, and write stacker.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ensemble import artifacts, members, metrics
from ensemble.bootstrap import score_intervals
from ensemble.errors import ArtifactError
from ensemble.metrics import Interval
from ensemble.stack import Stacker, fit_stacker, out_of_fold


@dataclass(frozen=True)
class Scored:
    """One line of the table: a member, the mean of all, or the stack."""

    name: str
    auroc: Interval
    log_loss: Interval


@dataclass(frozen=True)
class Stacked:
    """A fitted stacker, its scores beside those of its members, and the rows that these are of.

    basis: how those rows stand to the stacker, in words.
    """

    stacker: Stacker
    scored: list[Scored]
    rows: pd.DataFrame
    basis: str


def stack_run(run: Path, names: tuple[str, ...] = ()) -> Stacked:
    """Fit, score and store.

    With folds the stacker is fitted on out-of-fold logits and scored on the held-out rows,
    which neither it nor its members have seen. Without them it is fitted on the held-out
    rows and scored on them out of fold.
    """
    chosen = artifacts.list_members(run, names)
    rows, logits = members.fitting_logits(run, chosen)
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy(dtype=str)
    stacker = fit_stacker(chosen, logits, labels, groups)
    fitted_on = {"images": len(rows), "groups": len(set(groups))}
    if set(rows["split"]) == {"heldout"}:
        basis, stack_logits = "out of fold", out_of_fold(logits, labels, groups)
    else:
        rows, logits = members.heldout_logits(run, chosen)
        labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy(dtype=str)
        basis, stack_logits = "fitted on other rows", stacker.logit(logits)
    scored = score_table(chosen, logits, stack_logits, labels, groups)
    artifacts.write_json(
        artifacts.stacker_path(run),
        {
            **stacker.to_dict(),
            "scores": {
                line.name: {"auroc": line.auroc.to_dict(), "log_loss": line.log_loss.to_dict()} for line in scored
            },
            "rows": {"split": "heldout", "images": len(rows), "groups": len(set(groups)), "stack": basis},
            "fitted_rows": fitted_on,
            "fitted_on": fingerprint(run, chosen),
        },
    )
    return Stacked(stacker, scored, rows, basis)


def read_stacker(run: Path) -> Stacker:
    """The run's stacker; ArtifactError if there is none, or if members changed since it was fitted."""
    remedy = f"run: python cli.py stack --run {run}"
    values = artifacts.read_json(artifacts.stacker_path(run), remedy)
    stacker = Stacker.from_dict(values)
    artifacts.list_members(run, stacker.members)
    if values.get("fitted_on") != fingerprint(run, stacker.members):
        raise ArtifactError(f"members of {run} changed since the stack was fitted; {remedy}")
    return stacker


def fingerprint(run: Path, names: Sequence[str]) -> dict[str, Any]:
    """What a stacker was fitted on: the data, and each member's weights and held-out logits."""
    infos = {name: members.read_info(run, name) for name in names}
    return {
        "data_sha256": {info["data_sha256"] for info in infos.values()}.pop(),
        "members": {name: artifacts.json_sha256(info["files"]) for name, info in infos.items()},
    }


def score_table(
    names: Sequence[str], logits: np.ndarray, stack_logits: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> list[Scored]:
    """Members, their mean probability, and the stack, all on the same rows."""
    p = {name: metrics.sigmoid(logits[:, column]) for column, name in enumerate(names)}
    return score_probabilities(p, metrics.sigmoid(stack_logits), labels, groups)


def score_probabilities(
    members: Mapping[str, np.ndarray], stack: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> list[Scored]:
    """As `score_table`, from probabilities."""
    p = {**members, "mean": np.mean(list(members.values()), axis=0), "stack": stack}
    return [
        Scored(name, **score_intervals(labels, values, groups, names=("auroc", "log_loss")))
        for name, values in p.items()
    ]


def score_frames(scores: pd.DataFrame, truth: pd.DataFrame) -> list[Scored]:
    """As `score_table`, from what `infer --members` wrote and a table of `id`, `label` and perhaps `group`."""
    rows = truth.set_index("id", drop=False).loc[scores["id"]]
    members = {name: scores[name].to_numpy() for name in scores.columns if name not in ("id", "target")}
    groups = rows["group" if "group" in rows else "id"].to_numpy(dtype=str)
    return score_probabilities(members, scores["target"].to_numpy(), rows["label"].to_numpy(), groups)


def as_table(scored: Sequence[Scored], weights: Mapping[str, float] | None = None) -> pd.DataFrame:
    """The scores, and the stack's weights if given, as text for people."""
    frame = pd.DataFrame(
        {
            "": [line.name for line in scored],
            "AUROC": [str(line.auroc) for line in scored],
            "log-loss": [str(line.log_loss) for line in scored],
        }
    )
    if weights is not None:
        frame["weight"] = [f"{weights[line.name]:+.3f}" if line.name in weights else "" for line in scored]
    return frame


def verdict(scored: Sequence[Scored]) -> str:
    """Whether the stack beats the best member and the mean on these rows, in one sentence."""
    by_name = {line.name: line for line in scored}
    stack = by_name.pop("stack")
    best = max((line for line in by_name.values() if line.name != "mean"), key=lambda line: line.auroc.value)
    beaten = [line for line in (best, by_name["mean"]) if line.auroc.value >= stack.auroc.value]
    if beaten:
        names = " nor ".join(f"{line.name} ({line.auroc.value:.4f})" for line in beaten)
        return f"The stack ({stack.auroc.value:.4f} AUROC) does not beat {names} on these rows."
    return (
        f"The stack beats its best member {best.name} by {stack.auroc.value - best.auroc.value:.4f} AUROC "
        f"and the mean by {stack.auroc.value - by_name['mean'].auroc.value:.4f} on these rows."
    )
