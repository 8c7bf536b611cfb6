"""Damaged and hostile files through the real `infer`: each is scored as when alone, or listed once."""

import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import PREPROCESS_CONFIG, ROOT, SCALES, STACKER, exported_run, read_csv, run_python, write_image
from mutations import KINDS, mutated, png_of_zeros, tag_bomb, tiled_tiff
from pictures import encoded, noise, write_files
from PIL import Image

from ensemble.core.errors import ImageError
from ensemble.images import decode, preprocess
from export import Predictor


@dataclass(frozen=True)
class Outcome:
    """What `infer` left behind: rows, listed errors, its exit code, stderr, seconds and most memory in MiB."""

    rows: pd.DataFrame
    errors: pd.DataFrame
    code: int
    stderr: str
    seconds: float
    memory: int


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("exported") / "run")


def write_mutated(folder: Path, seeds: range, photos: list[Image.Image]) -> Path:
    folder.mkdir()
    for seed in seeds:
        file = mutated(seed, photos)
        (folder / file.name).write_bytes(file.data)
    return folder


def infer(folder: Path, run: Path, timeout: float) -> Outcome:
    """The command as a user starts it, killed where it takes longer than `timeout` seconds."""
    output = folder.parent / "scores.csv"
    command = [sys.executable, ROOT / "cli.py", "infer", "--onnx", "--device", "cpu"]
    command += ["--run", run, "--input", folder, "--output", output]
    started, memory = time.monotonic(), 0
    with (folder.parent / "stderr").open("w+") as stderr:
        process = subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL, cwd=folder.parent)
        try:
            while process.poll() is None:
                assert time.monotonic() - started < timeout, "infer hangs"
                memory = max(memory, _most_memory(process.pid))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        stderr.seek(0)
        rows, errors = read_csv(output), read_csv(output.with_name("scores.errors.csv"))
        return Outcome(rows, errors, process.returncode, stderr.read(), time.monotonic() - started, memory)


def _most_memory(process: int) -> int:
    """MiB, of a process that may have ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024 if "VmHWM:" in status else 0


def alone(folder: Path) -> dict[str, float]:
    """Each readable file's target by name, decoded by itself; the bundle's members are simple enough to work out."""
    targets = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted(folder.rglob("*")):
            try:
                pixels = preprocess.to_pixels(decode.decode(path), PREPROCESS_CONFIG)
            except ImageError:
                continue
            brightness = pixels.mean(dtype=np.float64) / 255 - 0.5
            [target] = STACKER.target(np.array([[brightness * scale for scale in SCALES.values()]]))
            targets[path.relative_to(folder).as_posix()] = float(target)
    return targets


def assert_complete(rows: pd.DataFrame, errors: pd.DataFrame, folder: Path, targets: dict[str, float]) -> None:
    """Every file is scored as when alone, or has no target and is listed once; none is both or neither."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    assert list(rows["id"]) == names
    assert sorted(errors["id"]) == [name for name in names if name not in targets]
    assert list(rows.loc[rows["target"] == "", "id"]) == [name for name in names if name not in targets]
    assert all(Path(path) == folder / name for name, path in zip(errors["id"], errors["path"], strict=True))
    assert (errors["error"] != "").all()
    scored = rows[rows["target"] != ""]
    np.testing.assert_allclose(scored["target"].astype(float), [targets[name] for name in scored["id"]], atol=1e-6)


def assert_calm(outcome: Outcome, unreadable: int) -> None:
    assert outcome.code == 1
    [line] = outcome.stderr.splitlines()  # nothing of a decoder's beside our own
    assert line.startswith(f"Error: {unreadable} images could not be read, listed in ")


@pytest.fixture(scope="session")
def scored(tmp_path_factory, exported, photos):
    folder = write_mutated(tmp_path_factory.mktemp("hostile") / "images", range(300), photos)
    return folder, infer(folder, exported, timeout=100), alone(folder)


def test_each_of_300_mutated_files_is_scored_as_when_alone_or_listed_once(scored):
    folder, outcome, targets = scored
    assert 100 < len(targets) < 270  # both outcomes are well represented
    assert_calm(outcome, 300 - len(targets))
    assert_complete(outcome.rows, outcome.errors, folder, targets)


def test_a_file_by_itself_has_the_same_target(scored, exported):
    """Here warnings are errors, which what Pillow says of a file that it reads must not become."""
    folder, outcome, targets = scored
    predictor = Predictor.load(exported, device="cpu")
    in_company = outcome.rows.set_index("id")["target"]
    for name in sorted(targets)[::25]:
        [target] = predictor.predict(pd.DataFrame({"path": [str(folder / name)]}))["target"]
        assert target == pytest.approx(float(in_company[name]), abs=1e-6)


