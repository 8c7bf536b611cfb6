import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import change_json, read_csv, run_cli, write_scores
from pictures import encoded, noise, write_files

from ensemble.audit import prepare_dataset
from ensemble.core import artifacts
from ensemble.data import dataset
from ensemble.training import train_all
from ensemble.training.train_member import Outcome

RECIPE = b"backbone: {architecture: timm/none}\ntrain: {lr: 1.0e-3, epochs: 1, batch_size: 4}\n"
SHARES = ("--tune", 0.2, "--heldout", 0.3)
SHORTCUT = "Metadata alone tells ai from real with balanced accuracy 1.0000 [1.0000, 1.0000]: a shortcut."


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "recipes", "one.yaml", data=RECIPE)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """shortcut/: real images are JPEGs and ai ones PNGs. clean/: all are PNGs."""
    folder = tmp_path_factory.mktemp("made")
    for number in range(24):
        for label, start in (("ai", 0), ("real", 100)):
            png = encoded(noise(start + number, 48, 48))
            write_files(folder, f"clean/{label}/{number:02}.png", data=png)
        write_files(folder, f"shortcut/ai/{number:02}.png", data=encoded(noise(number, 48, 48)))
        write_files(folder, f"shortcut/real/{number:02}.jpg", data=encoded(noise(100 + number, 48, 48), "JPEG"))
    return folder


@pytest.fixture
def trained(monkeypatch):
    """Instead of training, writes members with random logits; holds the frames they were to be trained on."""
    frames = []

    def stub(recipes, frame, run, context, log, fresh, engine):
        frames.append(frame)
        rows = frame[~frame["split"].isin(["train", "tune"])]
        logits = np.random.default_rng(0).normal(size=len(rows))
        for recipe in recipes:
            write_scores(run, recipe.name, frame, rows[["id", "label", "split", "fold"]].assign(logit=logits))
            info = artifacts.member_path(run, recipe.name) / "member.json"
            change_json(info, data_sha256=dataset.run_sha256(frame, run))
        return [Outcome(recipe.name, "trained", 1.0) for recipe in recipes]

    monkeypatch.setattr(train_all, "train_all", stub)
    monkeypatch.setattr(train_all, "check_ready", lambda recipes, device, report_to, remote: None)
    return frames


def train(*options):
    return run_cli("train-all", "recipes", *options, *SHARES, "--run", "run", "--seed", 1)


def one_line(err) -> str:
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    return err.removeprefix("Error: ").strip()


# ---- train-all


def test_train_all_refuses_a_shortcut_in_one_line(made, trained):
    code, out, err = train("--data", made / "shortcut")
    assert code == 2
    assert SHORTCUT in out
    assert "python cli.py canonicalise" in one_line(err)
    assert "--canonical" in err
    assert "--accept-shortcuts" in err
    assert trained == []


@pytest.mark.parametrize("option", ["--accept-shortcuts", "--canonical"])
def test_train_all_goes_on_when_told_and_says_it_beside_the_scores(made, trained, option):
    code, out, err = train("--data", made / "shortcut", option)
    assert (code, err) == (0, "")
    assert len(trained) == 1
    table = out.index("held-out AUROC")
    assert out.rindex(SHORTCUT) > table
    assert ("crops of 40 pixels" in out) == (option == "--canonical")
    code, out, err = run_cli("stack", "--run", "run")
    assert (code, err) == (0, "")
    assert SHORTCUT in out


def test_train_all_audits_unchanged_data_once(made, trained, monkeypatch):
    first = train("--data", made / "clean")
    monkeypatch.setattr(prepare_dataset.audit, "audit", None)
    assert train("--data", made / "clean") == first
    assert first[0] == 0
    assert first[1].count("no shortcut found.") == 2


def test_train_all_combines_sources_and_holds_one_out(made, trained, here):
    for number in range(30):
        name = f"film/{('fake', 'human')[number % 2]}/{number:02}.png"
        write_files(here, name, data=encoded(noise(300 + number, 48, 48)))
    data = ("--data", made / "clean", "--data", "film", "--accept-shortcuts")
    code, out, err = train(*data, "--hold-out", "source=film")
    assert (code, err) == (0, "")
    assert "film: fake counts as ai, human as real" in out
    unseen = trained[0][trained[0]["split"] == "unseen"]
    assert set(unseen["id"].str.split("/").str[0]) == {"film"}
    assert len(unseen) == 30
    assert "unseen AUROC" in out
    code, out, err = train(*data, "--hold-out", "source=film", "--hold-out", "source=clean")
    assert code == 2
    assert one_line(err).endswith("leaves no real images to fit on; hold out less")


def test_train_all_understands_classes_of_other_languages(trained, here, made):
    shutil.copytree(made / "clean" / "ai", here / "data/生成")
    shutil.copytree(made / "clean" / "real", here / "data/写真")
    code, out, _ = train("--data", "data", "--classes", "生成=ai,写真=real")
    assert code == 0
    assert "生成 counts as ai, 写真 as real" in out
    assert trained[0].groupby("label").size().to_dict() == {0: 24, 1: 24}
    code, _, err = train("--data", "data", "--classes", "生成=ai")
    assert (code, one_line(err).endswith("--classes does not say what these are: 写真")) == (2, True)
    code, _, err = train("--data", "data", "--classes", "生成")
    assert code == 2
    assert "'生成': write NAME=ai or NAME=real" in err


