import functools

import numpy as np
import pandas as pd
import pytest
from helpers import write_image
from PIL import Image

from ensemble.core import metrics
from ensemble.core.errors import ArtifactError, ImageError
from ensemble.data.sources import LabelledImage
from ensemble.evaluation import protocol
from ensemble.evaluation.protocol import EvaluatedModel, score_corruptions, summarize
from ensemble.images import decode as images
from ensemble.stacking.stacker import Stacker

STACKER = Stacker(members=("light", "dark"), coef=(2.0, -1.0), intercept=0.5)
CELLS = {"clean": lambda image: image, "dim": lambda image: image.point(lambda value: value // 2)}


def brightness(picture):
    return np.asarray(picture).mean() / 255


class Scorer:
    """Logits (brightness, -brightness), and what was asked of it; fails at a given call."""

    def __init__(self, fail_at=None):
        self.sizes, self.fail_at = [], fail_at

    def __call__(self, pictures):
        self.sizes.append(len(pictures))
        if len(self.sizes) == self.fail_at:
            raise KeyboardInterrupt
        return np.array([[brightness(picture), -brightness(picture)] for picture in pictures], dtype=np.float32)


@pytest.fixture
def items(tmp_path):
    values = [10, 60, 110, 160, 210, 250]
    for value in values:
        write_image(tmp_path / f"{value}.png", value)
    return [
        LabelledImage(
            f"id{value}", str(tmp_path), f"{value}.png", row % 2, "g" if row < 2 else None, "s", f"gen{row % 4}"
        )
        for row, value in enumerate(values)
    ]


def scored(items, tmp_path, scorer=None, cells=CELLS, stacker=STACKER, identity="one", batch=4, sha256s=None):
    model = EvaluatedModel(scorer or Scorer(), stacker, identity, batch)
    return score_corruptions(items, sha256s or [item.id for item in items], cells, model, tmp_path / "out")


def test_every_image_has_a_row_in_every_cell_with_all_logits(items, tmp_path):
    frame, errors = scored(items, tmp_path)
    assert errors == {}
    assert list(frame) == ("id path root label group source generator cell logit logit:light logit:dark".split())
    assert list(frame["id"][:4]) == ["id10", "id10", "id60", "id60"]
    assert list(frame["cell"][:4]) == ["clean", "dim", "clean", "dim"]
    assert list(frame["group"][::2]) == ["g", "g", "id110", "id160", "id210", "id250"]
    light = np.array([value / 255 for value in (10, 5, 60, 30, 110, 55, 160, 80, 210, 105, 250, 125)])
    np.testing.assert_allclose(frame["logit:light"], light, rtol=1e-6)
    np.testing.assert_allclose(frame["logit"], 0.5 + 3 * light, rtol=1e-6)
    assert (frame["logit"].dtype, frame["logit:dark"].dtype) == (np.float64, np.float32)


def test_each_image_is_decoded_once_and_scored_in_batches(items, tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(images, "decode", lambda file, decode=images.decode: decoded.append(file) or decode(file))
    scorer = Scorer()
    scored(items, tmp_path, scorer)
    assert decoded == [item.file for item in items]
    assert scorer.sizes == [4, 4, 4]


def test_a_batch_holds_few_large_images(items, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "MAX_BATCH_PIXELS", 2 * 20 * 12 - 1)
    scorer = Scorer()
    scored(items, tmp_path, scorer)
    assert scorer.sizes == [2] * 6


@pytest.mark.parametrize("seconds", [-1, 1000])
def test_a_killed_evaluation_goes_on_where_it_was(items, tmp_path, monkeypatch, seconds):
    monkeypatch.setattr(protocol, "SAVE_SECONDS", seconds)
    with pytest.raises(KeyboardInterrupt):
        scored(items, tmp_path, Scorer(fail_at=3))
    assert len(list(protocol.parts_path(tmp_path / "out").glob("*.parquet"))) == (8 if seconds < 0 else 1)
    scorer = Scorer()
    frame, _ = scored(items, tmp_path, scorer)
    assert scorer.sizes == [4]
    pd.testing.assert_frame_equal(frame, scored(items, tmp_path / "other")[0])


@pytest.mark.parametrize(
    "changed", [{"identity": "two"}, {"sha256s": list("abcdeg")}, {"stacker": Stacker(("light", "other"), (1, 1), 0)}]
)
def test_other_members_or_files_are_scored_anew(items, tmp_path, changed):
    scored(items, tmp_path, sha256s=list("abcdef"))
    scorer = Scorer()
    scored(items, tmp_path, scorer, **{"sha256s": list("abcdef"), **changed})
    assert sum(scorer.sizes) == 12


def test_another_stacker_of_the_same_members_scores_nothing_anew(items, tmp_path):
    scored(items, tmp_path)
    scorer = Scorer()
    frame, _ = scored(items, tmp_path, scorer, stacker=Stacker(STACKER.members, (0.0, 0.0), 7.0))
    assert scorer.sizes == []
    assert set(frame["logit"]) == {7.0}


def test_a_finished_evaluation_keeps_its_cells_and_scores_only_new_ones(items, tmp_path):
    frame, _ = scored(items, tmp_path)
    key = protocol.evaluation_key(items, [item.id for item in items], EvaluatedModel(Scorer(), STACKER, "one"))
    protocol.write_evaluation(tmp_path / "out", frame, {"key": key})
    assert not protocol.parts_path(tmp_path / "out").exists()
    scorer = Scorer()
    dimmer = functools.partial(Image.Image.point, lut=lambda value: value // 4)
    frame, _ = scored(items, tmp_path, scorer, cells={"clean": CELLS["clean"], "dimmer": dimmer})
    assert sum(scorer.sizes) == 6
    assert list(frame["cell"][:3]) == ["clean", "dimmer", "dim"]
    assert len(frame) == 18


def test_unreadable_images_are_named_and_in_no_cell(items, tmp_path):
    (tmp_path / "60.png").write_bytes(b"no image")
    (tmp_path / "250.png").unlink()
    frame, errors = scored(items, tmp_path)
    assert list(errors) == ["id60", "id250"]
    assert "not an image" in errors["id60"]
    assert "no such file" in errors["id250"]
    assert set(frame["id"]) == {"id10", "id110", "id160", "id210"}
    assert len(frame) == 8


def test_an_image_that_fails_in_one_cell_is_in_none(items, tmp_path):
    def score(pictures):
        if any(round(255 * brightness(picture)) == 80 for picture in pictures):
            raise ImageError("too thin")
        return Scorer()(pictures)

    frame, errors = scored(items, tmp_path, score)
    assert errors == {"id160": "dim: too thin"}
    assert set(frame["id"]) == {"id10", "id60", "id110", "id210", "id250"}
    assert np.isfinite(frame["logit"]).all()


def test_a_member_without_an_answer_is_an_error(items, tmp_path):
    with pytest.raises(ArtifactError, match=r"no finite logit .*id110, id160"):
        scored(items, tmp_path, lambda pictures: np.where(Scorer()(pictures) > 0.4, np.nan, 0))


def table(cells, labels, groups=None):
    rows = [
        {"id": f"{row}", "label": label, "group": (groups or range(100))[row], "cell": cell, "logit": logit}
        for cell, logits in cells.items()
        for row, (label, logit) in enumerate(zip(labels, logits, strict=True))
    ]
    generators = ["x" if row["label"] and int(row["id"]) % 4 == 1 else "y" if row["label"] else None for row in rows]
    return pd.DataFrame(rows).assign(generator=generators, source="all")


LABELS = [0, 1] * 20
RNG = np.random.default_rng(0)
LOGITS = {
    "clean": RNG.normal(size=40) + 2 * np.array(LABELS),
    "bad": RNG.normal(size=40),
    "good": RNG.normal(size=40) + 3 * np.array(LABELS),
}


def test_scores_are_those_of_metrics_with_the_worst_cell_named():
    record = summarize(table(LOGITS, LABELS), 0.7, 0, stress=False)
    labels = np.array(LABELS)
    assert list(record["cells"]) == ["clean", "bad", "good"]
    for cell, logits in LOGITS.items():
        p = metrics.sigmoid(logits)
        scores = record["cells"][cell]
        assert scores["auroc"]["value"] == pytest.approx(metrics.auroc(labels, p))
        assert scores["balanced_accuracy"]["value"] == pytest.approx(metrics.score("balanced_accuracy", labels, p, 0.7))
        assert scores["auroc"]["low"] <= scores["auroc"]["value"] <= scores["auroc"]["high"]
    assert set(record["cells"]["clean"]) == set(metrics.SCORES)
    assert record["worst"]["cell"] == "bad"
    assert record["worst"]["value"] == record["cells"]["bad"]["auroc"]["value"]
    assert [(part["name"], part["real"], part["ai"]) for part in record["by_generator"]] == [
        ("x", 20, 10),
        ("y", 20, 10),
    ]
    assert [part["name"] for part in record["by_source"]] == ["all"]


def test_data_without_generators_have_no_table_of_them():
    frame = table(LOGITS, LABELS).assign(generator=None)
    assert summarize(frame, 0.5, 0, stress=False)["by_generator"] == []


@pytest.mark.parametrize(("label", "score"), [(0, "accuracy_real"), (1, "accuracy_ai")])
def test_a_stress_set_has_the_rate_of_errors_and_quantiles(label, score):
    logits = {"clean": np.linspace(-3, 3, 101), "worse": np.linspace(-3, 3, 101) + (3 if label == 0 else -3)}
    frame = table(logits, [label] * 101, groups=[f"g{row // 2}" for row in range(101)])
    record = summarize(frame, 0.5, 0, stress=True)
    assert record["cells"]["clean"] == {score: record["cells"]["clean"][score]}
    assert record["cells"]["clean"][score]["value"] == pytest.approx((50 if label == 0 else 51) / 101)
    assert record["worst"]["cell"] == "worse"
    assert record["worst"]["score"] == score
    median = record["target_quantiles"]["0.5"]
    assert median["value"] == pytest.approx(0.5)
    assert 0 < median["low"] < 0.5 < median["high"] < 1
