from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import PREPROCESS_CONFIG, SCALES, STACKER, expected_logits, read_csv, write_csv, write_image
from pictures import HOSTILE_NAMES
from PIL import Image
from small_ensemble import ENSEMBLE, runner

from ensemble.core.errors import ArtifactError
from ensemble.core.metrics import sigmoid
from ensemble.data.inputs import read_inputs
from ensemble.models.runner import Runner
from ensemble.stacking.stacker import Stacker
from export.inference import journal
from export.inference.infer import (
    Ensemble,
    ScoreOptions,
    infer,
    infer_to_file,
    member_logits,
    with_flips,
)

SINGLE = Stacker(members=("one",), coef=(1.0,), intercept=0.0)
HOSTILE = [*HOSTILE_NAMES, " spaces ", "😀", "nan", "1.50", "-0", "=1+1", "'", "TRUE", "#", "\ufeff", "a\rb", "a\r\nb"]


def write_images(folder, names):
    return [write_image(folder / name, 13 * number % 256) for number, name in enumerate(names)]


def score(source, images=None, **options):
    return infer(read_inputs(source, images), ENSEMBLE, **options)


def to_file(output, source, ensemble=ENSEMBLE, log=print, **options):
    with journal.locked_workdir(output) as folder:
        return infer_to_file(read_inputs(source, spill=folder), ensemble, output, folder, ScoreOptions(**options), log)


def expected(files):
    return STACKER.target(expected_logits(files))


@pytest.mark.parametrize("suffix", ["", ".png"])
@pytest.mark.parametrize("place", ["images beside", "beside", "named"])
def test_a_csv_of_ids_keeps_rows_and_order(tmp_path, suffix, place):
    folder = {"images beside": tmp_path / "images", "beside": tmp_path, "named": tmp_path / "elsewhere"}[place]
    files = write_images(folder, [f"{name}.png" for name in "cab"])
    table = write_csv(tmp_path / "test.csv", id=[name + suffix for name in "cab"])
    result, errors = score(table, folder if place == "named" else None)
    assert list(result.columns) == ["id", "target"]
    assert list(result["id"]) == [name + suffix for name in "cab"]
    np.testing.assert_allclose(result["target"], expected(files), rtol=1e-6)
    assert errors.empty


def test_a_csv_with_paths(tmp_path):
    files = write_images(tmp_path / "deep" / "er", ["2.png", "1.png"])
    table = write_csv(tmp_path / "test.csv", path=["deep/er/2.png", "deep/er/1.png"])
    result, _ = score(table)
    assert list(result["id"]) == ["deep/er/2.png", "deep/er/1.png"]
    np.testing.assert_allclose(result["target"], expected(files), rtol=1e-6)


def test_ids_stand_for_paths_where_a_csv_has_both(tmp_path):
    files = write_images(tmp_path, ["b.png", "a.png"])
    result, _ = score(write_csv(tmp_path / "test.csv", id=["1", "2"], path=["b.png", "a.png"]))
    assert list(result["id"]) == ["1", "2"]
    np.testing.assert_allclose(result["target"], expected(files), rtol=1e-6)


def test_a_folder_is_scored_in_the_order_of_its_names(tmp_path):
    files = write_images(tmp_path, ["a/2.png", "a/10.PNG", "b.png"])
    (tmp_path / "notes.txt").write_text("no image")
    result, _ = score(tmp_path)
    assert list(result["id"]) == ["a/10.PNG", "a/2.png", "b.png"]
    np.testing.assert_allclose(result["target"], expected([files[1], files[0], files[2]]), rtol=1e-6)


def test_images_in_a_parquet_file_are_scored_as_files_are(tmp_path):
    files = write_images(tmp_path, ["a.png", "b.png", "c.png"])
    files[1].write_bytes(b"")
    by_file, _ = score(tmp_path)
    frame = pd.DataFrame({"image": [{"bytes": file.read_bytes(), "path": file.name} for file in files]})
    frame.to_parquet(tmp_path / "set.parquet", row_group_size=2)
    result, errors = score(tmp_path / "set.parquet")
    pd.testing.assert_frame_equal(result, by_file)
    place = f"{tmp_path / 'set.parquet'}:1"
    assert errors.to_dict("records") == [{"id": "b.png", "path": place, "error": f"{place}: the file is empty"}]


@pytest.mark.parametrize("how", ["by id", "by path", "folder"])
def test_hostile_ids_survive_the_round_trip(tmp_path, how):
    files = write_images(tmp_path / "images", [f"{name}.png" for name in HOSTILE])
    named = {file.stem: value for file, value in zip(files, expected(files), strict=True)}
    table = tmp_path / "test.csv"
    if how == "by id":
        source, ids = write_csv(table, id=HOSTILE), HOSTILE
    elif how == "by path":
        paths = [f"images/{name}.png" for name in HOSTILE]
        ids = [f"</script>/{name}" for name in HOSTILE]
        source = write_csv(table, id=ids, path=paths)
    else:
        source, ids = tmp_path / "images", sorted(f"{name}.png" for name in HOSTILE)
    done = to_file(tmp_path / "out.csv", source)
    assert (done.scored, done.failed, done.listing) == (len(HOSTILE), 0, None)
    read = read_csv(tmp_path / "out.csv")
    assert list(read["id"]) == ids
    stems = [key.removeprefix("</script>/").removesuffix(".png") for key in ids]
    np.testing.assert_allclose(read["target"].astype(float), [named[stem] for stem in stems], rtol=1e-6)


