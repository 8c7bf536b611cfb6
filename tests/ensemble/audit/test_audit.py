import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import run_cli
from pictures import SIDE, crops, encoded
from PIL import Image

from ensemble.audit import audit, checks, storage_swap
from ensemble.audit.audit import audit_data
from ensemble.core.errors import DataError
from ensemble.data import dataset
from ensemble.data.sources import read_data
from ensemble.images import pixel_traces


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return crops(120)


def write(folder: Path, pictures: list[Image.Image], ai: dict, real: dict | None = None) -> Path:
    """Every second picture is ai; options of Pillow's save for each class."""
    for number, picture in enumerate(pictures):
        name, options = (("real", real or ai), ("ai", ai))[number % 2]
        suffix = {"JPEG": "jpg", "PNG": "png"}[options["file_format"]]
        path = folder / name / f"{number * 7919 % 100_003:06}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture, **options))
    return folder


JPEG90 = {"file_format": "JPEG", "quality": 90}
PNG = {"file_format": "PNG"}


def findings(data: Path) -> tuple[audit.Audit, dict[str, audit.Finding]]:
    items, notes = read_data([data])
    found = audit_data(items, notes)[0]
    return found, {finding.kind: finding for finding in found.findings}


def test_files_stored_alike_pass(tmp_path, pictures):
    found, kinds = findings(write(tmp_path, pictures, JPEG90))
    assert not found.blocked
    assert found.metadata.balanced_accuracy.low < 0.6
    assert not {"format", "size", "compression", "metadata", "names"} & set(kinds)
    assert audit.headline(found).endswith("no shortcut found.")


@pytest.mark.parametrize(
    ("real", "kind", "said"),
    [
        (PNG, "format", "format JPEG (100%) in ai, PNG (100%) in real"),
        ({"file_format": "JPEG", "quality": 70}, "compression", "in real"),
        ({**JPEG90, "subsampling": 0}, "subsampling", "sampling 2 (100%) in ai, 0 (100%) in real"),
        ({**JPEG90, "comment": b"made by hand"}, "metadata", "in ai"),
    ],
    ids=["format", "quality", "subsampling", "comment"],
)
def test_files_stored_unlike_block_and_are_named(tmp_path, pictures, real, kind, said):
    found, kinds = findings(write(tmp_path, pictures, JPEG90, real))
    assert found.blocked
    assert found.metadata.balanced_accuracy.value == 1.0
    assert said in kinds[kind].text
    assert audit.headline(found).endswith("a shortcut.")
    with pytest.raises(DataError, match="--accept-shortcuts") as caught:
        audit.refuse_blocked(found.to_dict(), "data/train")
    assert "python cli.py canonicalise data/train DIR" in str(caught.value)


def test_copies_in_the_other_class_are_named_and_equal_pixels_block(tmp_path, pictures):
    write(tmp_path, pictures, PNG)
    (tmp_path / "ai" / "equal.png").write_bytes(encoded(pictures[2]))
    (tmp_path / "ai" / "twin.jpg").write_bytes(encoded(pictures[0], "JPEG", quality=60))
    found, kinds = findings(tmp_path)
    assert found.blocked
    assert (
        "1 images stand in both classes with equal pixels (ai/equal.png and real/015838.png)" in kinds["conflicts"].text
    )
    (across,) = [f for f in found.findings if f.kind == "duplicates" and "across the classes" in f.text]
    assert across.severity == "note"
    assert "1 near-duplicate pairs" in across.text
    assert "ai/twin.jpg and real/000000.png" in across.text


def test_broken_files_and_other_kinds_are_counted_by_class(tmp_path, pictures):
    write(tmp_path, pictures, JPEG90)
    (tmp_path / "ai" / "half.jpg").write_bytes(encoded(pictures[0], "JPEG")[:200])
    (tmp_path / "real" / "raw.heic").write_bytes(b"x")
    code, out, _ = run_cli("audit", tmp_path)
    assert code == 0
    assert re.search(r"warn +corrupt: 1 images cannot be read: .*half\.jpg", out)
    assert re.search(r"warn +skipped: .*1 \.heic in real", out)


def test_the_command_blocks_with_exit_code_1_unless_accepted(tmp_path, pictures):
    data = write(tmp_path / "data", pictures[:60], JPEG90, PNG)
    code, out, _ = run_cli("audit", data, "--json", tmp_path / "audit.json")
    assert code == 1
    assert re.search(r"block +null: metadata alone reaches balanced accuracy 1\.0000", out)
    values = json.loads((tmp_path / "audit.json").read_text())
    assert values["blocked"]
    assert values["headline"] in out
    assert run_cli("audit", data, "--accept-shortcuts")[0] == 0


def test_the_page_shows_pictures_spectra_and_the_swap_test_and_escapes_names(tmp_path, pictures):
    data = write(tmp_path / "a <b> & c", pictures, JPEG90, {"file_format": "JPEG", "quality": 60})
    (data / "ai" / "<script>alert(1)<script>.jpg").write_bytes(encoded(pictures[0].rotate(40), "JPEG"))
    test = tmp_path / "test"
    write(test, pictures[:20], JPEG90)
    code, _, _ = run_cli("audit", data, "--html", tmp_path / "audit.html", "--against", test, "--accept-shortcuts")
    assert code == 0
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "a &lt;b&gt; &amp; c" in page
    assert page.count("data:image/jpeg;base64,") == 32 + 32 + 20
    assert page.count("data:image/svg+xml;base64,") == 1
    assert "stored as the other class" in page
    assert "http" not in page.replace("data:image", "")


# ---- single checks


def item(path: str, label: int, source: str | None = None, group: str | None = None):
    return checks.LabelledImage(path, "root", path, label, group, source)


