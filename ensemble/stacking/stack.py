"""Fit a run's stacker on its members' held-out logits, score it, describe it in words, and write stacker.json.

Test-time augmentation (TTA) is measured here too: whether averaging a member's logit with that of the mirrored
image lowers its log-loss on held-out rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from tqdm import tqdm

from ensemble.core import artifacts, metrics
from ensemble.core.bootstrap import score_intervals
from ensemble.core.errors import ArtifactError, join_limited
from ensemble.core.metrics import Interval, sigmoid
from ensemble.data import dataset
from ensemble.images import canonical, decode
from ensemble.models import external, members
from ensemble.models.external import External
from ensemble.models.runner import Runner, score_images, with_flip
from ensemble.stacking.calibration import fit_calibration
from ensemble.stacking.diagnostics import COLLINEAR_CORRELATION, WEIGHT_DRAWS, collinear_pairs, weight_intervals
from ensemble.stacking.fit import StackLogits, fit_weights
from ensemble.stacking.grouped_cv import grouped_folds, single_threaded_blas
from ensemble.stacking.label_shift import LabelShift
from ensemble.stacking.logit_table import StackingData, read_stacking_data, stack_scores
from ensemble.stacking.scores import ModelScores, format_signed, score_models, score_stack
from ensemble.stacking.stacker import METHODS, Stacker
from ensemble.stacking.threshold import BALANCED, choose_threshold


def measure_tta(run: Path, names: Sequence[str], ids: Sequence[str]) -> list[ModelScores]:
    """A line for each member: its scores with TTA, and their difference from those without. Needs torch."""
    import torch

    from ensemble.models.members import load_member
    from ensemble.models.torch_runner import choose_device, torch_runner

    device = torch.device(choose_device("auto"))
    runners = [torch_runner(name, load_member(run, name), device) for name in names]
    return compare_tta(runners, run, ids)


def compare_tta(runners: Sequence[Runner], run: Path, ids: Sequence[str]) -> list[ModelScores]:
    """As `measure_tta`, for runners; images are read as in training, in canonical form if that was used."""
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first").set_index("id", drop=False)
    rows = frame.loc[list(ids)]
    plan = canonical.read_plan(artifacts.canonical_path(run))

    def read(row: int, file: Path) -> Image:
        return decode.decode(file) if plan is None else canonical.read_canonical(file, plan, (0, row))

    both = [*runners, *map(with_flip, runners)]
    with tqdm(total=len(rows), desc="flips", unit="image", leave=False, disable=None) as bar:
        logits, errors = score_images(dataset.files(rows), both, progress=bar.update, read=read)
    if errors:
        raise ArtifactError(f"held-out images cannot be read: {join_limited(errors.values(), 2)}; put them back")
    labels, groups = rows["label"].to_numpy(), rows["group"].to_numpy(dtype=str)
    p = sigmoid(np.asarray(logits, dtype=np.float64))
    lines = []
    for column, runner in enumerate(runners):
        pair = {runner.name: p[:, len(runners) + column], "": p[:, column]}
        lines.append(score_models(pair, "", labels, groups)[0])
    return lines


def members_helped_by_tta(lines: Sequence[ModelScores]) -> tuple[str, ...]:
    """Members whose log-loss TTA lowers, with a 95 % interval that excludes 0."""
    return tuple(
        line.name for line in lines if line.log_loss_difference is not None and line.log_loss_difference.high < 0
    )


@dataclass(frozen=True)
class StackOptions:
    """How a stacker is fitted: method, calibration, threshold rule (`threshold.parse_rule`), members trained elsewhere,
    and whether TTA is measured.
    """

    method: str = METHODS[0]
    calibration: str = "auto"
    threshold: str | float = BALANCED
    externals: tuple[External, ...] = ()
    measure_tta: bool = False


@dataclass(frozen=True)
class StackResult:
    """A fitted stacker and its scores.

    scored: the stack beside its members. kinds: beside the stacks of other methods. weights: with intervals, None
    for a method that estimates none. inverse_penalty: scikit-learn's C. stack_logits: its logits of
    `data.scored`. ece: before and after calibration. balanced_accuracy: of the stack at its threshold.
    flipped: scores with TTA, None if not measured.
    """

    stacker: Stacker
    data: StackingData
    scored: list[ModelScores]
    kinds: list[ModelScores]
    weights: list[Interval] | None
    inverse_penalty: float
    stack_logits: StackLogits
    ece: tuple[float, float]
    balanced_accuracy: Interval
    flipped: list[ModelScores] | None

    @property
    def stack_targets(self) -> np.ndarray:
        """The stack's p of the rows, float64."""
        return metrics.sigmoid(self.stack_logits.calibrated)


