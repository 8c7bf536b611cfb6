from dataclasses import asdict

import numpy as np
import pytest
from helpers import STACKER
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.core.errors import ArtifactError, DataError
from ensemble.core.metrics import sigmoid
from ensemble.stacking import label_shift
from ensemble.stacking.label_shift import LabelShift
from ensemble.stacking.stacker import Stacker

# Two normal densities a unit of variance wide and SEPARATION apart: the logit of the mix is linear in x.
SEPARATION = 2.5
STORED = LabelShift(-0.75, 0.3, 40, "photos <é>", "em", "ab" * 32)


def draw(share, fitted_prior, count, seed=0):
    """Logits calibrated for fitted_prior, of images of which `share` are ai."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) < round(share * count)
    x = rng.normal(size=count) + SEPARATION * labels
    return SEPARATION * x - SEPARATION**2 / 2 + label_shift.log_odds(fitted_prior)


def em(logits, fitted_prior, steps):
    """Saerens, Latinne and Decaestecker's iteration, as they print it."""
    p, prior = sigmoid(logits), fitted_prior
    for _ in range(steps):
        ai = p * prior / fitted_prior
        prior = np.mean(ai / (ai + (1 - p) * (1 - prior) / (1 - fitted_prior)))
    return prior


@pytest.mark.parametrize("fitted_prior", [0.5, 0.3, 0.8])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_a_planted_share_is_found_from_calibrated_scores(share, fitted_prior):
    found = label_shift.estimate_shift(draw(share, fitted_prior, 4000), fitted_prior, resamples=100)
    assert found.prior.value == pytest.approx(share, abs=0.02)
    assert found.prior.low < found.prior.value < found.prior.high
    assert found.shift.value == pytest.approx(
        label_shift.log_odds(share) - label_shift.log_odds(fitted_prior), abs=0.25
    )
    assert not found.at_edge


def test_scores_that_are_not_calibrated_give_another_share():
    logits = draw(0.2, 0.5, 4000)
    assert abs(label_shift.estimate_prior(logits + 1.5, 0.5) - 0.2) > 0.05
    assert abs(label_shift.estimate_prior(logits / 4, 0.5) - 0.2) > 0.05


def test_the_mean_score_alone_is_not_the_share():
    logits = draw(0.1, 0.5, 4000)
    assert abs(sigmoid(logits).mean() - 0.1) > 0.03
    assert label_shift.estimate_prior(logits, 0.5) == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("prior", [0.2, 0.5, 0.7])
def test_an_unchanged_share_needs_no_shift(prior):
    found = label_shift.estimate_shift(draw(prior, prior, 4000), prior, resamples=100)
    assert found.shift.value == pytest.approx(0, abs=0.12)
    assert found.shift.low < 0 < found.shift.high


def test_the_interval_of_the_share_holds_it_as_often_as_it_says():
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        labels = rng.random(200) < 0.3
        logits = SEPARATION * (rng.normal(size=200) + SEPARATION * labels) - SEPARATION**2 / 2
        prior = label_shift.estimate_shift(logits, 0.5, resamples=60, seed=seed).prior
        held += prior.low <= 0.3 <= prior.high
    assert held >= 34


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=10, max_size=40), st.floats(0.1, 0.9))
def test_the_estimate_is_where_em_ends(logits, fitted_prior):
    values = np.array(logits)
    edge = 1 / (len(values) + 2)
    expected = np.clip(em(values, fitted_prior, 5000), edge, 1 - edge)
    assert label_shift.estimate_prior(values, fitted_prior) == pytest.approx(expected, abs=2e-3)


def test_without_its_iterations_em_has_not_arrived():
    logits = draw(0.05, 0.5, 4000)
    assert em(logits, 0.5, 1) > 0.05 + 0.03


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=10, max_size=40), st.floats(0.02, 0.98))
def test_a_known_share_becomes_the_mean(logits, share):
    by = label_shift.shift_to_prior(np.array(logits), share)
    assert sigmoid(np.array(logits) + by).mean() == pytest.approx(share, abs=1e-6)


def test_a_known_share_undoes_a_move_of_all_scores():
    logits = draw(0.5, 0.5, 4000)
    found = label_shift.estimate_shift(logits - 2, 0.5, share=0.5, resamples=20)
    assert found.shift.value == pytest.approx(2, abs=0.15)
    assert (found.prior.value, found.at_edge) == (0.5, False)
    assert label_shift.estimate_prior(logits - 2, 0.5) < 0.5  # the estimated share takes the move for fewer ai images


@pytest.mark.parametrize(("value", "edge"), [(-9.0, 1 / 32), (9.0, 31 / 32)])
def test_images_of_one_class_are_at_the_edge_and_finite(value, edge):
    found = label_shift.estimate_shift(np.full(30, value), 0.5)
    assert found.at_edge
    assert found.prior.value == pytest.approx(edge)
    assert np.isfinite([found.shift.value, found.shift.low, found.shift.high]).all()


def test_too_few_images_are_refused():
    with pytest.raises(DataError, match="9 readable images are too few to estimate a shift; give 10 or more"):
        label_shift.estimate_shift(np.zeros(9), 0.5)
    assert label_shift.estimate_shift(np.linspace(-1, 1, 10), 0.5).prior.value == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_is_refused(value, share):
    with pytest.raises(DataError, match="gave no finite logit for images it could read; train it again"):
        label_shift.estimate_shift(np.append(np.linspace(-1, 1, 12), value), 0.5, share)


def test_an_estimate_repeats():
    logits = draw(0.3, 0.5, 100)
    assert label_shift.estimate_shift(logits, 0.5, seed=3) == label_shift.estimate_shift(logits, 0.5, seed=3)


def test_a_stacker_adds_the_shift_only_when_asked():
    logits = np.array([[0.5, -1.0], [3.0, 2.0]], dtype=np.float32)
    adapted = Stacker(STACKER.members, STACKER.coef, STACKER.intercept, adapted=STORED)
    assert (adapted.target(logits) == STACKER.target(logits)).all()
    np.testing.assert_allclose(adapted.target(logits, adapted=True), sigmoid(STACKER.logit(logits) - 0.75))
    with pytest.raises(ArtifactError, match=r"not adapted to target images; run: python cli\.py adapt --images DIR"):
        STACKER.target(logits, adapted=True)


def test_a_stacker_keeps_its_shift_on_disk():
    adapted = Stacker(STACKER.members, STACKER.coef, STACKER.intercept, adapted=STORED)
    assert Stacker.from_dict(adapted.to_dict()) == adapted
    assert "adapted" not in STACKER.to_dict()


@pytest.mark.parametrize(
    "damage",
    [{"shift": None}, {"shift": float("nan")}, {"prior": float("inf")}, {"prior": 10**400}, {"images": "many"}],
)
def test_a_damaged_shift_is_refused(damage):
    with pytest.raises(ArtifactError, match=r"stacker\.json is damaged .*; run adapt again"):
        LabelShift.from_dict(asdict(STORED) | damage)


def test_names_are_told_apart_whatever_their_order():
    assert label_shift.names_sha256(["a", "b"]) == label_shift.names_sha256(["b", "a"])
    assert label_shift.names_sha256(["a", "b"]) != label_shift.names_sha256(["ab"])
    assert label_shift.names_sha256(["\udcff"]) != label_shift.names_sha256([])
