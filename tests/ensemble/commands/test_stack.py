import re

import numpy as np
import pytest
from helpers import make_frame, noisy_logits, run_cli, write_member, write_run

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.stacking import stack
from ensemble.stacking.stack import read_stacker
from ensemble.stacking.stacker import read_stacker_values


@pytest.fixture
def run(tmp_path):
    write_run(tmp_path)
    return tmp_path


def test_fewer_rows_than_members_are_refused(tmp_path):
    frame = make_frame(groups=2, rows=2)
    artifacts.write_parquet(artifacts.dataset_path(tmp_path), frame)
    for seed in range(5):
        write_member(tmp_path, f"m{seed}", frame, noisy_logits(frame, 1, seed))
    with pytest.raises(ArtifactError, match="4 held-out rows are fewer than the 5 members to weigh; train with"):
        stack.stack_run(tmp_path)


def test_a_member_that_says_the_same_of_every_image_is_refused_by_name(run):
    frame = make_frame()
    write_member(run, "flat", frame, np.full(48, 0.25))
    code, _, err = run_cli("stack", "--run", run)
    assert code == 2
    assert err.startswith(
        "Error: every held-out image has the same p by flat, which separates no ai from real; train again"
    )
    assert run_cli("stack", "--run", run, "--members", "one,two")[0] == 0


def test_twins_and_a_better_kind_are_said(tmp_path):
    frame = make_frame()
    good = noisy_logits(frame, 2.5, 1)
    # twelve more that share one noise: the mean believes them as much as the good ones
    shared = noisy_logits(frame, 0.5, 7)
    weak = {f"weak{i}": shared + 0.1 * noisy_logits(frame, 0, 10 + i) for i in range(12)}
    write_run(tmp_path, {"good": good, "twin": 2 * good + 0.01 * noisy_logits(frame, 0, 5), **weak})
    code, out, _ = run_cli("stack", "--run", tmp_path, "--kind", "mean")
    assert code == 0
    assert "good and twin say nearly the same (correlation 1.000, above 0.98)" in out
    assert re.search(r"\n(\w+) is clearly better than mean on these rows; take it with --kind \1\.\n", out)
    stacker = read_stacker(tmp_path)
    assert stacker.method == "mean"
    assert len(set(stacker.coef)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "fpr=0.01"], "needs at least 100 real"),
        (["--threshold", "soon"], "'soon' is neither balanced, fpr=SHARE nor a number in 0..1"),
        (["--kind", "worst"], "'worst' is not one of 'logistic', 'logit', 'nonnegative', 'mean', 'best'"),
    ],
)
def test_choices_that_cannot_be_kept_are_refused(run, arguments, message):
    code, _, err = run_cli("stack", "--run", run, *arguments)
    assert code == 2
    assert message in err


def test_a_threshold_by_fpr_is_stored_with_its_rule(run):
    assert run_cli("stack", "--run", run, "--threshold", "fpr=0.25", "--calibration", "temperature")[0] == 0
    stacker = read_stacker(run)
    assert stacker.threshold_rule == "fpr=0.25"
    assert stacker.calibration.kind == "temperature"
    rows = read_stacker_values(artifacts.stacker_path(run), "")
    assert set(rows["ece"]) == {"before_calibration", "after"}


def test_help_teaches():
    code, out, _ = run_cli("stack", "--help")
    assert code == 0
    assert "stack --drop-one --threshold fpr=0.05" in out
    assert "NAME=heldout.csv,test.csv" in out