def test_a_source_of_one_class_is_named():
    both = [item(str(i), i % 2, "web") for i in range(20)] + [item(f"x{i}", 1, "gan") for i in range(10)]
    (found,) = checks.sources(both)
    assert found.severity == "warn"
    assert "1 of 2 sources hold one class alone: gan (ai 10)" in found.text
    assert checks.sources([item(str(i), i % 2, ("web", "disk")[i // 2 % 2]) for i in range(40)]) == []


@pytest.mark.parametrize(
    ("counts", "value"), [([[50, 50], [50, 50]], 0.0), ([[100, 0], [0, 100]], 1.0), ([[75, 25], [25, 75]], 0.495)]
)
def test_cramers_v(counts, value):
    assert checks.cramers_v(np.array(counts)) == pytest.approx(value, abs=0.01)


@pytest.mark.parametrize(("swapped", "severity"), [(True, "warn"), (False, None)])
def test_swapped_labels_are_suspected_from_metadata(swapped, severity):
    labels = np.tile([0, 1], 20)
    items = [item(f"{i}.png", int(label)) for i, label in enumerate(labels)]
    made = (labels == 0) if swapped else (labels == 1)
    headers = pd.DataFrame({"generator_text": made.astype(float), "camera": np.where(made, 0.0, 3.0)})
    found = list(checks.polarity(items, headers, []))
    assert {finding.severity for finding in found} == ({severity} if severity else set())
    if swapped:
        assert "20 images name a generator in their metadata, yet are labelled real" in found[0].text


def test_how_labels_were_read_is_to_be_confirmed():
    headers = pd.DataFrame({"generator_text": [0.0, 0.0], "camera": [0.0, 0.0]})
    (found,) = checks.polarity([item("a", 0), item("b", 1)], headers, ["1 counts as ai, 0 as real"])
    assert found.text == "confirm how the labels were read: 1 counts as ai, 0 as real"


def test_numbering_by_class_is_a_note():
    told = [item(f"img_{i:04}.png", int(i >= 50)) for i in range(100)]
    mixed = [item(f"img_{i:04}.png", i % 2) for i in range(100)]
    assert [finding.severity for finding in checks.numbering(told)] == ["note"]
    assert checks.numbering(mixed) == []


# ---- the swap test


def test_scores_that_follow_the_storage_are_found_out(tmp_path, pictures):
    files = []
    for number, picture in enumerate(pictures[:40]):
        files.append(tmp_path / f"{number}.jpg")
        files[-1].write_bytes(encoded(picture, "JPEG", quality=95 if number % 2 else 30, subsampling=0))
    labels = np.arange(40) % 2

    def by_storage(images_: list[Image.Image]) -> np.ndarray:
        return np.array(
            [
                -pixel_traces.measure(image)[pixel_traces.SPECTRUM_BINS + pixel_traces.GRID_COLUMNS.index("step")]
                for image in images_
            ]
        )  # the comb's step

    def by_picture(images_: list[Image.Image]) -> np.ndarray:
        return np.array([float(np.asarray(image).mean()) for image in images_])

    cheat = storage_swap.swap_test(files, labels, by_storage, "steps")
    assert min(cheat.as_is, cheat.own) > 0.95
    assert cheat.swapped < cheat.own - 0.4
    assert cheat.shifts[1] < -1  # what was stored finely; coarse steps do not go away by storing them finely
    honest = storage_swap.swap_test(files, labels, by_picture, "brightness")
    assert abs(honest.swapped - honest.own) < 0.02


def test_stored_as_never_enlarges(tmp_path, pictures):
    small, large = tmp_path / "small.jpg", tmp_path / "large.png"
    small.write_bytes(encoded(pictures[0].resize((40, 50)), "JPEG"))
    large.write_bytes(encoded(pictures[0].resize((300, 300))))
    assert storage_swap.stored_as(pictures[1], small).size == (40, 50)
    assert storage_swap.stored_as(pictures[1], large).size == (SIDE, SIDE)
    assert storage_swap.stored_as(pictures[1], large).tobytes() == pictures[1].tobytes()


def test_near_duplicates_that_the_user_grouped_are_only_noted(tmp_path, pictures):
    files = {"a.jpg": pictures[0], "b.jpg": pictures[0], "c.jpg": pictures[1], "d.jpg": pictures[1]}
    for number, (name, picture) in enumerate(files.items()):
        (tmp_path / name).write_bytes(encoded(picture, "JPEG", quality=90 - 20 * number))
    places = [("a.jpg", 1, "g"), ("b.jpg", 0, "g"), ("c.jpg", 1, "h"), ("d.jpg", 0, "i")]
    items = [checks.LabelledImage(name, str(tmp_path), name, label, group) for name, label, group in places]
    kept, indexed = dataset.index_items(items)
    found = list(checks.duplicates(kept, indexed, dataset.near_pairs(indexed)))
    assert [(one.severity, one.text) for one in found] == [
        ("note", "1 near-duplicate pairs lie within groups of yours"),
        ("warn", "1 near-duplicate pairs across the classes, kept in one split (c.jpg and d.jpg)"),
        ("warn", "1 copies or near-duplicates lie in different groups of yours, now joined (c.jpg and d.jpg)"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "runs/none"], "--run scores the swap test of the page; name that with --html"),
        (["--run", "runs/none", "--html", "audit.html"], "no members in runs/none; train them first"),
        (["--html", "file/audit.html"], "cannot"),
    ],
)
def test_what_will_fail_is_said_before_any_image_is_read(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, out, err = run_cli("audit", "no data", *options)
    assert (code, out) == (2, "")
    assert message in err
