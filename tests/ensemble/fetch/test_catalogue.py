import pytest

from ensemble.core.errors import DataError
from ensemble.fetch.catalogue import ImageSource, find_source, hub_source, load_catalogue


def test_the_catalogue_holds_the_sources_of_the_original():
    sources = load_catalogue()
    assert {source.kaggle for source in sources.values() if source.kaggle} == {
        "cashbowman/ai-generated-images-vs-real-images",
        "adityajn105/flickr30k",
        "don121/train-15k",
        "don121/train-1-2k",
        "don121/midj-sample-6k",
        "don121/52k-ai-and-real-img",
    }
    generators = {source.generator: source.path for source in sources.values() if source.hub.startswith("InfImagine/")}
    assert set(generators) == {"stable-diffusion-1.5", "stable-diffusion-2.1", "midjourney-v5", "stylegan3"}
    assert generators["midjourney-v5"] == "ImageData/val/Midjourneyv5-5K/Midjourneyv5-5K.tar.gz"
    action = sources["human-action"]
    assert (action.hub, action.unpack, action.labels) == ("Bingsu/Human_Action_Recognition", "parquet", (0,))


@pytest.mark.parametrize("source", load_catalogue().values(), ids=lambda source: source.name)
def test_every_entry_says_what_a_user_must_know(source):
    assert source.title
    assert source.licence
    assert source.url.startswith("https://")
    assert source.unverified, "no entry could be seen whole when it was written"
    assert bool(source.generator) == (source.labels == (1,))
    assert (source.label is None) == bool(source.classes)
    assert bool(source.hub) != bool(source.kaggle)
    assert source.unpack in (("zip",) if source.kaggle else ("tar.gz", "parquet"))
    assert bool(source.path) == (source.unpack == "tar.gz")


def test_midjourney_is_ai_whatever_its_csv_says():
    source = load_catalogue()["midjourney-v5"]
    assert source.label == 1
    assert "0 means fake" in source.unverified


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("midjourney", "did you mean midjourney-v5?"),
        ("Flickr-30k", "did you mean flickr30k?"),
        ("zzz", "it has sd15, "),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name, hint):
    with pytest.raises(DataError) as caught:
        find_source(name, load_catalogue())
    assert hint in str(caught.value)


def test_any_data_set_on_the_hub_is_a_source():
    source = hub_source("hf://datasets/org/name@v1.0", label="ai", image_column="img", generator="flux")
    assert (source.hub, source.revision, source.label, source.image_column) == ("org/name", "v1.0", 1, "img")
    assert source.url == "https://huggingface.co/datasets/org/name"


def test_label_values_are_mapped_as_given_or_by_their_usual_names():
    given = hub_source("hf://datasets/a/b", label_column="y", classes={"cat": "real", "GAN": "ai"})
    assert (given.classes, given.labels) == ({"cat": 0, "GAN": 1}, (0, 1))
    usual = hub_source("hf://datasets/a/b", label_column="y")
    assert (usual.classes["fake"], usual.classes["human"], "cat" in usual.classes) == (1, 0, False)


@pytest.mark.parametrize(
    ("address", "options", "message"),
    [
        ("hf://datasets/only-owner", {"label": "ai"}, "is no Hub data set; write hf://datasets/OWNER/NAME"),
        ("hf://datasets/a/b/../c", {"label": "ai"}, "is no Hub data set"),
        ("hf://datasets/a/b", {}, "say what the images are: --class ai"),
        ("hf://datasets/a/b", {"label": "ai", "label_column": "y"}, "say what the images are"),
        ("hf://datasets/a/b", {"label": "ai", "classes": {"x": "ai"}}, "name it with --label-column"),
    ],
)
def test_wrong_options_say_what_to_write(address, options, message):
    with pytest.raises(DataError) as caught:
        hub_source(address, **options)
    assert message in str(caught.value)


def test_a_changed_source_has_another_identity():
    one, other = (ImageSource("x", "X", "tar.gz", path=path, label=1) for path in ("a", "b"))
    assert one.identity != other.identity
    assert one.identity == ImageSource("x", "another title", "tar.gz", path="a", label=1).identity
