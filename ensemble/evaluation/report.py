"""The report page of a run: scores, curves, calls by source, spectra, and a gallery of the worst errors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL.Image import Image
from tqdm import tqdm

from ensemble.audit.headline import audit_headline, read_audit
from ensemble.core import artifacts, metrics
from ensemble.core.bootstrap import PairedDifference
from ensemble.core.errors import ArtifactError, ImageError
from ensemble.core.metrics import Interval, sigmoid
from ensemble.evaluation import protocol, report_data, report_plots, report_scores
from ensemble.evaluation.report_plots import mean_spectra
from ensemble.evaluation.report_scores import ScoredImages
from ensemble.evaluation.tables import TITLES
from ensemble.images import html
from ensemble.images.canonical import WHITE
from ensemble.images.figures import Plot, radial_spectra
from ensemble.images.preprocess import flatten
from ensemble.models import members
from ensemble.stacking.leave_out import describe_left_out
from ensemble.stacking.stack import read_stacker
from ensemble.stacking.stacker import Stacker

GALLERY_IMAGES = 12  # images of each kind
RESAMPLES = 2000
POOR, GOOD, PLAIN, DEEP = (250, 185, 160), (190, 222, 245), (255, 255, 255), (120, 170, 230)  # red, green, blue
GALLERY_TITLES = ("False positives: reals called ai", "False negatives: ai called real")  # by label

Overlay = Callable[[Image], Image]  # an RGB image -> the same with its heat map laid on


def most_wrong(labels: np.ndarray, logits: np.ndarray, label: int, count: int = GALLERY_IMAGES) -> np.ndarray:
    """Rows of a class, int [up to count], those that lie furthest on the other class's side first."""
    rows = np.flatnonzero(labels == label)
    return rows[np.argsort(logits[rows] if label else -logits[rows], kind="stable")[:count]]


def _card(rows: ScoredImages, row: int, threshold: float, look: Overlay | None) -> dict[str, Any]:
    """One image of the gallery; picture and heat are data URIs, missing is why the image cannot be shown."""
    facts, p = rows.frame.iloc[row], rows.p
    picture = heat = None
    missing = ""
    try:
        image = flatten(rows.read(row), WHITE)
        picture = html.picture(image)
        heat = html.picture(look(image)) if look is not None else None
    except ImageError as error:
        missing = str(error)
    target = float(p["stack"][row])
    return {
        **{column: str(facts[column]) for column in ("id", "source", "generator")},
        "target": target,
        "wrong": bool((target >= threshold) != bool(facts["label"])),
        "members": [(name, float(p[name][row])) for name in rows.names],
        "picture": picture,
        "heat": heat,
        "missing": missing,
    }


