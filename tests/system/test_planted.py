import csv
import io
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import planted
import planted_metadata
import planted_photos
import pytest
from pictures import encoded, noise, photo_file
from PIL import Image, JpegImagePlugin
from planted_headers import told_apart_by_headers
from planted_photos import Wanted, cut
from planted_set import CODECS, Style, encode

from ensemble.core.errors import ImageError
from ensemble.images import decode

EVERY = [(kind, variant) for kind in ("clean", *planted.KINDS) for variant in range(10)]
BY_HEADER = ("format", "size", "jpeg_quality", "metadata", "names")


@pytest.fixture(scope="module")
def real_photos():
    return [image for _, image in planted.photos()]


@pytest.fixture(scope="module")
def made(tmp_path_factory, real_photos):
    """Rows of a set as dicts with file and label; each set is made once."""
    sets = {}

    def get(kind, variant):
        if (kind, variant) not in sets:
            folder = tmp_path_factory.mktemp("planted")
            sets[kind, variant] = rows_of(planted.make(kind, variant, folder, real_photos, 0))
        return sets[kind, variant]

    return get


def rows_of(data: Path) -> list[dict]:
    if data.is_dir():
        assert sorted(path.name for path in data.iterdir()) == ["ai", "real"]
        return [
            {"file": file, "label": label} for label in ("ai", "real") for file in sorted((data / label).rglob("*"))
        ]
    with data.open(encoding="utf-8", newline="") as file:
        return [{**row, "file": data.parent / row["path"]} for row in csv.DictReader(file)]


def features(tiles: np.ndarray) -> float:
    """How much of [N, H, W] is left in their mean besides its slow changes, in grey values."""
    mean = Image.fromarray(tiles.mean(axis=0))
    return float((np.asarray(mean) - np.asarray(mean.resize((4, 4), 4).resize(mean.size, 2))).std())


def opened(file: Path) -> Image.Image:
    return Image.open(io.BytesIO(file.read_bytes()))


def count(rows, has) -> tuple[int, int]:
    """How many of ai and of real have something."""
    found = Counter(row["label"] for row in rows if has(row["file"]))
    return found["ai"], found["real"]


def mean(rows, label, measure) -> float:
    return float(np.mean([measure(opened(row["file"]).convert("RGB")) for row in rows if row["label"] == label]))


def readable(file: Path) -> bool:
    try:
        decode.decode(file)
    except ImageError:
        return False
    return True


def subsampling(file: Path) -> str:
    return ("4:4:4", "4:2:2", "4:2:0")[JpegImagePlugin.get_sampling(opened(file))]


def edges(image: Image.Image) -> np.ndarray:
    """Mean second difference at each place of an 8-pixel grid, about 1 where there is none."""
    grey = np.asarray(image.convert("L"), dtype=float)
    steps = np.abs(grey[:, :-3] - 3 * grey[:, 1:-2] + 3 * grey[:, 2:-1] - grey[:, 3:]).mean(axis=0)
    places = np.array([steps[place::8].mean() for place in range(8)])
    return places / places.mean()


def blockiness(image: Image.Image) -> float:
    return float(edges(image)[6])


