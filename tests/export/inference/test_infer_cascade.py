"""infer --cascade: which members run for which image, what is said of it, and what is refused."""

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import (
    PREPROCESS_CONFIG,
    STACKER,
    exported_run,
    read_csv,
    run_cli,
    write_bundle,
    write_csv,
    write_folded_run,
    write_image,
    write_stacker,
)

from ensemble.cascade import stream as cascade_stream
from ensemble.cascade.cascade import Cascade, CascadeReport, CascadeStep
from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, UnavailableError
from ensemble.core.metrics import Interval, sigmoid
from ensemble.data.inputs import read_inputs
from ensemble.models.external import External
from ensemble.models.runner import Runner
from export import Predictor
from export.bundle import bundle, heldout_rows
from export.bundle.export import export_run
from export.inference import journal, loading, pipeline
from export.inference.ensemble import Ensemble
from export.inference.infer import ScoreOptions, infer, infer_to_file
from export.runtimes import autotune
from export.runtimes.capabilities import Machine
from export.runtimes.settings import RuntimeConfig, RuntimeOptions

REPORT = CascadeReport(100, 50, (0.9, 0.9), Interval(0.0, 0.0, 0.0), (0.5, 0.5), (3.0, 2.0), 0.0)
# after `one` an image leaves beyond half a logit
CASCADE = Cascade((CascadeStep("one", (0.3,), 0.1, -0.5, 0.5),), "two", (1.0, 2.0), 0.01, REPORT)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("exported"), cascade=True)


@pytest.fixture
def run(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "run")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Every brightness in steps of 15, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    for value in range(0, 256, 15):
        write_image(folder / f"{value:03}.png", value)
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def costs(monkeypatch):
    """Two costs ten times one."""
    seconds = {"one": 0.001, "two": 0.01}
    monkeypatch.setattr(autotune, "seconds_per_image", lambda runner, *others: seconds[runner.name])


def answers(ran, **logits):
    """Runners of CONTRACT by a function of brightness 0 to 1; the rows that each was given go to `ran`."""

    def runner(name, logit):
        def run(pixels):
            ran.append((name, len(pixels)))
            return np.array([logit(image.mean() / 255) for image in pixels], dtype=np.float32)

        return Runner(name, PREPROCESS_CONFIG, run)

    return tuple(runner(name, logit) for name, logit in logits.items())


def ensemble(ran, cascade=CASCADE, externals=(), **logits):
    logits = logits or {"one": lambda b: 4 * (b - 0.5), "two": lambda b: -2 * (b - 0.5)}
    return Ensemble(answers(ran, **logits), STACKER, "cpu", externals, "tiny", cascade)


def to_file(output, source, loaded, **options):
    said = []
    with journal.locked_workdir(output) as folder:
        done = infer_to_file(
            read_inputs(source, spill=folder), loaded, output, folder, ScoreOptions(**options), said.append
        )
    return done, said


def test_images_that_are_clear_leave_after_the_cheap_member(exported, pictures, tmp_path, costs):
    given = ("--bundle", exported / "bundle", "--input", pictures, "--runtime", "onnxruntime", "--members")
    assert run_cli("infer", *given, "--output", tmp_path / "full.csv")[0] == 1
    code, out, _ = run_cli("infer", *given, "--cascade", "0.01", "--output", tmp_path / "out.csv")
    assert code == 1  # one picture cannot be read
    full, found = (read_csv(tmp_path / name).replace("", "nan") for name in ("full.csv", "out.csv"))
    assert list(found["id"]) == list(full["id"])
    ran = found["two"] != "nan"
    read = full["target"] != "nan"
    grey = full.index[full["id"].isin(["120.png", "135.png"])]
    assert ran[grey].all()
    assert not ran[full.index[full["id"].isin(["000.png", "255.png", "broken.png"])]].any()
    pd.testing.assert_frame_equal(found[ran], full[ran])
    assert (found.loc[read, "one"] == full.loc[read, "one"]).all()
    left = read & ~ran
    assert (found.loc[left, "target"] != full.loc[left, "target"]).all()
    assert np.abs(found.loc[left, "target"].astype(float) - full.loc[left, "target"].astype(float)).max() < 0.02
    assert re.search(r"^Fitting the cascade on [\d,]+ held-out images\n(.*\n)*Cascade, from cheap", out, re.MULTILINE)
    assert re.search(
        r"to lose at most 0\.01 of AUROC:\n  one: 1\.00 ms an image, \d+\.\d% leave\n  two: 10\.00 ms", out
    )
    assert re.search(r"Expected: members take \d\.\d\d ms an image in place of 11\.00, \d\.\d times as fast\n", out)
    assert re.search(
        r"On [\d,]+ images of \d+ groups, by limits fitted on other groups: .*, lost -?0\.\d+ \[-?0\.\d+, 0\.\d+\]; ",
        out,
    )
    share = left.sum() / read.sum()
    assert f"Left the cascade: {share:.1%} after one, {1 - share:.1%} after two\n" in out


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (Interval(0.011, 0.009, 0.02), "  It lost more than allowed on these images, which are too few to be sure."),
        (Interval(0.01, 0.009, 0.02), "  These images are too few to show that no more than 0.01 is lost."),
        (Interval(0.0, 0.0, 0.01), None),
    ],
)
def test_the_report_says_what_the_images_cannot_show(loss, said):
    *_, last = pipeline.describe_cascade(replace(CASCADE, report=replace(REPORT, loss=loss)))
    assert last == said or (said is None and last.startswith("  On 100 images"))


