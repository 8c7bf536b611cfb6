"""frontier through the command line: what it says and draws, what a chosen point changes, and what is refused."""

import io
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from helpers import (
    STACKER,
    exported_run,
    make_frame,
    noisy_logits,
    read_csv,
    run_cli,
    write_bundle,
    write_image,
    write_member,
    write_stacker,
)
from PIL import Image

from ensemble.core import artifacts
from ensemble.core.metrics import Interval, sigmoid
from ensemble.stacking.logit_table import LabelledLogits
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle, check_images, heldout_rows, member_logits, operating_point
from export.bundle.export import export_run
from export.inference import benchmark, frontier, plan
from export.inference.evaluation_model import load_model
from export.inference.loading import load_bundle
from export.inference.plan import plan_bundle
from export.runtimes import autotune, devices
from export.runtimes.capabilities import Machine
from export.runtimes.settings import RuntimeConfig, RuntimeOptions

SECONDS = {"one": 0.001, "two": 0.009}
PIXELS = [1.0, 1.5]  # milliseconds of decoding, and of that and the one view


def planted_rows(spoilt=False):
    """`one` tells most, `two` what is left; or `two`, spoilt, nothing."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(800, 2))
    worth = np.array([3.0, 0.0 if spoilt else 1.5])
    labels = (rng.random(800) < sigmoid(logits @ worth)).astype(int)
    return LabelledLogits(STACKER.members, logits, labels, rng.integers(0, 80, 800))


def make(run, spoilt=False):
    exported_run(run)
    heldout_rows.write_rows(artifacts.bundle_path(run), planted_rows(spoilt))
    write_bundle(run)
    return run


@pytest.fixture(scope="module")
def timed():
    """Costs that no machine changes; cascades are left to their own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "seconds_per_image", lambda runner, *others: SECONDS[runner.name])
        patch.setattr(benchmark, "_pixel_milliseconds", lambda *others: PIXELS)
        patch.setattr(frontier.pareto, "TOLERANCES", ())
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def chosen(original, timed, tmp_path_factory):
    """A copy of which a point was chosen, what was said, and the picture."""
    folder = tmp_path_factory.mktemp("chosen")
    run = shutil.copytree(original, folder / "run")
    code, out, err = run_cli("frontier", "--run", run, "--budget", 200, "--output", folder / "f.png")
    assert (code, err) == (0, "")
    return run, out, folder / "f.png"


@pytest.fixture
def run(chosen, tmp_path):
    return shutil.copytree(chosen[0], tmp_path / "run")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for value in range(0, 256, 15):
        write_image(folder / f"{value:03}.png", value)
    return folder


def infer(given, pictures, output, *more):
    code, out, err = run_cli("infer", *given, "--input", pictures, "--output", output, "--members", *more)
    assert (code, err) == (0, "")
    return read_csv(output), out


def test_what_is_said_and_drawn(chosen):
    run, out, picture = chosen
    assert re.search(r"All 2 members at fp32: 87\.0 images/s, AUROC 0\.\d{4} \[0\.\d{4}, 0\.\d{4}\]\n", out)
    assert re.search(
        r"Scores are of \d{3} images of 40 groups, on which no stack or limit of the table was fitted\.\n", out
    )
    assert "for generated JPEGs of 512 x 384. No point tried beats these in both:\n" in out
    header, *lines = out[out.index("in both:\n") :].splitlines()[1:4]
    assert header.split() == "members precision cascade images/s AUROC lost against all".split()
    first, second = (re.split(r"\s{1,}(?![^\[]*\])", line.strip()) for line in lines)
    assert first[:5] == ["1", "one", "fp32", "-", "400.0"]
    assert second[:7] == ["2", "one", "+", "two", "fp32", "-", "87.0"]
    assert lines[1].endswith("0.0000 [0.0000, 0.0000]")
    assert re.search(
        r"1 of 2 members, as frontier chose for 200 images/s \(400\.0 predicted on \d+ cores? of .+; "
        rf"AUROC lost against all: {re.escape(' '.join(lines[0].split()[-3:]))}\); --full runs all\n",
        out,
    )
    assert f"-> {run / 'bundle' / 'point.json'}; to take it away: frontier --reset\n" in out
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert np.asarray(image).std() > 10


