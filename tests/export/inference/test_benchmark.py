import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from helpers import exported_run, run_cli, write_image
from mutations import tag_bomb
from pictures import encoded, noise, write_files
from PIL import Image

from ensemble.core import artifacts
from export.inference import benchmark
from export.inference.plan import plan_bundle
from export.runtimes import autotune
from export.runtimes.settings import RuntimeConfig, RuntimeOptions


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def short(monkeypatch, tmp_path):
    monkeypatch.setattr(autotune, "MIN_TIMING_SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "MATRIX_SIDE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(benchmark, "BASELINE_SECONDS", 0.0)
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))


def test_bench_says_what_auto_chose_and_how_fast_it_is(run, tmp_path):
    for name in "ab":
        write_image(tmp_path / "images" / f"{name}.png")
    code, out, err = run_cli("bench", "--run", run, "--images", tmp_path / "images", "--json", tmp_path / "out.json")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert " fp32 on " in lines[0]
    assert lines[2].split() == "member runtime precision batch streams ms an image images/s GFLOP of roof".split()
    assert [line.split()[0] for line in lines[3:5]] == ["one", "two"]
    assert f"8 of {tmp_path / 'images'}, all members, images a second:" in lines
    assert lines[-2].startswith("End to end is ")
    assert lines[-2].endswith(" times as fast as ONNX Runtime's sessions run in turn.")

    found = json.loads((tmp_path / "out.json").read_text())
    assert found["format_version"] == artifacts.FORMAT_VERSION
    assert found["chosen"] == lines[:1]
    for row in found["members"]:
        assert row["images_per_second"] == pytest.approx(1000 / row["ms"])
        assert row["roof_gflops"] > 0
        assert row["share_of_roof"] == pytest.approx(row["gflop"] * row["images_per_second"] / row["roof_gflops"])
    whole = found["end_to_end"]
    assert (whole["images"], whole["different_images"]) == (8, 2)
    assert min(whole["ratio"], whole["preparing"], whole["bundle"], whole["onnxruntime_in_turn"]) > 0


def test_what_decoders_say_of_an_image_is_not_shown(run, tmp_path):
    write_files(tmp_path, "images/tags.png", data=encoded(noise(0), exif=tag_bomb(5, 1_000_000)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert run_cli("bench", "--run", run, "--images", tmp_path / "images")[0] == 0
    assert [each for each in said if "PIL" in each.filename] == []


def test_the_ratio_is_of_rounds_in_which_both_took_turns(run, monkeypatch, tmp_path):
    folder, sources = artifacts.bundle_path(run), [write_image(tmp_path / "a.png")]
    plan = plan_bundle(folder, RuntimeOptions(), lambda line: None).members
    runners, _ = benchmark.measure_members(plan, lambda line: None, lambda count: None)
    # the pace; then in each round the bundle, preparing, and ONNX Runtime in turn
    seconds = iter([1.0, *(2.0, 1.0, 4.0), *(2.0, 1.0, 6.0), *(20.0, 1.0, 60.0), *(2.0, 1.0, 6.0), *(2.0, 1.0, 8.0)])
    monkeypatch.setattr(benchmark, "call_seconds", lambda call: next(seconds))
    steps = []
    found = benchmark.end_to_end(folder, "cpu", False, runners, sources, steps.append)
    assert found == {
        "images": 8,
        "different_images": 1,
        "bundle": 8 / 2,
        "preparing": 8 / 1,
        "onnxruntime_in_turn": 8 / 6,
        "ratio": 3,
    }
    assert len(steps) == 15


def test_a_bundle_alone_is_measured_on_generated_images(run, monkeypatch):
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    code, out, err = run_cli("bench", "--bundle", artifacts.bundle_path(run), "--runtime", "onnxruntime")
    assert (code, err) == (0, "")
    assert "onnxruntime fp32 on" in out.splitlines()[0]
    assert "8 of generated JPEGs of 512 x 384, all members, images a second:" in out


def test_a_bundle_that_is_out_of_date_is_not_measured(run, tmp_path):
    code, out, err = run_cli("bench", "--run", exported_run(tmp_path / "old"), "--precision", "bf16", "--device", "cpu")
    assert code == 2
    assert "bf16" in err
    (artifacts.bundle_path(tmp_path / "old") / "bundle.json").unlink()
    code, out, err = run_cli("bench", "--run", tmp_path / "old")
    assert (code, out) == (2, "")
    assert err.startswith("Error: the bundle of ")
    assert f"export it first: python cli.py export --run {tmp_path / 'old'}" in err


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_the_roof_is_a_matrix_product_over_its_time(monkeypatch, name):
    monkeypatch.setattr(benchmark, "call_seconds", lambda call: 0.5)
    assert benchmark.peak_gflops(RuntimeConfig(name, threads=1)) == pytest.approx(2 * 64**3 / 1e9 / 0.5)


def test_without_openvino_numpy_makes_the_product(monkeypatch):
    def missing():
        raise ImportError

    monkeypatch.setattr(benchmark, "load_openvino", missing)
    product = benchmark._cpu_product(RuntimeConfig("onnxruntime"))
    assert product().shape == (64, 64)


def test_a_torch_that_cannot_use_the_gpu_makes_no_product(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.peak_gflops(RuntimeConfig("cuda")) is None


def test_a_member_of_several_views_takes_as_many_times_as_long(run, monkeypatch):
    first, second = plan_bundle(artifacts.bundle_path(run), RuntimeOptions(), lambda line: None).members
    uncounted = replace(first, gflop=0.0)
    nine = replace(
        second, preprocess_config=replace(second.preprocess_config, geometry="native_crops", count=9), gflop=2.0
    )
    monkeypatch.setattr(benchmark, "timer", lambda runner, setting: lambda: 0.5)
    monkeypatch.setattr(benchmark, "peak_gflops", lambda setting: 8.0)
    _, (one, other) = benchmark.measure_members([uncounted, nine], lambda line: None, lambda count: None)
    assert (one["ms"], one["gflop"], one["share_of_roof"]) == (500, None, None)
    assert (other["ms"], other["gflop"], other["share_of_roof"]) == (4500, 18, 0.5)


def test_generated_photographs_are_as_large_as_photographs(tmp_path):
    files = benchmark.write_photographs(tmp_path, 3)
    for file in files:
        with Image.open(file) as image:
            assert (image.size, image.format) == ((512, 384), "JPEG")
            assert np.asarray(image).std() > 20
        assert 20_000 < file.stat().st_size < 200_000
    assert len({file.read_bytes() for file in files}) == 3
