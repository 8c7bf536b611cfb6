"""What every machine has to see of an input, to read its images."""

import pytest
from helpers import write_csv, write_image
from tar_shards import write_shards

from ensemble.data.inputs import read_inputs


def test_a_folder_needs_itself_and_shards_their_files(tmp_path):
    write_image(tmp_path / "photos" / "a.png")
    assert read_inputs(tmp_path / "photos").files == (tmp_path / "photos",)
    pattern = write_shards(tmp_path / "tars")
    assert read_inputs(pattern).files == tuple(sorted((tmp_path / "tars").iterdir()))


@pytest.mark.parametrize("folder", [None, "photos"])
def test_a_table_needs_nothing_since_its_images_may_lie_anywhere(tmp_path, folder):
    write_image(tmp_path / "photos" / "a.png")
    write_csv(tmp_path / "list.csv", path=["a.png" if folder else "photos/a.png"])
    assert read_inputs(tmp_path / "list.csv", folder and tmp_path / folder).files == ()
