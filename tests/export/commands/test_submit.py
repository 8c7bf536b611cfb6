"""infer, then submit: what made the scores is known, carried on, and refused where it must be."""

import json
import shutil

import pytest
from helpers import STACKER, change_json, exported_run, read_csv, run_cli, write_csv, write_image, write_onnx

from ensemble.core import artifacts
from ensemble.core.metrics import Interval
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle, operating_point
from export.inference import pipeline

IDS = ["a", "b", "007"]
ENDS = ("value", "low", "high")
INFER = ("infer", "--onnx", "--run", "run", "--input", "test.csv", "--device", "cpu")
SUBMIT = ("submit", "--run", "run", "--sample", "sample.csv")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run, images, their table and the competition's sample."""
    folder = tmp_path_factory.mktemp("made")
    exported_run(folder / "run")
    change_json(folder / "run" / "stacker.json", scores={"stack": {"auroc": {"value": 0.9, "low": 0.8, "high": 0.95}}})
    stacker = (folder / "run" / "stacker.json").read_bytes()
    (folder / "run" / "bundle" / "stacker.json").write_bytes(stacker)
    bundle.write_bundle(folder / "run" / "bundle", bundle.read_contents(folder / "run" / "bundle")["members"])
    for brightness, name in zip((10, 90, 240), IDS, strict=True):
        write_image(folder / "images" / f"{name}.png", brightness)
    write_csv(folder / "test.csv", id=IDS)
    write_csv(folder / "sample.csv", Id=IDS[::-1], label=["0.5"] * 3)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def done(*arguments):
    code, out, err = run_cli(*arguments)
    assert code == 0, err
    return out


def refused(*arguments):
    code, out, err = run_cli(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    return err


def test_infer_then_submit(here):
    done(*INFER)
    scored = read_csv(here / "submission.csv")
    said = done(*SUBMIT)
    submitted = read_csv(here / "submission.csv")
    assert submitted.to_dict("list") == {"Id": IDS[::-1], "label": scored["target"].tolist()[::-1]}
    assert said.splitlines() == [
        "AUROC of the stack on held-out images: 0.9000 [0.8000, 0.9500].",
        "Rows were put into the sample's order.",
        "3 rows as in sample.csv -> submission.csv; what made it: submission.csv.json",
    ]


def test_the_fingerprint_says_what_made_it_and_nothing_of_this_machine(here):
    done(*INFER, "--output", "scores.csv", "--precision", "fp32")
    done(*SUBMIT, "--scores", "scores.csv")
    text = (here / "submission.csv.json").read_text(encoding="utf-8")
    values = json.loads(text)
    assert str(here) not in text
    assert values["file"] == "submission.csv"
    assert values["sha256"] == artifacts.file_sha256(here / "submission.csv")
    made = values["made"]
    assert made["bundle"] == json.loads((here / "run" / "bundle" / "bundle.json").read_text())["digest"]
    assert list(made["members"]) == list(STACKER.members)
    assert all(setting.endswith(" fp32") for setting in made["members"].values())
    assert made["uncertified"] == []
    assert made["images"] == {"scored": 3, "failed": 0}
    assert made["options"] == {"members": False, "tta": False, "adapted": False, "fill": None, "cascade": None}
    assert set(made["versions"]) >= {"manyeyes", "python", "numpy", "pillow"}
    facts = values["submission"]
    assert (facts["sample"], facts["rows"], facts["reordered"], facts["hard"]) == ("sample.csv", 3, True, False)
    assert facts["scores_sha256"] == artifacts.file_sha256(here / "scores.csv")
    assert facts["heldout_auroc"] == {"value": 0.9, "low": 0.8, "high": 0.95}


def test_a_bundle_alone_and_parquet_do_as_well(here):
    (here / "run" / "bundle").rename(here / "copied")
    done("infer", "--bundle", "copied", "--input", "images", "--output", "scores.parquet")
    write_csv(here / "sample.csv", id=["007.png", "a.png", "b.png"], target=["0.5"] * 3)
    said = done("submit", "--bundle", "copied", "--scores", "scores.parquet", "--sample", "sample.csv")
    assert "AUROC of the stack on held-out images: 0.9000" in said
    assert "Nothing beside" not in said


def test_scores_of_infer_come_out_byte_for_byte(here):
    write_csv(here / "sample.csv", id=IDS, target=["0.5"] * 3)
    done(*INFER, "--output", "scores.csv")
    done(*SUBMIT, "--scores", "scores.csv")
    assert (here / "submission.csv").read_bytes() == (here / "scores.csv").read_bytes()


def test_labels_by_the_stacks_threshold(here):
    done(*INFER, "--output", "scores.csv")
    write_csv(here / "sample.csv", id=IDS, target=["0"] * 3)
    done(*SUBMIT, "--scores", "scores.csv", "--hard")
    expected = (read_csv(here / "scores.csv")["target"].astype(float) >= STACKER.threshold).astype(int).astype(str)
    assert read_csv(here / "submission.csv")["target"].tolist() == expected.tolist()
    assert sorted(set(expected)) == ["0", "1"]


def test_scores_of_the_point_that_frontier_chose_are_of_the_run(here):
    folder = here / "run" / "bundle"
    values = bundle.read_contents(folder)
    one, lost = Stacker(("one",), (1.0,), -0.1, threshold=0.3), Interval(0.001, -0.001, 0.002)
    made_from = operating_point.identity(folder, values["members"], values["files"])
    operating_point.write(
        folder, operating_point.OperatingPoint(one, "auto", {}, None, 200.0, 400.0, lost, "a CPU", made_from)
    )
    done(*INFER, "--output", "scores.csv")
    write_csv(here / "sample.csv", id=IDS, target=["0"] * 3)
    assert "AUROC" not in done(*SUBMIT, "--scores", "scores.csv", "--hard")  # known of the whole stack only
    expected = (read_csv(here / "scores.csv")["target"].astype(float) >= 0.3).astype(int).astype(str)
    assert read_csv(here / "submission.csv")["target"].tolist() == expected.tolist()
    operating_point.remove(folder)
    assert "made by another stack than run/stacker.json" in refused(*SUBMIT, "--scores", "scores.csv", "--hard")


def test_scores_of_another_stack_are_refused(here):
    done(*INFER)
    change_json(here / "run" / "stacker.json", coef=[0.5, 0.5])
    assert "made by another stack than run/stacker.json; run infer again" in refused(*SUBMIT)


def test_another_threshold_is_not_another_stack(here):
    done(*INFER)
    change_json(here / "run" / "stacker.json", threshold=0.7)
    done(*SUBMIT)


def test_changed_scores_have_no_maker(here):
    done(*INFER)
    frame = read_csv(here / "submission.csv")
    write_csv(here / "submission.csv", id=frame["id"], target=["0.1", "0.2", "0.3"])
    assert "Nothing beside submission.csv says what made it" in done(*SUBMIT)
    assert json.loads((here / "submission.csv.json").read_text())["made"] is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format_version": 1, "sha256": 3, "made": {"stack": 1}}', "[" * 100_000 + "]" * 100_000],
    ids=["empty", "list", "nothing", "types", "deep"],
)
def test_a_damaged_fingerprint_is_none(here, text):
    done(*INFER)
    (here / "submission.csv.json").write_text(text)
    assert "Nothing beside submission.csv says what made it" in done(*SUBMIT)


