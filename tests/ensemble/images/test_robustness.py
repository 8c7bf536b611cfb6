import pickle

import numpy as np
import pytest
from pictures import noise

from ensemble.core.errors import DataError
from ensemble.images import degradations
from ensemble.images.robustness import SMALL_GRID, choose_corruptions, full_grid, worst_corruption

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
        "jpeg 70": degradations.jpeg(photo, 70, 2),
        "jpeg 50": degradations.jpeg(photo, 50, 2),
        "webp 70": degradations.webp(photo, 70, 4),
        "blur 1": degradations.blur(photo, 1.0),
        "resize 0.5": degradations.resize(photo, 0.5, "bicubic"),
        "noise 0.05": degradations.noise(photo, 0.05, 0),
    }
    made = {name: change(photo) for name, change in SMALL_GRID.items()}
    assert list(made) == list(expected)
    assert {name: image.tobytes() for name, image in made.items()} == {
        name: image.tobytes() for name, image in expected.items()
    }
    assert len({image.tobytes() for image in made.values()}) == 7
    assert made["resize 0.5"].size == (48, 32)


def test_the_full_grid_has_every_strength_and_the_small_grids_own_pixels(photos):
    photo = photos[0].crop((0, 0, 128, 96))
    made = {name: change(photo) for name, change in full_grid().items()}
    kinds = [name.split()[0] for name in made if "+" not in name]
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    assert counts == {"clean": 1, "jpeg": 5, "webp": 5, "blur": 3, "resize": 9, "noise": 3, "crop": 1}
    assert len(made) == 31
    for name, change in SMALL_GRID.items():
        assert made[name].tobytes() == change(photo).tobytes(), name
    assert len({image.tobytes() for image in made.values()}) == 31
    assert {made[f"resize 0.25{name}"].size for name in ("", " bilinear", " lanczos")} == {(43, 32)}  # 32 at the least
    assert made["crop 0.8"].tobytes() == photo.crop((13, 10, 115, 87)).tobytes()
    assert made["jpeg 70 + webp 50 + jpeg 30"].tobytes() == (
        degradations.jpeg(degradations.webp(degradations.jpeg(photo, 70), 50), 30).tobytes()
    )


def test_cells_are_chosen_by_grid_or_by_name_with_clean_first():
    assert choose_corruptions("small") == SMALL_GRID
    assert list(choose_corruptions("none")) == ["clean"]
    assert len(choose_corruptions("full")) == 31
    assert list(choose_corruptions("full", ["blur 2", "jpeg 30", "blur 2"])) == [
        "clean",
        "blur 2",
        "jpeg 30",
    ]


@pytest.mark.parametrize(
    ("name", "message"), [("jpg 50", "did you mean jpeg 50"), ("fog", "there are: clean, jpeg 95")]
)
def test_an_unknown_cell_is_refused_with_a_suggestion(name, message):
    with pytest.raises(DataError, match=message):
        choose_corruptions("small", [name])


@pytest.mark.parametrize("change", full_grid().values(), ids=full_grid())
def test_a_cell_repeats_in_other_processes_and_keeps_transparency(change):
    image = noise(0, 64, 64)
    sent = pickle.loads(pickle.dumps(change))  # noqa: S301 - as a data loader's worker gets it
    assert sent(image).tobytes() == change(image).tobytes()
    image.putalpha(100)
    assert change(image).getchannel("A").getextrema() == (100, 100)


def test_the_worst_cell_has_the_lowest_auroc():
    assert worst_corruption(LABELS, LOGITS) == ("noise", 0.25)
    assert worst_corruption(LABELS, {name: LOGITS[name] for name in ("clean", "jpeg")}) == ("jpeg", 0.75)
    assert worst_corruption(LABELS, {"clean": LOGITS["clean"]}) == ("clean", 1.0)


def test_of_equal_cells_the_first_is_named():
    assert worst_corruption(LABELS, {"b": LOGITS["jpeg"], "a": LOGITS["jpeg"]}) == ("b", 0.75)


def test_without_both_classes_there_is_no_score():
    name, score = worst_corruption(np.ones(4), LOGITS)
    assert name == "clean"
    assert np.isnan(score)