def fine_detail(image: Image.Image) -> float:
    """The share of a horizontal spectrum's power in its upper half."""
    power = np.abs(np.fft.rfft(np.asarray(image.convert("L"), dtype=float), axis=1)) ** 2
    return float(power[:, power.shape[1] // 2 :].sum() / power[:, 1:].sum())


def test_there_are_twelve_kinds_of_ten_and_ten_clean_sets():
    assert len(planted.KINDS) == 12
    for kind in (*planted.KINDS.values(), planted.CLEAN):
        assert kind.expects
        assert len({variant.what for variant in kind.variants}) == len(kind.variants) == 10


def test_photos_come_from_packages_and_from_folders_named_by_the_user(tmp_path, monkeypatch):
    packaged = dict(planted.photos())
    assert len(packaged) == 17
    assert {image.mode for image in packaged.values()} == {"RGB"}
    for label in ("ai", "real"):
        (tmp_path / label).mkdir()
        noise(1, 256, 256).save(tmp_path / label / "a.png")
    noise(2, 100, 256).save(tmp_path / "real" / "thin.png")
    rows = ["path,label,group", "ai/a.png,1,p1", "real/a.png,0,p1", "real/thin.png,0,p2"]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    monkeypatch.setenv("MANYEYES_PHOTOS", str(tmp_path))
    assert set(dict(planted.photos())) - set(packaged) == {"p1"}
    (tmp_path / "train.csv").unlink()
    assert set(dict(planted.photos())) - set(packaged) == {"a"}


def test_tiles_hardly_overlap_and_a_photo_that_is_used_up_is_told():
    photo = Image.open(photo_file("coffee.png")).convert("RGB")
    wanted = Wanted((128, 128), (1, 1), Image.Resampling.LANCZOS, [0])  # 18 fit side by side
    tiles = cut([photo], [wanted] * 10, np.random.default_rng(0))
    assert {tile.size for _, tile in tiles} == {(128, 128)}
    assert len({tile.tobytes() for _, tile in tiles}) == 10
    with pytest.raises(AssertionError, match="used up"):
        cut([photo], [wanted] * 100, np.random.default_rng(0))


def jumbf_boxes(data: bytes) -> list[bytes]:
    """The types of all boxes, depth first."""
    found = []
    while data:
        length, kind = int.from_bytes(data[:4]), data[4:8]
        assert 8 <= length <= len(data)
        found += [kind, *(jumbf_boxes(data[8:length]) if kind == b"jumb" else [])]
        data = data[length:]
    return found


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_c2pa_is_a_tree_of_boxes_where_the_format_puts_it(file_format):
    rng = np.random.default_rng(0)
    data = encoded(noise(0), file_format, **planted_metadata.save_options(("c2pa",), file_format, rng))
    data = planted_metadata.insert(data, ("c2pa",), file_format, rng)
    Image.open(io.BytesIO(data)).load()
    if file_format == "JPEG":
        start = data.index(b"\xff\xeb")
        payload = data[start + 4 : start + 2 + int.from_bytes(data[start + 2 : start + 4])]
        assert payload[:2] == b"JP"
        store = payload[8:]
    else:
        start = data.index(b"caBX")
        store = data[start + 4 : start + 4 + int.from_bytes(data[start - 4 : start])]
    boxes = jumbf_boxes(store)
    assert boxes[:2] == [b"jumb", b"jumd"]
    assert boxes.count(b"jumb") == 6  # store, manifest, assertions, one of them, claim, signature
    assert b"trainedAlgorithmicMedia" in store


def test_metadata_reads_back_with_pillow():
    rng = np.random.default_rng(0)
    names = ("camera", "icc", "trained_xmp")
    for file_format in ("JPEG", "PNG", "WEBP", "AVIF"):
        image = Image.open(
            io.BytesIO(encoded(noise(0), file_format, **planted_metadata.save_options(names, file_format, rng)))
        )
        assert image.getexif()[271] in {make for make, _ in planted_metadata.CAMERAS}
        assert set(image.getexif().get_ifd(0x8769)) >= {33434, 33437, 34855}
        assert "icc_profile" in image.info
        assert "trainedAlgorithmicMedia" in str(image.info.get("xmp", image.info.get("XML:com.adobe.xmp")))
    with pytest.raises(ValueError, match="no metadata called 'exfi'"):
        planted_metadata.save_options(("exfi",), "JPEG", rng)


def test_a_seed_decides_every_byte(tmp_path, made, real_photos):
    again, other = (rows_of(planted.make("polarity", 8, tmp_path / str(seed), real_photos, seed)) for seed in (0, 1))
    first, again, other = ({row["file"].read_bytes() for row in rows} for rows in (made("polarity", 8), again, other))
    assert first == again
    assert not first & other
    with pytest.raises(FileExistsError):
        planted.make("polarity", 8, tmp_path / "0", real_photos, 0)


@pytest.mark.parametrize("codec", CODECS)
def test_a_photo_brings_no_metadata_of_its_own(codec):
    tagged = encoded(noise(0), "PNG", **planted_metadata.save_options(("icc",), "PNG", np.random.default_rng(0)))
    photo = Image.open(io.BytesIO(tagged))
    photo.info["comment"] = b"mine"
    assert "icc_profile" in photo.info
    _, data = encode(photo, Style((codec,)), np.random.default_rng(0))
    assert not {"icc_profile", "comment"} & set(Image.open(io.BytesIO(data)).info)


@pytest.mark.parametrize(
    ("kind", "variant", "has", "expected"),
    [
        ("format", 6, lambda file: (file.suffix, opened(file).format) == (".jpg", "PNG"), (120, 0)),
        ("size", 4, lambda file: opened(file).width == opened(file).height, (120, 0)),
        ("jpeg_quality", 7, lambda file: subsampling(file) == "4:2:2", (0, 84)),
        ("metadata", 5, lambda file: b"caBX" in file.read_bytes(), (72, 0)),
        ("names", 3, lambda file: file.stem.endswith("_gen"), (84, 0)),
        ("polarity", 8, lambda file: 271 in opened(file).getexif(), (30, 0)),
        ("unreadable", 8, lambda file: not readable(file), (0, 12)),
    ],
)
def test_the_trap_is_in_the_files(made, kind, variant, has, expected):
    rows = made(kind, variant)
    assert count(rows, lambda file: True) == (120, 120)
    assert count(rows, has) == expected


def test_hidden_jpeg_leaves_its_grid_and_a_clean_set_has_none(made):
    rows, clean = made("hidden_jpeg", 4), made("clean", 7)
    assert mean(rows, "real", blockiness) > 1.2 * mean(rows, "ai", blockiness)
    assert mean(clean, "real", blockiness) == pytest.approx(mean(clean, "ai", blockiness), rel=0.1)


def test_enlarged_images_lack_fine_detail(made):
    rows = made("resampling", 0)
    assert mean(rows, "real", fine_detail) < 0.5 * mean(rows, "ai", fine_detail)


@pytest.mark.parametrize(("kind", "variant", "expected"), [("duplicates", 3, 12), ("clean", 7, 0)])
def test_copies_cross_the_classes_and_nothing_else_does(made, kind, variant, expected):
    rows = made(kind, variant)
    tiles = [opened(row["file"]).convert("RGB") for row in rows]
    labels = [row["label"] for row in rows]
    pixels = Counter(tile.tobytes() for tile in tiles)
    assert sum(times == 2 for times in pixels.values()) == expected
    assert len({(tile.tobytes(), label) for tile, label in zip(tiles, labels, strict=True)}) == len(rows)
    looks = [planted_photos.look(tile) for tile in tiles]
    alike = [max(planted_photos.likeness(tile, looks[:place]), 0) for place, tile in enumerate(tiles)]
    assert sum(value > 0.999 for value in alike) == expected


def test_faces_are_of_one_class(made):
    rows = made("content", 3)
    ai, real = (
        np.stack([np.asarray(opened(row["file"]).convert("L"), dtype=float) for row in rows if row["label"] == label])
        for label in ("ai", "real")
    )
    assert features(ai) > 3 * features(real)  # eyes and mouths fall on each other


def test_sources_have_one_class_in_the_trap_and_both_in_a_clean_set(made):
    trap = Counter((row["source"], row["label"]) for row in made("source", 1))
    assert trap["sdxl", "ai"] == 120
    assert {source for source, label in trap if label == "real"} == {"coco", "flickr", "raise"}
    clean = Counter((row["source"], row["label"]) for row in made("clean", 7))
    assert len(clean) == 6
    assert min(clean.values()) > 20


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "variant"), EVERY)
def test_every_set_is_whole_and_its_headers_tell_the_classes_apart_only_where_meant(made, kind, variant):
    rows = made(kind, variant)
    what = (planted.CLEAN if kind == "clean" else planted.KINDS[kind]).variants[variant]
    assert count(rows, lambda file: True) == what.counts
    broken = count(rows, lambda file: not readable(file))
    if kind == "unreadable" and variant != 6:  # there, files without a suffix
        assert min(broken) == 0 < max(broken)
    else:
        assert broken == (0, 0)
    if kind in BY_HEADER:
        assert told_apart_by_headers(rows) > 0.7
    elif kind in {"clean", "hidden_jpeg", "resampling", "content", "duplicates", "source"}:
        assert told_apart_by_headers(rows) < 0.64
    if "group" in rows[0]:
        assert [row["id"] for row in rows] == [f"{number:06}" for number in range(len(rows))]
        assert all(int(row["id"]) < int(after["id"]) for row, after in pairwise(rows))
        assert {row["generator"] == "" for row in rows if row["label"] == "real"} == {True}
