import os
import re
import statistics
import time

import click
import pandas as pd
import pytest
from helpers import (
    ROOT,
    exported_run,
    make_frame,
    noisy_logits,
    read_csv,
    run_cli,
    run_python,
    write_csv,
    write_image,
    write_member,
    write_run,
)
from pictures import write_files

import cli
from ensemble.commands import train_all
from ensemble.stacking import stack
from ensemble.training.train_member import Outcome

RECIPE = """
backbone:
  checkpoint: microsoft/swin-tiny-patch4-window7-224
train:
  lr: 1.0e-3
  epochs: 2
  batch_size: 4
"""
BARE = """
import click
import pandas as pd

@click.group()
def cli(): ...

for number in range({count}):
    cli.command(f"command-{{number}}", help="One line of help for this one.")(lambda: None)
cli()
"""
SCORE = ("infer", "--onnx", "--device", "cpu")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder as a user would have it: recipes, two classes of images and a test set."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "recipes", "member.yaml", data=RECIPE.encode())
    write_files(tmp_path / "data" / "train", "ai/1.png", "ai/2.png", "real/1.png", "real/2.png")
    for number in range(3):
        write_image(tmp_path / "data" / "images" / f"{number}.png", 100 * number)
    write_csv(tmp_path / "data" / "test.csv", id=["2", "0", "1"])
    return tmp_path


def refused(command, message):
    code, out, err = run_cli(*command.split())
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert message in err


def unwrapped(text):
    return "".join(text.split())


def resolved(name):
    return cli.cli.get_command(click.Context(cli.cli), name)


def test_help_lists_every_command_with_its_line():
    code, out, err = run_cli("--help")
    assert (code, err) == (0, "")
    listed = [line.split(maxsplit=1) for line in out.partition("Commands:\n")[2].splitlines()]
    assert listed == [[name, line] for name, (_, line) in cli.COMMANDS.items()]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there_and_documents_each_option(name):
    command = resolved(name)
    assert isinstance(command, click.Command)
    assert command.name == name
    code, out, err = run_cli(name, "--help")
    assert (code, err) == (0, "")
    assert f" {name} [OPTIONS]" in out.splitlines()[0]
    assert unwrapped(command.help.partition(".")[0]) in unwrapped(out)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert all(text in out for text in parameter.opts)
            assert parameter.help, f"{parameter.opts} has no help"
            assert unwrapped(parameter.help) in unwrapped(out)


def test_a_command_that_cannot_be_found_is_no_command():
    assert resolved("trian") is None


def test_version_is_printed():
    code, out, _ = run_cli("--version")
    assert code == 0
    assert "version 0.1.0" in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "[OPTIONS] COMMAND [ARGS]"),
        ("trian", "No such command 'trian'"),
        ("--verbose", "No such option '--verbose'"),
        ("train", "Missing argument 'RECIPE'"),
        ("train recipes", "is a directory"),
        ("train-all --seed -1", "Invalid value for '--seed'"),
        ("train-all --tune many", "'many' is not a valid float"),
        ("stack --members", "Option '--members' requires an argument"),
        ("stack extra", "Got unexpected extra argument (extra)"),
        ("infer --device tpu", "Invalid value for '--device': 'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        ("infer --fill 2", "Invalid value for '--fill'"),
        ("infer --batch-size 0", "Invalid value for '--batch-size'"),
        ("infer --output data", "is a directory"),
    ],
)
def test_wrong_use_exits_with_2_and_says_what_is_wrong(command, message):
    code, out, err = run_cli(*command.split())
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train-all --data gone", "no data at gone; put images in gone/ai and gone/real"),
        ("train-all --data three.csv", "must hold two classes ('0' 1 times, '1' 1 times, '2' 1 times)"),
        ("train-all --data empty", "real holds no images; both classes need some"),
        ("train-all gone", "no recipe at gone; name a YAML file, or a folder of them"),
        ("train-all data", "no recipe (*.yaml) in data"),
        ("train-all --set train.lrr=1", "recipes/member.yaml: train.lrr: unknown key; did you mean 'lr'?"),
        ("train-all --set train.lr=-1", "recipes/member.yaml: train.lr: Input should be greater than 0 (got -1)"),
        ("train gone.yaml", "no recipe at gone.yaml; name a YAML file"),
        ("train-all --set backbone.checkpoint=swin-tiny", "'swin-tiny' is neither a folder here nor a Hub id such as"),
        ("train-all --set backbone.checkpoint=data", "data has no config.json"),
        ("train-all --tune 0.6 --heldout 0.6", "both must be above 0 and their sum below 1"),
        ("train-all --run recipes/member.yaml/run", "cannot make recipes/member.yaml/run"),
        ("stack", "no members in runs/default; train them first: python cli.py train-all recipes/ --run runs/default"),
        ("stack --run elsewhere", "no members in elsewhere"),
        ("export", "no runs/default/stacker.json; run: python cli.py stack --run runs/default"),
        ("infer", "no runs/default/stacker.json; run: python cli.py stack --run runs/default"),
        ("infer --onnx", "no runs/default/stacker.json; run: python cli.py stack --run runs/default"),
        ("infer --input gone.csv", "no input at gone.csv; give a CSV with a column id, or a folder of images"),
        ("infer --input three.csv", "1 of 3 ids have no image in .: '3'; name their folder with --images"),
        ("infer --images gone", "no such folder: gone (--images)"),
        ("infer --output data/test.csv/out.csv", "test.csv: "),
    ],
)
def test_what_cannot_be_done_is_one_line_that_says_what_to_do(here, command, message):
    write_files(here / "empty", "ai/1.png", "real/notes.txt")
    write_csv(here / "three.csv", id=["1", "2", "3"], label=["0", "1", "2"])
    refused(command, message)
    assert not (here / "submission.csv").exists()


