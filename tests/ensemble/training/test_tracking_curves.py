import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ensemble.training.tracking import draw_curves, smooth


def part(title="", epochs=3, steps=60, best=2, score=None):
    rows = [
        {"epoch": epoch, "train_loss": 0.5, "tune_auroc": 0.8 + epoch / 50, "tune_log_loss": 0.6 - epoch / 20}
        for epoch in range(1, epochs + 1)
    ]
    return {
        "title": title,
        "epochs": [row | {"tune_score": row["tune_auroc"] if score is None else score} for row in rows],
        "steps": [{"step": step, "loss": 1 / step, "lr": 1e-4 * step} for step in range(1, steps + 1)],
        "best": best,
    }


def drawn(tmp_path, *parts, name="curves.png"):
    path = tmp_path / name
    draw_curves({"parts": parts}, path)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def coloured(pixels, color):
    """Where the picture is (nearly) of that colour, bool [H, W]."""
    wanted = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)])
    return (abs(pixels - wanted) <= 8).all(axis=2)


def test_three_panels_hold_loss_rate_and_scores(tmp_path):
    pixels = drawn(tmp_path, part())
    third = pixels.shape[1] // 3
    for color, panel in (("#4269d0", 0), ("#d0632a", 0), ("#2f8f5b", 2)):
        counts = [coloured(pixels[:, at * third : (at + 1) * third], color).sum() for at in range(3)]
        assert counts[panel] > 50, color
        assert sum(counts) == counts[panel], color
    assert coloured(pixels[:, third : 2 * third], "#333333").sum() > 200


def test_the_picture_is_the_same_for_the_same_history_alone(tmp_path):
    history = {"parts": [part(), part("fold 2/2")]}
    for name in ("a.png", "b.png"):
        draw_curves(json.loads(json.dumps(history)), tmp_path / name)
    draw_curves({"parts": [part(best=3), part("fold 2/2")]}, tmp_path / "c.png")
    a, b, c = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b
    assert a != c  # the ring stands elsewhere
    assert b"Software" not in a
    assert b"Date" not in a


@pytest.mark.parametrize(("score", "told"), [(0.7, True), (None, False)])
def test_a_score_of_its_own_has_a_line(tmp_path, score, told):
    assert coloured(drawn(tmp_path, part(score=score)), "#7a4fb0").any() == told


def test_folds_are_thinner_than_their_refit(tmp_path):
    fold = drawn(tmp_path, part("fold 1/2"), part("fold 2/2"), name="folds.png")
    refit = drawn(tmp_path, part("fold 1/2"), {**part("refit"), "epochs": []}, name="refit.png")
    assert coloured(refit, "#4269d0").sum() > coloured(fold, "#4269d0").sum()


@pytest.mark.parametrize(
    "parts",
    [[part(steps=0)], [part(epochs=0), part(epochs=1, steps=1, best=1)], []],
    ids=["no steps", "no epochs, then one", "no part"],
)
def test_little_history_is_drawn_too(tmp_path, parts):
    assert drawn(tmp_path, *parts).shape[1] > 1000


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=50), st.integers(1, 60))
def test_smoothing_keeps_the_length_and_the_range(values, window):
    smoothed = smooth(np.array(values), window)
    assert smoothed.shape == (len(values),)
    assert min(values) - 1e-9 <= smoothed.min() <= smoothed.max() <= max(values) + 1e-9


def test_smoothing_is_the_mean_of_neighbours():
    assert smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3) == pytest.approx([1.5, 3, 3, 3])
    assert smooth(np.array([1.0, 2.0]), 1) == pytest.approx([1, 2])