def test_the_tolerance_may_be_left_out_and_the_option_too(exported, pictures, tmp_path, costs):
    given = ("infer", "--bundle", exported / "bundle", "--input", pictures)
    _, out, _ = run_cli(*given, "--cascade", "--output", tmp_path / "out.csv")
    assert "to lose at most 0.001 of AUROC" in out
    _, out, _ = run_cli(*given, "--output", tmp_path / "plain.csv")
    assert "ascade" not in out


def test_from_python(exported, pictures, costs):
    frame = pd.DataFrame({"path": [str(path) for path in sorted(pictures.glob("?[0-9]*.png"))]})
    targets = [
        Predictor.load(exported / "bundle", "cpu", cascade=tolerance).predict(frame)["target"]
        for tolerance in (None, 0.01)
    ]
    assert 0 < np.abs(targets[0] - targets[1]).max() < 0.02
    with pytest.raises(UnavailableError, match=r"more than 0 and less than 0\.5 of AUROC"):
        Predictor.load(exported / "bundle", "cpu", cascade=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cascade"], "--cascade runs a bundle: add --onnx, or name one with --bundle"),
        (["--onnx", "--tta", "--cascade"], "--cascade and --tta exclude each other"),
        (["--onnx", "--cascade", "0.5"], "0.5 is not in the range 0<x<0.5"),
        (["--onnx", "--cascade", "0"], "0.0 is not in the range 0<x<0.5"),
    ],
)
def test_wrong_use_is_said_before_anything_is_read(run, tmp_path, options, message):
    code, _, err = run_cli("infer", "--run", run, *options, "--input", tmp_path, "--output", tmp_path / "out.csv")
    assert (code, message in err) == (2, True)


def test_a_bundle_without_held_out_logits_says_how_to_get_them(tmp_path, pictures):
    run = exported_run(tmp_path / "run")
    given = ("infer", "--bundle", run / "bundle", "--input", pictures, "--output", tmp_path / "out.csv")
    code, _, err = run_cli(*given, "--cascade")
    assert code == 2
    assert "has no held-out logits to fit and report on; export again (python cli.py export; a bundle of" in err
    export_run(run, print)
    frame = pd.read_parquet(run / "bundle" / "heldout.parquet")
    assert list(frame.columns) == ["label", "group", "logit one", "logit two"]
    assert (len(frame), frame["group"].nunique(), str(frame["group"].dtype)) == (48, 12, "int32")
    assert "heldout.parquet" in bundle.open_bundle(run / "bundle")["files"]
    code, _, err = run_cli(*given, "--cascade")
    assert (code, "100 held-out images or more, and here are 48" in err) == (2, True)


def test_with_folds_the_training_rows_serve_too_each_scored_by_weights_that_never_saw_its_group(tmp_path):
    frame, scores = write_folded_run(tmp_path, {"one": 2.0, "two": 1.0})
    write_stacker(tmp_path)
    write_bundle(tmp_path)
    export_run(tmp_path, print)
    rows = pd.read_parquet(tmp_path / "bundle" / "heldout.parquet")
    held = (frame["split"] == "heldout").to_numpy()
    assert 0 < held.sum() < len(frame) == len(rows)
    for name in ("one", "two"):
        logits = scores[name]["logit"].to_numpy()
        np.testing.assert_array_equal(rows[f"logit {name}"], [*logits[held], *logits[~held]])
    np.testing.assert_array_equal(rows["label"], [*frame["label"][held], *frame["label"][~held]])
    assert rows["group"].nunique() == frame["group"].nunique()


