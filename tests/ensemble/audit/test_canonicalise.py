import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import read_csv, write_csv
from pictures import HOSTILE_NAMES, encoded, noise, write_files
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ensemble.audit import canonicalise, metadata_classifier
from ensemble.audit.audit import BLOCK_ACCURACY
from ensemble.audit.canonicalise import canonicalise_data
from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, DataError
from ensemble.data import dataset
from ensemble.data.index import index_files
from ensemble.data.sources import ReadOptions, read_data
from ensemble.images import decode
from ensemble.images.canonical import CanonicalPlan, read_plan

COLUMNS = ["id", "path", "label", "group", "source", "generator", "original"]
TILE = 40


def run(data, folder, **changed) -> list[str]:
    options = {"skip_unreadable": False, "size": None, "quality": None, "seed": 0} | changed
    reading = ReadOptions(**{key: options.pop(key) for key in ("images", "positive", "classes") if key in options})
    return canonicalise_data([data] if isinstance(data, Path) else data, folder, reading, **options)


def refusal(error, *arguments, **changed) -> str:
    with pytest.raises(error) as caught:
        run(*arguments, **changed)
    return str(caught.value)


def tiles_of(photo: Image.Image, side: int) -> list[Image.Image]:
    places = [(x, y) for y in range(0, photo.height - side, side) for x in range(0, photo.width - side, side)]
    return [photo.crop((x, y, x + side, y + side)) for x, y in places]


@pytest.fixture(scope="module")
def shortcut(tmp_path_factory, photos):
    """Tiles of the same photos in both classes; all that differs is how they are stored."""
    folder = tmp_path_factory.mktemp("shortcut")
    text, camera = PngInfo(), Image.Exif()
    text.add_text("parameters", "Steps: 20")
    camera[271] = "Canon"
    tiles = [tile for photo in photos for tile in tiles_of(photo, TILE + 8)]
    for number, tile in enumerate(tiles):
        if number % 2:
            data = encoded(tile.crop((0, 0, TILE, TILE)), "PNG", pnginfo=text)
            write_files(folder, f"ai/{number:05}-gen.png", data=data)
        else:
            data = encoded(tile, "JPEG", quality=60 + number % 30, exif=camera, comment=b"holiday")
            write_files(folder, f"real/IMG_{number}.jpg", data=data)
    return folder


@pytest.fixture(scope="module")
def made(shortcut, tmp_path_factory):
    """The canonical form of `shortcut`, and what was said of it."""
    folder = tmp_path_factory.mktemp("made") / "canonical"
    return folder, run(shortcut, folder)


