"""The point that frontier chose, in its bundle: what runs it, what keeps it, and what is refused."""

import shutil

import numpy as np
import pandas as pd
import pytest
from helpers import STACKER, exported_run, run_cli, write_bundle, write_image, write_stacker

from ensemble.cascade.cascade import CascadeReport
from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, UnavailableError
from ensemble.core.metrics import Interval, sigmoid
from ensemble.models.external import External, write_external
from ensemble.stacking.label_shift import LabelShift
from ensemble.stacking.stack import store_shift
from ensemble.stacking.stacker import Stacker
from export import Predictor
from export.bundle import bundle, operating_point
from export.bundle.export import export_run
from export.bundle.operating_point import OperatingPoint
from export.inference import benchmark, plan
from export.inference.loading import load_bundle
from export.inference.plan import plan_bundle
from export.runtimes import autotune, devices
from export.runtimes.capabilities import Machine
from export.runtimes.settings import PRECISIONS, RuntimeOptions

ONE = Stacker(("one",), (1.5,), 0.25, 0.4)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("original"))


def choose(folder, stacker):
    values = bundle.open_bundle(folder)
    made_from = operating_point.identity(folder, values["members"], values["files"])
    lost = Interval(0.0125, 0.001, float("nan"))
    operating_point.write(folder, OperatingPoint(stacker, "auto", {}, None, 200.0, 400.0, lost, "a CPU", made_from))


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
    assert some.notes[0] == (
        "1 of 2 members, as frontier chose for 200 images/s (400.0 predicted on a CPU; "
        "AUROC lost against all: 0.0125 [0.0010, nan]); --full runs all"
    )
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
    for name, value in (("ROUNDS", 1), ("MATRIX_SIDE", {"cpu": 64}), ("BASELINE_SECONDS", 0.01)):
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(autotune, "MIN_TIMING_SECONDS", 0.01)
    _, out, _ = run_cli("bench", "--bundle", run / "bundle", "--runtime", "onnxruntime")
    assert out.startswith("1 of 2 members, as frontier chose for 200 images/s")
    assert "\n   two " not in out
    _, out, _ = run_cli("bench", "--bundle", run / "bundle", "--runtime", "onnxruntime", "--full")
    assert "\n   two " in out


XEON, GPU = Machine("Xeon", 2), Machine("Xeon", 2, "H200")
NO_OPENVINO = Machine("Xeon", 2, unsupported={("openvino", precision): "not here" for precision in PRECISIONS})


@pytest.mark.parametrize(
    ("precisions", "machine", "wanted"),
    [
        ([], XEON, RuntimeOptions()),
        (["openvino bf16"], XEON, RuntimeOptions("onnxruntime")),
        (["openvino bf16"], GPU, RuntimeOptions()),
        (["openvino bf16"], Machine("Xeon", 2, unsupported={("openvino", "bf16"): "no bf16"}), RuntimeOptions()),
    ],
)
def test_no_certificate_is_advised_that_would_not_be_one_for_these_members(
    original, run, monkeypatch, precisions, machine, wanted
):
    allow(run, "openvino bf16")
    certify(run, *precisions)
    monkeypatch.setattr(plan, "available", lambda: machine)
    plan_bundle(run / "bundle", wanted, (said := []).append)
    assert not any("certif" in line for line in said)
    plan_bundle(original / "bundle", RuntimeOptions(device=wanted.device), (said := []).append)
    assert any("has no certificate" in line for line in said)


def test_what_a_point_cannot_do_is_advised_to_all_members(run, monkeypatch):
    allow(run, "openvino bf16", "openvino fp16")
    certify(run, "openvino fp16")
    monkeypatch.setattr(plan, "available", lambda: XEON)
    folder, device = run / "bundle", "cpu"
    assert {str(m.setting) for m in plan_bundle(folder, RuntimeOptions(device=device), print).members} == {
        "openvino fp16"
    }
    with pytest.raises(
        UnavailableError, match=r"^one may not run at openvino bf16 in the .* chose: add --full to run "
    ):
        plan_bundle(folder, RuntimeOptions(device=device, precision="bf16"), print)
    assert plan_bundle(folder, RuntimeOptions(device=device, precision="bf16", full=True), print).members
    with pytest.raises(
        UnavailableError, match=r"--cascade needs two members or more, and frontier chose one alone .*--full"
    ):
        load_bundle(folder, RuntimeOptions(cascade=0.01))
    monkeypatch.setattr(
        plan, "available", lambda: Machine("Xeon", 2, unsupported={("openvino", "bf16"): "no bf16; buy"})
    )
    with pytest.raises(UnavailableError, match="openvino cannot run bf16 here: no bf16; buy"):
        plan_bundle(folder, RuntimeOptions(device=device, precision="bf16"), print)