DAMAGES = [
    *({"options": value} for value in (None, 3, [], {}, {"adapted": "no"})),
    *({"images": value} for value in (None, 3, [], {}, {"scored": 3, "failed": None}, {"scored": 3, "failed": True})),
    *({"uncertified": value} for value in (None, 3, True, [1], "fp32", {})),
    *({"stack": value} for value in (None, 3, [])),
    *({"source": value} for value in (None, 3)),
    *({"device": value} for value in (float("nan"), float("inf"), "\ud800")),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=repr)
def test_a_fingerprint_of_other_types_is_none(here, damage):
    done(*INFER, "--output", "scores.csv")
    path = here / "scores.csv.json"
    values = artifacts.read_json(path, "")
    path.write_text(json.dumps({**values, "made": values["made"] | damage}))
    assert "Nothing beside scores.csv says what made it" in done(*SUBMIT, "--scores", "scores.csv")
    assert json.loads((here / "submission.csv.json").read_text())["made"] is None


def test_a_number_beyond_all_floats_is_none(here):
    done(*INFER, "--output", "scores.csv")
    path = here / "scores.csv.json"
    path.write_text(path.read_text().replace('"failed": 0', '"failed": 0, "more": 1e999'))
    assert "Nothing beside scores.csv says what made it" in done(*SUBMIT, "--scores", "scores.csv")


def test_a_folder_in_the_place_of_the_fingerprint_is_none(here):
    done(*INFER, "--output", "scores.csv")
    (here / "scores.csv.json").unlink()
    (here / "scores.csv.json").mkdir()
    assert "Nothing beside scores.csv says what made it" in done(*SUBMIT, "--scores", "scores.csv")


@pytest.mark.parametrize(
    "scores",
    [3, [1], {"stack": 3}, *({"stack": {"auroc": auroc}} for auroc in (3, [], "x", {}, dict.fromkeys(ENDS, "0.9")))],
    ids=repr,
)
def test_held_out_scores_of_other_types_are_one_line(here, scores):
    done(*INFER)
    change_json(here / "run" / "stacker.json", scores=scores)
    assert "run/stacker.json is damaged (its scores); run stack again" in refused(*SUBMIT)