def test_a_member_that_adds_nothing_is_on_no_point(tmp_path, timed):
    run = make(tmp_path / "run", spoilt=True)
    code, out, _ = run_cli("frontier", "--run", run, "--output", tmp_path / "f.png")
    assert code == 0
    assert [line.split()[1:5] for line in out[out.index("in both:\n") :].splitlines()[2:-1]] == [
        ["one", "fp32", "-", "400.0"]
    ]
    assert not (run / "bundle" / "point.json").exists()  # without --budget nothing is chosen


def test_infer_runs_only_the_chosen_members_and_full_all(original, run, pictures, tmp_path):
    before, _ = infer(("--bundle", original / "bundle"), pictures, tmp_path / "before.csv")
    some, out = infer(("--run", run, "--onnx"), pictures, tmp_path / "some.csv")
    assert out.startswith("1 of 2 members, as frontier chose for 200 images/s (400.0 predicted on ")
    assert "18 images, 1 members on cpu" in out
    assert "Not in the stack" not in out
    assert list(some) == ["id", "target", "one"]
    assert list(some["one"]) == list(before["one"])
    stacker = operating_point.read(run / "bundle", bundle.open_bundle(run / "bundle")).stacker
    logit = 4 * (np.arange(0, 256, 15) / 255 - 0.5)
    np.testing.assert_allclose(some["target"].astype(float), stacker.target(logit[:, None]), rtol=1e-5)
    full, out = infer(("--run", run, "--onnx", "--full"), pictures, tmp_path / "full.csv")
    assert "frontier" not in out
    assert (tmp_path / "full.csv").read_bytes() == (tmp_path / "before.csv").read_bytes()
    pd.testing.assert_frame_equal(full, before)


def test_what_ships_is_fitted_on_all_rows(run):
    stacker = operating_point.read(run / "bundle", bundle.open_bundle(run / "bundle")).stacker
    rows = planted_rows()
    from ensemble.stacking.fit import fit_stacker

    again = fit_stacker(("one",), rows.logits[:, :1], rows.labels, rows.groups.astype(str), "logit")
    assert (stacker.members, stacker.coef, stacker.intercept) == (("one",), again.coef, again.intercept)


def test_a_budget_beyond_the_fastest_names_it_and_changes_nothing(run, tmp_path, timed):
    before = (run / "bundle" / "bundle.json").read_bytes()
    code, _, err = run_cli("frontier", "--run", run, "--budget", 401, "--output", tmp_path / "f.png")
    assert code == 2
    assert err == (
        "Error: no point reaches 401 images/s here: the fastest (one at fp32) is predicted to make 400.0; "
        "give a smaller --budget\n"
    )
    assert (tmp_path / "f.png").is_file()
    assert (run / "bundle" / "bundle.json").read_bytes() == before


def test_the_most_accurate_that_is_fast_enough_takes_the_place_of_the_last(run, tmp_path, timed):
    code, out, _ = run_cli("frontier", "--bundle", run / "bundle", "--budget", 86.9, "--output", tmp_path / "f.png")
    assert code == 0
    assert "2 of 2 members, as frontier chose for 86.9 images/s" in out
    ensemble = load_bundle(run / "bundle")
    assert ensemble.stacker == STACKER  # of all members it is the bundle's own


def test_a_point_that_is_as_good_as_another_is_not_listed_but_may_be_chosen(original, tmp_path, monkeypatch, timed):
    monkeypatch.setitem(SECONDS, "two", 0.00003)
    run = shutil.copytree(original, tmp_path / "run")
    code, out, _ = run_cli("frontier", "--run", run, "--budget", 398, "--output", tmp_path / "f.png")
    assert code == 0
    listed = [line.split()[1:-6] for line in out[out.index("in both:\n") :].splitlines()[2:4]]
    assert listed == [["two", "fp32", "-", "653.6"], ["one", "+", "two", "fp32", "-", "395.3"]]
    assert not re.search(r"\n3 +", out)
    assert "\nChosen: one at fp32\n1 of 2 members, as frontier chose for 398 images/s" in out
    point = operating_point.read(run / "bundle", bundle.open_bundle(run / "bundle"))
    assert (point.stacker.members, point.images_per_second) == (("one",), pytest.approx(400))


def test_a_bundle_that_changes_while_it_is_measured_gets_no_point(original, tmp_path, monkeypatch, timed):
    run = shutil.copytree(original, tmp_path / "run")
    measure = benchmark.measure_costs

    def stacked_meanwhile(*given):
        write_stacker(run, Stacker(("one", "two"), (1.0, 1.0), 0.0))
        write_bundle(run)
        return measure(*given)

    monkeypatch.setattr(benchmark, "measure_costs", stacked_meanwhile)
    code, _, err = run_cli("frontier", "--run", run, "--budget", 200, "--output", tmp_path / "f.png")
    assert code == 2
    assert err == f"Error: the bundle {run / 'bundle'} changed meanwhile; run frontier again\n"
    assert not (run / "bundle" / "point.json").exists()
    assert load_bundle(run / "bundle").stacker.coef == (1.0, 1.0)


