import pytest
from helpers import write_csv, write_image

from ensemble.core.errors import DataError
from ensemble.data.sources import ReadOptions
from ensemble.evaluation.benchmarks import read_benchmarks, recognize_layout

GENIMAGE = {
    "Midjourney/imagenet_midjourney": "Midjourney",
    "stable_diffusion_v_1_4/imagenet_ai_0419_sdv4": "SD v1.4",
    "Stable Diffusion V1.5": "SD v1.5",
    "imagenet_ai_0508_adm": "ADM",
    "wukong": "Wukong",
    "NewGenerator": "NewGenerator",
}


def tree(folder, *paths):
    for path in paths:
        write_image(folder / path)
    return folder


def read(*paths, **reading):
    items, notes, names = read_benchmarks(paths, ReadOptions(**reading))
    return {item.id: (item.label, item.source, item.generator) for item in items}, notes, names


@pytest.fixture
def genimage(tmp_path):
    for place in GENIMAGE:
        tree(tmp_path / "gen" / place, "train/ai/1.png", "train/nature/2.png", "val/ai/3.png", "val/nature/n01/4.PNG")
    return tmp_path / "gen"


def test_genimage_gives_its_validation_images_by_generator(genimage):
    rows, notes, names = read(genimage)
    assert names == ("GenImage",)
    expected = {}
    for place, name in GENIMAGE.items():
        expected[f"{place}/val/ai/3.png"] = (1, name, name)
        expected[f"{place}/val/nature/n01/4.PNG"] = (0, name, None)
    assert rows == expected
    assert any("recognised as GenImage" in note for note in notes)


def test_one_generator_of_genimage_alone_is_recognised(genimage):
    assert set(read(genimage / "Midjourney")[0].values()) == {(1, "Midjourney", "Midjourney"), (0, "Midjourney", None)}
    rows = read(genimage / "wukong")[0]
    assert rows == {"val/ai/3.png": (1, "Wukong", "Wukong"), "val/nature/n01/4.PNG": (0, "Wukong", None)}


def test_a_generator_without_validation_images_is_named(genimage):
    tree(genimage / "BigGAN", "train/ai/1.png", "train/nature/2.png")
    rows, notes, _ = read(genimage)
    assert len(rows) == 12
    assert any("left out, without val/: BigGAN" in note for note in notes)


def test_chameleon_is_recognised_with_its_reals(tmp_path):
    folder = tree(tmp_path / "Chameleon", "test/0_real/a.png", "test/1_fake/b.png")
    expected = {"test/0_real/a.png": (0, "Chameleon", None), "test/1_fake/b.png": (1, "Chameleon", None)}
    assert read(folder)[::2] == (expected, ("Chameleon",))
    assert read(folder / "test")[0] == {key.removeprefix("test/"): row for key, row in expected.items()}


def test_fake_image_dataset_is_ai_by_generator_and_reals_are_named_by_the_user(tmp_path):
    folder = tree(
        tmp_path / "FakeImageDataset",
        "ImageData/train/SDv15R-CC1M/x.png",
        "ImageData/val/Midjourneyv5-5K/1.png",
        "ImageData/val/SDv15-CC30K/SDv15R-dpmsolver-25-15K/2.png",
    )
    rows, notes, names = read(folder)
    assert names == ("FakeImageDataset",)
    assert rows == {
        "ImageData/val/Midjourneyv5-5K/1.png": (1, "Midjourneyv5-5K", "Midjourney v5"),
        "ImageData/val/SDv15-CC30K/SDv15R-dpmsolver-25-15K/2.png": (1, "SDv15-CC30K", "SD v1.5"),
    }
    assert any("no real images" in note for note in notes)
    tree(folder, "ImageData/val/cc3m/3.png")
    with pytest.raises(DataError, match="--classes cc3m=real"):
        read(folder)
    rows, notes, _ = read(folder, classes={"cc3m": "real"})
    assert rows["ImageData/val/cc3m/3.png"] == (0, "cc3m", None)
    assert not any("no real images" in note for note in notes)


def test_reals_from_elsewhere_may_join_a_benchmark(tmp_path):
    folder = tree(tmp_path / "FakeImageDataset", "ImageData/val/Midjourneyv5-5K/1.png")
    reals = tree(tmp_path / "photos", "real/1.png")
    rows, _, _ = read(folder, reals)
    assert rows == {
        "photos/real/1.png": (0, "photos", None),
        "FakeImageDataset/ImageData/val/Midjourneyv5-5K/1.png": (1, "Midjourneyv5-5K", "Midjourney v5"),
    }


def test_other_data_are_read_as_train_reads_them(tmp_path):
    folder = tree(tmp_path / "own", "ai/1.png", "real/2.png")
    assert recognize_layout(folder) is None
    assert read(folder) == ({"ai/1.png": (1, "own", None), "real/2.png": (0, "own", None)}, [], ())
    table = write_csv(tmp_path / "labels.csv", id=["1"], label=["0"], group=["p"], generator=["none"])
    write_image(tmp_path / "1.png")
    assert read(table)[0] == {"1": (0, "labels", "none")}


def test_an_empty_benchmark_folder_is_refused(tmp_path):
    folder = tree(tmp_path / "c", "test/0_real/a.png")
    (folder / "test" / "1_fake").mkdir()
    with pytest.raises(DataError, match="holds no images; unpack Chameleon there"):
        read(folder)
