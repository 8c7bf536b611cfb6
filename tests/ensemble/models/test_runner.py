import threading
from dataclasses import replace
from itertools import count, islice

import numpy as np
import pytest
from helpers import PREPROCESS_CONFIG, write_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ensemble.core.errors import ImageError
from ensemble.core.preprocess_config import CROP_COUNTS, PreprocessConfig
from ensemble.images import decode as images
from ensemble.images import preprocess
from ensemble.models.runner import (
    AHEAD_CHUNKS,
    CHUNK_BYTES,
    MAX_CHUNK_ROWS,
    Runner,
    chunk_rows,
    image_scorer,
    score_images,
    score_stream,
)

CROPS = PreprocessConfig(
    size=8, mean=PREPROCESS_CONFIG.mean, std=PREPROCESS_CONFIG.std, geometry="native_crops", count=4
)


def brightness(name="one", preprocess_config=PREPROCESS_CONFIG, scale=1.0, batches=None):
    def run(pixels):
        assert pixels.dtype == np.uint8
        assert pixels.shape[1:] == (preprocess_config.size, preprocess_config.size, 3)
        if batches is not None:
            batches.append(len(pixels))
        return (pixels.mean(axis=(1, 2, 3), dtype=np.float64) * scale).astype(np.float32)

    return Runner(name, preprocess_config, run)


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
    decode, prepare = images.decode, preprocess.prepare

    def counted(file, large):
        with lock:
            decoded.append(file)
        return decode(file, large=large)

    def resized(image, preprocess_configs):
        with lock:
            decoded.extend(preprocess_config.size for preprocess_config in preprocess_configs)
        return prepare(image, preprocess_configs)

    monkeypatch.setattr(images, "decode", counted)
    monkeypatch.setattr(preprocess, "prepare", resized)
    files = grey_files(tmp_path, [1, 2, 3])
    normalised = replace(PREPROCESS_CONFIG, mean=(0.1, 0.2, 0.3))  # another member's numbers, the same pixels
    small = replace(PREPROCESS_CONFIG, size=4)
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


def test_what_runs_beside_an_image_does_not_depend_on_others_being_readable(tmp_path):
    files, batches = grey_files(tmp_path, [10, 20, 30, 40, 50, 60]), []
    files[1].write_bytes(b"")
    logits, _ = score_images(files, [brightness(batches=batches)], 2)
    assert batches == [1, 2, 2]
    assert logits[[0, 2, 3, 4, 5], 0].tolist() == [10, 30, 40, 50, 60]


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
        score_images(grey_files(tmp_path, [1, 2, 3]), [Runner("one", PREPROCESS_CONFIG, fail)], 2)


def test_decoded_images_are_scored_as_their_files_are(tmp_path):
    files = [*grey_files(tmp_path, [10, 20]), tmp_path / "noise.png"]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(files[-1])
    runners = [brightness(), brightness("crops", CROPS, scale=-1)]
    logits, _ = score_images(files, runners)
    np.testing.assert_array_equal(image_scorer(runners)([images.decode(file) for file in files]), logits)


def test_a_decoded_image_that_no_contract_can_take_is_an_image_error():
    thin = replace(PREPROCESS_CONFIG, geometry="center_crop", size=224)
    with pytest.raises(ImageError, match="too thin"):
        image_scorer([brightness(preprocess_config=thin)])([Image.new("RGB", (1, 5000))])


def test_a_file_that_no_contract_can_take_is_named(tmp_path):
    thin = replace(PREPROCESS_CONFIG, geometry="center_crop", size=224)
    file = tmp_path / "line.png"
    Image.new("RGB", (1, 20_000)).save(file)
    _, errors = score_images([file], [brightness(preprocess_config=thin)])
    assert errors == {0: f"{file}: an image of 1x20000 is too thin to be resized to 224x4480000"}


def grey(value, large=None):
    return Image.new("RGB", (20, 12), (value % 256,) * 3)


def counted(taken):
    for row in count():
        taken.append(row)
        yield row


def scored(stream):
    return [chunk.logits[:, 0].tolist() for chunk in stream]


def test_rows_without_end_are_scored_as_they_come():
    stream = score_stream(count(), grey, [brightness()], 3)
    assert scored(islice(stream, 2)) == [[0, 1, 2], [3, 4, 5]]
    stream.close()