@pytest.fixture
def lower(original, tmp_path, monkeypatch):
    """A bundle with certificates on a machine that computes them all, where tuning finds fp32 in ONNX Runtime best."""
    run = shutil.copytree(original, tmp_path / "run")
    values = bundle.read_contents(run / "bundle")
    may = {key: {"members": ["one", "two"], "certified": True} for key in ("openvino bf16", "openvino fp16")}
    bundle.write_contents(run / "bundle", {**values, "precisions": may})
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "available", lambda: Machine("Xeon", 2))

    def measure(job, *rest):
        best = RuntimeConfig("onnxruntime", "fp32", 16, 1, 2)
        return {setting: 0.001 if setting == best else 0.01 for setting in job.candidates}

    monkeypatch.setattr(autotune, "measure", measure)
    return run / "bundle"


def test_what_is_timed_is_what_infer_will_run(lower):
    plans = frontier._plans(lower, RuntimeOptions(tune=True, full=True, device="cpu"), print)
    assert list(plans) == ["fp32"]
    assert {(str(m.setting), m.setting.batch) for m in plans["fp32"]} == {("onnxruntime fp32", 16)}
    values = bundle.open_bundle(lower)
    made_from = operating_point.identity(lower, values["members"], values["files"])
    lost = Interval(0.0, 0.0, 0.0)
    one = Stacker(("one",), (1.0,), 0.0)
    operating_point.write(
        lower, operating_point.OperatingPoint(one, "auto", {}, None, 1.0, 2.0, lost, "a CPU", made_from)
    )
    (member,) = plan_bundle(lower, RuntimeOptions(device="cpu"), print).members
    assert member == plans["fp32"][0]


def test_precisions_that_are_timed(lower):
    plans = frontier._plans(lower, RuntimeOptions(full=True, device="cpu"), print)
    assert {key: {str(m.setting) for m in members} for key, members in plans.items()} == {
        "fp32": {"openvino fp32"},
        "bf16": {"openvino bf16"},
    }
    for precision in ("fp32", "fp16"):
        plans = frontier._plans(lower, RuntimeOptions(precision=precision, full=True, device="cpu"), print)
        assert {key: {str(m.setting) for m in members} for key, members in plans.items()} == {
            precision: {f"openvino {precision}"}
        }


def test_the_runtime_that_was_asked_for_goes_into_the_point(run, tmp_path, timed):
    assert operating_point.read(run / "bundle", bundle.open_bundle(run / "bundle")).runtime == "auto"
    given = ("frontier", "--run", run, "--budget", 200, "--output", tmp_path / "f.png")
    assert run_cli(*given, "--runtime", "onnxruntime")[0] == 0
    assert operating_point.read(run / "bundle", bundle.open_bundle(run / "bundle")).runtime == "onnxruntime"
    assert plan_bundle(run / "bundle", RuntimeOptions(), print).members[0].setting.runtime == "onnxruntime"


LOWER = RuntimeConfig("openvino", "bf16")


def with_bf16(run, monkeypatch, flips, certified=True):
    """A bundle whose members may run at bf16, twice as fast, on a machine that has it; bf16 moves so many calls."""
    folder = run / "bundle"
    values = bundle.read_contents(folder)
    may = {"openvino bf16": {"members": ["one", "two"], "certified": certified}}
    bundle.write_contents(folder, {**values, "precisions": may})
    fp32 = plan_bundle(folder, RuntimeOptions(full=True, precision="fp32"), print).members
    lower = tuple(vars(member) | {"setting": LOWER} for member in fp32)
    plans = {"fp32": fp32, "bf16": tuple(type(fp32[0])(**values) for values in lower)}
    monkeypatch.setattr(frontier, "_plans", lambda *others: plans)
    monkeypatch.setattr(benchmark, "open_member", lambda member, log: member)
    speed = {"bf16": 0.5, "fp32": 1.0}
    monkeypatch.setattr(
        autotune, "seconds_per_image", lambda member, setting, *others: SECONDS[member.name] * speed[setting.precision]
    )
    rows = planted_rows()
    given = check_images.LabelledImages("images", True, tuple(map(str, range(800))), (folder,) * 800, rows.labels)
    monkeypatch.setattr(check_images, "heldout_images", lambda run: given)

    def compute(files, columns, title):
        drawn = check_images.stratified_sample(given, 1024)
        logits = rows.logits[[int(key) for key in drawn.ids]]
        turned = np.where(np.arange(len(logits)) < flips, -1, 1)[:, None]
        return range(len(logits)), np.hstack([logits, turned * logits]), {}

    monkeypatch.setattr(member_logits, "compute_logits", compute)
    return folder