@pytest.mark.parametrize(
    ("first", "holds"),
    [(("--positive", "real"), "1 - target, of real"), (("--hard",), "labels")],
    ids=["real", "hard"],
)
@pytest.mark.parametrize("then", [(), ("--positive", "real"), ("--hard",)], ids=["", "real", "hard"])
def test_its_own_output_is_not_turned_again(here, first, holds, then):
    done(*INFER, "--output", "scores.csv")
    write_csv(here / "sample.csv", id=IDS, target=["0"] * 3)
    done(*SUBMIT, "--scores", "scores.csv", *first)
    said = refused(*SUBMIT, "--output", "again.csv", *then)
    assert f"submission.csv is a submission already (it holds {holds}); give infer's file with --scores" in said
    assert not (here / "again.csv").exists()


def test_its_own_output_of_probabilities_may_be_taken_again(here):
    done(*INFER)
    for _ in range(2):
        done(*SUBMIT)
    assert json.loads((here / "submission.csv.json").read_text())["made"]["images"]["scored"] == 3
    done(*SUBMIT, "--positive", "real", "--output", "real.csv")
    assert read_csv(here / "real.csv")["Id"].tolist() == IDS[::-1]


def test_a_bundle_that_changes_while_images_are_scored_is_not_named(here, monkeypatch):
    folder = here / "run" / "bundle"
    before = json.loads((folder / "bundle.json").read_text())["digest"]
    infer_to_file = pipeline.infer_to_file

    def replaced(*arguments):
        found = infer_to_file(*arguments)
        (folder / "bundle.json").unlink()
        return found

    monkeypatch.setattr(pipeline, "infer_to_file", replaced)
    done(*INFER)
    assert json.loads((here / "submission.csv.json").read_text())["made"]["bundle"] == before


@pytest.mark.parametrize(
    ("auroc", "outcome"),
    [
        ((0.1, 0.05, 0.2), "backwards (AUROC 0.1000 [0.0500, 0.2000]"),
        ((0.45, 0.3, 0.6), "0.4500 [0.3000, 0.6000]: perhaps no better than chance."),
    ],
    ids=["reversed", "chance"],
)
def test_what_the_held_out_scores_say(here, auroc, outcome):
    done(*INFER)
    scores = {"stack": {"auroc": dict(zip(ENDS, auroc, strict=True))}}
    change_json(here / "run" / "stacker.json", scores=scores)
    assert outcome in (refused(*SUBMIT) if auroc[2] < 0.5 else done(*SUBMIT))


def test_a_stack_without_held_out_scores_is_said(here):
    done(*INFER)
    change_json(here / "run" / "stacker.json", scores=None)
    assert "No held-out scores of the stack here" in done(*SUBMIT)


@pytest.mark.parametrize("certified", [True, False])
def test_a_precision_without_certificate_is_refused_unless_it_is_taken(here, certified):
    folder = here / "run" / "bundle"
    entries = bundle.read_contents(folder)["members"]
    for name, entry in entries.items():
        entry |= {"int8": f"members/{name}.int8.onnx", "made": {"int8": {}}}
        write_onnx(folder / entry["int8"], 1)
    allowed = {"onnxruntime int8": {"members": list(entries), "certified": certified}}
    bundle.write_bundle(folder, entries, precisions=allowed)
    code, _, err = run_cli(*INFER, "--runtime", "onnxruntime", "--precision", "int8")
    if code and "no instructions for int8" in err:
        pytest.skip("this CPU does not run int8")
    if certified:
        done(*SUBMIT)
    else:
        assert "scored at onnxruntime int8, which has no passing certificate" in refused(*SUBMIT)
        done(*SUBMIT, "--uncertified")
    values = json.loads((here / "submission.csv.json").read_text())
    assert values["made"]["uncertified"] == ([] if certified else ["onnxruntime int8"])
    assert values["submission"]["uncertified"] is not certified


def test_images_that_could_not_be_read_are_said(here):
    (here / "images" / "b.png").write_bytes(b"")
    assert run_cli(*INFER)[0] == 1
    assert "target is empty or outside [0, 1] for 1 ids: b; where images could not be read" in refused(*SUBMIT)
    assert run_cli(*INFER, "--fill", 0.5)[0] == 1
    assert "1 images could not be read and have the score of --fill." in done(*SUBMIT)


def test_run_and_bundle_exclude_each_other(here):
    code, _, err = run_cli(*SUBMIT, "--bundle", "run/bundle")
    assert (code, "not both" in err) == (2, True)
