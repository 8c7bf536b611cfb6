import threading
from dataclasses import replace

import numpy as np
import pytest
from helpers import CONTRACT, write_image
from PIL import Image

from ensemble import images
from ensemble.contract import ImageContract
from ensemble.errors import ImageError
from ensemble.score import Runner, image_score, score_images

CROPS = ImageContract(size=8, mean=CONTRACT.mean, std=CONTRACT.std, geometry="native_crops", count=4)


def brightness(name="one", contract=CONTRACT, scale=1.0, batches=None):
    def run(pixels):
        assert pixels.dtype == np.uint8
        assert pixels.shape[1:] == (contract.size, contract.size, 3)
        if batches is not None:
            batches.append(len(pixels))
        return (pixels.mean(axis=(1, 2, 3), dtype=np.float64) * scale).astype(np.float32)

    return Runner(name, contract, run)


def grey_files(folder, values):
    return [write_image(folder / f"{number}.png", value) for number, value in enumerate(values)]


def test_rows_keep_the_order_given_and_columns_that_of_the_runners(tmp_path):
    values = [200, 3, 90, 255, 0, 17]
    logits, errors = score_images(grey_files(tmp_path, values), [brightness(), brightness("two", scale=-2)], 4, 3)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, np.outer(values, [1, -2]))
    assert errors == {}


@pytest.mark.parametrize("count", range(6))
def test_batch_boundaries_change_nothing(tmp_path, count):
    values = list(range(10, 10 + count))
    batches, done = [], []
    logits, _ = score_images(grey_files(tmp_path, values), [brightness(batches=batches)], 2, progress=done.append)
    assert logits[:, 0].tolist() == values
    assert batches == [2] * (count // 2) + [1] * (count % 2)
    assert sum(done) == count


def test_an_image_is_decoded_once_for_all_members(tmp_path, monkeypatch):
    decoded, lock = [], threading.Lock()
    decode, to_pixels = images.decode, images.to_pixels

    def counted(file):
        with lock:
            decoded.append(file)
        return decode(file)

    def resized(image, contract):
        with lock:
            decoded.append(contract.size)
        return to_pixels(image, contract)

    monkeypatch.setattr(images, "decode", counted)
    monkeypatch.setattr(images, "to_pixels", resized)
    files = grey_files(tmp_path, [1, 2, 3])
    normalised = replace(CONTRACT, mean=(0.1, 0.2, 0.3))  # another member's numbers, the same pixels
    small = replace(CONTRACT, size=4)
    runners = [brightness("one"), brightness("two", normalised), brightness("three", small)]
    logits, _ = score_images(files, runners, 2)
    np.testing.assert_array_equal(logits, np.outer([1, 2, 3], [1, 1, 1]))
    assert sorted(item for item in decoded if item in files) == files
    assert sorted(item for item in decoded if item not in files) == [4] * 3 + [8] * 3


def test_views_of_an_image_are_averaged(tmp_path):
    # four quadrants of one brightness each; a view that falls into one quadrant sees it alone
    pixels = np.repeat(np.repeat(np.array([[0, 40], [80, 200]], dtype=np.uint8), 8, axis=0), 8, axis=1)
    Image.fromarray(np.stack([pixels] * 3, axis=2)).save(tmp_path / "quadrants.png")
    files = [tmp_path / "quadrants.png", *grey_files(tmp_path, [10, 20])]
    batches = []

    def square(pixels):
        batches.append(len(pixels))
        return pixels.mean(axis=(1, 2, 3)) ** 2

    logits, _ = score_images(files, [Runner("crops", CROPS, square), brightness("whole")], 2)
    assert logits[:, 0].tolist() == [(40**2 + 80**2 + 200**2) / 4, 100, 400]
    assert logits[1:, 1].tolist() == [10, 20]
    assert batches == [8, 4]


BROKEN = {
    "first": [0],
    "last": [4],
    "middle of a batch": [1],
    "a whole batch": [2, 3],
    "last two": [3, 4],
    "all": [0, 1, 2, 3, 4],
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_unreadable_images_are_nan_and_the_others_unmoved(tmp_path, broken, batch_size):
    files, done = grey_files(tmp_path, [50, 60, 70, 80, 90]), []
    for row in broken:
        files[row].write_bytes(b"not an image" if row % 2 else b"")
    logits, errors = score_images(files, [brightness(), brightness("two")], batch_size, progress=done.append)
    expected = [np.nan if row in broken else 50 + 10 * row for row in range(5)]
    np.testing.assert_array_equal(logits, np.transpose([expected, expected]))
    assert list(errors) == broken
    for row, message in errors.items():
        assert message.startswith(f"{files[row]}: ")
        assert ("not an image" if row % 2 else "empty") in message
    assert sum(done) == 5


def test_a_missing_file_is_named(tmp_path):
    _, errors = score_images([tmp_path / "gone.png"], [brightness()])
    assert errors == {0: f"{tmp_path / 'gone.png'}: no such file"}


def test_a_member_that_fails_is_not_taken_for_an_unreadable_image(tmp_path):
    def fail(pixels):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        score_images(grey_files(tmp_path, [1, 2, 3]), [Runner("one", CONTRACT, fail)], 2)


def test_decoded_images_are_scored_as_their_files_are(tmp_path):
    files = [*grey_files(tmp_path, [10, 20]), tmp_path / "noise.png"]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(files[-1])
    runners = [brightness(), brightness("crops", CROPS, scale=-1)]
    logits, _ = score_images(files, runners)
    np.testing.assert_array_equal(image_score(runners)([images.decode(file) for file in files]), logits)


def test_a_decoded_image_that_no_contract_can_take_is_an_image_error():
    thin = replace(CONTRACT, geometry="center_crop", size=224)
    with pytest.raises(ImageError, match="too thin"):
        image_score([brightness(contract=thin)])([Image.new("RGB", (1, 5000))])