def stack_run(run: Path, names: tuple[str, ...] = (), options: StackOptions | None = None) -> StackResult:
    """Fit, score and store.

    With folds the stacker is fitted on out-of-fold logits and scored on the held-out rows,
    which neither it nor its members have seen. Without them it is fitted on the held-out
    rows and scored on them out of fold.
    """
    options = options or StackOptions()
    chosen = artifacts.list_members(run, names)
    _check_externals(run, options.externals)
    data = read_stacking_data(run, chosen, options.externals)
    done = fit_and_score(data, options)
    if options.measure_tta:
        flipped = measure_tta(run, chosen, data.ids)
        done = replace(done, flipped=flipped, stacker=replace(done.stacker, tta_members=members_helped_by_tta(flipped)))
    for member in options.externals:
        external.write_external(run, member)
    artifacts.write_json(
        artifacts.stacker_path(run), stacker_record(done, options, fingerprint(run, done.stacker.members))
    )
    return done


def fit_and_score(data: StackingData, options: StackOptions) -> StackResult:
    """Fit, calibrate, set the threshold and score: all that needs no image."""
    part, truth = data.fitting, (data.scored.labels, data.scored.groups)
    with single_threaded_blas():
        folds = grouped_folds(part.labels, part.groups)
        fitted = fit_weights(options.method, part.logits, part.labels, folds)
        calibration = fit_calibration(options.calibration, fitted.oof_logits, part.labels, part.groups, folds)
    kinds = tqdm(METHODS, desc="stack", unit="kind", leave=False, disable=None)
    scores = {kind: stack_scores(data, kind, options.calibration) for kind in kinds}
    p = {kind: metrics.sigmoid(found.calibrated) for kind, found in scores.items()}
    ranking = {kind: metrics.sigmoid(found.raw) for kind, found in scores.items()}
    threshold, rule = choose_threshold(options.threshold, truth[0], p[options.method])
    stacker = Stacker(
        data.members, tuple(fitted.coef.tolist()), fitted.intercept, threshold, options.method, calibration, rule
    )
    own = scores[options.method]
    return StackResult(
        stacker,
        data,
        score_stack(data.members, data.scored.logits, own.calibrated, *truth, own.raw),
        score_models(p, options.method, *truth, ranking),
        weight_intervals(options.method, part.logits, part.labels, part.groups, fitted.inverse_penalty),
        fitted.inverse_penalty,
        own,
        (
            metrics.expected_calibration_error(truth[0], ranking[options.method]),
            metrics.expected_calibration_error(truth[0], p[options.method]),
        ),
        score_intervals(truth[0], p[options.method], truth[1], threshold, names=("balanced_accuracy",))[
            "balanced_accuracy"
        ],
        None,
    )


def _check_externals(run: Path, externals: Sequence[External]) -> None:
    names = [member.name for member in externals]
    for name in names:
        if artifacts.member_path(run, name).is_dir() or names.count(name) > 1:
            raise ArtifactError(f"--external {name}: a member of that name is there already; give it another name")


def stacker_record(done: StackResult, options: StackOptions, fitted_on: Mapping[str, Any]) -> dict[str, Any]:
    """What stacker.json holds. fitted_on: hashes of the members and of what they scored."""
    stacker, fitting, scored = done.stacker, done.data.fitting, done.data.scored
    return {
        **stacker.to_dict(),
        "scores": {line.name: line.to_dict() for line in done.scored},
        "kinds": {line.name: line.to_dict() for line in done.kinds},
        "weights": None if done.weights is None else [weight.to_dict() for weight in done.weights],
        "strength": done.inverse_penalty,
        "calibration_asked": options.calibration,
        "ece": {"before_calibration": done.ece[0], "after": done.ece[1]},
        "balanced_accuracy": done.balanced_accuracy.to_dict(),
        "flip_scores": None if done.flipped is None else {line.name: line.to_dict() for line in done.flipped},
        "rows": {
            "split": "heldout",
            "images": len(scored.labels),
            "groups": scored.group_count,
            "stack": done.data.basis,
        },
        "fitted_rows": {"images": len(fitting.labels), "groups": fitting.group_count},
        "fitted_on": dict(fitted_on),
    }


def read_stacker(run: Path) -> Stacker:
    """The run's stacker; ArtifactError if there is none, or if members changed since it was fitted."""
    remedy = f"run: python cli.py stack --run {run}"
    values = artifacts.read_json(artifacts.stacker_path(run), remedy)
    stacker = Stacker.from_dict(values)
    artifacts.list_members(run, tuple(name for name in stacker.members if not external.is_external(run, name)))
    if values.get("fitted_on") != fingerprint(run, stacker.members):
        raise ArtifactError(f"members of {run} changed since the stack was fitted; {remedy}")
    return stacker