def test_train_all_leaves_out_what_the_test_shows(made, trained, here):
    write_files(here / "test", "a.png", data=(made / "clean/ai/07.png").read_bytes())
    code, out, _ = train("--data", made / "clean", "--against", "test")
    assert code == 0
    assert "1 training images are in the test too, or nearly (ai/07.png and a.png); see --exclude-overlap" in out
    assert "ai/07.png" in set(trained[0]["id"])
    code, out, _ = train("--data", made / "clean", "--against", "test", "--exclude-overlap")
    assert code == 0
    assert "left out: 1 images that the test shows too" in out
    stored = artifacts.read_parquet(artifacts.dataset_path(here / "run"), "")
    assert "ai/07.png" not in set(stored["id"])
    assert len(stored) == len(trained[1]) == 47


def test_the_same_picture_in_both_classes_of_two_roots_is_refused_by_name(made, trained, here):
    write_files(here / "web", "real/x.png", data=(made / "clean/ai/07.png").read_bytes())
    code, _, err = train("--data", made / "clean", "--data", "web")
    assert code == 2
    message = one_line(err)
    assert message.startswith("identical pixels are labelled both ai and real: ")
    assert str(made / "clean/ai/07.png") in message
    assert str(here / "web/real/x.png") in message


# ---- audit


def test_audit_blocks_a_shortcut(made):
    code, out, err = run_cli("audit", made / "shortcut", "--json", "found.json")
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[:2] == ["48 images, 24 ai, in 48 groups", SHORTCUT]
    assert lines[2].startswith("  block  null: metadata alone reaches balanced accuracy 1.0000")
    assert lines[-1] == "Blocked: train-all refuses this data. Try canonicalise, or --accept-shortcuts."
    found = artifacts.read_json(Path("found.json"), "")
    assert (found["blocked"], found["headline"], found["images"]) == (True, SHORTCUT, 48)
    assert found["null"]["balanced_accuracy"] == {"value": 1, "low": 1, "high": 1}
    assert found["findings"][0]["severity"] == "block"


def test_audit_does_not_block_what_is_accepted(made):
    code, out, _ = run_cli("audit", made / "shortcut", "--accept-shortcuts")
    assert code == 0
    assert SHORTCUT in out
    assert "Blocked" not in out


def test_audit_of_clean_data_with_files_that_are_skipped_or_broken(made, here):
    shutil.copytree(made / "clean", here / "data")
    write_files(here / "data", "ai/1.heic", "real/text.png", data=b"text")
    code, out, err = run_cli("audit", "data")
    assert (code, err) == (0, "")
    assert "skipped: images of a kind that cannot be read are left out: 1 .heic in ai; convert them" in out
    assert f"corrupt: 1 images cannot be read: {here / 'data/real/text.png'}: not an image" in out
    assert "no shortcut found." in out


def test_audit_against_a_test_set(made, here):
    for number in range(20):
        write_files(here / "test", f"{number}.jpg", data=encoded(noise(400 + number, 60, 48), "JPEG"))
    code, out, _ = run_cli("audit", made / "clean", "--against", "test")
    assert code == 0
    assert "against_files: files tells training from test with balanced accuracy" in out
    assert "test, " in out


def test_audit_refuses_what_it_cannot_read_in_one_line(made, here):
    write_files(here / "test", "1.png", data=b"text")
    write_files(here / "data", "ai/1.png", "real/1.png", data=b"text")
    for arguments, message in (
        ((made / "clean", "--against", "test"), f"no image of test can be read: {here / 'test/1.png'}: not an image"),
        ((made / "clean", "--against", "none"), "no test set at none; give a folder of images"),
        (("data",), "no image of 2 can be read: "),
        (("nowhere",), "no data at nowhere; put images in nowhere/ai"),
        ((made / "clean", made / "clean"), "is given more than once"),
    ):
        code, out, err = run_cli("audit", *arguments)
        assert (code, out) == (2, "")
        assert message in one_line(err)


# ---- canonicalise


def test_canonicalise_takes_the_shortcut_away(made, trained, here):
    code, out, err = run_cli("canonicalise", made / "shortcut", "canonical")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "crops of 40 pixels, JPEG quality 65 to 75",
        "24 ai and 24 real images",
        "-> canonical/data.csv; next: python cli.py audit canonical/data.csv",
    ]
    assert len(read_csv(here / "canonical/data.csv")) == 48
    code, out, _ = train("--data", "canonical/data.csv")
    assert code == 0
    assert len(trained) == 1
    assert SHORTCUT not in out


def test_canonicalise_takes_size_quality_and_seed(made, here):
    options = ("--size", 32, "--quality", 85, 90, "--seed", 7)
    code, out, _ = run_cli("canonicalise", made / "shortcut", "canonical", *options)
    assert code == 0
    assert out.startswith("crops of 32 pixels, JPEG quality 85 to 90\n")
    kept = json.loads((here / "canonical/canonical.json").read_text())
    assert (kept["seed"], kept["images"], kept["plan"]["size"]) == (7, 48, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", 31), "31 is not in the range x>=32"),
        (("--quality", 0, 90), "0 is not in the range 1<=x<=100"),
        (("--quality", 90, 80), "--quality 90 80: the lower one comes first"),
        (("--size", 49), "no real image can be cropped to 49 pixels; lower --size"),
    ],
)
def test_canonicalise_refuses_what_cannot_be(made, here, options, message):
    code, _, err = run_cli("canonicalise", made / "shortcut", "canonical", *options)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (here / "canonical").exists()


def test_canonicalise_leaves_other_folders_alone(made, here):
    write_files(here / "mine", "notes.txt", data=b"mine")
    code, _, err = run_cli("canonicalise", made / "shortcut", "mine")
    assert code == 2
    assert one_line(err) == "mine is not empty and was not written by canonicalise; name another folder"
    code, _, err = run_cli("canonicalise", made / "shortcut", made / "shortcut")
    assert code == 2
    assert "holds the data itself" in one_line(err)
