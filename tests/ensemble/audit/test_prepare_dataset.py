import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import encoded, noise, write_files

from ensemble.audit import audit, prepare_dataset
from ensemble.audit.prepare_dataset import DatasetOptions
from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, DataError
from ensemble.data import dataset, sources
from ensemble.data.splits import Fractions
from ensemble.images import canonical

SHARES = Fractions(0.2, 0.3)
SIDE = 48


@pytest.fixture(scope="module")
def shortcut(tmp_path_factory):
    """Real images are JPEGs and ai ones PNGs."""
    folder = tmp_path_factory.mktemp("shortcut")
    for number in range(24):
        write_files(folder, f"ai/{number:02}.png", data=encoded(noise(number, SIDE, SIDE)))
        write_files(folder, f"real/{number:02}.jpg", data=encoded(noise(100 + number, SIDE, SIDE), "JPEG"))
    return folder


@pytest.fixture
def audited(monkeypatch):
    """Counts audits, none of which finds anything."""
    counts = Counter()

    def found(items, indexed, near, **options):
        counts["audits"] += 1
        values = {"headline": "Nothing was looked at.", "blocked": False, "findings": []}
        return SimpleNamespace(to_dict=lambda: values)

    monkeypatch.setattr(prepare_dataset.audit, "audit", found)
    return counts


def run(folder, source, **wanted):
    """The frame, and what was said."""
    said = []
    items, _ = sources.read_data([source] if not isinstance(source, list) else source)
    frame = prepare_dataset.prepare_dataset(folder, items, DatasetOptions(SHARES, **wanted), said.append)
    return frame, said


def refusal(folder, source, **wanted) -> str:
    with pytest.raises(DataError) as caught:
        run(folder, source, **wanted)
    return str(caught.value)


# ---- shortcuts


def test_a_shortcut_is_refused_with_what_to_do(shortcut, tmp_path):
    message = refusal(tmp_path, shortcut)
    assert message.startswith("the files give the class away: metadata alone reaches balanced accuracy 1.0000 [")
    assert message.endswith(
        f"Take that away with: python cli.py canonicalise {shortcut} DIR; or as images are read, with --canonical; "
        "or train as it is, with --accept-shortcuts"
    )
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["audit.json"]


def test_the_advice_names_the_data_as_the_user_did(shortcut, tmp_path):
    message = refusal(tmp_path, shortcut, data=(Path("a.csv"), Path("film")))
    assert "python cli.py canonicalise a.csv film DIR;" in message


def test_it_goes_on_where_that_is_accepted(shortcut, tmp_path):
    frame, said = run(tmp_path, shortcut, accept_shortcuts=True)
    assert said[0].startswith("Metadata alone tells ai from real with balanced accuracy 1.0000 [")
    assert said[0].endswith(": a shortcut.")
    assert any(line.startswith("  block  null: ") for line in said)
    assert said[-2] == "48 images"
    assert said[-1] == dataset.describe(frame)
    assert artifacts.read_json(artifacts.audit_path(tmp_path), "")["headline"] == said[0]
    stored = artifacts.read_parquet(artifacts.dataset_path(tmp_path), "")
    assert list(stored) == dataset.COLUMNS
    assert stored["id"].tolist() == frame["id"].tolist()


def test_it_goes_on_where_the_canonical_form_is_read(shortcut, tmp_path):
    _, said = run(tmp_path, shortcut, canonical=True)
    plan = canonical.read_plan(artifacts.canonical_path(tmp_path))
    assert plan.size == 40
    assert "canonical form as images are read: crops of 40 pixels, JPEG quality 65 to 75" in said
    run(tmp_path, shortcut, accept_shortcuts=True)
    assert not artifacts.canonical_path(tmp_path).exists()


def test_data_without_a_shortcut_needs_nothing(tiles, tmp_path):
    _, said = run(tmp_path, tiles)
    assert said[0].endswith(": no shortcut found.")
    assert not any(line.startswith("  block") for line in said)