def test_stack_before_infer_is_asked_for_by_name(here):
    write_run(here / "runs" / "default")
    refused("infer --onnx", "no runs/default/stacker.json; run: python cli.py stack --run runs/default")


def test_an_error_in_a_real_process_is_the_same_line(here):
    result = run_python(ROOT / "cli.py", "stack", "--run", here / "run")
    assert (result.returncode, result.stdout) == (2, "")
    run = here / "run"
    remedy = f"train them first: python cli.py train-all recipes/ --run {run}"
    assert result.stderr == f"Error: no members in {run}; {remedy}\n"


@pytest.fixture
def run(here):
    return exported_run(here / "runs" / "default")


def test_infer_scores_and_exits_with_0(here, run):
    code, out, err = run_cli(*SCORE, "--members")
    assert (code, err) == (0, "")
    chosen, *lines = out.splitlines()
    assert " fp32 on " in chosen
    assert lines[0] == "3 images, 2 members on cpu"
    assert re.fullmatch(r"3 images scored -> submission\.csv, [\d,.]+ images per second", lines[1])
    scores = read_csv(here / "submission.csv")
    assert list(scores.columns) == ["id", "target", "one", "two"]
    assert list(scores["id"]) == ["2", "0", "1"]


def test_a_bundle_alone_scores_as_the_run_it_came_from(here, run):
    run_cli(*SCORE)
    (run / "bundle").rename(here / "copied")
    output = here / "other.csv"
    code, out, err = run_cli("infer", "--device", "cpu", "--bundle", here / "copied", "--output", output)
    assert (code, err) == (0, "")
    assert "Not in the stack" not in out
    assert output.read_bytes() == (here / "submission.csv").read_bytes()
    code, _, err = run_cli("infer", "--device", "cpu", "--bundle", here / "copied", "--output", output, "--tta")
    assert code == 2
    assert err.endswith("leave out --tta, or use a bundle whose run had: python cli.py stack --tta\n")
    code, _, err = run_cli("infer", "--bundle", here / "copied", "--run", run)
    assert code == 2
    assert "Error: give either --bundle or --run, not both" in err


@pytest.mark.parametrize(("name", "output"), [("mine.csv", "mine.csv"), ("mine.errors.csv", "mine.csv")])
def test_the_input_is_never_overwritten(here, run, name, output):
    table = write_csv(here / "data" / name, id=["2", "0", "1"])
    before = table.read_bytes()
    code, out, err = run_cli(*SCORE, "--input", table, "--output", f"data/{output}")
    assert (code, out) == (2, "")
    assert err == f"Error: data/{name} is the input and would be overwritten; choose another --output\n"
    assert table.read_bytes() == before


