import numpy as np
import pandas as pd
import pytest

from ensemble.audit import metadata_classifier
from ensemble.audit.metadata_classifier import cross_validate, file_features
from ensemble.core import metrics

RNG = np.random.default_rng(0)
LABELS = np.tile([0, 1], 100)
ALONE = np.array([f"group {i}" for i in range(200)], dtype=object)
PAIRS = np.array([f"group {i // 2}" for i in range(200)], dtype=object)


def numbers(signal: float) -> pd.DataFrame:
    return pd.DataFrame({"noise": RNG.normal(size=200), "told": RNG.normal(size=200) + signal * LABELS})


def test_a_column_that_tells_the_class_is_found_and_named():
    probe = cross_validate(numbers(4.0), LABELS, ALONE, top=2)
    assert probe.balanced_accuracy.value > 0.9
    assert probe.balanced_accuracy.low > 0.85
    assert probe.auroc > 0.95
    assert probe.features[0][0] == "told"
    assert probe.features[0][1] > 0.3
    assert probe.rows == 200


def test_columns_that_tell_nothing_stay_at_chance():
    probe = cross_validate(numbers(0.0), LABELS, ALONE)
    assert probe.balanced_accuracy.low < 0.55
    assert abs(probe.balanced_accuracy.value - 0.5) < 0.12


def test_texts_tell_as_well_as_numbers():
    table = pd.DataFrame({"format": np.where(LABELS == 1, "PNG", "JPEG")})
    assert cross_validate(table, LABELS, ALONE).balanced_accuracy.low == 1.0


def test_columns_without_variation_are_exactly_chance():
    probe = cross_validate(pd.DataFrame({"format": ["JPEG"] * 200}), LABELS, ALONE)
    assert (probe.balanced_accuracy.value, probe.auroc, probe.features) == (0.5, 0.5, ())


def test_what_only_marks_a_group_tells_nothing_since_groups_stay_together():
    names = np.repeat([f"g{i}" for i in range(20)], 10)
    labels = np.repeat(np.arange(20) % 2, 10)
    told = pd.DataFrame({"place": np.repeat(RNG.permutation(20), 10)})
    assert cross_validate(told, labels, names.astype(object)).balanced_accuracy.low < 0.55
    # the same column with rows of a group on both sides gives the label away
    assert cross_validate(told, labels, ALONE).balanced_accuracy.low > 0.9


def test_too_few_groups_give_no_answer():
    assert cross_validate(numbers(4.0), LABELS, LABELS.astype(str)) is None


def test_more_rows_than_needed_are_sampled(monkeypatch):
    monkeypatch.setattr(metadata_classifier, "MAX_ROWS", 150)
    assert cross_validate(numbers(4.0), LABELS, ALONE).rows == 150


def test_missing_and_infinite_values_are_no_error():
    table = numbers(4.0)
    table.loc[:20, "told"] = np.nan
    table.loc[30, "noise"] = np.inf
    assert cross_validate(table, LABELS, ALONE).balanced_accuracy.value > 0.85
    assert cross_validate(table, LABELS, ALONE, linear=0.1).balanced_accuracy.value > 0.7


def test_balanced_accuracy_by_hand():
    assert metrics.score("balanced_accuracy", np.array([1, 1, 0, 0]), np.array([0.9, 0.1, 0.4, 0.2])) == 0.75
    assert metrics.score("balanced_accuracy", np.array([1, 0]), np.array([0.5, 0.5])) == 0.5
    assert np.isnan(metrics.score("balanced_accuracy", np.array([1, 1]), np.array([0.5, 0.5])))


HEADERS = pd.DataFrame({"width": [10.0, 20.0], "height": [5.0, 5.0]})


def test_names_are_read_as_patterns_without_folders():
    frame = file_features(HEADERS, ["ai/IMG_0012.JPG", "real/deep/7f3a.png"])
    assert list(frame["suffix"]) == [".JPG", ".png"]
    assert list(frame["name_shape"]) == ["a_0", "0a0a"]
    assert list(frame["name_first"]) == ["IMG_", ""]
    assert list(frame["name_digits"]) == [4.0, 2.0]
    assert list(frame["area"]) == [50.0, 100.0]


@pytest.mark.parametrize(("one", "other"), [("ai_001", "real_001"), ("FAKE-7", "human-7"), ("x.ai", "x.photo")])
def test_a_name_that_says_its_class_is_no_pattern(one, other):
    frame = file_features(HEADERS, [f"{one}.png", f"{other}.png"])
    patterns = frame[list(metadata_classifier.FAMILIES["names"])]
    assert patterns.iloc[0].tolist() == patterns.iloc[1].tolist()


def test_a_word_that_only_contains_a_class_name_stays():
    frame = file_features(HEADERS, ["realism_1.png", "paint_1.png"])
    assert list(frame["name_first"]) == ["realism_", "paint_"]
