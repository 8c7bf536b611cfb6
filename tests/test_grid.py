import pickle

import numpy as np
import pytest
from conftest import noise

from ensemble import degrade, grid
from ensemble.grid import SMALL_GRID, Cell, worst_cell

LABELS = np.array([0, 0, 1, 1])
LOGITS = {
    "clean": np.array([-2.0, -1.0, 1.0, 2.0]),
    "jpeg": np.array([-2.0, 1.5, 1.0, 2.0]),
    "noise": np.array([1.0, 2.0, -2.0, 1.5]),
}


def test_the_small_grid_is_what_its_names_say(photos):
    photo = photos[0].crop((0, 0, 96, 64))
    expected = {
        "clean": photo,
        "jpeg 70": degrade.jpeg(photo, 70, 2),
        "jpeg 50": degrade.jpeg(photo, 50, 2),
        "webp 70": degrade.webp(photo, 70, 4),
        "blur 1": degrade.blur(photo, 1.0),
        "resize 0.5": degrade.resize(photo, 0.5, "bicubic"),
        "noise 0.05": degrade.noise(photo, 0.05, 0),
    }
    made = {cell.name: cell.apply(photo) for cell in SMALL_GRID}
    assert list(made) == list(expected)
    assert {name: image.tobytes() for name, image in made.items()} == {
        name: image.tobytes() for name, image in expected.items()
    }
    assert len({image.tobytes() for image in made.values()}) == 7
    assert made["resize 0.5"].size == (48, 32)


@pytest.mark.parametrize("cell", SMALL_GRID, ids=lambda cell: cell.name)
def test_a_cell_repeats_in_other_processes_and_keeps_transparency(cell):
    image = noise(0, 64, 64)
    sent = pickle.loads(pickle.dumps(cell))  # noqa: S301 - as a data loader's worker gets it
    assert sent.apply(image).tobytes() == cell.apply(image).tobytes()
    image.putalpha(100)
    assert cell.apply(image).getchannel("A").getextrema() == (100, 100)


def test_a_cell_is_frozen():
    with pytest.raises(AttributeError):
        Cell("clean", grid.unchanged).name = "other"


def test_the_worst_cell_has_the_lowest_auroc():
    assert worst_cell(LABELS, LOGITS) == ("noise", 0.25)
    assert worst_cell(LABELS, {name: LOGITS[name] for name in ("clean", "jpeg")}) == ("jpeg", 0.75)
    assert worst_cell(LABELS, {"clean": LOGITS["clean"]}) == ("clean", 1.0)


def test_of_equal_cells_the_first_is_named():
    assert worst_cell(LABELS, {"b": LOGITS["jpeg"], "a": LOGITS["jpeg"]}) == ("b", 0.75)


def test_without_both_classes_there_is_no_score():
    name, score = worst_cell(np.ones(4), LOGITS)
    assert name == "clean"
    assert np.isnan(score)