def test_members_have_columns_of_their_own_probability(tmp_path):
    files = write_images(tmp_path, ["0.png", "1.png", "2.png"])
    result, _ = score(tmp_path, with_members=True)
    assert list(result.columns) == ["id", "target", "one", "two"]
    np.testing.assert_allclose(result[["one", "two"]], sigmoid(expected_logits(files)), rtol=1e-6)


def test_a_single_member_stands_for_itself(tmp_path):
    files = write_images(tmp_path, ["0.png", "1.png"])
    result, _ = infer(read_inputs(tmp_path), Ensemble((runner("one", 4),), SINGLE, "cpu"))
    np.testing.assert_allclose(result["target"], sigmoid(expected_logits(files)[:, 0]), rtol=1e-6)


@pytest.fixture
def broken(tmp_path):
    folder = tmp_path / "images"
    files = write_images(folder, ["a.png", "b,1.png", "c.png"])
    files[1].write_bytes(b"")
    return folder


def test_unreadable_images_are_listed_and_have_no_target(tmp_path, broken):
    done = to_file(tmp_path / "out.csv", broken, members=True)
    assert (done.scored, done.failed) == (2, 1)
    read = read_csv(tmp_path / "out.csv")
    assert list(read["id"]) == ["a.png", "b,1.png", "c.png"]
    assert read.loc[1, ["target", "one", "two"]].tolist() == ["", "", ""]
    assert (read.loc[[0, 2], ["target", "one", "two"]] != "").all(axis=None)
    assert done.listing == tmp_path / "out.errors.csv"
    assert read_csv(done.listing).to_dict("records") == [
        {"id": "b,1.png", "path": str(broken / "b,1.png"), "error": f"{broken / 'b,1.png'}: the file is empty"}
    ]


def test_fill_stands_in_for_unreadable_images_alone(tmp_path, broken):
    to_file(tmp_path / "plain.csv", broken, members=True)
    to_file(tmp_path / "filled.csv", broken, members=True, fill=0.5)
    plain, filled = read_csv(tmp_path / "plain.csv"), read_csv(tmp_path / "filled.csv")
    assert filled.loc[1].tolist() == ["b,1.png", "0.5", "0.5", "0.5"]
    pd.testing.assert_frame_equal(filled.drop(index=1), plain.drop(index=1))
    assert len(read_csv(tmp_path / "filled.errors.csv")) == 1


def test_an_older_error_list_goes_when_all_images_are_read(tmp_path, broken):
    to_file(tmp_path / "out.csv", broken)
    write_image(broken / "b,1.png")
    assert to_file(tmp_path / "out.csv", broken).listing is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.csv"]


def test_nothing_readable_is_said_so(tmp_path):
    write_images(tmp_path, ["a.png"])[0].write_bytes(b"")
    result, errors = score(tmp_path)
    assert len(result) == len(errors) == 1


def test_a_member_without_an_answer_is_not_written_as_an_unreadable_image(tmp_path):
    write_images(tmp_path, ["a.png", "b.png"])
    silent = Runner("one", PREPROCESS_CONFIG, lambda pixels: np.full(len(pixels), np.nan, dtype=np.float32))
    with pytest.raises(ArtifactError, match="gave no finite logit"):
        infer(read_inputs(tmp_path), Ensemble((silent,), SINGLE, "cpu"))


@pytest.mark.parametrize(("place", "kept"), [("file.txt/out.csv", []), ("folder.csv", ["folder.csv.partial"])])
def test_an_output_that_cannot_be_written_is_one_clear_error(tmp_path, place, kept):
    (tmp_path / "file.txt").write_text("in the way")
    (tmp_path / "folder.csv").mkdir()
    write_images(tmp_path / "images", ["a.png"])
    with pytest.raises(ArtifactError, match=r"cannot (make|write) .*; choose another place"):
        to_file(tmp_path / place, tmp_path / "images")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.txt", "folder.csv", *kept, "images"]


def test_flips_are_averaged_where_they_helped_and_only_there(tmp_path):
    files = [tmp_path / "a.png"]
    pixels = np.zeros((12, 20, 3), dtype=np.uint8)
    pixels[:, :10] = 255
    Image.fromarray(pixels).save(files[0])

    def left(pixels):
        return (pixels[:, :, : PREPROCESS_CONFIG.size // 2].mean(axis=(1, 2, 3)) / 255).astype(np.float32)

    runners = tuple(Runner(name, PREPROCESS_CONFIG, left) for name in SCALES)
    plain = Ensemble(runners, replace(STACKER, tta_members=("two",)), "cpu")
    inputs = read_inputs(tmp_path)
    one, two = member_logits(inputs, plain)[0][0]
    assert one == two > 0.9
    assert member_logits(inputs, with_flips(plain, ""))[0][0].tolist() == [one, pytest.approx(0.5, abs=0.05)]


def test_flips_that_were_not_measured_are_asked_for():
    with pytest.raises(ArtifactError, match="it was not measured which members mirrored images help; run: me"):
        with_flips(ENSEMBLE, "run: me")
