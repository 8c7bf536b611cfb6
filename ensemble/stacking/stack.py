"""Fit a run's stacker on its members' held-out logits, score it, describe it in words, and write stacker.json.

Test-time augmentation (TTA) is measured here too: whether averaging a member's logit with that of the mirrored
image lowers its log-loss on held-out rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from ensemble.stacking.diagnostics import COLLINEAR_CORRELATION, WEIGHT_DRAWS, collinear_pairs, weight_intervals
from ensemble.stacking.fit import TEMPERATURES, StackLogits, fit_on_folds
from ensemble.stacking.grouped_cv import grouped_folds
from ensemble.stacking.label_shift import LabelShift
from ensemble.stacking.logit_table import StackingData, read_stacking_data, stack_scores
from ensemble.stacking.scores import ModelScores, format_signed, score_models
from ensemble.stacking.stacker import METHODS, Stacker, read_stacker_values
from ensemble.stacking.threshold import BALANCED, choose_threshold


def measure_tta(runners: Sequence[Runner], run: Path, ids: Sequence[str]) -> list[ModelScores]:
    """A line for each member: its scores with TTA, and their difference from those without.

    Images are read as in training, in canonical form if that was used.
    """
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
    for a method that estimates none. strength: what cross-validation chose (fit.py). stack_logits: its logits of
    `data.scored`. ece: before and after calibration. balanced_accuracy: of the stack at its threshold.
    flipped: scores with TTA, None if not measured.
    """

    stacker: Stacker
    data: StackingData
    scored: list[ModelScores]
    kinds: list[ModelScores]
    weights: list[Interval] | None
    strength: float
    stack_logits: StackLogits
    ece: tuple[float, float]
    balanced_accuracy: Interval
    flipped: list[ModelScores] | None


def stack_run(run: Path, members: tuple[str, ...] = (), options: StackOptions | None = None) -> StackResult:
    """Fit, score and store.

    With folds the stacker is fitted on out-of-fold logits and scored on the held-out rows,
    which neither it nor its members have seen. Without them it is fitted on the held-out
    rows and scored on them out of fold.
    """
    options = options or StackOptions()
    chosen = artifacts.list_members(run, members)
    names = [member.name for member in options.externals]
    for name in names:
        if artifacts.member_path(run, name).is_dir() or names.count(name) > 1:
            raise ArtifactError(f"--external {name}: a member of that name is there already; give it another name")
    data = read_stacking_data(run, chosen, options.externals)
    done = fit_and_score(data, options)
    if options.measure_tta:
        from ensemble.models.torch_runner import member_runners

        flipped = measure_tta([*member_runners(run, chosen)], run, data.ids)
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
    folds = grouped_folds(part.labels, part.groups)
    stacker, strength = fit_on_folds(
        data.members, part.logits, part.labels, part.groups, folds, options.method, options.calibration
    )
    kinds = tqdm(METHODS, desc="stack", unit="kind", leave=False, disable=None)
    scores = {kind: stack_scores(data, kind, options.calibration) for kind in kinds}
    p = {kind: sigmoid(logits.calibrated) for kind, logits in scores.items()}
    ranking = {kind: sigmoid(logits.raw) for kind, logits in scores.items()}
    threshold, rule = choose_threshold(options.threshold, truth[0], p[options.method])
    own, targets = scores[options.method], p[options.method]
    member_p = sigmoid(stacker.fill_missing(data.scored.logits))
    compared = {**dict(zip(data.members, member_p.T, strict=True)), "mean": p["mean"], "stack": targets}
    return StackResult(
        replace(stacker, threshold=threshold, threshold_rule=rule),
        data,
        score_models(compared, "stack", *truth, {"mean": ranking["mean"], "stack": ranking[options.method]}),
        score_models(p, options.method, *truth, ranking),
        weight_intervals(options.method, part.logits, part.labels, part.groups, strength),
        strength,
        own,
        (
            metrics.expected_calibration_error(truth[0], ranking[options.method]),
            metrics.expected_calibration_error(truth[0], targets),
        ),
        score_intervals(truth[0], targets, truth[1], threshold, names=["balanced_accuracy"])["balanced_accuracy"],
        None,
    )