@pytest.mark.parametrize(("flips", "precision"), [(0, "bf16"), (40, "fp32")])
def test_a_stack_of_some_runs_below_fp32_only_with_a_certificate_of_its_own(
    original, tmp_path, monkeypatch, timed, flips, precision
):
    run = shutil.copytree(original, tmp_path / "run")
    folder = with_bf16(run, monkeypatch, flips)
    code, out, _ = run_cli("frontier", "--run", run, "--budget", 300, "--output", tmp_path / "f.png")
    assert code == 0
    assert re.search(rf"\n1 +one +{precision} +- +{500 if precision == 'bf16' else 400}\.0 ", out)
    assert ("one at bf16: AUROC by " in out) == (precision == "fp32")
    assert ("one + two at bf16: AUROC by " in out) == (precision == "fp32")  # all members too, where there is proof
    assert bool(re.search(r"\n\d +one \+ two +bf16 ", out)) == (precision == "bf16")
    values = bundle.open_bundle(folder)
    point = operating_point.read(folder, values)
    may = {("openvino", "bf16"): frozenset({"one"})} if precision == "bf16" else {}
    assert operating_point.certified_precisions(point, values, [("openvino", "bf16")], print) == may
    for made in point.precisions.values():
        assert made.files == {"one": values["files"]["members/one.fp32.onnx"]}
        assert made.by == devices.version("openvino") != ""


def test_a_bundle_alone_has_no_images_to_certify_some_members_on(original, tmp_path, monkeypatch, timed):
    run = shutil.copytree(original, tmp_path / "run")
    folder = with_bf16(run, monkeypatch, 0)
    code, out, _ = run_cli("frontier", "--bundle", folder, "--output", tmp_path / "f.png")
    assert code == 0
    assert "Below fp32 only all members together are tried: " in out
    assert "or more, and a bundle has none: name its run with --run." in out
    assert re.search(r"\n1 +one +fp32 .*\n2 +one \+ two +bf16 ", out)


@pytest.mark.parametrize("certified", [True, False])
def test_a_precision_by_the_users_word_is_marked(original, tmp_path, monkeypatch, timed, certified):
    run = shutil.copytree(original, tmp_path / "run")
    folder = with_bf16(run, monkeypatch, 0, certified)
    _, out, _ = run_cli("frontier", "--bundle", folder, "--output", tmp_path / "f.png")
    mark = "" if certified else r" \(uncertified\)"
    assert re.search(rf"\nAll 2 members at bf16{mark}: ", out)
    assert re.search(rf"\n1 +one +fp32 +- .*\n2 +one \+ two +bf16{mark} +- ", out)
    _, out, _ = run_cli("frontier", "--run", run, "--output", tmp_path / "f.png")  # there it passes
    assert re.search(rf"\nAll 2 members at bf16{mark}: ", out)
    assert re.search(r"\n1 +one +bf16 +- .*\n2 +one \+ two +bf16 +- ", out)


def test_images_that_are_gone_certify_nothing(original, tmp_path, monkeypatch, timed):
    run = shutil.copytree(original, tmp_path / "run")
    with_bf16(run, monkeypatch, 0)
    compute = member_logits.compute_logits
    lost = dict.fromkeys(range(255, 800), "gone")
    monkeypatch.setattr(member_logits, "compute_logits", lambda *given: (range(255), compute(*given)[1][:255], lost))
    code, out, _ = run_cli("frontier", "--run", run, "--output", tmp_path / "f.png")
    assert code == 0
    assert "on 256 held-out images of the run or more, and 255 can be read." in out
    assert re.search(r"\n1 +one +fp32 .*\n2 +one \+ two +bf16 ", out)