@pytest.mark.parametrize(("side", "size"), [(41, 32), (50, 40)])
def test_on_the_fly_every_image_is_large_enough(tmp_path, audited, side, size):
    for number in range(50):
        for label in (0, 1):
            shorter = side if number == label == 0 else 50
            name = f"{('real', 'ai')[label]}/{number}.png"
            write_files(tmp_path / "data", name, data=encoded(noise(100 * label + number, shorter, 50)))
    _, said = run(tmp_path / "run", tmp_path / "data", canonical=True)
    assert f"canonical form as images are read: crops of {size} pixels, JPEG quality 85 to 95" in said


def test_an_image_too_small_for_any_canonical_form_is_refused(tmp_path, audited):
    for number in range(50):
        for label in (0, 1):
            side = 30 if number == label == 0 else 50
            name = f"{('real', 'ai')[label]}/{number}.png"
            write_files(tmp_path / "data", name, data=encoded(noise(100 * label + number, side, 50)))
    message = refusal(tmp_path / "run", tmp_path / "data", canonical=True)
    assert message.startswith("images are too small for a common crop of 32 pixels; the smallest side is 30; remove ")
    assert not artifacts.canonical_path(tmp_path / "run").exists()


# ---- the audit is kept


@pytest.fixture
def tile_copy(tiles, tmp_path):
    return shutil.copytree(tiles, tmp_path / "data")


def test_the_audit_of_unchanged_data_is_not_run_again(tile_copy, tmp_path, audited):
    _, first = run(tmp_path / "run", tile_copy)
    _, second = run(tmp_path / "run", tile_copy)
    assert audited["audits"] == 1
    assert first == second
    assert first[0] == "Nothing was looked at."


@pytest.mark.parametrize("change", ["another image", "another label", "another name", "damage", "version", "removed"])
def test_the_audit_of_changed_data_is_run_again(tile_copy, tmp_path, audited, monkeypatch, change):
    run(tmp_path / "run", tile_copy)
    stored = artifacts.audit_path(tmp_path / "run")
    if change == "another image":
        write_files(tile_copy, "ai/more.bmp", data=encoded(noise(999), "BMP"))
    elif change == "another label":
        (tile_copy / "ai/00.bmp").rename(tile_copy / "real/99.bmp")
    elif change == "another name":
        (tile_copy / "ai/00.bmp").rename(tile_copy / "ai/IMG_0.bmp")
    elif change == "damage":
        stored.write_text(stored.read_text()[:-20])
    elif change == "version":
        monkeypatch.setattr(audit, "AUDIT_VERSION", audit.AUDIT_VERSION + 1)
    else:
        stored.unlink()
    run(tmp_path / "run", tile_copy)
    assert audited["audits"] == 2
    assert json.loads(stored.read_text())["headline"] == "Nothing was looked at."


def test_another_seed_does_not_audit_again(tile_copy, tmp_path, audited):
    first, _ = run(tmp_path / "run", tile_copy)
    second, _ = run(tmp_path / "run", tile_copy, seed=1)
    assert audited["audits"] == 1
    assert first["split"].tolist() != second["split"].tolist()


# ---- against a test set


@pytest.fixture
def shown(tiles, tmp_path):
    """Ten images of which two are in the data: one as it is, one in another format."""
    for number in range(8):
        write_files(tmp_path / "test", f"{number}.bmp", data=encoded(noise(500 + number), "BMP"))
    write_files(tmp_path / "test", "copy.bmp", data=(tiles / "ai/03.bmp").read_bytes())
    write_files(tmp_path / "test", "again.png", data=encoded(noise(5)))
    return tmp_path / "test"


def test_what_the_test_shows_too_is_reported(tiles, tmp_path, shown, audited):
    frame, said = run(tmp_path / "run", tiles, against=shown)
    text = "2 training images are in the test too, or nearly (ai/03.bmp and copy.bmp, real/05.bmp and again.png)"
    assert f"  warn   overlap: {text}; see --exclude-overlap" in said
    assert {"ai/03.bmp", "real/05.bmp"} <= set(frame["id"])
    assert any("no clear difference between training and test" in line for line in said)


