import re
import shutil

import numpy as np
import pandas as pd
import pytest
from helpers import (
    expected_logits,
    heldout,
    noisy_logits,
    read_csv,
    run_cli,
    write_bundle,
    write_csv,
    write_folded_run,
    write_image,
    write_run,
)
from pictures import HOSTILE_NAMES

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, DataError
from ensemble.core.metrics import sigmoid
from ensemble.data.inputs import read_inputs
from ensemble.models import external, members
from ensemble.stacking.stack import StackOptions, read_stacker, stack_run
from export.bundle import bundle
from export.inference.infer import infer
from export.inference.loading import load_bundle, load_run


def scores(path, ids, logits, column="logit"):
    values = logits if column == "logit" else sigmoid(np.asarray(logits))
    return write_csv(path, id=list(ids), **{column: [repr(float(value)) for value in values]})


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    """A run of two members and a strong one from elsewhere, stacked; images a, b and c to score."""
    run = tmp_path_factory.mktemp("external")
    frame = write_run(run)
    for name, value in (("a", 0), ("b", 255), ("c", 128)):
        write_image(run / "images" / f"{name}.png", value)
    write_csv(run / "test.csv", id=list("abc"))
    logits = noisy_logits(frame, 3, 7)
    order = np.random.default_rng(0).permutation(len(logits))
    scores(run / "held,out.csv", heldout(frame)["id"].iloc[order], logits[order])
    scores(run / "test_scores.csv", "cabz", [0.5, -1.0, 2.0, 9.0], "p")
    done = run_cli("stack", "--run", run, "--external", f"clip={run / 'held,out.csv'},{run / 'test_scores.csv'}")
    return run, frame, logits, done


@pytest.fixture
def run(stacked, tmp_path):
    return shutil.copytree(stacked[0], tmp_path / "run")


def test_it_is_one_member_more_of_the_stack(stacked):
    run, frame, logits, (code, out, err) = stacked
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[2:7]] == ["one", "two", "clip", "mean", "stack"]
    stacker = read_stacker(run)
    assert stacker.members == ("one", "two", "clip")
    assert stacker.coef[2] > stacker.coef[0]
    rows, stored = members.heldout_logits(run, stacker.members)
    np.testing.assert_allclose(stored[:, 2], logits)
    assert list(rows["id"]) == list(heldout(frame)["id"])


@pytest.mark.parametrize("onnx", [True, False])
def test_infer_looks_its_scores_up(run, onnx, monkeypatch):
    write_bundle(run, ["clip"])
    if not onnx:  # the torch members of these tests have no weights
        runners = {runner.name: runner for runner in load_bundle(artifacts.bundle_path(run)).runners}
        monkeypatch.setattr("ensemble.models.members.load_member", lambda run, name: name)
        monkeypatch.setattr(
            "ensemble.models.torch_runner.torch_runner", lambda name, member, device, batch: runners[name]
        )
    ensemble = load_run(run, onnx)
    assert [member.name for member in ensemble.externals] == ["clip"]
    inputs = read_inputs(run / "test.csv")
    result, errors = infer(inputs, ensemble, with_members=True)
    logits = np.column_stack(
        [expected_logits([item.source for item in inputs.items(0, inputs.count)]), [-1.0, 2.0, 0.5]]
    )
    np.testing.assert_allclose(result["target"], ensemble.stacker.target(logits), rtol=1e-5)
    np.testing.assert_allclose(result["clip"], sigmoid([-1.0, 2.0, 0.5]))
    assert list(result.columns) == ["id", "target", "one", "two", "clip"]
    assert errors.empty


def test_the_command_says_what_it_looks_up_and_which_ids_have_no_score(run):
    write_bundle(run, ["clip"])
    assert bundle.is_current(run)
    common = ["infer", "--onnx", "--run", run, "--device", "cpu", "--output", run / "out.csv", "--input"]
    code, out, err = run_cli(*common, run / "test.csv")
    assert (code, err) == (0, "")
    assert "Looked up by id: clip" in out
    assert list(read_csv(run / "out.csv")["id"]) == ["a", "b", "c"]
    write_image(run / "images" / "d.png")
    code, _, err = run_cli(*common, write_csv(run / "more.csv", id=list("dab")))
    assert code == 2
    assert err.startswith("Error: clip was trained elsewhere and has no score for 1 of 3 ids ('d'); give its scores")


def test_an_image_that_cannot_be_read_has_no_target(run):
    write_bundle(run, ["clip"])
    (run / "images" / "b.png").write_bytes(b"no image")
    result, errors = infer(read_inputs(run / "test.csv"), load_run(run, True), with_members=True)
    assert list(errors["id"]) == ["b"]
    assert result[["target", "one", "clip"]].isna().to_numpy().tolist() == [[False] * 3, [True] * 3, [False] * 3]