def test_changed_held_out_logits_are_refused(run):
    path = run / "bundle" / heldout_rows.HELDOUT_FILE
    artifacts.write_parquet(path, pd.read_parquet(path).assign(label=0))
    with pytest.raises(ArtifactError, match=r"heldout\.parquet is damaged"):
        Predictor.load(run / "bundle", "cpu")


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (lambda frame: frame.drop(columns="logit two"), "has no column logit two, or more than one"),
        (lambda frame: frame.drop(columns=["label", "group"]), "has no column label, group, or more than one"),
        (lambda frame: frame.assign(**{"logit two": "<script>"}), "has values that are no numbers in logit two"),
        (lambda frame: frame.assign(group=[[1]] * len(frame)), "has values that are no numbers in group"),
        (lambda frame: frame.assign(label=frame["label"] / 1), "has values that are no numbers in label"),
        (lambda frame: frame.assign(**{"logit one": np.nan}), "has values that are not finite in logit one"),
        (lambda frame: frame.assign(**{"logit one": np.inf}), "has values that are not finite in logit one"),
        (lambda frame: frame.assign(label=2), "has labels other than 0 and 1"),
        (
            lambda frame: frame.assign(group=frame["group"].astype("Int64").where(frame["group"] > 0)),
            "has values that are not finite in group",
        ),
    ],
)
def test_held_out_logits_from_elsewhere_are_refused_in_one_line(run, tmp_path, changed, fault):
    folder = run / "bundle"
    path = folder / heldout_rows.HELDOUT_FILE
    artifacts.write_parquet(path, changed(pd.read_parquet(path)))
    values = artifacts.read_json(folder / "bundle.json", "")
    values.pop("digest")
    values["files"][path.name] = artifacts.file_sha256(path)
    artifacts.write_json(folder / "bundle.json", {**values, "digest": artifacts.json_sha256(values)})
    write_image(tmp_path / "pictures" / "grey.png")
    given = ("infer", "--bundle", folder, "--input", tmp_path / "pictures", "--output", tmp_path / "out.csv")
    code, _, err = run_cli(*given, "--cascade")
    assert code == 2
    assert re.fullmatch(rf"Error: --cascade: .*heldout\.parquet {fault}.*; export again .*\n", err)
    assert run_cli(*given)[0] == 0  # without the cascade they are not looked at


def test_a_member_runs_only_for_those_that_need_it(pictures):
    ran = []
    frame, errors = infer(read_inputs(pictures), ensemble(ran), with_members=True)
    guess = 0.3 * 4 * (np.arange(0, 256, 15) / 255 - 0.5) + 0.1
    stays = np.abs(guess) < 0.5
    assert ran == [("one", 18), ("two", stays.sum())]
    assert len(errors) == 1
    np.testing.assert_array_equal(frame["two"].notna(), [*stays, False])
    np.testing.assert_allclose(frame["target"][:18][~stays], sigmoid(guess[~stays]), rtol=1e-6)


def test_an_image_scores_alone_as_in_a_batch(pictures, tmp_path):
    together, _ = infer(read_inputs(pictures), ensemble([]))
    for path in sorted(pictures.glob("?[0-9]*.png")):
        shutil.copy(path, tmp_path)
        (only,) = infer(read_inputs(tmp_path), ensemble([]))[0]["target"]
        assert only == together.loc[together["id"] == path.name, "target"].item()
        (tmp_path / path.name).unlink()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_one_image_costs_one_where_shapes_are_free(exported, tmp_path, runtime):
    """And scores the same bits alone as among others where they are not."""
    write_image(tmp_path / "one" / "grey.png", 120)
    for value in range(100, 150, 5):
        write_image(tmp_path / "many" / f"{value}.png", value)
    write_image(tmp_path / "many" / "grey.png", 120)
    loaded = loading.load_bundle(exported / "bundle", RuntimeOptions(runtime, batch=4))
    loaded = replace(loaded, cascade=CASCADE)
    asked = []

    def spied(runner):
        return replace(runner, run=lambda pixels: asked.append(len(pixels)) or runner.run(pixels))

    alone, _ = infer(read_inputs(tmp_path / "one"), replace(loaded, runners=tuple(map(spied, loaded.runners))))
    assert asked == [1, 1]
    assert all(runner.fixed == (runtime == "openvino") for runner in loaded.runners)
    many, _ = infer(read_inputs(tmp_path / "many"), loaded)
    (among,) = many.loc[many["id"] == "grey.png", "target"]
    if runtime == "openvino":
        assert alone["target"][0] == among
    assert alone["target"][0] == pytest.approx(among, abs=1e-6)


def test_looked_up_scores_are_known_from_the_start(pictures, tmp_path):
    names = [path.name for path in sorted(pictures.iterdir())]
    one = pd.Series(np.linspace(-2, 2, len(names)), index=names)
    loaded = ensemble(ran := [], externals=(External("one", one, one),), two=lambda b: -2 * (b - 0.5))
    done, _ = to_file(tmp_path / "out.csv", pictures, loaded, members=True)
    stays = np.abs(0.3 * one[:18] + 0.1) < 0.5
    assert ran == [("two", stays.sum())]
    assert done.exits == {"one": 18 - stays.sum(), "two": stays.sum()}
    assert ((read_csv(tmp_path / "out.csv")["two"] != "")[:18] == stays.to_numpy()).all()