def fitted_prior(run: Path, stacker: Stacker) -> float:
    """The share of ai among the rows that the run's stacker was fitted on."""
    trained = [name for name in stacker.members if not external.is_external(run, name)]
    rows, _ = members.fitting_logits(run, trained)
    return float(rows["label"].mean())


def store_shift(run: Path, shift: LabelShift) -> None:
    """Put a shift for target images beside the stacker; all else in stacker.json stays."""
    path = artifacts.stacker_path(run)
    values = artifacts.read_json(path, "run stack again")
    artifacts.write_json(path, {**values, "adapted": shift.to_dict()})


def has_shift(run: Path) -> bool:
    """Whether the run's stacker.json, current or not, holds a shift."""
    try:
        return "adapted" in artifacts.read_json(artifacts.stacker_path(run), "")
    except ArtifactError:
        return False


def fingerprint(run: Path, names: Sequence[str]) -> dict[str, Any]:
    """What a stacker was fitted on: the data, each member's weights and held-out logits, and scores from elsewhere."""
    elsewhere = [name for name in names if external.is_external(run, name)]
    infos = {name: members.read_info(run, name) for name in names if name not in elsewhere}
    found = {
        "data_sha256": {info["data_sha256"] for info in infos.values()}.pop(),
        "members": {name: artifacts.json_sha256(info["files"]) for name, info in infos.items()},
    }
    if elsewhere:
        found["externals"] = {name: artifacts.file_sha256(artifacts.external_path(run, name)) for name in elsewhere}
    return found


def format_weights(done: StackResult) -> dict[str, str]:
    """Each member's weight as text, with its interval where it was estimated."""
    if done.weights is None:
        found = [f"{weight:+.4f}" for weight in done.stacker.coef]
    else:
        found = [format_signed(weight) for weight in done.weights]
    return dict(zip(done.stacker.members, found, strict=True))


def describe_stack(done: StackResult) -> list[str]:
    """Lines on a better method, collinear members, calibration, threshold and TTA."""
    return [*_kind(done), *_weights(done), *_calibration(done), _threshold_note(done), *_flips(done)]


def _kind(done: StackResult) -> list[str]:
    better = [line for line in done.kinds if line.auroc_difference is not None and line.auroc_difference.low > 0]
    if not better:
        return []
    best = max(better, key=lambda line: line.auroc.value)
    return [f"{best.name} is clearly better than {done.stacker.method} on these rows; take it with --kind {best.name}."]


def _weights(done: StackResult) -> list[str]:
    lines = []
    if done.weights is not None:
        lines.append(f"Weights: intervals from {WEIGHT_DRAWS} draws of groups at the chosen penalty.")
    for one, other, correlation in collinear_pairs(done.data.members, done.data.fitting.logits):
        lines.append(
            f"{one} and {other} say nearly the same (correlation {correlation:.3f}, above {COLLINEAR_CORRELATION}): "
            "their weights mean little apart, and one may do."
        )
    return lines


def _calibration(done: StackResult) -> list[str]:
    found = done.stacker.calibration
    if found.kind == "none":
        return [f"Calibration: none ({found.reason}); ECE {done.ece[0]:.4f}."]
    number = f"scale {found.scale:.3f}" if found.kind == "temperature" else f"shift {found.shift:+.3f}"
    return [
        f"Calibration: {found.kind}, {number} ({found.reason}); ECE {done.ece[0]:.4f} before, {done.ece[1]:.4f} after."
    ]


def _threshold_note(done: StackResult) -> str:
    stacker, labels = done.stacker, done.data.scored.labels
    called = done.stack_targets >= stacker.threshold
    return (
        f"Threshold: {stacker.threshold:.4f} ({stacker.threshold_rule}); on these rows it calls "
        f"{np.mean(called[labels == 1]):.1%} of ai and {np.mean(called[labels == 0]):.1%} of real images ai."
    )


def _flips(done: StackResult) -> list[str]:
    if done.flipped is None:
        return []
    lines = ["Averaging over mirrored images, change of log-loss (infer --tta does it where it helps):"]
    helped = done.stacker.tta_members or ()
    return lines + [_flip(line, line.name in helped) for line in done.flipped]


def _flip(line: ModelScores, helps: bool) -> str:
    outcome = "helps" if helps else "does not help beyond noise"
    return f"  {line.name}: {format_signed(line.log_loss_difference)}, {outcome}"