def write_report(
    run: Path, output: Path, evaluation: str | None = None, look: Overlay | None = None, resamples: int = RESAMPLES
) -> str:
    """Write the page; returns its verdict.

    evaluation: by name; else the latest, if there is any. look: lays a heat map on an image.
    """
    stacker = read_stacker(run)
    sets = report_scores.read_run_images(run, stacker)
    cautions = []
    try:
        if evaluation is not None or (names := report_scores.list_evaluations(run)):
            sets.append(report_scores.read_evaluated_images(run, evaluation or names[0], stacker))
    except ArtifactError as error:
        if evaluation is not None:
            raise
        cautions.append(f"Not shown: {error}.")
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
    audit = read_audit(run)
    infos = [members.read_info(run, name) for name in report_scores.split_externals(run, stacker)[0]]
    sections = [_section(rows, stacker, look, resamples) for rows in sets]
    sentence = verdict(sets[0], stacker.threshold, sections[0]["scores"], sections[0]["versus"])
    page = html.render(
        "report.html",
        run=run.resolve().name,
        verdict=sentence,
        headline=audit_headline(run),
        cautions=[*report_data.cautions(run, frame, stacker, sets, audit), *cautions],
        findings=(audit or {}).get("findings", []),
        counts=report_data.counts(frame),
        listed=report_data.MAX_PARTS,
        members=[report_data.member_facts(info) for info in infos],
        recipes=[(info["name"], _recipe_json(info)) for info in infos],
        stacker=stacker,
        coef=dict(zip(stacker.members, stacker.coef, strict=True)),
        weights=report_data.weight_intervals(run),
        null=report_data.null_scores(audit),
        columns=TITLES,
        part_columns=protocol.TITLES,
        heaviest=largest_weight_member(run, stacker),
        looked=look is not None,
        sections=sections,
        left_out=report_scores.leave_out_parts(run, stacker),
        models=("stack", "mean", "best member"),
        describe=describe_left_out,
    )
    with artifacts.replacing(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return sentence


def _recipe_json(info: Mapping[str, Any]) -> str:
    return json.dumps({key: info[key] for key in ("recipe", "contract")}, indent=1, ensure_ascii=False)


def largest_weight_member(run: Path, stacker: Stacker) -> str:
    """Of the members that the run trained, the one of the largest weight, whatever its sign."""
    own, _ = report_scores.split_externals(run, stacker)
    return own[int(np.argmax(np.abs(stacker.coef[: len(own)])))]


def heatmap_overlay(run: Path, name: str) -> Overlay:
    """Lays a member's heat map on an image. Needs torch."""
    from ensemble.evaluation import heatmaps

    member = members.load_member(run, name)
    return lambda image: heatmaps.overlay(image, heatmaps.heatmaps(member, image))


def verdict(
    rows: ScoredImages,
    threshold: float,
    scores: Mapping[str, Mapping[str, Interval]],
    versus: Mapping[str, PairedDifference],
) -> str:
    """Whether the stack earns its place on these rows, in one sentence."""
    stack, best_name = scores["stack"], next(iter(versus))
    differences = [paired.difference for paired in versus.values()]
    best, mean = (
        "beats" if each.low > 0 else "loses to" if each.high < 0 else "does not clearly differ from"
        for each in differences
    )
    apart = [f"{each.value:+.3f} AUROC, {each.low:+.3f} to {each.high:+.3f}" for each in differences]
    return (
        f"On {len(rows.frame)} held-out images in {len(set(rows.groups))} groups the stack reaches an AUROC of "
        f"{_range(stack['auroc'])} and, at its threshold of {threshold:.3f}, a balanced accuracy of "
        f"{_range(stack['balanced_accuracy'])}; it {best} its best member {best_name} ({apart[0]}), "
        f"and {mean} the members' mean ({apart[1]})."
    )


def _range(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _section(rows: ScoredImages, stacker: Stacker, look: Overlay | None, resamples: int) -> dict[str, Any]:
    """All that the page shows of one set of rows."""
    threshold = stacker.threshold
    scores = report_data.scores(rows, threshold, resamples)
    spectra = mean_spectra(rows)
    galleries = []
    for label, title in enumerate(GALLERY_TITLES):
        bar = tqdm(most_wrong(rows.labels, rows.stack, label), "pictures", unit="image", leave=False, disable=None)
        galleries.append((title, [_card(rows, int(row), threshold, look) for row in bar]))
    heat = report_data.robustness(rows, stacker)
    worst = ""
    if heat is not None:
        auroc = heat["stack"]
        worst = f"The stack fares worst under {auroc.idxmin()}, with an AUROC of {auroc.min():.3f}."
    return {
        "title": rows.title,
        "where": rows.where(),
        "scores": scores,
        "versus": report_data.comparisons(rows, scores, resamples),
        "plots": _plots(rows, stacker),
        "legend": report_plots.colours([*rows.scores]),
        "confusion": report_data.confusion(rows, threshold),
        "parts": {column: report_data.parts(rows, column, threshold, resamples) for column in ("generator", "source")},
        "robustness": None if heat is None else _shaded(heat, 0.5, 1.0, POOR, GOOD),
        "worst": worst,
        "correlations": _shaded(report_data.correlations(rows), 0.0, 1.0, PLAIN, DEEP),
        "disagreements": _shaded(report_data.disagreements(rows, threshold), 0.0, 0.5, PLAIN, POOR),
        "divided": report_data.divided(rows, threshold),
        "images": len(rows.frame),
        "galleries": galleries,
        "spectra": spectra,
        "spectrum_plots": []
        if spectra is None
        else [*report_plots.planes(spectra.planes), radial_spectra(spectra.radial)],
    }


def _plots(rows: ScoredImages, stacker: Stacker) -> list[Plot]:
    labels, p = rows.labels, rows.p
    stack = {"stack": p["stack"]}
    if stacker.calibration.kind != "none":
        stack = {"before calibration": sigmoid(rows.raw), "after calibration": p["stack"]}
    eces = {name: metrics.expected_calibration_error(labels, values) for name, values in stack.items()}
    ranked = [report_plots.roc, report_plots.precision_recall] if rows.both_classes else []
    return [
        *(plot(labels, rows.scores) for plot in ranked),
        report_plots.reliability(labels, stack, eces),
        report_plots.histograms(labels, p["stack"], stacker.threshold),
    ]


def _shaded(
    table: pd.DataFrame, low: float, high: float, first: tuple[int, int, int], last: tuple[int, int, int]
) -> dict[str, Any]:
    """A table of numbers with a colour for each, from `first` at `low` to `last` at `high`."""
    shares = np.clip((np.nan_to_num(table.to_numpy(), nan=low) - low) / (high - low), 0, 1)
    mixed = np.round(np.array(first) + shares[..., None] * (np.array(last) - np.array(first))).astype(int)
    lines = []
    for name, values, colours in zip(table.index, table.to_numpy().tolist(), mixed.tolist(), strict=True):
        cells = [(value, "rgb({}, {}, {})".format(*colour)) for value, colour in zip(values, colours, strict=True)]
        lines.append((name, cells))
    return {"columns": list(table.columns), "lines": lines}
