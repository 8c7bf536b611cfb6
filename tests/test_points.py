"""The point that frontier chose, in its bundle: what runs it, what keeps it, and what is refused."""

import shutil

import numpy as np
import pandas as pd
import pytest
from helpers import STACKER, exported_run, run_cli, write_bundle, write_image, write_stacker

from ensemble import artifacts
from ensemble.errors import ArtifactError
from ensemble.external import External, write_external
from ensemble.metrics import Interval, sigmoid
from ensemble.shift import Shift
from ensemble.stack import Stacker
from ensemble.stack_run import store_shift
from export import Predictor, bench, bundle, plan, points, tuning
from export.export_run import export_run
from export.hardware import Machine
from export.plan import plan_bundle
from export.points import Chosen
from export.predictor import load_bundle
from export.setting import Wanted

ONE = Stacker(("one",), (1.5,), 0.25, 0.4)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("original"))


def choose(folder, stacker):
    values = bundle.open_bundle(folder)
    made_from = points.identity(folder, values["members"], values["files"])
    interval = Interval(0.9, 0.8, float("nan"))
    points.write(folder, Chosen(stacker, {}, None, 200.0, 400.0, interval, interval, "a CPU", made_from))


@pytest.fixture
def run(original, tmp_path):
    """A copy for which one of two members was chosen."""
    run = shutil.copytree(original, tmp_path / "run")
    choose(run / "bundle", ONE)
    return run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for value in range(0, 256, 15):
        write_image(folder / f"{value:03}.png", value)
    return folder


def test_from_python(original, run, pictures):
    frame = pd.DataFrame({"path": [str(path) for path in sorted(pictures.iterdir())]})
    plain, some, full = (
        Predictor.load(folder / "bundle", "cpu", full=full)
        for folder, full in ((original, False), (run, False), (run, True))
    )
    assert some.notes[0] == "1 of 2 members, as frontier chose for 200 images/s; --full runs all"
    assert not any("frontier" in line for line in (*plain.notes, *full.notes))
    targets = [predictor.predict(frame)["target"] for predictor in (plain, some, full)]
    assert (targets[0] == targets[2]).all()
    assert np.abs(targets[0] - targets[1]).max() > 0.01


def test_a_member_that_is_looked_up_may_be_in_a_point(tmp_path, pictures):
    run = exported_run(tmp_path / "run")
    names = [path.name for path in sorted(pictures.iterdir())]
    scores = pd.Series(np.linspace(-1, 1, len(names)), index=names)
    write_external(run, External("three", scores, scores))
    write_stacker(run, Stacker(("one", "two", "three"), (1.0, 1.0, 1.0), 0.0))
    folder = write_bundle(run, externals=("three",))
    choose(folder, Stacker(("one", "three"), (0.5, 2.0), 0.0))
    code, out, err = run_cli("infer", "--bundle", folder, "--input", pictures, "--output", tmp_path / "out.csv")
    assert (code, err) == (0, "")
    assert out.startswith("2 of 3 members, as frontier chose")
    logit = 0.5 * 4 * (np.arange(0, 256, 15) / 255 - 0.5) + 2 * scores
    found = pd.read_csv(tmp_path / "out.csv")["target"]
    np.testing.assert_allclose(found, sigmoid(logit.to_numpy()), rtol=1e-5)


def test_bench_measures_what_runs(run, monkeypatch):
    for name, value in (("ROUNDS", 1), ("SIDE", {"cpu": 64}), ("SECONDS", 0.01)):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(tuning, "SECONDS", 0.01)
    _, out, _ = run_cli("bench", "--bundle", run / "bundle", "--runtime", "onnxruntime")
    assert out.startswith("1 of 2 members, as frontier chose for 200 images/s")
    assert "\n   two " not in out
    _, out, _ = run_cli("bench", "--bundle", run / "bundle", "--runtime", "onnxruntime", "--full")
    assert "\n   two " in out


def test_no_certificate_is_advised_that_would_not_be_one_for_these_members(original, run, monkeypatch):
    monkeypatch.setattr(plan, "available", lambda: Machine("Xeon", 2))
    for folder, flag, advised in ((original, False, True), (run, False, False), (run, True, True)):
        plan_bundle(folder / "bundle", Wanted(device="cpu", full=flag), (said := []).append)
        assert any("has no certificate" in line for line in said) == advised


