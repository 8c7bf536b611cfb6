import base64
import io
import re

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from pictures import noise
from PIL import Image

from ensemble.core import metrics
from ensemble.evaluation import report_plots
from ensemble.evaluation.report_plots import center_square, log_spectrum, mean_spectra
from ensemble.evaluation.report_scores import ScoredImages
from ensemble.images import html

SCORED = st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=2, max_size=60).filter(
    lambda rows: len({label for label, _ in rows}) == 2
)


def rows_of(pictures, labels):
    frame = pd.DataFrame({"label": labels})
    zeros = np.zeros(len(labels))
    return ScoredImages("some", "", frame, ("one",), zeros[:, None], zeros, zeros, pictures.__getitem__)


@given(SCORED)
def test_the_area_under_the_drawn_curve_is_the_auroc(rows):
    labels, scores = np.array(rows, dtype=int).T
    hits, alarms = (counts[0] for counts in metrics.roc_counts(labels, scores))
    assert (hits[0], alarms[0]) == (0, 0)
    assert np.trapezoid(hits / hits[-1], alarms / alarms[-1]) == pytest.approx(metrics.auroc(labels, scores))


@given(SCORED)
def test_the_gaps_of_the_drawn_bins_are_the_ece(rows):
    labels, p = np.array(rows, dtype=int).T / [[1], [20]]
    said, was, count = report_plots.reliability_bins(labels, p)
    assert np.sum(count * abs(said - was)) / len(p) == pytest.approx(metrics.expected_calibration_error(labels, p))


def lost_colours(picture, members):
    """The members' colours that no pixel of a picture has, give or take what a palette loses."""
    packed = np.unique(np.asarray(picture.convert("RGB")) @ np.array([1 << 16, 1 << 8, 1]))
    found = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1)
    wanted = [list(bytes.fromhex(colour[1:])) for colour in report_plots.COLOURS[:members]]
    return [colour for colour in wanted if abs(found - colour).max(axis=1).min() > 3]


def test_ten_members_have_colours_of_their_own():
    names = [*map(str, range(10)), "mean", "stack"]
    assert len(set(report_plots.colours(names).values())) == len(names)


def test_the_readmes_picture_keeps_the_members_colours_apart():
    with Image.open(ROOT / "docs" / "report.png") as picture:
        assert lost_colours(picture, 8) == []
        assert lost_colours(picture.convert("RGB").quantize(16), 8) != []


def test_figures_are_svg_with_words_for_those_who_do_not_see_them():
    labels, scores = np.array([0, 1, 0, 1]), {"$x": np.array([0.1, 0.2, 0.3, 0.4]), "stack": np.array([1.0, 2, 3, 4])}
    p = np.array([0.1, 0.9, 0.2, 0.8])
    plots = [
        report_plots.roc(labels, scores),
        report_plots.precision_recall(labels, scores),
        report_plots.reliability(labels, {"stack": p}, {"stack": 0.15}),
        report_plots.histograms(labels, p, 0.25),
    ]
    for plot in plots:
        head, _, text = plot.uri.partition(",")
        assert head == "data:image/svg+xml;base64"
        assert base64.b64decode(text).count(b"<svg") == 1
        assert len(plot.alt) > 40
    assert "ECE 0.150 stack" in plots[2].alt
    assert "0.250" in plots[3].alt


def test_every_score_has_a_colour_of_its_own():
    names = [f"member {number}" for number in range(9)] + ["mean", "stack"]
    found = report_plots.colours(names)
    assert list(found) == names
    assert len(set(found.values())) == 11
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in found.values())


def test_a_wave_stands_where_its_frequency_is():
    wave = np.cos(2 * np.pi * np.arange(64) / 4)[None, :] + np.zeros((64, 1))
    found = log_spectrum(128 + 50 * wave)
    assert found.shape == (64, 64)
    assert np.unravel_index(found.argmax(), found.shape)[0] == 32
    assert abs(np.unravel_index(found.argmax(), found.shape)[1] - 32) == 16


def test_spectra_tell_the_classes_apart_by_what_was_added():
    wave = np.round(20 * np.cos(np.pi * np.arange(70) / 2))[None, :, None] + np.zeros((64, 1, 3))
    plain = [noise(seed, 70, 64) for seed in range(8)]
    waved = [
        Image.fromarray((np.asarray(image) / 2 + 64 + (number % 2) * wave).clip(0, 255).astype(np.uint8))
        for number, image in enumerate(plain)
    ]
    found = mean_spectra(rows_of(waved, np.arange(8) % 2))
    assert (found.side, found.left_out) == (64, 0)
    assert {label: values.shape for label, values in found.radial.items()} == {0: (4, 48), 1: (4, 48)}
    apart = found.planes[1] - found.planes[0]
    assert np.unravel_index(apart.argmax(), apart.shape) in ((32, 16), (32, 48))
    assert len(report_plots.planes(found.planes)) == 3
    assert "Difference" in report_plots.planes(found.planes)[2].alt


def test_small_images_are_left_out_and_counted():
    pictures = [noise(seed, 64, 64) for seed in range(20)]
    pictures[3] = noise(3, 40, 64)
    found = mean_spectra(rows_of(pictures, np.arange(20) % 2))
    assert (found.side, found.left_out) == (64, 1)
    assert mean_spectra(rows_of([noise(0, 20, 20)] * 4, np.array([0, 1, 0, 1]))) is None
    assert mean_spectra(rows_of(pictures, np.zeros(20, dtype=int))) is None


def test_the_middle_is_the_middle():
    assert center_square(np.arange(30).reshape(5, 6), 3).tolist() == [[7, 8, 9], [13, 14, 15], [19, 20, 21]]
    assert center_square(np.zeros((2, 9)), 4).shape == (2, 4)


def test_pictures_are_small_and_leave_the_image_as_it_was():
    image = Image.new("RGBA", (1000, 500), (255, 0, 0, 0))
    uri = html.picture(image)
    assert image.size == (1000, 500)
    shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert (shown.size, shown.format) == ((256, 128), "JPEG")
    assert min(shown.getpixel((5, 5))) > 250