@pytest.fixture
def small(tmp_path):
    """Six images a class, PNG 60 pixels and JPEG 50 by turns."""
    for number in range(12):
        label, file_format = ("ai", "real")[number % 2], ("PNG", "JPEG")[number // 2 % 2]
        picture = noise(number, 60 - 10 * (number // 2 % 2), 60)
        write_files(tmp_path / "data", f"{label}/{number}.{file_format}", data=encoded(picture, file_format))
    return tmp_path / "data"


def described(data):
    items, _ = read_data([data])
    indexed = index_files([item.file for item in items])
    return items, indexed


def null_of(data):
    """What metadata alone tells, for all families."""
    items, indexed = described(data)
    features = metadata_classifier.file_features(indexed.headers, [item.path for item in items])
    columns = [name for family in metadata_classifier.FAMILIES.values() for name in family]
    groups = np.array(dataset.group_names(items, indexed, dataset.near_pairs(indexed)), dtype=object)
    return metadata_classifier.cross_validate(features[columns], np.array([item.label for item in items]), groups)


# ---- the shortcut goes


def test_the_null_is_high_before_and_at_chance_after(shortcut, made, tmp_path):
    before = null_of(shortcut)
    after = [null_of(made[0] / "data.csv")]
    for seed in (1,):
        run(shortcut, tmp_path / str(seed), seed=seed)
        after.append(null_of(tmp_path / str(seed) / "data.csv"))
    assert before.balanced_accuracy.low > 0.95
    assert all(probe.balanced_accuracy.low < BLOCK_ACCURACY for probe in after)
    # Over 12 seeds the mean was 0.496, the standard deviation of one 0.032.
    assert np.mean([probe.balanced_accuracy.value for probe in after]) == pytest.approx(0.5, abs=0.09)
    assert {probe.rows for probe in after} == {before.rows}
    assert before.rows > 300


def test_a_form_that_keeps_one_trait_by_class_is_not_at_chance(made, tmp_path):
    """The twin: the same files, but the ai ones are stored anew at another quality."""
    folder = tmp_path / "half"
    shutil.copytree(made[0], folder)
    for file in (folder / "ai").iterdir():
        decode.decode(file).save(file, "JPEG", quality=97)
    assert null_of(folder / "data.csv").balanced_accuracy.low > 0.9


def test_both_classes_are_stored_alike(made):
    _, indexed = described(made[0] / "data.csv")
    headers, table = indexed.headers, read_csv(made[0] / "data.csv")
    labels = table["label"].to_numpy()
    for name in ("format", "mode", "width", "height", "progressive", "density", "segments", "icc", "exif", "text"):
        assert headers[name].nunique() == 1, name
    assert headers["format"].iloc[0] == "JPEG"
    assert headers["width"].iloc[0] == headers["height"].iloc[0] == TILE - 8
    assert (
        not headers[["exif", "camera", "xmp", "text", "generator_text", "c2pa", "comment", "trailing"]].to_numpy().any()
    )
    for name in ("quality", "sampling"):
        values = headers[name].astype(float).to_numpy()
        means = [values[labels == label].mean() for label in "01"]
        assert abs(means[0] - means[1]) < 3 * values.std() * (2 / len(values)) ** 0.5 * 2**0.5, name
        assert set(values[labels == "0"]) == set(values[labels == "1"])


def test_names_say_nothing(made):
    table = read_csv(made[0] / "data.csv")
    assert table["path"].str.fullmatch(r"(ai|real)/[0-9a-f]{20}\.jpg").all()
    assert (table["path"].str.startswith("ai/") == (table["label"] == "1")).all()
    files = sorted(path.relative_to(made[0]).as_posix() for path in made[0].rglob("*.*"))
    assert files == sorted([*table["path"], "canonical.json", "data.csv"])


def test_it_says_what_it_did(made, shortcut):
    plan = read_plan(made[0] / "canonical.json")
    counts = [len(list((shortcut / name).iterdir())) for name in ("ai", "real")]
    assert made[1] == [
        f"crops of 32 pixels, JPEG quality {plan.quality[0]} to {plan.quality[1]}",
        f"{counts[0]} ai and {counts[1]} real images",
    ]
    assert (plan.size, plan.quality[1] - plan.quality[0]) == (32, 10)


# ---- the rows


def test_the_table_reads_back_with_ids_groups_and_sources(tmp_path):
    names = [f"{name} {number}" for name in HOSTILE_NAMES for number in range(2)]
    for number in range(len(names)):
        write_files(tmp_path / "in", f"{number}.png", data=encoded(noise(number, 48, 48)))
    table = write_csv(
        tmp_path / "in" / "data.csv",
        id=names,
        path=[f"{number}.png" for number in range(len(names))],
        label=["1", "0"] * len(HOSTILE_NAMES),
        group=[f"group of {name}" for name in HOSTILE_NAMES for _ in range(2)],
        source=["NA", ""] * len(HOSTILE_NAMES),
        generator=["sd", ""] * len(HOSTILE_NAMES),
    )
    run(table, tmp_path / "out")
    before = {item.id: item for item in read_data([table])[0]}
    after = read_data([tmp_path / "out" / "data.csv"])[0]
    assert list(read_csv(tmp_path / "out" / "data.csv")) == COLUMNS
    assert {item.id for item in after} == set(names) == set(before)
    for item in after:
        old = before[item.id]
        assert (item.label, item.group, item.generator) == (old.label, old.group, old.generator)
        assert item.source == ("NA" if item.label else "data")
    originals = read_csv(tmp_path / "out" / "data.csv").set_index("id")["original"]
    assert {key: Path(value) for key, value in originals.items()} == {key: item.file for key, item in before.items()}


def test_groups_that_were_found_are_kept(small, tmp_path):
    """Near-duplicates share a group by name, though after it their crops may differ."""
    first = next((small / "real").glob("*.PNG"))
    write_files(small, "real/twin.jpg", data=encoded(decode.decode(first), "JPEG", quality=90))
    run(small, tmp_path / "out")
    table = read_csv(tmp_path / "out" / "data.csv")
    twins = table.loc[table["original"].str.contains(f"twin|{first.name}"), "group"]
    assert len(twins) == 2
    assert twins.nunique() == 1
    assert table["group"].nunique() == 12
    items, _ = read_data([tmp_path / "out" / "data.csv"])
    assert Counter(item.group for item in items) == Counter(table["group"])


def test_the_seed_decides_every_byte(small, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        run(small, tmp_path / name, seed=seed)
    names = read_csv(tmp_path / "one" / "data.csv")["path"].tolist()
    read = {name: [artifacts.file_sha256(tmp_path / name / path) for path in names] for name in ("one", "two")}
    assert read["one"] == read["two"]
    assert (tmp_path / "one" / "data.csv").read_bytes() == (tmp_path / "two" / "data.csv").read_bytes()
    assert not set(read_csv(tmp_path / "other" / "data.csv")["path"]) & set(names)


def test_one_more_image_changes_no_other(small, tmp_path):
    run(small, tmp_path / "one", size=40, quality=(70, 80))
    write_files(small, "real/more.jpg", data=encoded(noise(99, 60, 60), "JPEG", quality=75))
    run(small, tmp_path / "two", size=40, quality=(70, 80))
    before, after = (read_csv(tmp_path / name / "data.csv").set_index("id")["path"] for name in ("one", "two"))
    assert len(after) == len(before) + 1
    assert (after[before.index] == before).all()


# ---- too small, broken, transparent


def test_small_images_are_left_out_and_said(small, tmp_path):
    write_files(small, "ai/small.png", data=encoded(noise(50, 39, 200)))
    said = run(small, tmp_path / "out", size=40)
    assert said[1:] == [
        "6 ai and 6 real images",
        "left out: 1 ai and 0 real images (39x200 is smaller than the common crop of 40, for example)",
    ]
    table = read_csv(tmp_path / "out" / "data.csv")
    assert "ai/small.png" not in set(table["id"])
    assert {decode.decode(tmp_path / "out" / path).size for path in table["path"]} == {(40, 40)}


@pytest.mark.parametrize(("size", "name"), [(55, "real"), (61, "real")])
def test_a_size_that_leaves_a_class_empty_is_refused(tmp_path, size, name):
    for number in range(3):
        write_files(tmp_path / "data", f"ai/{number}.png", data=encoded(noise(number, 60, 60)))
        write_files(tmp_path / "data", f"real/{number}.png", data=encoded(noise(10 + number, 50, 50)))
    message = refusal(DataError, tmp_path / "data", tmp_path / "out", size=size)
    assert message == f"no {name} image can be cropped to {size} pixels; lower --size"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_broken_image_is_refused_or_left_out(small, tmp_path):
    write_files(small, "ai/text.png", data=b"text")
    assert "1 of 13 images cannot be read" in refusal(DataError, small, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    said = run(small, tmp_path / "out", skip_unreadable=True)
    assert said[-1].startswith(f"left out: {small / 'ai/text.png'}: not an image in a known format")
    assert len(read_csv(tmp_path / "out" / "data.csv")) == 12


def test_what_is_transparent_is_stored_on_white(tmp_path):
    for label in ("ai", "real"):
        clear = Image.new("RGBA", (64, 64), (200, 0, 0, 0))
        clear.putpixel((0, 0), (0, 0, len(label), 255))
        write_files(tmp_path / "data", f"{label}/1.png", data=encoded(clear))
    run(tmp_path / "data", tmp_path / "out", size=32)
    for file in (tmp_path / "out").rglob("*.jpg"):
        assert np.asarray(decode.decode(file)).min() > 240


def test_identical_pixels_in_both_classes_are_refused(small, tmp_path):
    data = next((small / "ai").glob("*.PNG")).read_bytes()
    write_files(small, "real/copy.png", data=data)
    message = refusal(DataError, small, tmp_path / "out")
    assert message.startswith("identical pixels are labelled both ai and real: ")
    assert "copy.png" in message


def test_both_bounds_of_the_quality_are_checked(small, tmp_path):
    message = refusal(DataError, small, tmp_path / "out", quality=(90, 80))
    assert message == "--quality 90 80: the lower one comes first"
    run(small, tmp_path / "out", quality=(80, 80))
    _, indexed = described(tmp_path / "out" / "data.csv")
    assert set(indexed.headers["quality"]) == {80}


def test_several_sources_become_one(small, tmp_path):
    write_files(tmp_path / "film", "human/1.jpg", data=encoded(noise(77, 60, 60), "JPEG"))
    said = run([small, tmp_path / "film"], tmp_path / "out")
    table = read_csv(tmp_path / "out" / "data.csv").set_index("id")
    assert said[0] == f"{tmp_path / 'film'}: human as real"
    assert table.loc["film/human/1.jpg", ["label", "source"]].tolist() == ["0", "film"]
    assert set(table["source"]) == {"film", "data"}


# ---- the output folder


def test_a_folder_of_someone_else_is_left_alone(small, tmp_path):
    write_files(tmp_path / "out", "mine.txt", data=b"mine")
    message = refusal(ArtifactError, small, tmp_path / "out")
    assert message == f"{tmp_path / 'out'} is not empty and was not written by canonicalise; name another folder"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_empty_folder_and_its_own_result_are_replaced(small, tmp_path):
    (tmp_path / "out").mkdir()
    run(small, tmp_path / "out", seed=1)
    run(small, tmp_path / "out", seed=2)
    table = read_csv(tmp_path / "out" / "data.csv")
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == len(table) == 12
    assert artifacts.read_json(tmp_path / "out" / "canonical.json", "")["seed"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_an_interrupted_pass_leaves_the_earlier_result(small, tmp_path, monkeypatch):
    run(small, tmp_path / "out")
    before = sorted((tmp_path / "out").rglob("*"))

    def full(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(canonicalise, "_write", full)
        with pytest.raises(KeyboardInterrupt):
            run(small, tmp_path / "out", seed=5)
    assert sorted((tmp_path / "out").rglob("*")) == before
    run(small, tmp_path / "out", seed=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


@pytest.mark.parametrize("place", ["data", "data/../data", "data/canonical", "."])
def test_the_data_itself_is_refused(small, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    message = refusal(DataError, Path("data"), Path(place))
    assert message == f"{Path(place)} holds the data itself, or lies in it; name another folder"
    assert not (small / "canonical").exists()


def test_an_earlier_result_is_not_made_from_itself(small, tmp_path):
    run(small, tmp_path / "out")
    before = (tmp_path / "out" / "data.csv").read_bytes()
    message = refusal(DataError, tmp_path / "out" / "data.csv", tmp_path / "out")
    assert message.endswith("holds the data itself, or lies in it; name another folder")
    assert (tmp_path / "out" / "data.csv").read_bytes() == before


def test_a_place_that_cannot_be_written_is_refused_early(small, tmp_path, monkeypatch):
    write_files(tmp_path, "file", data=b"x")
    monkeypatch.setattr(dataset, "index_items", None)
    assert "cannot make" in refusal(ArtifactError, small, tmp_path / "file" / "out")


def test_a_written_row_keeps_what_the_plan_says(small, tmp_path):
    items, _ = read_data([small])
    kept, indexed = dataset.index_items(items)
    frame = dataset.assemble(kept, indexed, [], dataset.Fractions(), 0, check=False)
    plan = CanonicalPlan(48, (), (90, 90))
    table, left_out = canonicalise.canonicalise(frame, plan, tmp_path / "out", seed=3)
    pd.testing.assert_series_equal(table["id"], frame["id"])
    assert left_out == {}
    assert read_plan(tmp_path / "out" / "canonical.json") == plan
