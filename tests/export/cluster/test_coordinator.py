"""What stands by the command and answers workers, without Ray."""

import pyarrow as pa
import pytest

from ensemble.core.errors import ArtifactError
from ensemble.data.image_list import ImageEntry, ImageList, read_list, write_list
from export.cluster.worker import Coordinator, task

LIST = [ImageEntry(f"\udcff {number}", f"images/{number}.png", number, 1, -1) for number in range(5000)]


@pytest.fixture
def coordinator(tmp_path):
    (tmp_path / "bundle.json").write_text("{}")
    return Coordinator(tmp_path, write_list(iter(LIST), tmp_path / "rows.arrow"))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (4000, 4200), (4990, 5000)])
def test_it_hands_out_the_rows_that_are_asked_for(coordinator, start, stop):
    sent = coordinator.rows(start, stop)
    assert list(read_list(ImageList(stop - start, "", False, pa.py_buffer(sent)), 0, stop - start)) == LIST[start:stop]


def test_a_task_is_small_however_long_its_rows_are():
    assert task(range(3, 11)).nbytes == 16


def test_what_goes_away_meanwhile_is_one_line(coordinator, tmp_path):
    assert coordinator.read_chunk("bundle.json", 0) == b"{}"
    for file in ("bundle.json", "rows.arrow"):
        (tmp_path / file).unlink()
    with pytest.raises(ArtifactError, match=r"bundle\.json cannot be read: No such file or directory; run the same"):
        coordinator.read_chunk("bundle.json", 0)
    with pytest.raises(ArtifactError, match=r"rows\.arrow cannot be read: .*No such file or directory"):
        coordinator.rows(0, 3)