def test_what_the_test_shows_too_is_left_out_on_request(tiles, tmp_path, shown, audited):
    plain, _ = run(tmp_path / "plain", tiles)
    frame, said = run(tmp_path / "run", tiles, against=shown, exclude_overlap=True)
    assert "left out: 2 images that the test shows too" in said
    assert set(plain["id"]) - set(frame["id"]) == {"ai/03.bmp", "real/05.bmp"}
    stored = artifacts.read_parquet(artifacts.dataset_path(tmp_path / "run"), "")
    assert len(stored) == 58
    split = plain.set_index("id")["split"]
    assert (frame.set_index("id")["split"] == split[frame["id"]]).all()


def test_nothing_is_left_out_where_nothing_is_shared(tiles, tmp_path, audited):
    write_files(tmp_path / "test", "1.bmp", data=encoded(noise(500), "BMP"))
    frame, said = run(tmp_path / "run", tiles, against=tmp_path / "test", exclude_overlap=True)
    assert len(frame) == 60
    assert not any("left out" in line or "overlap" in line for line in said)


def test_data_that_is_the_test_is_refused(tiles, tmp_path, audited):
    message = refusal(tmp_path / "run", tiles, against=tiles, exclude_overlap=True)
    assert message == "every training image is in the test too; nothing is left to train on"


def test_a_test_set_of_broken_images_is_refused(tiles, tmp_path, audited):
    write_files(tmp_path / "test", "1.png", data=b"text")
    message = refusal(tmp_path / "run", tiles, against=tmp_path / "test")
    assert message.startswith(f"no image of {tmp_path / 'test'} can be read: {tmp_path / 'test/1.png'}: not an image")
    assert refusal(tmp_path / "run", tiles, against=tmp_path / "none").startswith(f"no test set at {tmp_path / 'none'}")


# ---- the rest of what may be asked


def test_broken_images_are_left_out_by_name(tile_copy, tmp_path, audited):
    write_files(tile_copy, "ai/text.png", data=b"text")
    assert "1 of 61 images cannot be read" in refusal(tmp_path / "run", tile_copy)
    frame, said = run(tmp_path / "run", tile_copy, skip_unreadable=True)
    assert len(frame) == 60
    assert said[0].startswith(f"left out: {tile_copy / 'ai/text.png'}: not an image")


def test_a_source_is_held_out_of_what_is_fitted(tile_copy, tiles, tmp_path, audited):
    for number in range(40):
        label = ("ai", "real")[number % 2]
        write_files(tmp_path / "film", f"{label}/{number}.png", data=encoded(noise(700 + number)))
    frame, said = run(tmp_path / "run", [tile_copy, tmp_path / "film"], hold_out=("source=film",))
    unseen = frame[frame["split"] == "unseen"]
    assert set(unseen["source"]) == {"film"}
    assert len(unseen) == 40
    assert set(frame.loc[frame["split"] != "unseen", "source"]) == {"data"}
    assert "  unseen    40 images, 20 ai, in 40 groups" in said[-1]
    assert "  sources: data 60, film 40" in said[-1]
    message = refusal(tmp_path / "run", [tile_copy, tmp_path / "film"], hold_out=("source=web",))
    assert message == "--hold-out source=web: no image has this source; there are: data, film"


def test_a_run_that_cannot_be_written_is_refused_first(tiles, tmp_path, monkeypatch):
    write_files(tmp_path, "file", data=b"x")
    monkeypatch.setattr(dataset, "index_items", None)
    with pytest.raises(ArtifactError, match="cannot make"):
        run(tmp_path / "file" / "run", tiles)


def test_the_same_data_gives_the_same_rows(tiles, tmp_path, audited):
    frames = [run(tmp_path / name, tiles)[0] for name in ("one", "two")]
    assert dataset.dataset_sha256(frames[0]) == dataset.dataset_sha256(frames[1])
    np.testing.assert_array_equal(frames[0]["split"], frames[1]["split"])
