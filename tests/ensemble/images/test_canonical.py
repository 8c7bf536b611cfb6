import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import PREPROCESS_CONFIG, make_frame, noisy_logits, write_member, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, noise, write_files
from PIL import Image

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, DataError, ImageError
from ensemble.core.recipe import Augment, Recipe
from ensemble.data import dataset
from ensemble.images import canonical, decode
from ensemble.images.canonical import CanonicalPlan, last_compression, make_plan, read_canonical, read_plan
from ensemble.images.metadata import read_header
from ensemble.models import members
from ensemble.models.runner import Runner, score_images
from ensemble.training import train_all
from ensemble.training.data_loader import TrainDataset
from ensemble.training.distributed import ProcessGroup
from ensemble.training.train_member import TrainContext
from ensemble.training.validation import RowReader, predict_logits

PLAN = CanonicalPlan(size=40, first=((60, 2), (90, 0)), quality=(70, 80))
LABELS = np.array([0, 1] * 20)
RECIPE = Recipe.model_validate(
    {
        "name": "flat",
        "backbone": {"architecture": "timm/none"},
        "train": {"lr": 1e-3, "epochs": 1, "batch_size": 4},
    }
)


def headers(width=100, height=100, quality=90, sampling="2") -> pd.DataFrame:
    """Headers of 40 images, real and ai by turns; each value is one for all, or (real, ai)."""
    columns = {"width": width, "height": height, "quality": quality, "sampling": sampling}
    pairs = {name: value if isinstance(value, tuple) else (value, value) for name, value in columns.items()}
    return pd.DataFrame({name: [pair[label] for label in LABELS] for name, pair in pairs.items()})


def rng(seed=0):
    return np.random.default_rng(seed)


def stored(image, plan=PLAN, seed=0):
    """An image's canonical form as a file, and what its header says."""
    draws = rng(seed)
    quality, subsampling = last_compression(plan, draws)
    data = encoded(image, "JPEG", quality=quality, subsampling=subsampling)
    return read_header(data, *image.size)


# ---- the plan


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ({"width": 100, "height": 80}, 72),
        ({"width": (100, 64), "height": (200, 300)}, 56),  # the smaller class decides
        ({"width": (39, 500), "height": 500}, 32),
    ],
)
def test_the_size_leaves_room_for_a_random_place(values, size):
    plan = make_plan(headers(**values), LABELS)
    assert plan.size == size
    assert plan.size % 8 == 0


def test_a_few_small_images_do_not_decide_the_size():
    labels = np.repeat([0, 1], 100)
    found = pd.DataFrame({"width": 200, "height": 200, "quality": 90, "sampling": "2"}, index=range(200))
    found.loc[:3, "width"] = 20  # less than a twentieth of the real
    assert make_plan(found, labels).size == 192
    found.loc[:5, "width"] = 20
    with pytest.raises(DataError, match="too small for a common crop of 32 pixels"):
        make_plan(found, labels)


def test_the_size_may_be_given_down_to_32_pixels():
    assert make_plan(headers(), LABELS, size=33).size == 33
    with pytest.raises(DataError, match=r"the smallest side is \d+; remove what is below 39"):
        make_plan(headers(), LABELS, size=31)


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        ((90, 90), (80, 90)),
        ((75, 95), (65, 75)),  # the lower class decides
        ((95, 62), (52, 62)),
        ((30, 90), (50, 60)),  # but not below 50
        ((99, 98), (85, 95)),  # nor above 95
        ((-1, 80), (70, 80)),  # -1: no JPEG
        ((-1, -1), (85, 95)),
    ],
)
def test_the_last_quality_covers_what_the_classes_had(quality, expected):
    assert make_plan(headers(quality=quality), LABELS).quality == expected


def test_the_quality_may_be_given():
    assert make_plan(headers(quality=50), LABELS, quality=(88, 92)).quality == (88, 92)


def test_what_has_no_history_draws_from_that_of_the_jpegs():
    plan = make_plan(headers(quality=(75, -1), sampling=("0", "none")), LABELS)
    assert plan.first == ((75, 0),) * 20
    assert make_plan(headers(quality=-1, sampling="none"), LABELS).first == ()
    odd = make_plan(headers(quality=75, sampling=("-1", "1")), LABELS)  # -1: grey, or a rare layout
    assert Counter(odd.first) == {(75, 2): 20, (75, 1): 20}


def test_a_long_history_is_thinned_without_a_shift():
    pairs = pd.DataFrame([(60, "2")] * 900 + [(95, "0")] * 90 + [(80, "1")] * 10, columns=["quality", "sampling"])
    long = pairs.assign(width=200, height=200)
    thinned = make_plan(long, np.arange(1000) % 2).first
    assert Counter(thinned) == {(60, 2): 90, (95, 0): 9, (80, 1): 1}
    assert thinned == make_plan(long[::-1], np.arange(1000) % 2).first


