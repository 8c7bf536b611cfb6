import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import encoded
from PIL import Image

from ensemble.images import decode, duplicate_candidates, registration
from ensemble.images import near_duplicates as near
from ensemble.images.near_duplicates import (
    MAX_COMPARED_GROUP,
    connected_components,
    near_duplicates,
    near_duplicates_between,
    perceptual_hash,
    thumbnail,
)


def same_picture(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(near_duplicates([0, 0], np.stack([a, b])))


def described(pictures: list[Image.Image]) -> tuple[list[int], np.ndarray]:
    thumbs = np.stack([thumbnail(picture) for picture in pictures])
    return [perceptual_hash(thumb) for thumb in thumbs], thumbs


def pairs_of(pictures: list[Image.Image]) -> list[tuple[int, int]]:
    return near_duplicates(*described(pictures))


def recompressed(photo: Image.Image, quality: int) -> Image.Image:
    return decode.decode(encoded(photo, "JPEG", quality=quality))


def resized(photo: Image.Image, share: float) -> Image.Image:
    return photo.resize((int(photo.width * share), int(photo.height * share)), Image.Resampling.LANCZOS)


def cropped(photo: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    width, height = photo.size
    return photo.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )


def mirrored(photo: Image.Image) -> Image.Image:
    return photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


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
        lambda photo: cropped(photo, 0.05, 0.05, 0.05, 0.05),
        lambda photo: cropped(photo, 0.1, 0.1, 0.1, 0.1),
        lambda photo: cropped(photo, 0.1, 0, 0, 0),
        lambda photo: cropped(photo, 0, 0.03, 0.09, 0),
        lambda photo: recompressed(resized(mirrored(photo), 0.5), 60),
        lambda photo: recompressed(
            resized(cropped(photo.transpose(Image.Transpose.TRANSVERSE), 0, 0.05, 0.03, 0), 0.5), 60
        ),
        *(lambda photo, turn=turn: photo.transpose(turn) for turn in Image.Transpose),
    ],
    ids=[
        *("jpeg 75", "jpeg 30", "halved", "enlarged", "thumbnail", "trimmed", "brighter", "5 % round", "10 % round"),
        *("10 % left", "corner", "mirrored, halved, jpeg 60", "turned, cropped, halved, jpeg 60"),
        *(turn.name for turn in Image.Transpose),
    ],
)
def test_a_changed_copy_is_a_near_duplicate(photos, change):
    assert len(photos) == 4
    pictures = [*photos, *(change(photo) for photo in photos)]
    assert pairs_of(pictures) == [(0, 4), (1, 5), (2, 6), (3, 7)]


