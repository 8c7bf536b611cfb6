import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import encoded, noise

from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.core.recipe import Augment
from ensemble.training import data_loader
from ensemble.training.data_loader import TrainDataset

PREPROCESS_CONFIG = PreprocessConfig(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, geometry="native_crops")


@pytest.fixture
def rows(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(encoded(noise(number)))
    files = sorted(tmp_path.iterdir())
    return TrainDataset(files, np.array([0, 1] * 3), PREPROCESS_CONFIG, Augment(jpeg=(50, 90)), cache_bytes=2**20)


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 5))
def test_an_epoch_sees_every_row_once_in_steps_of_one_size(rows, effective, epoch):
    steps = data_loader.epoch_steps(rows, effective, 7, epoch)
    assert sorted(np.concatenate(steps).tolist()) == list(range(rows))
    sizes = [len(step) for step in steps]
    assert max(sizes) <= effective
    assert max(sizes) - min(sizes) <= 1
    assert len(steps) == data_loader.steps_per_epoch(rows, effective)


@given(st.integers(1, 100), st.integers(1, 40))
def test_pieces_are_the_step_in_order_and_none_too_large(count, most):
    cut = data_loader.micro_batches(np.arange(count), most)
    assert np.concatenate(cut).tolist() == list(range(count))
    assert max(map(len, cut)) <= most
    assert len(cut) == -(-count // most)


def test_the_order_is_drawn_for_seed_and_epoch():
    def order(seed, epoch):
        return np.concatenate(data_loader.epoch_steps(50, 8, seed, epoch)).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_batches_come_in_the_order_asked_for(rows):
    wanted = [np.array([5, 0]), np.array([3]), np.array([1, 2, 4])]
    loaded = list(data_loader.load_batches(rows, 2, wanted, "cpu"))
    assert [batch["labels"].tolist() for batch in loaded] == [[1, 0], [1], [1, 0, 0]]
    for batch, part in zip(loaded, wanted, strict=True):
        assert batch["pixels"].shape == (len(part), 1, 16, 16, 3)
        for pixels, row in zip(batch["pixels"], part, strict=True):
            assert torch.equal(pixels, torch.from_numpy(rows[2, int(row)]["pixels"]))


def test_worker_processes_give_the_same_batches(rows):
    wanted = [np.array([5, 0]), np.array([3, 1])]
    threads, processes = (list(data_loader.load_batches(rows, 1, wanted, device)) for device in ("cpu", "processes"))
    for one, other in zip(threads, processes, strict=True):
        assert torch.equal(one["pixels"], other["pixels"])
        assert torch.equal(one["labels"], other["labels"])


def test_decoded_images_are_kept_while_there_is_room(rows):
    size = 32 * 32 * 3
    rows._cache_bytes_left = 2 * size
    first = [rows[0, row]["pixels"] for row in range(6)]
    assert sorted(rows._cache) == [0, 1]
    assert rows._cache_bytes_left == 0
    for file in rows.files[:2]:
        file.unlink()
    np.testing.assert_array_equal(rows[0, 1]["pixels"], first[1])