def test_fill_is_for_unreadable_images_not_for_members_that_did_not_run(pictures, tmp_path):
    to_file(tmp_path / "out.csv", pictures, ensemble([]), members=True, fill=0.5)
    found = read_csv(tmp_path / "out.csv").set_index("id")
    assert found.loc["broken.png"].tolist() == ["0.5"] * 3
    assert found.loc["000.png", "two"] == ""


@pytest.mark.parametrize(("name", "value"), [("one", np.nan), ("one", np.inf), ("two", np.nan), ("two", np.inf)])
def test_a_member_that_had_to_run_and_gave_no_number_is_an_error(pictures, name, value):
    logits = {"one": lambda b: 4 * (b - 0.5), "two": lambda b: 0.0}
    sound = logits[name]
    with pytest.raises(ArtifactError, match=r"gave no finite logit .*\(135\.png\)"):
        infer(read_inputs(pictures), ensemble([], **logits | {name: lambda b: value if b == 135 / 255 else sound(b)}))
    if name == "two":  # it did not run for those that left
        infer(read_inputs(pictures), ensemble([], **logits | {name: lambda b: value if b == 0 else sound(b)}))


def test_another_cascade_starts_anew(pictures, tmp_path):
    output = tmp_path / "out.csv"

    def stops(b):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_file(output, pictures, ensemble([], one=stops, two=stops))
    with pytest.raises(KeyboardInterrupt):
        to_file(output, pictures, ensemble([], one=stops, two=stops))
    _, said = to_file(output, pictures, ensemble([], cascade=None))
    assert said == ["Starting anew: changed since out.csv.partial was begun: --cascade."]


def test_a_killed_run_goes_on_to_the_same_bytes_and_rows_score_as_in_any_list_of_a_batch_or_more(
    pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(cascade_stream, "MAX_WAITING_ROWS", 128)  # the first shards are written early
    monkeypatch.setattr(cascade_stream, "MAX_WAITING_BATCHES", 1)
    names = [path.name for path in sorted(pictures.iterdir())] * 40
    table = write_csv(tmp_path / "list.csv", id=[str(row) for row in range(len(names))], path=names)

    def loaded(kill=np.inf, whole=True):
        """A member of which a row's logit depends on how full its batch is, and, if `whole`, has only full ones."""
        done = 0

        def dear(pixels):
            nonlocal done
            done += len(pixels)
            if done > kill:
                raise KeyboardInterrupt
            brightness = pixels.mean(axis=(1, 2, 3)) / 255
            return (brightness + (len(pixels) % 8) - 0.5).astype(np.float32)

        one, _ = answers([], one=lambda b: 4 * (b - 0.5), two=lambda b: 0)
        return replace(ensemble([]), runners=(one, Runner("two", PREPROCESS_CONFIG, dear, batch=8 if whole else 1)))

    def scores(output, given, source=table):
        with journal.locked_workdir(output) as folder:
            inputs = read_inputs(source, images=pictures, spill=folder)
            infer_to_file(inputs, given, output, folder, ScoreOptions(members=True), said.append)
        return output.read_bytes()

    said = []
    whole = scores(tmp_path / "whole.csv", loaded())
    with pytest.raises(KeyboardInterrupt):
        scores(tmp_path / "out.csv", loaded(kill=300))
    assert scores(tmp_path / "out.csv", loaded()) == whole
    assert re.fullmatch(r"Going on: (128|256|384|512) of 760 rows were scored before\.", *said)
    few = write_csv(tmp_path / "few.csv", id=[str(row) for row in range(2, 17)], path=names[2:17])
    assert scores(tmp_path / "some.csv", loaded(), few).splitlines()[1:] == whole.splitlines()[3:18]
    assert scores(tmp_path / "parts.csv", loaded(whole=False)) != whole  # it can fail


def test_a_member_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path))
    (runner,) = answers(ran := [], one=lambda b: 0.0)
    ticks = iter(range(1000))
    monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: 0.4 * next(ticks)))
    given = (runner, RuntimeConfig("openvino", batch=4), "a hash", Machine("a CPU", 2))
    first = autotune.seconds_per_image(*given)
    assert first == pytest.approx(0.1)  # 0.4 seconds for a batch of four
    count = len(ran)
    assert autotune.seconds_per_image(*given) == first
    assert len(ran) == count
    autotune.seconds_per_image(runner, RuntimeConfig("openvino", batch=8), *given[2:])
    assert len(ran) > count