def test_a_plan_is_kept_as_json(tmp_path):
    artifacts.write_json(tmp_path / "canonical.json", {"plan": PLAN.to_dict()})
    assert read_plan(tmp_path / "canonical.json") == PLAN
    assert read_plan(tmp_path / "none.json") is None
    (tmp_path / "canonical.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"is damaged \(not JSON\); remove it and run train-all again"):
        read_plan(tmp_path / "canonical.json")


def test_nothing_need_be_left_out():
    headers = pd.DataFrame({"width": [50.0] * 99 + [41.0], "height": 60.0, "quality": -1.0, "sampling": "none"})
    labels = np.arange(100) % 2
    assert make_plan(headers, labels).size == 40
    assert make_plan(headers, labels, left_out=0.0).size == 32


# ---- one image


@settings(deadline=None)
@given(st.integers(40, 90), st.integers(40, 90), st.booleans(), st.integers(0, 99))
def test_every_image_becomes_a_crop_of_one_size(width, height, was_jpeg, seed):
    made = canonical.canonical(noise(1, width, height), was_jpeg, PLAN, rng(seed))
    assert (made.size, made.mode) == ((40, 40), "RGB")


def test_nothing_is_scaled():
    """The crop of a JPEG is the image's own pixels, at a random place."""
    picture = noise(1, 60, 50)
    places = set()
    pixels = np.asarray(picture)
    for seed in range(40):
        made = np.asarray(canonical.canonical(picture, True, PLAN, rng(seed)))
        found = [(y, x) for y in range(11) for x in range(21) if (pixels[y : y + 40, x : x + 40] == made).all()]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 30
    assert {y % 8 for y, _ in places} == {x % 8 for _, x in places} == set(range(8))


@pytest.mark.parametrize("size", [(39, 100), (100, 39)])
def test_an_image_that_is_too_small_is_refused_not_enlarged(size):
    message = f"{size[0]}x{size[1]} is smaller than the common crop of 40"
    with pytest.raises(ImageError, match=message):
        canonical.canonical(noise(1, *size), True, PLAN, rng())
    assert canonical.canonical(noise(1, 40, 40), True, PLAN, rng()).size == (40, 40)


def test_what_is_transparent_becomes_white():
    clear = Image.new("RGBA", (50, 50), (255, 0, 0, 0))
    made = canonical.canonical(clear, True, PLAN, rng())
    assert made.getextrema() == ((255, 255),) * 3


def test_only_what_has_no_history_gets_one():
    picture = noise(1, 40, 40)
    assert canonical.canonical(picture, True, PLAN, rng()).tobytes() == picture.tobytes()
    assert canonical.canonical(picture, False, replace(PLAN, first=()), rng()).tobytes() == picture.tobytes()
    made = np.asarray(canonical.canonical(picture, False, replace(PLAN, first=((10, 2),)), rng()), dtype=float)
    assert np.abs(made - np.asarray(picture)).mean() > 20


def test_the_last_compression_is_drawn_evenly():
    draws = [last_compression(PLAN, rng(seed)) for seed in range(1100)]
    qualities, samplings = (Counter(column) for column in zip(*draws, strict=True))
    assert set(qualities) == set(range(70, 81))
    assert min(qualities.values()) > 60
    assert set(samplings) == {0, 2}
    assert 450 < samplings[0] < 650
    assert stored(noise(1))["sampling"] in ("0", "2")


# ---- as images are read


@pytest.fixture
def files(tmp_path):
    """Six images, PNG and JPEG by turns, of several sizes and modes."""
    made = []
    for number in range(6):
        picture = noise(number, 50 + number, 44)
        picture = picture.convert("RGBA") if number == 2 else picture
        file_format = "JPEG" if number % 2 else "PNG"
        write_files(tmp_path, f"{number}.{file_format}", data=encoded(picture, file_format))
        made.append(tmp_path / f"{number}.{file_format}")
    return made


def test_reading_gives_what_the_canonical_file_would(files):
    for number, file in enumerate(files):
        draws = np.random.default_rng([0, 0, number, canonical.RNG_STREAM])
        crop = canonical.canonical(decode.decode(file), number % 2 == 1, PLAN, draws)
        quality, subsampling = last_compression(PLAN, draws)
        data = encoded(crop, "JPEG", quality=quality, subsampling=subsampling)
        read = read_canonical(file, PLAN, [0, 0, number])
        assert read.tobytes() == Image.open(io.BytesIO(data)).tobytes()


def test_the_seed_alone_decides(files):
    same = [read_canonical(files[0], PLAN, [0, 0, 1]).tobytes() for _ in range(2)]
    others = [read_canonical(files[0], PLAN, seed).tobytes() for seed in ([1, 0, 1], [0, 1, 1], [0, 0, 2])]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 4


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    write_files(tmp_path, "text.jpg", data=b"text")
    for name, why in (("gone.jpg", "No such file or directory"), ("text.jpg", "not an image in a known format")):
        with pytest.raises(ImageError, match=f"{tmp_path / name}: {why}"):
            read_canonical(tmp_path / name, PLAN, [0])


@pytest.fixture
def frame(files):
    """Heldout rows of the six images."""
    found = make_frame(groups=6, rows=1)
    found = found[found["split"] == "heldout"].reset_index(drop=True)
    return found.assign(root=str(files[0].parent), path=[file.name for file in files])


class Flat(torch.nn.Module):
    preprocess_config = replace(PREPROCESS_CONFIG, size=40, geometry="native_crops")

    def forward(self, pixels):
        return pixels.float().mean(dim=(1, 2, 3))


def test_tuning_and_held_out_scores_see_the_canonical_form(files, frame):
    seed = 5
    expected = [read_canonical(file, PLAN, [seed, 0, row]) for row, file in enumerate(files)]
    rows = TrainDataset(files, np.zeros(6), Flat.preprocess_config, seed=seed, plan=PLAN)
    for row, image in enumerate(expected):
        np.testing.assert_array_equal(rows[0, row]["pixels"], [np.asarray(image)])
    logits = predict_logits(Flat(), RECIPE, frame, RowReader(PLAN, seed), ProcessGroup())
    assert logits.tolist() == pytest.approx([np.asarray(image).mean() for image in expected], abs=1e-3)
    plain = predict_logits(Flat(), RECIPE, frame.iloc[1:2], RowReader(None, seed), ProcessGroup())
    assert abs(plain[0] - logits[1]) > 1e-3


def test_each_epoch_draws_anew_for_training_alone(files):
    augment = Augment(jpeg=None, flip=False, quarter_turns=False)
    rows = TrainDataset(files, np.zeros(6), Flat.preprocess_config, augment, plan=PLAN)
    tuning = TrainDataset(files, np.zeros(6), Flat.preprocess_config, plan=PLAN)
    seen = [tuple(data[epoch, 0]["pixels"].tobytes() for data in (rows, tuning)) for epoch in (0, 1, 0)]
    assert seen[0] == seen[2]
    assert seen[0][0] != seen[1][0]
    assert len({fixed for _, fixed in seen}) == 1


def test_score_images_reports_what_is_too_small(files):
    runner = Runner("flat", Flat.preprocess_config, lambda pixels: pixels.mean(axis=(1, 2, 3)))
    plan = replace(PLAN, size=48)
    _, errors = score_images(files, [runner], read=lambda row, file: read_canonical(file, plan, [row]))
    assert set(errors) == set(range(6))
    assert errors[0] == "50x44 is smaller than the common crop of 48"


# ---- members with and without are not mixed


def test_a_plan_changes_what_members_were_trained_on(tmp_path):
    frame = make_frame()
    plain = dataset.run_sha256(frame, tmp_path)
    assert plain == dataset.dataset_sha256(frame)
    found = []
    for plan in (PLAN, replace(PLAN, size=48), PLAN):
        artifacts.write_json(artifacts.canonical_path(tmp_path), {"plan": plan.to_dict()})
        found.append(dataset.run_sha256(frame, tmp_path))
    assert found[0] == found[2]
    assert len({plain, *found}) == 3


def test_members_with_and_without_are_not_stacked_together(tmp_path):
    frame = write_run(tmp_path)
    assert members.heldout_logits(tmp_path, ["one", "two"])[1].shape[1] == 2
    artifacts.write_json(artifacts.canonical_path(tmp_path), {"plan": PLAN.to_dict()})
    write_member(tmp_path, "three", frame, noisy_logits(frame, 1))
    with pytest.raises(ArtifactError, match="member 'one' was trained on another data set"):
        members.heldout_logits(tmp_path, ["one", "three"])


def test_a_member_trained_without_is_trained_again_with(tmp_path, monkeypatch):
    """What train_all calls current depends on the plan."""
    asked = []
    monkeypatch.setattr(train_all.members, "is_current", lambda run, name, wanted: asked.append(wanted) or True)
    for plan in (None, PLAN):
        if plan:
            artifacts.write_json(artifacts.canonical_path(tmp_path), {"plan": plan.to_dict()})
        train_all.train_all([RECIPE], make_frame(), tmp_path, TrainContext(), lambda line: None)
    assert asked[0]["data_sha256"] != asked[1]["data_sha256"]
