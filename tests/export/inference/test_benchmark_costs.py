import re
import time
from dataclasses import replace

import numpy as np
import pytest
from helpers import PREPROCESS_CONFIG, exported_run
from pictures import encoded, noise

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.models.runner import Runner
from export.inference import benchmark
from export.inference.plan import plan_bundle
from export.runtimes import autotune
from export.runtimes.settings import RuntimeOptions

NOISE = [encoded(noise(0)), encoded(noise(1))]


def test_each_view_and_each_member_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "MIN_TIMING_SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "COST_IMAGES", 4)
    one, two = plan_bundle(artifacts.bundle_path(exported_run(tmp_path)), RuntimeOptions(), print).members
    other = replace(two, preprocess_config=replace(PREPROCESS_CONFIG, size=16))
    found = benchmark.measure_costs({"fp32": (one, other)}, NOISE, print)
    assert found.decode > 0
    assert len(found.views) == 2
    assert found.view_of == {"one": 0, "two": 1}
    assert all(taken > 0 for taken in found.members["fp32"].values())
    assert (found.lower, found.overlap) == ({"fp32": frozenset()}, False)
    shared = benchmark.measure_costs({"fp32": (one, two)}, NOISE, print)
    assert (len(shared.views), shared.view_of) == (1, {"one": 0, "two": 0})


def test_an_image_that_cannot_be_read_is_named_and_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "MIN_TIMING_SECONDS", 0.0)
    plan = plan_bundle(artifacts.bundle_path(exported_run(tmp_path)), RuntimeOptions(), print).members
    good, bad = tmp_path / "good.png", tmp_path / "b,ad <script>.png"
    good.write_bytes(NOISE[0])
    bad.write_bytes(NOISE[1][:100])
    assert benchmark.measure_costs({"fp32": plan}, [good], print).decode > 0
    with pytest.raises(ArtifactError, match=rf"^{re.escape(str(bad))}: .*; time on .*: give others with --images$"):
        benchmark.measure_costs({"fp32": plan}, [good, bad], print)


def test_times_are_of_an_image_in_milliseconds(tmp_path, monkeypatch):
    def slow(sources, runners, device):
        time.sleep(len(sources) * (0.002 if runners else 0.001))

    def opened(member, log):
        def run(pixels):
            time.sleep(0.003 * len(pixels))
            return np.zeros(len(pixels), np.float32)

        return Runner(member.name, member.preprocess_config, run)

    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(benchmark, "score_images", slow)
    monkeypatch.setattr(benchmark, "open_member", opened)
    monkeypatch.setattr(autotune, "MIN_TIMING_SECONDS", 0.0)
    plan = plan_bundle(artifacts.bundle_path(exported_run(tmp_path / "run")), RuntimeOptions(), print).members
    found = benchmark.measure_costs({"fp32": plan}, NOISE, print)
    assert 1 <= found.decode < 2
    assert 0.3 < found.views[0] < 2
    assert all(3 <= taken < 6 for taken in found.members["fp32"].values())
