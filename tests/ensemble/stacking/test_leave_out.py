"""Leaving a generator out: its rows are fitted on nowhere, and the rows that it is compared with are out of fold."""

import numpy as np
import pytest

from ensemble.core.errors import DataError
from ensemble.core.metrics import auroc
from ensemble.stacking.leave_out import describe_left_out, leave_out_table
from ensemble.stacking.leave_out import leave_each_out as leave_out
from ensemble.stacking.logit_table import LabelledLogits, StackingData, cross_validated
from ensemble.stacking.stack import StackOptions, fit_and_score


def rows(count=360, seed=0):
    """Three members: the first knows all generators, the second is wrong on `odd`, and the third knows `odd` alone."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    generator = np.where(labels == 1, np.array(["a", "b", "odd"])[np.arange(count) // 2 % 3], "")
    odd, sign = generator == "odd", 2 * labels - 1
    signals = np.column_stack([0.3 * sign, np.where(odd, -1, 2 * sign), np.where(odd, 4, -1.0 * (labels == 0))])
    logits = signals + rng.normal(size=(count, 3))
    return LabelledLogits(("all", "most", "one"), logits, labels, np.arange(count)), generator.astype(object)


def leave_each_out(done, parts):
    return leave_out(done.data, parts, done.stacker.refit_method, done.strength)


def fitted(data):
    return fit_and_score(data, StackOptions(calibration="none"))


@pytest.fixture(scope="module")
def done():
    table, generator = rows()
    return fitted(cross_validated(table)), generator


def test_a_generator_that_only_one_member_knows_is_the_worst_once_left_out(done):
    result, generator = done
    lines, refused = leave_each_out(result, (generator, generator))
    scores = {line.name: line.scored[0].auroc.value for line in lines}
    assert not refused
    assert min(scores, key=scores.get) == "odd"
    own = (generator == "odd") | (result.data.scored.labels == 0)
    seen = auroc(result.data.scored.labels[own], result.stack_logits.raw[own])
    assert scores["odd"] < seen - 0.01  # with its rows the stack leans on the member that knows it
    assert next(line.best for line in lines if line.name == "odd") == ("most",)


def test_the_rest_are_reals_and_the_tables_name_the_worst(done):
    result, generator = done
    lines, refused = leave_each_out(result, (generator, generator))
    assert all(line.rest == 180 for line in lines)
    assert sum(line.images for line in lines) == 180
    table = leave_out_table(lines, "generator")
    assert table["generator"].iloc[0] == "odd"
    (text,) = describe_left_out(lines, refused, "generator")
    assert text.startswith("Worst generator: odd, AUROC 0.")


def test_no_score_of_a_left_out_part_depends_on_its_own_rows(done):
    result, generator = done
    data = result.data.scored
    changed = data.logits.copy()
    changed[generator == "odd"] = np.random.default_rng(9).normal(size=(int((generator == "odd").sum()), 3)) * 50
    other = fitted(cross_validated(LabelledLogits(data.members, changed, data.labels, data.groups)))
    before, after = (
        {line.name: line for line in leave_each_out(each, (generator, generator))[0]} for each in (result, other)
    )
    assert before["odd"].best == after["odd"].best
    assert before["a"].scored != after["a"].scored  # `a` is scored by stackers that saw those rows
    # of the part itself only its own scores change: those of the reals it is compared with are as they were
    np.testing.assert_allclose(before["odd"].rest, after["odd"].rest)


def test_a_source_with_both_classes_is_scored_alone(done):
    result, _ = done
    source = np.array(["x", "y", "z"], dtype=object)[np.arange(360) // 4 % 3]
    lines, _ = leave_each_out(result, (source, source))
    assert [(line.name, line.images, line.rest) for line in lines] == [("x", 120, 0), ("y", 120, 0), ("z", 120, 0)]


def test_rows_that_were_not_fitted_on_are_scored_by_one_stacker():
    (fitting, parts), (scored, others) = rows(), rows(seed=1)
    result = fitted(StackingData(fitting, scored))
    lines, _ = leave_each_out(result, (parts, others))
    assert {line.name: line.rest for line in lines} == {"a": 180, "b": 180, "odd": 180}
    assert all(len(line.best) == 1 for line in lines)


def test_few_images_and_parts_that_cannot_be_left_out_are_named(done):
    result, generator = done
    rare = generator.copy()
    rare[np.flatnonzero(generator == "a")[:3]] = "rare"
    lines, refused = leave_each_out(result, (rare, rare))
    assert refused == ["rare (3)"]
    assert describe_left_out(lines, refused, "generator")[-1].endswith("for fewer than 5 images: rare (3).")
    every = np.where(result.data.scored.labels == 1, "fake", "photo").astype(object)
    lines, refused = leave_each_out(result, (every, every))
    assert (lines, refused) == ([], [])  # without either, one class is left to fit on
    assert describe_left_out(lines, refused, "generator")[0].startswith("No generator can be left out")
    alone = np.full(360, "a", dtype=object)
    with pytest.raises(DataError, match="two different values or more"):
        leave_each_out(result, (alone, alone))
