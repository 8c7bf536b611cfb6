import numpy as np
import pytest
from conftest import encoded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ensemble import images
from ensemble.groups import connected, near_duplicates, perceptual_hash, same_picture, thumbnail


def pairs_of(pictures: list[Image.Image]) -> list[tuple[int, int]]:
    thumbs = [thumbnail(picture) for picture in pictures]
    return near_duplicates([perceptual_hash(thumb) for thumb in thumbs], np.stack(thumbs))


def recompressed(photo: Image.Image, quality: int) -> Image.Image:
    return images.decode(encoded(photo, "JPEG", quality=quality))


def resized(photo: Image.Image, share: float) -> Image.Image:
    return photo.resize((int(photo.width * share), int(photo.height * share)), Image.Resampling.LANCZOS)


# ---- near-duplicates


@pytest.mark.parametrize(
    "change",
    [
        lambda photo: recompressed(photo, 75),
        lambda photo: recompressed(photo, 30),
        lambda photo: resized(photo, 0.5),
        lambda photo: resized(photo, 1.7),
        lambda photo: recompressed(resized(photo, 0.4), 60),
        lambda photo: photo.crop((2, 2, photo.width - 2, photo.height - 2)),
        lambda photo: photo.point(lambda value: min(value + 3, 255)),
    ],
    ids=["jpeg 75", "jpeg 30", "halved", "enlarged", "thumbnail", "trimmed", "brighter"],
)
def test_a_changed_copy_is_a_near_duplicate(photos, change):
    assert len(photos) == 4
    pictures = [*photos, *(change(photo) for photo in photos)]
    assert pairs_of(pictures) == [(0, 4), (1, 5), (2, 6), (3, 7)]


@pytest.mark.parametrize(
    "change",
    [
        lambda photo: photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda photo: photo.transpose(Image.Transpose.ROTATE_180),
        lambda photo: photo.point(lambda value: 255 - value),
        lambda photo: photo.crop((0, 0, photo.width // 2, photo.height // 2)),
        lambda photo: Image.merge("RGB", photo.split()[::-1]).point(lambda value: value // 2),
    ],
    ids=["mirrored", "turned", "inverted", "quarter", "recoloured"],
)
def test_another_picture_is_not(photos, change):
    assert pairs_of([*photos, *(change(photo) for photo in photos)]) == []


def sky(rng: np.random.Generator) -> Image.Image:
    top = rng.uniform((40, 90, 150), (140, 180, 255))
    bottom = np.minimum(top + rng.uniform(20, 90, 3), 255)
    share = np.linspace(0, 1, 96)[:, None, None]
    grain = rng.normal(0, 2, (96, 96, 3))
    return Image.fromarray((top * (1 - share) + bottom * share + grain).clip(0, 255).astype(np.uint8))


def page(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray((248 + rng.normal(0, 2, (96, 96, 3))).clip(0, 255).astype(np.uint8))


def wall(rng: np.random.Generator) -> Image.Image:
    return Image.new("RGB", (96, 96), tuple(int(value) for value in rng.integers(0, 256, 3)))


@pytest.mark.parametrize("draw", [sky, page, wall])
def test_unrelated_flat_pictures_do_not_chain(draw):
    rng = np.random.default_rng(0)
    assert pairs_of([draw(rng) for _ in range(60)]) == []


def test_equal_hashes_alone_join_nothing():
    rng = np.random.default_rng(0)
    thumbs = [thumbnail(wall(rng)) for _ in range(60)]
    assert len({perceptual_hash(thumb) for thumb in thumbs}) == 1
    assert near_duplicates([0] * 60, np.stack(thumbs)) == []


def test_equal_brightness_alone_joins_nothing():
    rng = np.random.default_rng(0)
    thumbs = [thumbnail(page(rng)) for _ in range(2)]
    assert not same_picture(*thumbs)
    assert same_picture(thumbs[0], thumbs[0])


def test_a_hash_has_64_bits_and_a_thumbnail_three_channels(photos):
    thumb = thumbnail(photos[0].convert("RGBA"))
    assert (thumb.shape, thumb.dtype) == ((32, 32, 3), np.uint8)
    assert 0 <= perceptual_hash(thumb) < 2**64


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_pictures_have_no_pairs(count):
    assert near_duplicates([5] * count, np.zeros((count, 32, 32, 3), np.uint8)) == []


# ---- connected components


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 30))
    index = st.integers(0, count - 1)
    return count, draw(st.lists(st.tuples(index, index), max_size=40))


def merged(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    """The same by relabelling until nothing changes."""
    names = list(range(count))
    for _ in range(count):
        for a, b in pairs:
            names[a] = names[b] = min(names[a], names[b])
    return names


@given(graphs())
def test_connected_is_the_partition_by_relabelling(graph):
    assert connected(*graph) == merged(*graph)


@given(graphs(), st.randoms(use_true_random=False))
def test_the_order_of_pairs_does_not_matter(graph, random):
    count, pairs = graph
    shuffled = [tuple(random.sample(pair, 2)) for pair in random.sample(pairs, len(pairs))]
    assert connected(count, shuffled) == connected(count, pairs)


def test_a_chain_is_one_component():
    assert connected(5, [(3, 4), (1, 2), (2, 3)]) == [0, 1, 1, 1, 1]
    assert connected(0, []) == []