@pytest.mark.parametrize(
    "change",
    [
        lambda photo: photo.point(lambda value: 255 - value),
        lambda photo: photo.crop((0, 0, photo.width // 2, photo.height // 2)),
        lambda photo: Image.merge("RGB", photo.split()[::-1]).point(lambda value: value // 2),
    ],
    ids=["inverted", "quarter", "recoloured"],
)
def test_another_picture_is_not(photos, change):
    assert pairs_of([*photos, *(change(photo) for photo in photos)]) == []


def test_tiles_of_one_photo_are_other_pictures(photos):
    tiles = [cropped(photo, x / 4, y / 4, 0.75 - x / 4, 0.75 - y / 4) for photo in photos for y, x in np.ndindex(4, 4)]
    assert pairs_of([tile for tile in tiles if np.asarray(tile).std() > 8]) == []


def test_a_crop_needs_the_windows_and_a_mirrored_copy_the_turns(photos, monkeypatch):
    chelsea = photos[0]
    crop, mirror = cropped(chelsea, 0.1, 0.1, 0.1, 0.1), mirrored(chelsea)
    assert pairs_of([chelsea, crop]) == pairs_of([chelsea, mirror]) == [(0, 1)]
    monkeypatch.setattr(duplicate_candidates, "CUTS", ((0.0, 0.0),))
    assert pairs_of([chelsea, crop]) == []
    monkeypatch.setattr(near, "MAX_GAIN", 0.5)
    assert pairs_of([chelsea, mirror]) == []


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


def test_skies_would_chain_without_their_detail(monkeypatch):
    monkeypatch.setattr(near, "MIN_DETAIL_CORRELATION", -1.0)
    monkeypatch.setattr(near, "RECOMPRESSION_NOISE", 20.0)
    rng = np.random.default_rng(0)
    assert pairs_of([sky(rng) for _ in range(60)]) != []


def test_blank_pictures_are_one_only_if_equal():
    blanks = [Image.new("RGB", size, (255, 255, value)) for size in ((64, 48), (30, 90)) for value in (255, 254, 251)]
    assert pairs_of(blanks) == [(0, 3), (1, 4), (2, 5)]


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


def test_thumbnails_on_disk_are_compared_across_blocks(tmp_path):
    rng = np.random.default_rng(0)
    pictures = (
        rng.integers(0, 256, (duplicate_candidates.ROWS_AT_ONCE + 40, 8, 8, 3), dtype=np.uint8)
        .repeat(4, axis=1)
        .repeat(4, axis=2)
    )
    pictures[duplicate_candidates.ROWS_AT_ONCE + 30] = pictures[5, ::-1]
    pictures[duplicate_candidates.ROWS_AT_ONCE + 31] = np.clip(pictures[6].astype(int) + 2, 0, 255)
    np.save(tmp_path / "thumbs.npy", pictures)
    thumbs = np.load(tmp_path / "thumbs.npy", mmap_mode="r")
    assert near_duplicates([0] * len(thumbs), thumbs) == [
        (5, duplicate_candidates.ROWS_AT_ONCE + 30),
        (6, duplicate_candidates.ROWS_AT_ONCE + 31),
    ]


def test_each_copy_is_paired_with_what_the_first_is_paired_with(photos):
    chelsea, other = photos[0], recompressed(photos[0], 40)
    assert pairs_of([chelsea, other, photos[1], chelsea, other]) == [(0, 1), (0, 3), (0, 4), (1, 3), (1, 4)]


def test_a_large_group_is_joined_without_pairing_all(photos):
    count = MAX_COMPARED_GROUP + 26
    thumb = thumbnail(photos[0]).astype(np.int16)
    noise = np.random.default_rng(0).integers(-2, 3, (count, *thumb.shape))
    pairs = near_duplicates([0] * count, (thumb + noise).clip(0, 255).astype(np.uint8))
    assert set(connected_components(count, pairs)) == {0}
    assert len(pairs) < count * (count - 1) / 2


def test_near_duplicates_between_two_sets(photos):
    chelsea, coffee, rocket, astronaut = photos
    white = Image.new("RGB", (40, 40), "white")
    a = [chelsea, mirrored(coffee), white, chelsea]
    b = [astronaut, coffee, white.resize((9, 9)), cropped(chelsea, 0, 0, 0.1, 0.1), rocket]
    assert near_duplicates_between(*described(a), *described(b)) == [(0, 3), (1, 1), (2, 2), (3, 3)]
    assert near_duplicates_between(*described(b), *described(a)) == [(1, 1), (2, 2), (3, 0), (3, 3)]
    assert near_duplicates_between(*described(a), *described([astronaut])) == []
    assert near_duplicates_between([], np.zeros((0, 32, 32, 3), np.uint8), *described(b)) == []


def test_hashes_must_be_as_many_as_thumbnails():
    with pytest.raises(ValueError, match="3 hashes for 2 thumbnails"):
        near_duplicates([1, 2, 3], np.zeros((2, 32, 32, 3), np.uint8))


@pytest.mark.parametrize("turn", range(duplicate_candidates.TURNS))
@pytest.mark.parametrize("cut", [(0.0, 0.0, 0.0, 0.0), (0.06, -0.02, 0.0, 0.05)])
def test_registration_recovers_a_window(photos, turn, cut):
    thumb = thumbnail(photos[3]).astype(np.float32)[None]
    image = duplicate_candidates.apply_turns(thumb, np.array([turn]))[..., 0]
    other, _ = registration.warp_planes(image, np.array([cut], dtype=np.float32))
    found = registration.register(image, other, np.zeros((1, 4), np.float32), 8)
    np.testing.assert_allclose(found[0], cut, atol=0.004)


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
    assert connected_components(*graph) == merged(*graph)


@given(graphs(), st.randoms(use_true_random=False))
def test_the_order_of_pairs_does_not_matter(graph, random):
    count, pairs = graph
    shuffled = [tuple(random.sample(pair, 2)) for pair in random.sample(pairs, len(pairs))]
    assert connected_components(count, shuffled) == connected_components(count, pairs)


def test_a_chain_is_one_component():
    assert connected_components(5, [(3, 4), (1, 2), (2, 3)]) == [0, 1, 1, 1, 1]
    assert connected_components(0, []) == []