@pytest.mark.parametrize(
    ("chosen", "machine", "wanted", "runs"),
    [
        ("auto", XEON, RuntimeOptions(), "openvino"),
        ("onnxruntime", XEON, RuntimeOptions(), "onnxruntime"),
        ("onnxruntime", XEON, RuntimeOptions(device="cpu"), "onnxruntime"),
        ("onnxruntime", XEON, RuntimeOptions(full=True), "openvino"),
        ("onnxruntime", XEON, RuntimeOptions("openvino"), "openvino"),
        ("openvino", NO_OPENVINO, RuntimeOptions(), "onnxruntime"),
        ("cuda", GPU, RuntimeOptions(), "cuda"),
        ("cuda", GPU, RuntimeOptions(device="cpu"), "openvino"),
        ("onnxruntime", GPU, RuntimeOptions(device="cuda"), "tensorrt"),
    ],
)
def test_the_runtime_that_frontier_was_asked_for_is_taken_where_nothing_else_is_wanted(
    run, monkeypatch, chosen, machine, wanted, runs
):
    tamper(run, runtime=chosen)
    monkeypatch.setattr(plan, "available", lambda: machine)
    assert {m.setting.runtime for m in plan_bundle(run / "bundle", wanted, print).members} == {runs}


def test_the_precision_of_a_point_is_run_though_a_bundle_would_have_it_tuned_first(run, monkeypatch):
    allow(run, "onnxruntime int8")
    monkeypatch.setattr(bundle, "low_precision_kind", lambda setting: None)
    certify(run, "onnxruntime int8", runtime="onnxruntime")
    monkeypatch.setattr(plan, "available", lambda: XEON)
    (member,) = plan_bundle(run / "bundle", RuntimeOptions(), (said := []).append).members
    assert str(member.setting) == "onnxruntime int8"
    assert "as frontier chose: onnxruntime int8, batch 8, 1 stream (one)" in said
    assert {
        str(m.setting)
        for m in plan_bundle(run / "bundle", RuntimeOptions(full=True, runtime="onnxruntime"), print).members
    } == {"onnxruntime fp32"}


STILL = "Still allowed, though certified with other versions of libraries than those here: openvino bf16"


def test_a_certificate_holds_for_its_files_and_says_that_libraries_are_others(run, monkeypatch):
    allow(run, "openvino bf16")
    certify(run, "openvino bf16")
    monkeypatch.setattr(plan, "available", lambda: XEON)

    def planned(*wanted):
        (member,) = plan_bundle(run / "bundle", RuntimeOptions(*wanted), (said := []).append).members
        return str(member.setting), [line for line in said if "llowed" in line or "choose again" in line]

    assert planned() == ("openvino bf16", [])
    certify(run, "openvino bf16", by="openvino 1.0")
    assert planned() == ("openvino bf16", [STILL])
    assert planned("onnxruntime") == ("onnxruntime fp32", [])
    assert planned("auto", "fp32") == ("openvino fp32", [])
    gone = [
        "What frontier chose for openvino bf16 runs at fp32: its files or what the bundle allows have changed; "
        "choose again: python cli.py frontier --budget N"
    ]
    tamper(run, precisions={"openvino bf16": {"by": "", "files": {"one": "another file"}}})
    assert planned() == ("openvino fp32", gone)
    certify(run, "openvino bf16")
    allow(run, "openvino fp16")
    assert planned() == ("openvino fp32", gone)


def test_another_point_starts_scoring_anew(run, pictures, tmp_path, monkeypatch):
    output = tmp_path / "out.csv"
    given = ("infer", "--bundle", run / "bundle", "--input", pictures, "--output", output)

    def stop(*others):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("export.inference.infer.artifacts.clear_unfinished", stop)
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
    found = operating_point.read(run / "bundle", bundle.open_bundle(run / "bundle"))
    write_json = artifacts.write_json

    def killed(path, values):
        write_json(path, values)
        if path.name == "point.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        operating_point.write(run / "bundle", found)
    assert load_bundle(run / "bundle").stacker == STACKER
    monkeypatch.undo()
    assert (run / "bundle" / "point.json").is_file()
    export_run(run, (said := []).append)  # nothing was chosen that it could drop
    assert not any("frontier" in line for line in said)
    operating_point.write(run / "bundle", found)
    assert operating_point.read(run / "bundle", bundle.open_bundle(run / "bundle")) == found


def test_export_keeps_the_point_until_members_or_stack_change(run):
    assert operating_point.describe(operating_point.read(run / "bundle", bundle.open_bundle(run / "bundle")), 2)
    content = (run / "bundle" / "point.json").read_bytes()
    export_run(run, (said := []).append)
    assert (run / "bundle" / "point.json").read_bytes() == content
    store_shift(run, LabelShift(0.5, 0.5, 10, "images", "em", "names"))  # as adapt does
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
REPORT = CascadeReport(10, 5, (0.9, 0.9), Interval(0.0, 0.0, 0.0), (0.5, 0.5), (2.0, 1.0), 0.0).to_dict()
CASCADE = {"steps": [STEP], "last": "two", "milliseconds": [1.0, 2.0], "tolerance": 0.01, "report": REPORT}


def tamper(run, **changes):
    """Changed values, under hashes that fit."""
    folder = run / "bundle"
    values = artifacts.read_json(folder / "point.json", "") | changes
    artifacts.write_json(folder / "point.json", values)
    list_point(folder)


