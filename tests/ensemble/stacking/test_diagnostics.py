import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import PREPROCESS_CONFIG, heldout, make_frame, noisy_logits, run_cli, write_image, write_run
from PIL import Image

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, DataError
from ensemble.models import torch_runner
from ensemble.models.runner import Runner, score_images, with_flip
from ensemble.stacking import diagnostics, stack
from ensemble.stacking.diagnostics import drop_each_member, milliseconds_per_image
from ensemble.stacking.fit import StackLogits
from ensemble.stacking.logit_table import read_stacking_data


def material(run, signals):
    frame = make_frame()
    write_run(run, {name: noisy_logits(frame, signal, seed) for seed, (name, signal) in enumerate(signals.items())})
    return read_stacking_data(run, list(signals))


def test_each_member_is_left_out_once_and_the_useful_one_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(diagnostics, "WEIGHT_DRAWS", 2)  # intervals of weights are not looked at here
    found = material(tmp_path, {"strong": 3, "weak": 1, "noise": 0})
    done = stack.stack_run(tmp_path, ("strong", "weak", "noise"))
    lines = drop_each_member(found, "logistic", "auto", done.stack_logits)
    assert [line.name for line in lines] == ["all members", "strong", "weak", "noise"]
    assert lines[0].auroc == done.scored[-1].auroc
    assert lines[1].auroc_difference.high < 0
    assert abs(lines[3].auroc_difference.value) < abs(lines[1].auroc_difference.value) / 4
    alone = stack.stack_run(tmp_path, ("weak", "noise"))
    assert lines[1].auroc == alone.scored[-1].auroc
    table = diagnostics.drop_one_table(lines, {"strong": 10.0, "weak": 2.0, "noise": 0.5})
    assert list(table["without"]) == ["(none)", "strong", "weak", "noise"]
    assert list(table["ms per image"]) == ["12.5", "10.0", "2.0", "0.5"]


def test_one_member_cannot_be_dropped(tmp_path):
    found = material(tmp_path, {"only": 2})
    with pytest.raises(DataError, match="--drop-one needs two members or more"):
        drop_each_member(found, "logistic", "none", StackLogits(found.scored.logits[:, 0], found.scored.logits[:, 0]))


def test_time_is_the_median_of_an_image_after_a_run_to_warm_up(monkeypatch):
    ticks = iter([0.0, 4.0, 10.0, 11.0, 20.0, 22.0, 30.0, 33.0, 40.0, 90.0])
    monkeypatch.setattr(diagnostics, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    calls = []
    runner = Runner("a", PREPROCESS_CONFIG, lambda pixels: calls.append(len(pixels)))
    assert milliseconds_per_image(runner, np.zeros((8, 2, 2, 3)), 4) == 3.0 * 1000 / 4
    assert calls == [8] * 6


def test_the_command_prints_the_table(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.setattr(diagnostics, "measure_costs", lambda run, names, ids: (dict.fromkeys(names, 2.5), "cpu"))
    code, out, err = run_cli("stack", "--run", tmp_path, "--drop-one", "--threshold", "0.25", "--kind", "nonnegative")
    assert (code, err) == (0, "")
    assert re.search(r"\(none\) +0\.\d{4} .* 5\.0\n +one +0\.\d{4} .* 2\.5\n +two ", out)
    assert "Threshold: 0.2500 (given)" in out
    assert "nonnegative" in out


def brightness(name, left, right):
    """A member that looks at the brightness of both halves, a left and a right weight each."""

    def run(pixels):
        halves = pixels.reshape(len(pixels), PREPROCESS_CONFIG.size, 2, -1).mean(axis=(1, 3)) / 255 - 0.5
        return (halves @ np.array([left, right])).astype(np.float32)

    return Runner(name, PREPROCESS_CONFIG, run)


def test_a_flip_averages_both_sides(tmp_path):
    pixels = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    pixels[:, :, :4] = 255
    runner = brightness("a", 4.0, 0.0)
    assert runner.run(pixels) == [2.0]
    assert runner.run(pixels[:, :, ::-1]) == [-2.0]
    assert with_flip(runner).run(pixels) == [0.0]
    file = write_image(tmp_path / "plain.png", 200)
    plain, flipped = (score_images([file], [kind])[0] for kind in (runner, with_flip(runner)))
    np.testing.assert_array_equal(plain, flipped)


@pytest.fixture
def halves(tmp_path):
    """A run whose held-out images are bright by their class on one side, and by chance on the other."""
    frame = write_run(tmp_path)
    rng = np.random.default_rng(0)
    for row in heldout(frame).itertuples():
        pixels = np.full((8, 8, 3), 60 + 130 * row.label, dtype=np.uint8)
        side = slice(0, 4) if rng.random() < 0.5 else slice(4, 8)
        pixels[:, side] = rng.integers(0, 256)
        path = tmp_path / "images" / row.path
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    artifacts.write_parquet(artifacts.dataset_path(tmp_path), frame.assign(root=str(tmp_path / "images")))
    return tmp_path


def test_flips_help_whom_they_help(halves):
    rows = heldout(pd.read_parquet(artifacts.dataset_path(halves)))
    lines = stack.measure_tta(
        [brightness("one_eyed", 20.0, 0.0), brightness("both", 10.0, 10.0)], halves, list(rows["id"])
    )
    assert [line.name for line in lines] == ["one_eyed", "both"]
    assert lines[0].log_loss_difference.high < 0
    assert lines[1].log_loss_difference.value == pytest.approx(0, abs=1e-6)
    assert stack.members_helped_by_tta(lines) == ("one_eyed",)
    (halves / "images" / rows["path"].iloc[0]).write_bytes(b"")
    with pytest.raises(ArtifactError, match="held-out images cannot be read"):
        stack.measure_tta([brightness("both", 1.0, 1.0)], halves, list(rows["id"]))


def test_stack_tta_keeps_what_it_found(halves, monkeypatch):
    runners = [brightness("one", 20.0, 0.0), brightness("two", 10.0, 10.0)]
    monkeypatch.setattr(torch_runner, "member_runners", lambda run, names: runners)
    code, out, err = run_cli("stack", "--run", halves, "--tta")
    assert (code, err) == (0, "")
    assert re.search(r"\n  one: -\d.*, helps\n  two: .*, does not help beyond noise\n", out)
    assert stack.read_stacker(halves).tta_members == ("one",)
    assert run_cli("stack", "--run", halves)[0] == 0
    assert stack.read_stacker(halves).tta_members is None
