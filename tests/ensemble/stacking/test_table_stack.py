"""`stack --scores`: fitted on anybody's scores, applied to others, and what does not go together."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers import run_cli

from ensemble.core.metrics import auroc, sigmoid
from ensemble.stacking.stacker import METHODS, Stacker, read_stacker_values

ROWS = 240


def detectors(rows=ROWS, seed=0):
    """Three detectors in units of their own; the third is certain, and knows little."""
    rng = np.random.default_rng(seed)
    label = np.arange(rows) % 2
    z = (label - 0.5)[:, None] * [2.0, 2.0, 0.4] + rng.normal(size=(rows, 3))
    p = sigmoid(z * [1.0, 0.2, 30.0] + [0.0, 1.5, 0.0])
    frame = pd.DataFrame({"id": [f"{k:04}" for k in range(rows)], "label": label})
    frame["generator"] = np.where(label == 1, np.array(["sd", "gan", "mj"])[np.arange(rows) // 2 % 3], "photo")
    return frame.assign(calm=p[:, 0], shifted=p[:, 1], loud=p[:, 2])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    detectors().to_csv(folder / "scores.csv", index=False)
    output = folder / "stacker.json"
    given = ("--scores", folder / "scores.csv", "--output", output, "--leave-out", "generator", "--drop-one")
    return folder, run_cli("stack", *given)


def test_the_tables_are_those_of_a_run(fitted):
    folder, (code, out, err) = fitted
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[1] == f"On {ROWS} rows in {ROWS} groups; the stack out of fold, 95 % intervals over groups."
    assert [line.split()[0] for line in lines[3:8]] == ["calm", "shifted", "loud", "mean", "stack"]
    kinds = lines.index("Kinds of stack, each chosen, calibrated and scored alike:")
    assert [line.split()[0] for line in lines[kinds + 2 : kinds + 7]] == list(METHODS)
    assert "ms per image" not in out
    left_out = lines.index("The stack refitted without each generator, scored on it:")
    assert sorted(line.split()[0] for line in lines[left_out + 2 : left_out + 5]) == ["gan", "mj", "sd"]
    assert lines[-2].startswith("Worst generator: ")
    assert lines[-1] == f"-> {folder / 'stacker.json'}"


def test_the_stack_beats_its_members_and_stacker_json_says_what_it_took(fitted):
    folder, _ = fitted
    values = read_stacker_values(folder / "stacker.json", "")
    assert (values["format_version"], values["inputs"], values["kind"]) == (2, "probability", "logistic")
    scores = {name: line["auroc"]["value"] for name, line in values["scores"].items()}
    assert scores["stack"] > max(scores[name] for name in ("calm", "shifted", "loud"))
    assert values["rows"]["split"] == "table"
    assert set(values["fitted_on"]) == {"table", "sha256"}


def test_a_table_is_scored_in_its_own_order_with_its_own_ids(fitted, tmp_path):
    folder, _ = fitted
    new = detectors(60, seed=1).sample(frac=1, random_state=0)
    new = new.reset_index(drop=True)
    new.drop(columns=["label", "generator"])[["loud", "id", "calm", "shifted"]].to_parquet(tmp_path / "new.parquet")
    given = ("--scores", tmp_path / "new.parquet", "--apply", folder / "stacker.json", "--output", tmp_path / "out.csv")
    code, out, err = run_cli("stack", *given)
    assert (code, err) == (0, "")
    assert out.startswith("60 rows, ")
    written = pd.read_csv(tmp_path / "out.csv", dtype={"id": str})
    assert written.columns.tolist() == ["id", "target"]
    assert written["id"].tolist() == new["id"].tolist()
    assert auroc(new["label"].to_numpy(), written["target"].to_numpy()) > 0.8
    stacker = Stacker.from_dict(read_stacker_values(folder / "stacker.json", ""))
    p = new[list(stacker.members)].to_numpy().clip(1e-6, 1 - 1e-6)
    np.testing.assert_allclose(written["target"], stacker.target(np.log(p / (1 - p))), rtol=1e-9)


def test_missing_answers_are_counted_and_a_row_without_any_has_no_target(fitted, tmp_path):
    folder, _ = fitted
    new = detectors(20, seed=2)
    new.loc[[0, 1], "calm"] = np.nan
    new.loc[1, ["shifted", "loud"]] = np.nan
    new.to_csv(tmp_path / "new.csv", index=False)
    given = ("--scores", tmp_path / "new.csv", "--apply", folder / "stacker.json", "--output", tmp_path / "out.csv")
    code, out, err = run_cli("stack", *given)
    assert code == 1
    assert "calm: no answer on 2 of 20 rows; its mean calibrated probability is used there." in out
    assert err == "1 rows have no score by any member, so their target is empty.\n"
    written = pd.read_csv(tmp_path / "out.csv")
    assert written["target"].isna().tolist() == [k == 1 for k in range(20)]


def test_logits_are_fitted_and_applied_as_logits(tmp_path):
    frame = detectors()
    p = frame[["calm", "shifted"]].to_numpy().clip(1e-6, 1 - 1e-6)
    frame[["calm", "shifted"]] = np.log(p / (1 - p))
    frame.drop(columns="loud").to_csv(tmp_path / "z.csv", index=False)
    assert run_cli("stack", "--scores", tmp_path / "z.csv", "--logits", "--output", tmp_path / "s.json")[0] == 0
    assert json.loads((tmp_path / "s.json").read_text())["inputs"] == "logit"
    given = ("--scores", tmp_path / "z.csv", "--apply", tmp_path / "s.json", "--output", tmp_path / "out.csv")
    assert run_cli("stack", *given)[0] == 0
    assert auroc(frame["label"].to_numpy(), pd.read_csv(tmp_path / "out.csv")["target"].to_numpy()) > 0.8


TABLE = ("--scores", "scores.csv")
REFUSED = {
    "a run": ((*TABLE, "--run", "r"), "--run does not go with --scores, which needs no run"),
    "tta": ((*TABLE, "--tta"), "--tta does not go with --scores"),
    "kind": ((*TABLE, "--apply", "stacker.json", "--kind", "mean"), "--kind does not go with --apply"),
    "output alone": (("--output", "x.json"), "--output needs --scores"),
    "apply alone": (("--apply", "stacker.json"), "--apply needs --scores"),
    "logits of probabilities": (
        (*TABLE, "--apply", "stacker.json", "--logits"),
        "fitted on probabilities",
    ),
    "the table as output": ((*TABLE, "--output", "scores.csv"), "is an input and would be overwritten"),
    "the stacker as output": ((*TABLE, "--apply", "stacker.json", "--output", "stacker.json"), "is an input and would"),
    "no such table": (("--scores", "none.csv"), "no such file: none.csv"),
    "no such stacker": ((*TABLE, "--apply", "none.json"), "no none.json; name a stacker.json that stack has written"),
    "no such column": (
        ("--scores", "two.csv", "--leave-out", "source"),
        "two.csv has no column source",
    ),
    "a member that is not there": (("--scores", "two.csv", "--apply", "stacker.json"), "two.csv has no scores of loud"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(fitted, given, message, monkeypatch):
    folder, _ = fitted
    detectors().drop(columns="loud").to_csv(folder / "two.csv", index=False)
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _, err = run_cli("stack", *given)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert all(path.read_bytes() == content for path, content in before.items())
