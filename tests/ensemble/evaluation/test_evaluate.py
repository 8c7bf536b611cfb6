from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import make_frame, noisy_logits, write_csv, write_member

from ensemble.core import artifacts
from ensemble.core.errors import DataError
from ensemble.data.sources import LabelledImage
from ensemble.evaluation import leakage
from ensemble.evaluation.evaluate import check_classes, evaluation_name, output_folder, sample_images
from ensemble.evaluation.leave_out import leave_out_generators, training_commands
from ensemble.stacking.fit import fit_stacker


def images(*labels):
    return [LabelledImage(f"{row:03}", "root", f"{row}.png", label) for row, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("real", "ai", "limit", "expected"),
    [(20, 20, 10, (5, 5)), (3, 30, 10, (3, 7)), (30, 2, 9, (7, 2)), (2, 3, 9, (2, 3))],
)
def test_a_limit_takes_half_of_each_class_or_what_there_is(real, ai, limit, expected):
    items = images(*[0] * real, *[1] * ai)
    chosen = sample_images(items, limit, 0)
    assert (sum(item.label == 0 for item in chosen), sum(item.label == 1 for item in chosen)) == expected
    assert chosen == sorted(chosen, key=lambda item: item.id)
    assert chosen == sample_images(items[::-1], limit, 0)


def test_the_seed_draws_other_images():
    items = images(*[0, 1] * 50)
    assert sample_images(items, 10, 0) != sample_images(items, 10, 1)


@pytest.mark.parametrize(
    ("labels", "stress", "message"),
    [
        ([], False, "no images"),
        ([0, 0], False, "all images are real"),
        ([1], False, "all images are ai"),
        ([0, 1], True, "of both"),
    ],
)
def test_classes_that_cannot_be_scored_so(labels, stress, message):
    with pytest.raises(DataError, match=message):
        check_classes(images(*labels), stress)


@pytest.mark.parametrize(
    ("files", "name", "limit", "expected"),
    [
        (["test/labels.csv"], None, None, "test-labels"),
        (["flickr.csv"], None, 20, "flickr-20"),
        (["GenImage", "reals"], None, None, "GenImage+reals"),
        (["x.csv"], "../../etc/<script>", 3, "etc_script"),
        (["x.csv"], "...", None, "unnamed"),
        (["写真.csv"], None, None, "unnamed"),
    ],
)
def test_an_evaluation_is_named_safely(tmp_path, files, name, limit, expected):
    paths = [tmp_path / file for file in files]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch() if path.suffix else path.mkdir()
    assert evaluation_name(paths, name, limit, "inductive") == expected
    apart = expected if name else f"{expected}-transductive"
    assert evaluation_name(paths, name, limit, "transductive") == apart.replace("unnamed-", "")


def test_evaluations_lie_in_the_run_or_where_they_are_asked_for():
    assert output_folder(Path("run"), None, "n") == Path("run/evaluations/n")
    assert output_folder(Path("run"), Path("o"), "n") == Path("o")
    with pytest.raises(DataError, match="--output"):
        output_folder(None, None, "n")


def test_rows_of_every_split_but_unseen_count_as_trained_on(tmp_path):
    frame = make_frame()
    frame["sha256"] = [f"{row:064x}" for row in range(len(frame))]
    frame.loc[frame.index[:2], "split"] = "unseen"
    artifacts.write_parquet(artifacts.dataset_path(tmp_path), frame)
    wanted = [*frame["sha256"], "", "f" * 64]
    assert leakage.trained_rows(tmp_path, wanted).tolist() == [False] * 2 + [True] * (len(frame) - 2) + [False] * 2


def selection(folder, test, drew):
    artifacts.write_json(folder / "selection.json", {"test": str(test)})
    write_csv(folder / "selection.csv", id=["a"] * len(drew), test_id=drew)
    frame = make_frame().assign(root=str(folder), sha256="0" * 64)
    artifacts.write_parquet(artifacts.dataset_path(folder), frame)
    return folder


@pytest.mark.parametrize(
    ("drew", "moved", "expected"),
    [
        (["other"], False, True),
        (["000", "001"], True, True),
        (["000", "999"], True, False),
        (["other"], True, False),
    ],
)
def test_a_selections_test_is_known_by_its_place_or_by_its_ids(tmp_path, drew, moved, expected):
    (tmp_path / "test").mkdir()
    run = selection(tmp_path / "run", tmp_path / ("gone" if moved else "test"), drew)
    items = [LabelledImage(f"{row:03}", str(tmp_path / "test"), f"{row}.png", row % 2) for row in range(4)]
    found = leakage.selected_for(run, items)
    assert found == ([str(run / "selection.json")] if expected else [])
    assert leakage.check_untrained(run, items, "transductive", allow_trained=False) == ([""] * 4, 0)
    if expected:
        with pytest.raises(DataError, match="--track transductive"):
            leakage.check_untrained(run, items, "inductive", allow_trained=False)


GENERATORS = np.array(["gan", "diffusion"])


@pytest.fixture
def run(tmp_path):
    """Member "one" knows only gan, member "two" only diffusion; the run, its stacker and its own rows to score."""
    frame = make_frame(groups=30)
    generator = GENERATORS[(frame.index // 2) % 2]
    frame["generator"] = np.where(frame["label"] == 1, generator, "none")
    held = frame[frame["split"] == "heldout"].reset_index(drop=True)
    logits = {
        name: noisy_logits(frame, 0, seed) + 3.0 * (held["generator"] == own)
        for seed, (name, own) in enumerate(zip(("one", "two"), GENERATORS, strict=True))
    }
    artifacts.write_parquet(artifacts.dataset_path(tmp_path), frame)
    for name, values in logits.items():
        write_member(tmp_path, name, frame, values)
    names = list(logits)
    table = np.stack(list(logits.values()), axis=1)
    stacker = fit_stacker(names, table, held["label"].to_numpy(), held["group"].to_numpy(dtype=str))
    clean = pd.DataFrame(
        {
            "label": held["label"],
            "group": held["group"],
            "generator": held["generator"],
            "logit:one": logits["one"],
            "logit:two": logits["two"],
        }
    )
    return tmp_path, stacker, clean


def test_a_stack_without_a_generators_rows_is_worse_on_it(run):
    folder, stacker, clean = run
    lines = {line["generator"]: line for line in leave_out_generators(folder, clean, stacker)}
    assert set(lines) == set(GENERATORS)
    for line in lines.values():
        assert line["known"]
        assert line["rows"] == line["images"] == 30
        assert line["full"]["value"] > line["without"]["value"] + 0.05


def test_a_generator_that_no_row_was_fitted_on_changes_nothing(run):
    folder, stacker, clean = run
    renamed = clean.assign(generator=clean["generator"].replace("gan", "new"))
    new = next(line for line in leave_out_generators(folder, renamed, stacker) if line["generator"] == "new")
    assert (new["known"], new["rows"], new["full"]) == (False, 0, new["without"])


@pytest.mark.parametrize(
    ("names", "message"),
    [({}, "name no generators"), ("new", r"other generators \(diffusion, gan\) than these images have \(new\)")],
)
def test_generators_that_cannot_be_left_out_are_told(run, names, message):
    folder, stacker, clean = run
    with pytest.raises(DataError, match=message):
        leave_out_generators(folder, clean.assign(generator=names or None), stacker)


def test_the_commands_are_safe_for_a_shell():
    assert training_commands(Path("runs/a"), ["sd 1.5; rm"]) == [
        "python cli.py train-all ... --hold-out 'generator=sd 1.5; rm' --run runs/a-without-sd_1.5_rm"
    ]
