import json

import numpy as np
import pandas as pd
import pytest

from ensemble.core import metrics
from ensemble.core.bootstrap import score_intervals
from ensemble.core.metrics import sigmoid
from ensemble.evaluation.protocol import score_parts

HOSTILE = "<script>|`$x\n"


def rows(seed=0, count=240):
    """Reals and ai of two generators, easy and hard, from three sources, of which `shop` has ai alone."""
    rng = np.random.default_rng(seed)
    label = np.arange(count) % 2
    generator = np.where(label == 0, None, np.where(np.arange(count) % 4 == 1, "easy", HOSTILE))
    source = np.where((label == 1) & (np.arange(count) % 3 == 0), "shop", np.where(np.arange(count) % 5 < 2, "a", "b"))
    logit = rng.normal(size=count) + label * np.where(generator == "easy", 4, 1) - 1
    group = [f"g{i // 4}" for i in range(count)]
    return pd.DataFrame({"label": label, "group": group, "generator": generator, "source": source, "logit": logit})


def test_a_generators_ai_is_scored_against_all_reals():
    frame = rows()
    easy, hard = score_parts(frame, "generator", threshold=0.4, resamples=100)
    assert (easy.name, hard.name) == ("easy", HOSTILE)
    assert (easy.real, easy.ai, easy.groups) == (hard.real, hard.ai, hard.groups) == (120, 60, 60)
    kept = frame[(frame["label"] == 0) | (frame["generator"] == "easy")]
    labels, p = kept["label"].to_numpy(), sigmoid(kept["logit"])
    expected = score_intervals(labels, p, kept["group"].to_numpy(), 0.4, 100, names=tuple(easy.scores))
    assert easy.scores == expected
    assert easy.scores["auroc"].value == metrics.auroc(labels, p) > hard.scores["auroc"].high
    assert easy.scores["accuracy_ai"].value == metrics.score("accuracy_ai", labels, p, 0.4)
    assert easy.scores["accuracy_real"].value == hard.scores["accuracy_real"].value


def test_a_source_is_scored_by_its_own_rows():
    frame = rows()
    parts = {part.name: part for part in score_parts(frame, "source", resamples=100)}
    assert list(parts) == list(frame["source"].unique())
    assert sum(part.real + part.ai for part in parts.values()) == len(frame)
    own = frame[frame["source"] == "b"]
    assert parts["b"].scores["auroc"].value == metrics.auroc(own["label"], own["logit"])
    shop = parts["shop"]
    assert shop.real == 0
    assert shop.scores["accuracy_ai"].low < shop.scores["accuracy_ai"].value < shop.scores["accuracy_ai"].high
    missing = {"value": None, "low": None, "high": None}
    found = json.loads(json.dumps(shop.to_dict(), allow_nan=False))
    assert (found["ai"], found["groups"]) == (shop.ai, frame[frame["source"] == "shop"]["group"].nunique())
    assert [name for name, score in found["scores"].items() if score == missing] == [
        "auroc",
        "balanced_accuracy",
        "accuracy_real",
    ]


def test_cells_keep_their_order():
    frame = pd.concat([rows(seed).assign(cell=cell) for seed, cell in enumerate(("clean", "jpeg 50", "blur 1"))])
    parts = score_parts(frame, "cell", resamples=20)
    assert [part.name for part in parts] == ["clean", "jpeg 50", "blur 1"]
    assert {(part.real, part.ai, part.groups) for part in parts} == {(120, 120, 60)}
    assert len({part.scores["auroc"].value for part in parts}) == 3


@pytest.mark.parametrize("empty", [None, np.nan, ""])
def test_ai_whose_generator_is_not_told_is_a_part(empty):
    frame = rows()
    frame.loc[frame["generator"] == "easy", "generator"] = empty
    assert [part.name for part in score_parts(frame, "generator", resamples=20)] == ["not named", HOSTILE]
