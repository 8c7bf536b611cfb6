import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from helpers import read_csv, write_csv
from hub_layouts import write_checkpoint
from pictures import HOSTILE_NAMES, encoded, write_files
from PIL import Image
from small_pool import TEST_COLOURS, TINY, one_thread, patch, write_pool, write_test

from ensemble.commands.select import select
from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, DataError, RecipeError, UnavailableError
from ensemble.data import sources
from ensemble.selection import contact_sheet, neighbours
from ensemble.selection import output as select_output
from ensemble.selection import run as select_run

COLUMNS = "id path label group source generator distance test_id original".split()


@pytest.fixture(scope="session")
def embedder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("hub") / "tiny", TINY)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """test/ of red and green patches, pool/ of four colours in two classes, and no one's cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    write_test(tmp_path / "test")
    write_pool(tmp_path / "pool")
    with one_thread():
        yield tmp_path


@pytest.fixture
def run(embedder):
    """Runs the command with the given arguments and gives what it printed."""

    def call(*arguments, test="test", pool="pool", count=8, output="out"):
        given = ["--test", test, "--pool", pool, "--count", count, "--output", output, "--embedder", embedder]
        result = CliRunner().invoke(select, [str(part) for part in (*given, *arguments, "--device", "cpu")])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return call


@pytest.fixture
def refused(run, here):
    """Runs the command, which must fail with one line before any image is embedded, and write nothing."""

    def call(error, message, *arguments, early=True, **more):
        before = {path.name for path in here.iterdir()} | {"cache"}
        with pytest.MonkeyPatch.context() as patched:
            if early:
                patched.setattr(select_run.features, "load_embedder", None)
            with pytest.raises(error, match=message) as caught:
                run(*arguments, **more)
        assert "\n" not in str(caught.value)
        assert {path.name for path in here.iterdir()} <= before

    return call


def picture(here):
    with Image.open(here / "out" / "selection.jpg") as sheet:
        return sheet.convert("RGB")


def colour(name):
    return Path(name).name.partition("_")[0]


def test_chosen_images_are_linked_by_class_and_listed(run, here):
    out = run(count=12)
    table = read_csv(here / "out" / "selection.csv")
    assert list(table.columns) == COLUMNS
    assert Counter(table["label"]) == {"1": 6, "0": 6}
    for row in table.itertuples():
        link = here / "out" / row.path
        assert link.is_symlink()
        assert link.resolve() == Path(row.original) == (here / "pool" / row.id).resolve()
        assert row.path.startswith(f"{'ai' if row.label == '1' else 'real'}/0000")
        assert 0 <= float(row.distance) < 0.5
        assert colour(row.test_id) == colour(row.id) in TEST_COLOURS
    assert sum(1 for path in (here / "out").rglob("*.png")) == 12
    assert "12 images -> out" in out
    assert "label: ai 6, real 6" in out
    assert "8 of 8 test images drew something, 2 at most" in out


def test_the_selection_is_training_data(run, here):
    run(count=12)
    items, _ = sources.read_data([here / "out" / "selection.csv"])
    assert Counter(item.label for item in items) == {1: 6, 0: 6}
    assert all(item.file.is_file() for item in items)
    assert all(colour(item.id) in TEST_COLOURS for item in items)


def test_distances_are_below_those_of_a_random_draw(run):
    lines = run(count=8).splitlines()
    rows = {line.rsplit(maxsplit=3)[0].strip(): line.split()[-3:] for line in lines if "0." in line}
    names = ("chosen, to the test image that drew it", "chosen, to the nearest test image")
    drawn, nearest, random = (
        [float(value) for value in rows[name]] for name in (*names, names[1].replace("chosen", "random draw"))
    )
    assert drawn == sorted(drawn)
    assert all(a <= b for a, b in zip(nearest, drawn, strict=True))
    assert nearest[1] < random[1]
    assert nearest[2] < 0.7 * random[2]


def test_copies_stand_without_their_originals(run, here):
    run("--copy")
    table = read_csv(here / "out" / "selection.csv")
    for row in table.itertuples():
        assert not (here / "out" / row.path).is_symlink()
        assert (here / "out" / row.path).read_bytes() == Path(row.original).read_bytes()


def test_the_balance_is_kept(run, here):
    run("--balance", "0.25")
    assert Counter(read_csv(here / "out" / "selection.csv")["label"]) == {"1": 2, "0": 6}


def test_the_seed_decides_and_a_second_run_replaces_the_first(run, here):
    tables = []
    for arguments in (["--seed", "0"], ["--seed", "0", "--no-cache"], ["--seed", "5"]):
        run(*arguments, count=3 * 2)
        tables.append(read_csv(here / "out" / "selection.csv"))
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])
    assert sum(1 for path in (here / "out").rglob("*.png")) == 6
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


def test_an_unlabelled_pool_fills_one_folder(run, here):
    flat = here / "flat"
    for number, name in enumerate(("red", "green", "blue")):
        write_files(flat, f"deep/{name}_1.png", data=encoded(patch(name, 300 + number)))
    run(pool="flat", count=2)
    table = read_csv(here / "out" / "selection.csv")
    assert list(table.columns) == [name for name in COLUMNS if name != "label"]
    assert sorted(table["id"]) == ["deep/green_1.png", "deep/red_1.png"]
    assert set(table["source"]) == {"flat"}
    assert sorted(path.name for path in (here / "out" / "images").iterdir()) == sorted(
        path.rpartition("/")[2] for path in table["path"]
    )


def test_several_pools_are_one(run, here):
    write_pool(here / "more", each=2)
    for number, file in enumerate(sorted((here / "more").rglob("*.png"))):
        file.write_bytes(encoded(patch(colour(file.name), 1000 + number)))
    run("--pool", "more", count=32)
    table = read_csv(here / "out" / "selection.csv")
    assert set(table["source"]) == {"pool", "more"}
    assert table["id"].str.startswith(("pool/", "more/")).all()


def test_csv_pools_keep_what_they_know(run, here):
    write_csv(
        here / "pool.csv",
        id=[f"00{n}" for n in range(4)],
        path=[f"pool/{folder}/{name}_0.png" for folder in ("ai", "real") for name in TEST_COLOURS],
        label=["fake", "fake", "photo", "photo"],
        group=["g,1", "", "g2", "g2"],
        source=["s1", "s1", "s2", "s2"],
        generator=["gan", "", "", ""],
    )
    write_csv(here / "test.csv", id=["red_0", "green_1"])
    out = run("--images", "test", "--positive", "fake", test="test.csv", pool="pool.csv", count=4)
    table = read_csv(here / "out" / "selection.csv").sort_values("id")
    assert table["id"].tolist() == ["000", "001", "002", "003"]
    assert table["group"].tolist() == ["g,1", "", "g2", "g2"]
    assert table["generator"].tolist() == ["gan", "", "", ""]
    assert set(table["test_id"]) == {"red_0", "green_1"}
    assert "fake counts as ai" in out
    assert "source: " in out
    assert "generator: gan 1" in out


def test_names_are_made_safe_and_ids_kept(run, here):
    for number, name in enumerate(HOSTILE_NAMES):
        for label, folder in enumerate(("real", "ai")):
            data = encoded(patch("red", 500 + 20 * label + number))
            write_files(here / "odd", f"{folder}/sub/{name}.PNG", data=data)
    run(pool="odd", count=2 * len(HOSTILE_NAMES))
    table = read_csv(here / "out" / "selection.csv")
    assert sorted(table["id"]) == sorted(f"{f}/sub/{name}.PNG" for f in ("ai", "real") for name in HOSTILE_NAMES)
    assert table["path"].str.fullmatch(r"(ai|real)/[0-9]{6}_[A-Za-z0-9._-]*\.png").all()
    assert table["path"].is_unique
    assert all((here / "out" / path).is_file() for path in table["path"])
    assert picture(here).size[1] > 500


def test_near_duplicates_of_the_test_and_of_each_other_are_dropped_and_counted(run, here):
    red = patch("red", 0)  # test/red_0.png
    write_files(here / "pool", "ai/red_copy.jpg", data=encoded(red, "JPEG", quality=85))
    for number in range(2):
        half = patch("green", 100).resize((80, 80)).rotate(90 * number)
        write_files(here / "pool", f"real/green_again_{number}.png", data=encoded(half))
    out = run(count=24)
    table = read_csv(here / "out" / "selection.csv")
    assert "ai/red_copy.jpg" not in set(table["id"])
    alike = {"real/green_0.png", "real/green_again_0.png", "real/green_again_1.png"}
    assert len(alike & set(table["id"])) <= 1
    assert "dropped: 1 near-duplicates of test images" in out
    record = artifacts.read_json(here / "out" / "selection.json", "")
    assert record["near_duplicates_of_test"] == 1


def test_the_picture_shows_test_images_beside_what_they_drew(run, here):
    run(count=8)
    sheet = picture(here)
    cell, gap, top = contact_sheet.CELL_PIXELS, 12, 46
    corner = np.asarray(sheet)
    first = corner[top : top + cell, gap : gap + cell].reshape(-1, 3).mean(axis=0)
    beside = corner[top : top + cell, 3 * gap + cell : 3 * gap + 2 * cell].reshape(-1, 3).mean(axis=0)
    assert np.argmax(first) == np.argmax(beside) in (0, 1)  # red beside red, or green beside green
    assert np.abs(first - beside).max() < 40
    assert sheet.size == (gap + 3 * (cell + gap) + gap, top + 8 * (cell + 34))


def test_the_pictures_rows_are_bounded(run, here):
    write_test(here / "test", each=10)
    run(count=40)
    assert picture(here).size[1] == 46 + 12 * (144 + 34)


def test_unreadable_pool_images_are_said_and_left_out(run, here):
    write_files(here / "pool", "ai/red_broken.png", data=b"no image")
    out = run(count=40)
    assert "left out of the pool: " in out
    assert "red_broken.png" in out
    assert len(read_csv(here / "out" / "selection.csv")) == 40


def test_unreadable_test_images_stop_unless_skipped(run, refused, here):
    write_files(here / "test", "broken.png", data=b"no image")
    refused(DataError, r"1 of 9 test images cannot be read: .*broken\.png.* --skip-unreadable", early=False)
    out = run("--skip-unreadable")
    assert "left out of the test: " in out
    assert "8 of 8 test images drew something" in out


def test_a_pool_smaller_than_count_is_refused_before_work(refused):
    refused(DataError, "--count 50 needs 25 ai and 25 real, but the pool holds 24 ai and 24 real", count=50)
    refused(DataError, "needs 36 ai and 4 real, but .* 24 ai", "--balance", "0.9", count=40)


def test_a_pool_too_small_without_duplicates_says_what_is_left(refused, here):
    for number in range(2):
        write_files(here / "pool", f"ai/copy_{number}.png", data=encoded(patch("red", number)))
    message = "--count 52 needs 26 ai and 26 real, but the pool holds 26 ai and 24 real"
    refused(DataError, message, count=52)
    message = "needs 26 ai and 22 real, but without near-duplicates .* the pool holds 24 ai and 24 real"
    refused(DataError, message, "--balance", "0.54", count=48, early=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"test": "nowhere"}, DataError, "no test images at nowhere"),
        ({"pool": "nowhere"}, DataError, "no pool at nowhere"),
        ({"pool": "test", "count": 2}, DataError, "test is both --test and --pool"),
        ({"pool": "./test/../test", "count": 2}, DataError, "both --test and --pool"),
        ({"test": "empty"}, DataError, "no images in empty"),
        ({"pool": "empty"}, DataError, "no images in empty"),
        ({"output": "pool/out"}, DataError, "--output pool/out lies in pool, which is read"),
        ({"output": "test"}, DataError, "--output test lies in test"),
        ({"output": "notes"}, DataError, r"holds what no selection wrote \(mine\.txt\)"),
        ({"output": "notes/mine.txt"}, DataError, "is a file; name a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_work(refused, here, arguments, error, message):
    write_files(here, "empty/readme.txt", "notes/mine.txt")
    refused(error, message, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--embedder", "nothing"], Exception, "neither a folder here nor a Hub id"),
        (["--embedder", "runs/a:swin"], ArtifactError, "no member 'swin' in runs/a"),
        (["--test-labels", "labels.csv"], DataError, "--test-labels is for --ablate"),
        (["--ablate", "nothing.yaml"], RecipeError, "nothing.yaml: no such file"),
        (["--pool", "flat"], DataError, r"classes are known \(pool\), of others not \(flat\)"),
        (["--pool", "pool"], DataError, "given more than once"),
    ],
)
def test_wrong_options_are_refused_before_work(refused, here, arguments, error, message):
    write_files(here, "flat/a.png")
    refused(error, message, *arguments)


@pytest.mark.parametrize("option", [["--balance", "1.5"], ["--balance", "-0.1"], ["--count", "0"], ["--classes", "x"]])
def test_values_out_of_range_are_wrong_use(option):
    given = ["--test", "test", "--pool", "pool", "--count", "3", "--output", "out"]
    result = CliRunner().invoke(select, [*given, *option])
    assert result.exit_code == 2
    assert f"Invalid value for '{option[0]}'" in result.output


def test_a_balance_needs_known_classes(refused, here):
    write_files(here, "flat/a.png", "flat/b.png")
    refused(DataError, "--balance needs a pool of known classes", "--balance", "0.5", pool="flat", count=1)


def test_a_folder_with_foreign_files_beside_a_selection_is_not_replaced(run, refused, here):
    run()
    write_files(here / "out", "notes.txt", data=b"keep me")
    refused(DataError, r"no selection wrote \(notes\.txt\)")
    assert (here / "out" / "notes.txt").read_bytes() == b"keep me"
    (here / "out" / "notes.txt").unlink()
    run()


def test_equal_pixels_in_both_classes_are_said_and_left_out(run, here):
    write_files(here / "pool", "real/twin.png", data=encoded(patch("red", 200)))  # pool/ai/red_0.png
    out = run("--balance", "0.49", count=47)
    line = next(line for line in out.splitlines() if "both ai and real" in line)
    assert line.startswith("left out of the pool: 2 images")
    assert "red_0.png" in line
    assert "twin.png" in line
    assert not {"ai/red_0.png", "real/twin.png"} & set(read_csv(here / "out" / "selection.csv")["id"])
    assert "dropped: 0 near-duplicates of test images" in out


def test_a_write_that_fails_leaves_the_old_selection(run, here, monkeypatch):
    run()
    before = read_csv(here / "out" / "selection.csv")

    def fail(rows, path):
        raise OSError("disk full")

    monkeypatch.setattr(select_output, "write_contact_sheet", fail)
    with pytest.raises(OSError, match="disk full"):
        run("--seed", "3")
    assert read_csv(here / "out" / "selection.csv").equals(before)


def test_links_that_the_system_refuses_name_the_remedy(run, monkeypatch):
    def refuse(self, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(DataError, match=r"Operation not permitted; where links are not allowed, add --copy"):
        run()


def test_a_pool_beyond_the_exact_limit_needs_faiss(refused, monkeypatch):
    monkeypatch.setattr(neighbours, "find_spec", lambda name: None)
    monkeypatch.setattr(neighbours, "MAX_EXACT_VECTORS", 10)
    refused(UnavailableError, "over 10 images needs faiss")


def test_only_new_images_are_embedded_the_next_time(run, here, monkeypatch):
    run()
    seen = []
    load = select_run.features.load_embedder

    def counting(*arguments):
        embedder = load(*arguments)
        return select_run.features.Embedder(
            **{**vars(embedder), "run": lambda pixels: (seen.append(len(pixels)), embedder.run(pixels))[1]}
        )

    monkeypatch.setattr(select_run.features, "load_embedder", counting)
    run()
    assert seen == []
    write_files(here / "pool", "ai/red_new.png", data=encoded(patch("red", 999)))
    run()
    assert seen == [1]
    assert os.path.getsize(here / "cache" / "features.sqlite") > 0


def test_ids_sort_alike_whatever_the_file_order(run, here):
    rows = [
        (f"{folder}/{name}_{n}.png", folder) for folder in ("ai", "real") for name in TEST_COLOURS for n in range(6)
    ]
    tables = []
    for order in (1, -1):
        frame = pd.DataFrame(rows[::order], columns=["path", "label"])
        frame.to_csv(here / "pool" / "list.csv", index=False)
        run(pool="pool/list.csv", count=10)
        tables.append(read_csv(here / "out" / "selection.csv"))
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize(("name", "label"), [("ai", "1"), ("real", "0")])
def test_a_pool_of_one_class_gives_that_class(run, here, name, label):
    shutil.copytree(here / "pool" / name, here / "one" / name)
    out = run(pool="one", count=4)
    assert f"label: {name} 4" in out
    assert set(read_csv(here / "out" / "selection.csv")["label"]) == {label}


def test_several_pools_may_follow_one_another(run, here):
    for name in ("ai", "real"):
        shutil.copytree(here / "pool" / name, here / name / name)
    out = run("real", pool="ai", count=4)
    assert "label: ai 2, real 2" in out