def test_errors_are_of_the_last_table_though_it_is_empty(exported, tmp_path):
    predictor = Predictor.load(exported, device="cpu")
    gone = pd.DataFrame({"path": [str(write_files(tmp_path, "a.png", data=b"no image") / "a.png")]})
    predictor.predict(gone)
    assert list(predictor.errors["path"]) == list(gone["path"])
    assert predictor.predict(gone[:0])["target"].empty
    assert list(predictor.errors) == ["id", "path", "error"]
    assert predictor.errors.empty


def test_every_kind_of_mutation_is_among_them(scored):
    names = [path.name for path in scored[0].iterdir()]
    assert {kind for kind in KINDS if any(f"-{kind}." in name for name in names)} == set(KINDS)


def test_nothing_is_scored_that_pillow_alone_cannot_load(scored):
    folder, outcome, _ = scored
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in outcome.rows.loc[outcome.rows["target"] != "", "id"]:
            with Image.open(folder / name) as image:
                image.load()


WRONG = {
    "two rows changed places": lambda rows, errors: (rows.assign(id=rows["id"].to_numpy()[::-1]), errors),
    "a file is lost": lambda rows, errors: (rows[1:], errors),
    "a target belongs to another image": lambda rows, errors: (rows.assign(target=_rolled(rows)), errors),
    "an unreadable file is not listed": lambda rows, errors: (rows, errors[1:]),
    "one is listed twice": lambda rows, errors: (rows, pd.concat([errors, errors[:1]])),
    "one is scored and listed": lambda rows, errors: (rows.assign(target=rows["target"].replace("", "0.5")), errors),
    "one has another's path": lambda rows, errors: (rows, errors.assign(path=errors["path"].to_numpy()[::-1])),
}


def _rolled(rows: pd.DataFrame) -> pd.Series:
    target = rows["target"].copy()
    there = target != ""
    target[there] = np.roll(target[there], 1)
    return target


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_the_check_sees_a_wrong_outcome(scored, change):
    folder, outcome, targets = scored
    with pytest.raises(AssertionError):
        assert_complete(*change(outcome.rows, outcome.errors), folder, targets)


def test_pipes_devices_folders_and_broken_links_named_like_images_are_no_obstacle(tmp_path, exported):
    folder = tmp_path / "images"
    for name in ("a.png", "folder.jpg/b.png"):
        write_image(folder / name)
    for name in ("pipe.jpg", "pipe"):
        os.mkfifo(folder / name)
    (folder / "device.jpg").symlink_to("/dev/zero")
    (folder / "gone.jpg").symlink_to(folder / "nothing.jpg")
    (folder / "itself.jpg").symlink_to(folder / "itself.jpg")
    outcome = infer(folder, exported, timeout=60)
    assert outcome.code == 1
    scored = outcome.rows.loc[outcome.rows["target"] != "", "id"]
    assert sorted(scored) == ["a.png", "folder.jpg/b.png"]
    told = outcome.errors.set_index("id")["error"]
    assert told["gone.jpg"] == f"{folder / 'gone.jpg'}: no such file"
    assert set(told.index) - {"pipe.jpg", "device.jpg"} == {"gone.jpg", "itself.jpg"}


def test_what_decoders_say_is_kept_from_the_screen(tmp_path):
    """And the check of stderr can fail: without the silence they are heard."""
    (tmp_path / "tile.tif").write_bytes(tiled_tiff(16, 5000))
    (tmp_path / "tags.png").write_bytes(encoded(noise(0), exif=tag_bomb(50, 1_000_000)))
    said = [run_python("-c", DECODE, quiet, tmp_path / "tile.tif", tmp_path / "tags.png").stderr for quiet in (0, 1)]
    assert "ZIPDecode" in said[0]
    assert said[0].count("UserWarning") == 49
    assert said[1] == ""


DECODE = """
import sys
from pathlib import Path
from contextlib import nullcontext
from ensemble.images import decode as images

with images.silence_decoder_warnings() if sys.argv[1] == "1" else nullcontext():
    for file in sys.argv[2:]:
        try:
            images.decode(Path(file))
        except images.ImageError:
            pass
"""


@pytest.mark.slow
def test_each_of_10000_mutated_files_is_scored_as_when_alone_or_listed_once(tmp_path, exported, photos):
    folder = write_mutated(tmp_path / "images", range(1000, 11_000), photos)
    for number in range(8):  # whole, and as large as is read at all
        (folder / f"large {number}.png").write_bytes(png_of_zeros(16_000, 11_000))
    targets = alone(folder)
    outcome = infer(folder, exported, timeout=1800)
    assert_calm(outcome, 10_008 - len(targets))
    assert_complete(outcome.rows, outcome.errors, folder, targets)
    print(f"\n10,008 files, {len(targets)} readable: {outcome.seconds:.0f} s, {outcome.memory} MiB at most")
    assert outcome.memory < 1500  # one large image at a time