def test_changed_scores_are_stale_or_damaged(run):
    write_bundle(run, ["clip"])
    scores_file = artifacts.external_path(run, "clip")
    other = pd.read_parquet(scores_file).assign(logit=1.0)
    artifacts.write_parquet(artifacts.external_path(artifacts.bundle_path(run), "clip"), other)
    with pytest.raises(ArtifactError, match=r"clip\.parquet is damaged"):
        load_run(run, True)
    artifacts.write_parquet(scores_file, other)
    with pytest.raises(ArtifactError, match="changed since the stack was fitted"):
        read_stacker(run)


def test_a_stack_without_it_again_leaves_it_out(run):
    assert run_cli("stack", "--run", run)[0] == 0
    assert read_stacker(run).members == ("one", "two")


def test_export_carries_the_scores(run, monkeypatch):
    from export.bundle import export

    folder = write_bundle(run, ["clip"])
    record = {
        name: {"entry": entry, "files": {}, "certificate": {}}
        for name, entry in bundle.open_bundle(folder)["members"].items()
    }
    monkeypatch.setattr(export, "export_member", lambda work, name, *rest: record[name])
    export.export_run(run, print)
    assert bundle.is_current(run)
    assert load_run(run, True).externals[0].test.to_dict() == pytest.approx({"c": 0.5, "a": -1, "b": 2, "z": 9})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[:-2], r"clip: the ids of its held-out scores do not match .* 2 missing \('heldout/11-2', "),
        (lambda ids: [*ids, "x"], r"do not match the run's held-out rows: 1 not held out \('x'\); score just the rows"),
        (lambda ids: ["x", *ids[1:]], r"1 missing \('heldout/00-0'\) and 1 not held out \('x'\)"),
    ],
)
def test_ids_that_do_not_match_are_named(run, change, message):
    before = artifacts.stacker_path(run).read_bytes()
    ids = change(list(heldout(artifacts.read_parquet(run / "dataset.parquet", ""))["id"]))
    path = scores(run / "held.csv", ids, np.zeros(len(ids)))
    code, out, err = run_cli("stack", "--run", run, "--external", f"clip={path},{run / 'test_scores.csv'}")
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert artifacts.stacker_path(run).read_bytes() == before


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a", "b"], "p": ["0.5", "1.5"]}, r"p is not a probability in 0\.\.1 for 'b'"),
        ({"id": ["a", "b"], "target": ["0.5", ""]}, r"target is not a probability in 0\.\.1 for 'b'"),
        ({"id": ["a", "b"], "logit": ["inf", "1"]}, "logit is not a finite number for 'a'"),
        ({"id": ["a", "a"], "p": ["0.5", "0.5"]}, "ids given more than once: 'a'"),
        ({"id": ["a"], "ai": ["0.5"]}, "needs the columns id and logit or p or target or score; it has: id, ai"),
        ({"p": ["0.5"]}, "needs the columns id and"),
    ],
)
def test_scores_that_are_none_are_refused(tmp_path, columns, message):
    path = write_csv(tmp_path / "s.csv", **columns)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}.*{message}"):
        external.read_external_csv("clip", path, path)


@pytest.mark.parametrize("name", ["", "a b", "../a", "mean", "stack", "id", "é"])
def test_a_name_that_cannot_be_a_members_is_refused(run, name):
    code, _, err = run_cli("stack", "--run", run, "--external", f"{name}={run / 'test.csv'},{run / 'test.csv'}")
    assert code == 2
    assert "cannot be a member's name" in err


@pytest.mark.parametrize(("text", "message"), [("x=a.csv,b.csv", "are not two CSV files"), ("x", "are not two CSV")])
def test_files_that_are_not_there_are_refused(run, text, message):
    code, _, err = run_cli("stack", "--run", run, "--external", text)
    assert code == 2
    assert message in err


def test_a_members_name_is_taken(run):
    pair = f"{run / 'held,out.csv'},{run / 'test_scores.csv'}"
    for names, message in ((["one"], "--external one: a member"), (["x", "x"], "--external x: a member")):
        arguments = [word for name in names for word in ("--external", f"{name}={pair}")]
        code, _, err = run_cli("stack", "--run", run, *arguments)
        assert code == 2
        assert f"{message} of that name is there already" in err


def test_with_folds_it_is_refused(tmp_path):
    frame, _ = write_folded_run(tmp_path, {"one": 2.0, "two": 1.0})
    series = pd.Series(0.0, index=heldout(frame)["id"])
    choices = StackOptions(externals=(external.External("clip", series, series),))
    with pytest.raises(ArtifactError, match="--external needs a run without --folds"):
        stack_run(tmp_path, options=choices)


def test_certain_probabilities_are_clipped_and_ids_stay_as_they_are(tmp_path):
    ids = list(HOSTILE_NAMES)
    path = write_csv(tmp_path / "s.csv", id=ids, score=["0", "1"] * (len(ids) // 2))
    found = external.read_external_csv("clip", path, path)
    assert list(found.test.index) == ids
    np.testing.assert_allclose(sigmoid(found.test.to_numpy()[:2]), [1e-6, 1 - 1e-6])
    external.write_external(tmp_path, found)
    pd.testing.assert_series_equal(external.read_external(tmp_path, "clip").heldout, found.heldout, check_names=False)