def stacker_record(done: StackResult, options: StackOptions, fitted_on: Mapping[str, Any]) -> dict[str, Any]:
    """What stacker.json holds. fitted_on: hashes of the members and of what they scored."""
    stacker, fitting, scored = done.stacker, done.data.fitting, done.data.scored
    return {
        **stacker.to_dict(),
        "scores": {line.name: line.to_dict() for line in done.scored},
        "kinds": {line.name: line.to_dict() for line in done.kinds},
        "weights": None if done.weights is None else [weight.to_dict() for weight in done.weights],
        "strength": done.strength,
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
    values = read_stacker_values(artifacts.stacker_path(run), remedy)
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
    values = read_stacker_values(path, "run stack again")
    artifacts.write_json(path, {**values, "adapted": asdict(shift)})


def has_shift(run: Path) -> bool:
    """Whether the run's stacker.json, current or not, holds a shift."""
    try:
        return "adapted" in read_stacker_values(artifacts.stacker_path(run), "")
    except ArtifactError:
        return False


def fingerprint(run: Path, names: Sequence[str]) -> dict[str, Any]:
    """What a stacker was fitted on: the data, each member's weights and held-out logits, and scores from elsewhere."""
    elsewhere = [name for name in names if external.is_external(run, name)]
    infos = {name: members.read_info(run, name) for name in names if name not in elsewhere}
    hashes: dict[str, Any] = {
        "data_sha256": {info["data_sha256"] for info in infos.values()}.pop(),
        "members": {name: artifacts.json_sha256(info["files"]) for name, info in infos.items()},
    }
    if elsewhere:
        hashes["externals"] = {name: artifacts.file_sha256(artifacts.external_path(run, name)) for name in elsewhere}
    return hashes


def format_weights(done: StackResult) -> dict[str, str]:
    """Each member's weight as text, with its interval where it was estimated."""
    plain = [f"{weight:+.4f}" for weight in done.stacker.coef]
    texts = plain if done.weights is None else [format_signed(weight) for weight in done.weights]
    return dict(zip(done.stacker.members, texts, strict=True))


def describe_stack(done: StackResult) -> list[str]:
    """Lines on a better method, collinear members, calibration, threshold and TTA."""
    lines = []
    stacker, data, (before, after) = done.stacker, done.data, done.ece
    if better := [line for line in done.kinds if line.auroc_difference is not None and line.auroc_difference.low > 0]:
        best = max(better, key=lambda line: line.auroc.value).name
        lines.append(f"{best} is clearly better than {stacker.method} on these rows; take it with --kind {best}.")
    if done.weights is not None:
        lines.append(f"Weights: intervals from {WEIGHT_DRAWS} draws of groups.")
    if stacker.bounded and done.strength != TEMPERATURES[0]:
        lines.append(
            f"Members' calibrated probabilities are softened by a temperature of {done.strength:g}, which lowers the "
            "log-loss beyond noise."
        )
    lines += [
        f"{one} and {other} say nearly the same (correlation {correlation:.3f}, above {COLLINEAR_CORRELATION}): "
        "their weights mean little apart, and one may do."
        for one, other, correlation in collinear_pairs(data.members, data.fitting.logits)
    ]
    fitted = stacker.calibration
    if fitted.kind == "none":
        lines.append(f"Calibration: none ({fitted.reason}); ECE {before:.4f}.")
    else:
        number = f"scale {fitted.scale:.3f}" if fitted.kind == "temperature" else f"shift {fitted.shift:+.3f}"
        lines.append(
            f"Calibration: {fitted.kind}, {number} ({fitted.reason}); ECE {before:.4f} before, {after:.4f} after."
        )
    called, labels = sigmoid(done.stack_logits.calibrated) >= stacker.threshold, data.scored.labels
    lines.append(
        f"Threshold: {stacker.threshold:.4f} ({stacker.threshold_rule}); on these rows it calls "
        f"{np.mean(called[labels == 1]):.1%} of ai and {np.mean(called[labels == 0]):.1%} of real images ai."
    )
    if done.flipped is not None:
        lines.append("Averaging over mirrored images, change of log-loss (infer --tta does it where it helps):")
        helped = stacker.tta_members or ()
        for line in done.flipped:
            outcome = "helps" if line.name in helped else "does not help beyond noise"
            lines.append(f"  {line.name}: {format_signed(line.log_loss_difference)}, {outcome}")
    return lines
