"""Kinds of stack, and ideas that were tried and lost, on generators that they were not fitted on.

    python bench/stack_scores.py scores.csv --splits 20
    python bench/stack_scores.py scores.csv --splits 20 --rows 300
    python bench/stack_scores.py scores.csv --splits 40 --new-sources

The table has a column label (1 = ai), a column generator (of an ai image; the data set of a real one), and a column of
probabilities for each detector. In each split half of the generators, drawn at random, are fitted on with half of the
real images, and the others are scored; with --new-sources the data sets of real images are divided too. --rows: fit on
so many rows alone. The scores of seven published detectors are in the PyPI package deepsafe-bench.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ensemble.core.metrics import auroc, log_loss, sigmoid
from ensemble.stacking.fit import fit_with_strength, solve
from ensemble.stacking.grouped_cv import grouped_folds, single_threaded_blas
from ensemble.stacking.logistic import equal_weights_penalty, minimise_log_loss, smoothed_targets
from ensemble.stacking.score_table import labelled_scores, read_score_table
from ensemble.stacking.stacker import METHODS, calibrated_probabilities

Scorer = Callable[[np.ndarray], np.ndarray]  # logits [N, members] -> stack logits [N]
BASELINE = "logit"


def kind(method: str) -> Callable[[np.ndarray, np.ndarray, np.ndarray], Scorer]:
    """One of `stack --kind`, as `stack --scores` fits it: each row is a group."""

    def fit(logits: np.ndarray, labels: np.ndarray, generators: np.ndarray) -> Scorer:
        groups = np.arange(len(labels))
        stacker = fit_with_strength(method, logits, labels, groups, grouped_folds(labels, groups)).stacker
        return lambda rows: stacker.raw_logit(stacker.fill_missing(rows))

    return fit


def probabilities(logits: np.ndarray, labels: np.ndarray, generators: np.ndarray) -> Scorer:
    """Logistic regression on the probabilities as they are, by scikit-learn's default."""
    model = LogisticRegression(max_iter=1000).fit(sigmoid(logits), labels)
    return lambda rows: model.decision_function(sigmoid(rows))


def calibrated(logits: np.ndarray, labels: np.ndarray, generators: np.ndarray) -> Scorer:
    """Logistic regression on calibrated probabilities, penalised towards 0."""
    calibrations = solve("mean", logits, labels).member_calibrations
    model = LogisticRegression(max_iter=1000).fit(calibrated_probabilities(logits, calibrations), labels)
    return lambda rows: model.decision_function(calibrated_probabilities(rows, calibrations))


def beta_calibrated(logits: np.ndarray, labels: np.ndarray, generators: np.ndarray) -> Scorer:
    """As `logistic`, each member calibrated by three parameters: Kull et al., "Beta calibration" (2017)."""
    targets = smoothed_targets(labels)

    def pair(column: np.ndarray) -> np.ndarray:
        return np.column_stack([-np.logaddexp(0, -column), np.logaddexp(0, column)])  # log p and -log(1 - p)

    fits = [minimise_log_loss(pair(column), targets, 1e-3 * np.eye(2), lowest=0.0) for column in logits.T]

    def features(rows: np.ndarray) -> np.ndarray:
        return np.column_stack([sigmoid(pair(c) @ coef + shift) for c, (coef, shift) in zip(rows.T, fits, strict=True)])

    coef, intercept = minimise_log_loss(features(logits), targets, equal_weights_penalty(logits.shape[1]))
    return lambda rows: features(rows) @ coef + intercept


def chosen_penalty(logits: np.ndarray, labels: np.ndarray, generators: np.ndarray) -> Scorer:
    """As `logistic`, its penalty chosen by cross-validation over generators."""
    calibrations = solve("mean", logits, labels).member_calibrations
    features, penalty = calibrated_probabilities(logits, calibrations), equal_weights_penalty(logits.shape[1])
    losses = {}
    for c in (0.01, 0.1, 1.0, 10.0, 100.0):
        z = np.empty(len(labels))
        for fit, held in grouped_folds(labels, generators):
            coef, shift = minimise_log_loss(features[fit], smoothed_targets(labels[fit]), penalty / c)
            z[held] = features[held] @ coef + shift
        losses[c] = log_loss(labels, sigmoid(z))
    coef, shift = minimise_log_loss(features, smoothed_targets(labels), penalty / min(losses, key=losses.__getitem__))
    return lambda rows: calibrated_probabilities(rows, calibrations) @ coef + shift


MODELS = {
    **{method: kind(method) for method in METHODS},
    "mean of logits": kind("logit-mean"),
    "probabilities": probabilities,
    "calibrated, towards 0": calibrated,
    "beta calibration": beta_calibrated,
    "penalty by generators": chosen_penalty,
}


def draw_fitting_rows(
    labels: np.ndarray, generators: np.ndarray, new_sources: bool, rows: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of rows to fit on, and bool [N] of those to score."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.unique(generators[labels == 1]))
    fit = np.isin(generators, names[: len(names) // 2]) & (labels == 1)
    real = labels == 0
    if new_sources:  # the largest data sets alternate between the sides, so that both have many rows
        sources, sizes = np.unique(generators[real], return_counts=True)
        order = sources[np.argsort(-sizes, kind="stable")]
        fit |= real & np.isin(generators, order[seed % 2 :: 2])
    else:
        fit |= real & (rng.random(len(labels)) < 0.5)
    chosen = np.flatnonzero(fit)
    return (chosen if rows is None else rng.choice(chosen, rows, replace=False)), ~fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--rows", type=int, help="fit on so many rows, drawn at random")
    parser.add_argument("--new-sources", action="store_true", help="the data sets of real images are new too")
    arguments = parser.parse_args()
    data, described, _ = labelled_scores(read_score_table(arguments.table), arguments.table)
    generators, results = described["generator"].to_numpy(dtype=str), []
    with single_threaded_blas():
        for seed in range(arguments.splits):
            fit, held = draw_fitting_rows(data.labels, generators, arguments.new_sources, arguments.rows, seed)
            for name, model in MODELS.items():
                z = model(data.logits[fit], data.labels[fit], generators[fit])(data.logits[held])
                truth = data.labels[held]
                results.append((seed, name, auroc(truth, z), log_loss(truth, sigmoid(z))))
    frame = pd.DataFrame(results, columns=["split", "model", "AUROC", "log-loss"])
    table = frame.pivot(index="split", columns="model", values="AUROC")[list(MODELS)]
    ahead = table.sub(table[BASELINE], axis=0)
    print(
        pd.DataFrame(
            {
                "AUROC": table.mean(),
                "worst": table.min(),
                f"minus {BASELINE}": ahead.mean(),
                "better in": (ahead > 0).mean().map("{:.0%}".format),
                "log-loss": frame.groupby("model")["log-loss"].mean(),
            }
        )
        .loc[list(MODELS)]
        .to_string(float_format="{:.4f}".format)
    )


if __name__ == "__main__":
    main()
