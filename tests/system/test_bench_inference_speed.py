"""bench/inference_speed.py: what is measured anew, and what is refused at once."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from export.runtimes import capabilities


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    import inference_speed

    return inference_speed


def test_a_bundle_with_other_files_is_measured_anew(speed, tmp_path, monkeypatch):
    started = []

    class Side:
        def __init__(self, job, log):
            started.append(job)
            self.loaded = {"loaded": 0.0, "said": ""}

        def tell(self):
            return {"seconds": 1.0}

        def close(self):
            pass

    monkeypatch.setattr(speed, "Side", Side)
    options = Namespace(output=tmp_path, rounds=2, device="cpu")
    job = speed.Job("ours", {}, str(tmp_path), "photos", "cpu", "fp32", "auto")
    for content, times in (("{}", 1), ("{}", 1), ('{"int8": 1}', 2)):
        (tmp_path / "bundle.json").write_text(content)
        assert len(speed.measure(options, {"ours": job}, tmp_path)) == 2
        assert len(started) == times


def test_int8_is_refused_at_once_where_the_processor_lacks_it(speed, monkeypatch, capsys, tmp_path):
    unsupported = {("onnxruntime", "int8"): capabilities.NO_INT8}
    monkeypatch.setattr(capabilities, "available", lambda: capabilities.Machine("a CPU", 2, unsupported=unsupported))
    monkeypatch.setattr(sys, "argv", ["x", "--precision", "fp32,int8", "--output", str(tmp_path / "speed")])
    with pytest.raises(SystemExit):
        speed.main()
    assert capabilities.NO_INT8 in capsys.readouterr().err
    assert not (tmp_path / "speed").exists()