@pytest.mark.parametrize(("source", "output"), [("sets/*.parquet", "sets/b.parquet"), ("sets", "linked.parquet")])
def test_one_of_several_inputs_is_never_overwritten(here, run, source, output):
    table, file = here / "data" / "sets", here / "data" / output
    table.mkdir()
    for name in "ab":
        frame = pd.DataFrame({"id": [name], "image": [(here / "data/images/0.png").read_bytes()]})
        frame.to_parquet(table / f"{name}.parquet")
    if not file.exists():
        file.hardlink_to(table / "b.parquet")
    before = file.read_bytes()
    code, out, err = run_cli(*SCORE, "--input", f"data/{source}", "--output", f"data/{output}")
    assert (code, out) == (2, "")
    assert err == f"Error: data/{output} is the input and would be overwritten; choose another --output\n"
    assert file.read_bytes() == before
    assert not file.with_name(f"{file.name}.partial").exists()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_names_may_be_no_utf8_nor_longer_than_a_file_can_have(here, run, suffix):
    assert run_cli(*SCORE, "--output", f"plain.{suffix}")[0] == 0
    output = here / os.fsdecode(b"o\xe9." + suffix.encode())
    code, out, err = run_cli(*SCORE, "--output", output)
    assert (code, err) == (0, "")
    assert "images scored -> " in out.encode().decode()  # a terminal takes UTF-8 alone
    assert output.read_bytes() == (here / f"plain.{suffix}").read_bytes()
    code, _, err = run_cli(*SCORE, "--output", f"{'n' * 300}.{suffix}")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "File name too long; choose another place" in err


def test_shards_among_images_are_spoken_of(here, run):
    write_files(here / "data", "images/more.tar")
    code, _, err = run_cli(*SCORE, "--input", "data/images")
    assert (code, len(err.splitlines())) == (0, 1)
    assert "skipped in it: 'more.tar'" in err


def test_failures_listed_exit_with_1(here, run):
    (here / "data" / "images" / "0.png").write_bytes(b"")
    code, out, err = run_cli(*SCORE, "--fill", "0.5", "--output", "out/scores.csv")
    assert code == 1
    assert "2 images scored -> out/scores.csv" in out
    assert err == "Error: 1 images could not be read, listed in out/scores.errors.csv\n"
    assert read_csv(here / "out" / "scores.csv").loc[1].tolist() == ["0", "0.5"]
    assert list(read_csv(here / "out" / "scores.errors.csv")["id"]) == ["0"]


def test_nothing_scored_exits_with_2(here, run):
    for file in (here / "data" / "images").iterdir():
        file.write_bytes(b"")
    code, out, err = run_cli(*SCORE)
    assert code == 2
    assert "0 images scored" in out
    assert err.startswith("Error: 3 images could not be read")


def test_a_damaged_bundle_is_not_used(here, run):
    (run / "bundle" / "members" / "one.fp32.onnx").write_bytes(b"")
    refused(
        "infer --onnx",
        "one.fp32.onnx is damaged: it is not the file that was written; make it anew with: python cli.py export",
    )
    assert not (here / "submission.csv").exists()


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [("trained unchanged", 0), ("trained failed", 1), ("unchanged failed", 1), ("failed failed", 2)],
)
def test_training_exits_by_how_many_members_failed(here, capsys, statuses, expected):
    write_run(here)
    statuses = statuses.split()
    outcomes = [Outcome(name, status, 1.0, "why") for name, status in zip(("one", "two"), statuses, strict=True)]
    assert train_all.report(here, outcomes) == expected
    out, err = capsys.readouterr()
    assert [line.split()[:2] for line in out.splitlines()[2:-1]] == [["one", statuses[0]], ["two", statuses[1]]]
    assert out.count("2/3") == len(statuses) - statuses.count("failed")  # best epoch of all
    assert err == "".join(f"Error: {outcome.name}: why\n" for outcome in outcomes if outcome.status == "failed")


def test_stack_takes_the_members_named(here):
    frame = write_run(here / "runs" / "default")
    write_member(here / "runs" / "default", "three", frame, noisy_logits(make_frame(), 1, 3))
    code, out, _ = run_cli("stack", "--members", "three, one,")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:6]] == ["three", "one", "mean", "stack"]


def test_an_interruption_says_that_nothing_is_lost(here, monkeypatch):
    def interrupt(run, members, choices):
        raise KeyboardInterrupt

    monkeypatch.setattr(stack, "stack_run", interrupt)
    code, _, err = run_cli("stack")
    assert code == 130
    assert "What was finished is kept" in err


def test_help_takes_no_longer_than_clicks_own(tmp_path):
    bare = tmp_path / "bare.py"
    bare.write_text(BARE.format(count=len(cli.COMMANDS)))

    def seconds(script):
        started = time.perf_counter()
        assert run_python(script, "--help").returncode == 0
        return time.perf_counter() - started

    def ratio():
        pairs = [(seconds(ROOT / "cli.py"), seconds(bare)) for _ in range(9)]
        ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
        return ours / theirs

    assert ratio() <= 1.5 or ratio() <= 1.5