def test_another_point_starts_scoring_anew(run, pictures, tmp_path, monkeypatch):
    output = tmp_path / "out.csv"
    given = ("infer", "--bundle", run / "bundle", "--input", pictures, "--output", output)

    def stop(*others):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("export.infer.artifacts.clear_unfinished", stop)
        assert run_cli(*given)[0] == 130
    output.unlink()
    code, out, _ = run_cli(*given, "--full")
    assert code == 0
    assert "Starting anew: changed since out.csv.partial was begun: the members, or what runs them, the stack" in out


def test_reset_runs_all_again(original, run):
    given = ("frontier", "--run", run, "--reset")
    assert run_cli(*given)[:2] == (0, "All members run again.\n")
    assert not (run / "bundle" / "point.json").exists()
    assert bundle.open_bundle(run / "bundle") == bundle.open_bundle(original / "bundle")
    assert run_cli(*given)[:2] == (0, "No point was chosen for this bundle: all members run.\n")


def test_a_killed_write_leaves_a_bundle_without_a_point(original, run, monkeypatch):
    found = points.read(run / "bundle", bundle.open_bundle(run / "bundle"))
    write_json = artifacts.write_json

    def killed(path, values):
        write_json(path, values)
        if path.name == "point.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        points.write(run / "bundle", found)
    assert load_bundle(run / "bundle").stacker == STACKER
    monkeypatch.undo()
    points.write(run / "bundle", found)
    assert points.read(run / "bundle", bundle.open_bundle(run / "bundle")) == found


def test_export_keeps_the_point_until_members_or_stack_change(run):
    assert points.told(points.read(run / "bundle", bundle.open_bundle(run / "bundle")), 2)
    content = (run / "bundle" / "point.json").read_bytes()
    export_run(run, (said := []).append)
    assert (run / "bundle" / "point.json").read_bytes() == content
    store_shift(run, Shift(0.5, 0.5, 10, "images", "em", "names"))  # as adapt does
    export_run(run, said.append)
    assert "point.json" in bundle.open_bundle(run / "bundle")["files"]
    assert not any("frontier" in line for line in said)
    write_stacker(run, Stacker(("one", "two"), (1.0, 1.0), 0.0))
    export_run(run, said.append)
    assert said[-1].startswith("What frontier chose was for other members or another stack, and is dropped: all ")
    assert not (run / "bundle" / "point.json").exists()
    assert load_bundle(run / "bundle").stacker.coef == (1.0, 1.0)
    export_run(run, (said := []).append)
    assert not any("frontier" in line for line in said)


STRANGER = {**Stacker(("one", "stranger"), (1.0, 1.0), 0.0).to_dict()}
OUTSIDE = {**Stacker(("../../one",), (1.0,), 0.0).to_dict()}
STEP = {"member": "one", "coef": [1.0], "intercept": 0.0, "low": None, "high": None}


def tamper(run, **changes):
    """Changed values, under hashes that fit."""
    folder = run / "bundle"
    values = artifacts.read_json(folder / "point.json", "") | changes
    artifacts.write_json(folder / "point.json", values)
    listed = bundle.contents(folder)
    files = {**listed["files"], "point.json": artifacts.file_sha256(folder / "point.json")}
    bundle.write_contents(folder, {**listed, "files": files})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stacker": STRANGER}, r"names members that the bundle lacks \(stranger\); choose another: "),
        ({"stacker": OUTSIDE}, "is damaged"),
        ({"stacker": {"members": ["one"]}}, "is damaged"),
        ({"stacker": []}, "is damaged"),
        ({"cascade": {"steps": [STEP], "last": "two"}}, "is damaged"),
        ({"precisions": {"openvino nothing at all": ["one"]}}, "is damaged"),
        ({"precisions": ["one"]}, "is damaged"),
        ({"budget": -1}, "is damaged"),
        ({"auroc": None}, "is damaged"),
        ({"made_from": "another"}, "was chosen for other members or another stack"),
    ],
)
def test_a_point_that_no_frontier_wrote_is_refused_but_full_runs(run, changes, message):
    tamper(run, **changes)
    with pytest.raises(ArtifactError, match=rf"point\.json {message}.*--reset to run all members"):
        load_bundle(run / "bundle")
    assert load_bundle(run / "bundle", Wanted(full=True)).stacker == STACKER
    assert run_cli("frontier", "--bundle", run / "bundle", "--reset")[0] == 0
    assert load_bundle(run / "bundle").stacker == STACKER


def test_a_changed_point_without_its_hash_is_damaged(run):
    path = run / "bundle" / "point.json"
    path.write_text(path.read_text().replace('"budget": 200.0', '"budget": 300.0'))
    with pytest.raises(ArtifactError, match=r"point\.json is damaged: it is not the file that was written"):
        load_bundle(run / "bundle")