def test_images_are_decoded_while_a_member_runs():
    decoded = [threading.Event() for _ in range(12)]

    def read(row, large):
        decoded[row].set()
        return grey(row)

    def run(pixels):
        first = int(pixels[0, 0, 0, 0])
        # as this chunk runs, threads read the next ones to their last row
        assert all(event.wait(10) for event in decoded[: first + (1 + AHEAD_CHUNKS) * 2 - 1])
        return pixels[:, 0, 0, 0].astype(np.float32)

    assert scored(score_stream(range(12), read, [Runner("one", PREPROCESS_CONFIG, run)], 2)) == [
        [k, k + 1] for k in range(0, 12, 2)
    ]


def test_large_images_are_decoded_one_at_a_time():
    busy = threading.Lock()

    def read(row, large):
        large()
        assert busy.acquire(blocking=False)
        image = grey(row)
        busy.release()
        return image

    assert scored(score_stream(range(40), read, [brightness()], 20, workers=8)) == [
        list(range(20)),
        list(range(20, 40)),
    ]


@pytest.mark.parametrize("together", [False, True])
def test_no_more_is_read_ahead_than_a_few_chunks(together):
    taken = []
    stream = score_stream(counted(taken), grey, [brightness()], 4, together)
    for done in range(1, 6):
        next(stream)
        assert len(taken) <= 4 * (done + AHEAD_CHUNKS + together)
    stream.close()


def test_members_run_together_where_asked_and_in_turn_where_not():
    meeting = threading.Barrier(2, timeout=10)  # passed only by two at once
    busy = threading.Lock()

    def meets(pixels):
        meeting.wait()
        return pixels[:, 0, 0, 0].astype(np.float32)

    def alone(pixels):
        assert busy.acquire(blocking=False)
        logits = pixels[:, 0, 0, 0].astype(np.float32)
        busy.release()
        return logits

    for run, together in ((meets, True), (alone, False)):
        runners = [Runner("one", PREPROCESS_CONFIG, run), Runner("two", PREPROCESS_CONFIG, run)]
        assert scored(score_stream(range(5), grey, runners, 2, together)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("together", [False, True])
def test_a_failing_member_ends_the_stream_at_once(together):
    taken = []

    def fail(pixels):
        raise RuntimeError("out of memory")

    endless = counted(taken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(score_stream(endless, grey, [brightness(), Runner("two", PREPROCESS_CONFIG, fail)], 4, together))
    assert len(taken) <= 4 * (2 + AHEAD_CHUNKS)


def test_a_failing_thread_ends_the_stream_at_once():
    def read(row, large):
        if row == 5:
            raise MemoryError("no room for it")
        return grey(row)

    stream = score_stream(count(), read, [brightness()], 2)
    assert scored(islice(stream, 2)) == [[0, 1], [2, 3]]
    with pytest.raises(MemoryError, match="no room for it"):
        next(stream)


def test_a_list_scored_from_a_chunk_on_has_the_same_companions():
    def companions(pixels):  # of each row: what it runs beside
        return np.full(len(pixels), pixels[:, 0, 0, 0].sum(), dtype=np.float32)

    whole, rest = (
        scored(score_stream(range(a, 11), grey, [Runner("one", PREPROCESS_CONFIG, companions)], 4)) for a in (0, 4)
    )
    assert rest == whole[1:]


FULL = [
    replace(PREPROCESS_CONFIG, size=size, filter=filter_name)
    for size, filter_name in ((224, "bicubic"), (256, "bicubic"), (384, "bicubic"), (384, "bilinear"), (224, "bicubic"))
]
PREPROCESS_CONFIGS = st.builds(replace, st.just(CROPS), size=st.integers(1, 1024), count=st.sampled_from(CROP_COUNTS))


def test_a_chunk_of_full_size_members_is_smaller_than_one_of_small_members():
    assert chunk_rows([PREPROCESS_CONFIG], "cpu") == MAX_CHUNK_ROWS
    assert (chunk_rows(FULL, "cpu"), chunk_rows(FULL, "cuda")) == (32, 128)
    assert chunk_rows([*FULL, replace(CROPS, size=384, count=16)], "cpu") == 8
    assert chunk_rows([], "cpu") == MAX_CHUNK_ROWS


@given(st.lists(PREPROCESS_CONFIGS, max_size=5), st.sampled_from(["cpu", "cuda"]))
def test_a_chunk_divides_a_shard_and_is_bounded_in_bytes(preprocess_configs, device):
    rows = chunk_rows(preprocess_configs, device)
    assert MAX_CHUNK_ROWS % rows == 0
    pixels = sum(
        {
            preprocess_config.view: 3 * preprocess_config.count * preprocess_config.size**2
            for preprocess_config in preprocess_configs
        }.values()
    )
    assert rows == 1 or rows * pixels <= CHUNK_BYTES[device]