def allow(run, *keys):
    """Both members may run at these."""
    listed = bundle.read_contents(run / "bundle")
    may = {key: {"members": ["one", "two"], "certified": True} for key in keys}
    bundle.write_contents(run / "bundle", {**listed, "precisions": may})


def certify(run, *keys, by=None, **changes):
    """A point whose one member may run at these, by the libraries here or others."""
    files = bundle.read_contents(run / "bundle")["files"]
    made = {
        key: {
            "by": devices.version(key.split()[0]) if by is None else by,
            "files": {"one": files["members/one.fp32.onnx"]},
        }
        for key in keys
    }
    tamper(run, precisions=made, **changes)


def list_point(folder):
    """Its hash, whatever was changed."""
    listed = bundle.read_contents(folder)
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
        ({"runtime": "torch"}, "is damaged"),
        ({"runtime": ["openvino"]}, "is damaged"),
        ({"lost": None}, "is damaged"),
        ({"machine": "a CPU\x1b[2J\nError: none"}, "is damaged"),
        ({"precisions": {"openvino bf16": ["one"]}}, "is damaged"),
        ({"precisions": {"openvino bf16": {"by": "", "files": [["one"]]}}}, "is damaged"),
        ({"precisions": {"openvino bf16": {"by": "", "files": {"stranger": ""}}}}, "is damaged"),
        ({"precisions": {"openvino bf16": {"by": ""}}}, "is damaged"),
        ({"budget": 10**400}, "is damaged"),
        ({"images_per_second": -1}, "is damaged"),
        ({"made_from": "another"}, "was chosen for other members or another stack"),
    ],
)
def test_a_point_that_no_frontier_wrote_is_refused_but_full_runs(run, changes, message):
    tamper(run, **changes)
    with pytest.raises(ArtifactError, match=rf"point\.json {message}.*--reset to run all members"):
        load_bundle(run / "bundle")
    assert load_bundle(run / "bundle", RuntimeOptions(full=True)).stacker == STACKER
    assert run_cli("frontier", "--bundle", run / "bundle", "--reset")[0] == 0
    assert load_bundle(run / "bundle").stacker == STACKER


BUDGET, RULE = '"budget": 200.0', '"threshold_rule": "default 0.5"'


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (BUDGET, '"budget": Infinity'),
        (BUDGET, '"budget": NaN'),
        (BUDGET, '"budget": 1e999'),
        (BUDGET, f'"budget": {"[" * 50_000 + "]" * 50_000}'),
        (RULE, r'"threshold_rule": "\ud800"'),
    ],
)
def test_what_cannot_be_written_again_is_refused_and_export_drops_the_point(run, old, new):
    path = run / "bundle" / "point.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    list_point(run / "bundle")
    with pytest.raises(ArtifactError, match=r"point\.json is damaged; choose another: "):
        load_bundle(run / "bundle")
    export_run(run, (said := []).append)
    assert said[-1].startswith("What frontier chose was for other members")


@pytest.mark.parametrize(
    ("changes", "report"),
    [
        ({"milliseconds": [1.0]}, {}),
        ({"milliseconds": ["1", "2"]}, {}),
        ({"milliseconds": [-1.0, 2.0]}, {}),
        ({"tolerance": "0.01"}, {}),
        ({"steps": [{**STEP, "coef": [[1.0]]}]}, {}),
        ({"steps": [{**STEP, "low": "0"}]}, {}),
        ({"steps": [{**STEP, "member": ["one"]}]}, {}),
        ({"report": None}, {}),
        ({}, {"shares": [1.0]}),
        ({}, {"shares": "ab"}),
        ({}, {"rows": "many"}),
        ({}, {"groups": 0.5}),
        ({}, {"auroc": [None, None]}),
        ({}, {"auroc": [0.9]}),
        ({}, {"milliseconds": [2.0, None]}),
        ({}, {"flips": "none"}),
        ({}, {"loss": {"value": "a", "low": 0.0, "high": 0.0}}),
        ({}, {"loss": {"value": 0.0}}),
        ({}, {"more": 1}),
    ],
)
def test_a_cascade_that_no_frontier_wrote_is_refused(run, pictures, tmp_path, changes, report):
    whole = {"stacker": STACKER.to_dict(), "cascade": CASCADE}
    given = ("infer", "--bundle", run / "bundle", "--input", pictures, "--output", tmp_path / "out.csv")
    tamper(run, **whole)
    assert run_cli(*given)[0] == 0
    tamper(run, **whole | {"cascade": CASCADE | {"report": REPORT | report} | changes})
    code, _, err = run_cli(*given)
    assert code == 2
    assert err.startswith("Error: ")
    assert "point.json is damaged; choose another: python cli.py frontier --bundle " in err


def test_a_changed_point_without_its_hash_is_damaged(run):
    path = run / "bundle" / "point.json"
    path.write_text(path.read_text().replace('"budget": 200.0', '"budget": 300.0'))
    with pytest.raises(ArtifactError, match=r"point\.json is damaged: it is not the file that was written"):
        load_bundle(run / "bundle")