def test_a_point_may_be_a_cascade(tmp_path, pictures, monkeypatch, timed):
    monkeypatch.setattr(frontier.pareto, "TOLERANCES", (0.01,))
    run = exported_run(tmp_path / "run")
    rng = np.random.default_rng(0)
    one = rng.uniform(-2, 2, 800)  # two matters only where one is near 0
    logits = np.column_stack([one, -one / 2 + 4 * (np.abs(one) < 0.4) * rng.normal(size=800)])
    labels = (rng.random(800) < sigmoid(8 * STACKER.logit(logits))).astype(int)
    heldout_rows.write_rows(run / "bundle", LabelledLogits(STACKER.members, logits, labels, rng.integers(0, 60, 800)))
    write_bundle(run)
    code, out, _ = run_cli("frontier", "--run", run, "--budget", 100, "--output", tmp_path / "f.png")
    assert code == 0
    speed = float(re.search(r"\n\d +one \+ two +fp32 +0\.01 +(\d{3}\.\d) ", out)[1])
    # of the cascade that ships: decoding, the view, `one`, and `two` for the images that stay
    point = operating_point.read(run / "bundle", bundle.open_bundle(run / "bundle"))
    expected = 1000 / (1.5 + 1 + 9 * (1 - point.cascade.report.shares[0]))
    assert point.cascade.report.rows == 800
    assert speed == pytest.approx(expected, abs=0.05)
    assert point.images_per_second == pytest.approx(expected)
    told = "2 of 2 members in a cascade of tolerance 0.01, as frontier chose for 100 images/s ("
    assert told in out
    given = ("--bundle", run / "bundle")
    some, out = infer(given, pictures, tmp_path / "some.csv")
    assert out.startswith(told)
    assert "Left the cascade: " in out
    assert 0 < (some["two"] == "").sum() < 18
    full, out = infer(given, pictures, tmp_path / "full.csv", "--full")
    assert "Cascade" not in out
    ran = some["two"] != ""
    pd.testing.assert_frame_equal(some[ran], full[ran])  # all members' stack is the bundle's own
    _, out = infer(given, pictures, tmp_path / "anew.csv", "--cascade", "0.02")
    assert "to lose at most 0.02 of AUROC" in out
    _, _, err = run_cli("infer", *given, "--tta", "--input", pictures, "--output", tmp_path / "tta.csv")
    assert "--tta excludes the cascade that frontier chose for this bundle: add --full" in err
    # it is scored by all its members, in the stacker's order
    model, _ = load_model(run, None, True, RuntimeOptions(), print)
    assert model.stacker == STACKER


@pytest.mark.parametrize("budget", ["nan", "inf", "-inf", "0", "-5", "1e300", "1000001"])
def test_a_budget_that_is_no_speed_is_refused_before_anything_is_measured(tmp_path, budget):
    code, out, err = run_cli("frontier", "--run", tmp_path, "--budget", budget)
    assert (code, out) == (2, "")
    assert "is no speed: give images a second, above 0 and at most 1,000,000" in err


def test_a_bundle_that_cannot_be_written_is_told_before_anything_is_measured(original, tmp_path, monkeypatch, timed):
    def never(*given):
        raise AssertionError

    def full_disk(dir):
        if dir == original / "bundle":
            raise OSError(28, "No space left on device")
        return io.BytesIO()

    monkeypatch.setattr(frontier, "compute_frontier", never)
    monkeypatch.setattr(artifacts.tempfile, "TemporaryFile", full_disk)
    given = ("frontier", "--run", original, "--output", tmp_path / "f.png")
    code, _, err = run_cli(*given, "--budget", 5)
    assert code == 2
    assert err == f"Error: cannot write in {original / 'bundle'}: No space left on device; choose another place\n"
    with pytest.raises(AssertionError):
        run_cli(*given)


def test_what_cannot_be_done_is_said(tmp_path, timed):
    given = ("--output", tmp_path / "f.png")
    assert "--reset takes a chosen point away" in run_cli("frontier", "--reset", "--budget", 5)[2]
    assert "not both" in run_cli("frontier", "--bundle", tmp_path, "--run", tmp_path)[2]
    assert "torch does not run" in run_cli("frontier", "--bundle", tmp_path, "--runtime", "torch")[2]
    run = exported_run(tmp_path / "run")
    _, _, err = run_cli("frontier", "--run", run, *given)
    assert "Error: frontier: the bundle " in err
    assert "has no held-out logits to fit and report on; export again" in err
    export_run(run, print)
    _, _, err = run_cli("frontier", "--run", run, *given)
    assert "Error: frontier chooses on 100 held-out images or more, and here are 48: export with more" in err
    write_member(run, "two", make_frame(), noisy_logits(make_frame(), 1, 5))
    assert "run: python cli.py stack" in run_cli("frontier", "--run", run, *given)[2]
