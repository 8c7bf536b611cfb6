"""Platt's calibration of each member: what it recovers, and members that are constant, reversed, silent or certain."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.core.metrics import auroc, sigmoid
from ensemble.stacking.calibration import fit_member_calibrations
from ensemble.stacking.stacker import calibrated_probabilities


def planted(rows=4000, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=1.5, size=rows)
    return logits, (rng.random(rows) < sigmoid(logits)).astype(int)


def test_an_overconfident_and_shifted_member_is_put_right():
    logits, labels = planted()
    (one,) = fit_member_calibrations((7 * logits + 3)[:, None], labels)
    assert one.scale == pytest.approx(1 / 7, rel=0.1)
    np.testing.assert_allclose(
        calibrated_probabilities((7 * logits + 3)[:, None], [one])[:, 0], sigmoid(logits), atol=0.05
    )


@settings(deadline=None, max_examples=25)
@given(st.floats(1e-6, 1e6), st.floats(-1e6, 1e6))
def test_probabilities_do_not_depend_on_a_members_unit(scale, shift):
    logits, labels = planted(300)
    plain = calibrated_probabilities(logits[:, None], fit_member_calibrations(logits[:, None], labels))
    moved = (logits * scale + shift)[:, None]
    again = calibrated_probabilities(moved, fit_member_calibrations(moved, labels))
    np.testing.assert_allclose(again, plain, atol=1e-3)


@pytest.mark.parametrize("kind", ["reversed", "constant"])
def test_a_member_that_ranks_wrongly_or_not_at_all_has_scale_0(kind):
    logits, labels = planted(500)
    column = -logits if kind == "reversed" else np.full(500, 2.5)
    (one,) = fit_member_calibrations(column[:, None], labels)
    assert (one.scale, one.missing) == (0.0, 0.0)
    assert sigmoid(one.shift) == pytest.approx(labels.mean(), abs=0.01)


def test_a_missing_answer_has_the_mean_calibrated_probability_of_those_given():
    logits, labels = planted(500)
    column = np.where(np.arange(500) % 3 == 0, np.nan, logits)
    (one,) = fit_member_calibrations(column[:, None], labels)
    known = ~np.isnan(column)
    p = calibrated_probabilities(column[:, None], [one])[:, 0]
    assert sigmoid(one.scale * one.missing + one.shift) == pytest.approx(p[known].mean())
    (same,) = fit_member_calibrations(column[known][:, None], labels[known])
    assert same == one


def test_a_member_without_any_answer_is_neutral():
    (one,) = fit_member_calibrations(np.full((10, 1), np.nan), np.arange(10) % 2)
    assert (one.scale, one.shift, one.missing) == (0.0, 0.0, 0.0)


def test_a_member_that_is_always_right_stays_finite():
    labels = np.arange(40) % 2
    (one,) = fit_member_calibrations(np.where(labels == 1, 13.8, -13.8)[:, None], labels)
    assert 0 < one.scale < 10
    p = calibrated_probabilities(np.array([[13.8], [-13.8]]), [one])[:, 0]
    np.testing.assert_allclose(p, [21 / 22, 1 / 22], atol=1e-4)  # Platt's targets of 20 rows a class
    assert auroc(labels, labels) == 1
