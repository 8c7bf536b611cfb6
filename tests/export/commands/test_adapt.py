import re
import shutil

import numpy as np
import pytest
from helpers import (
    change_json,
    exported_run,
    heldout,
    noisy_logits,
    read_csv,
    run_cli,
    write_bundle,
    write_csv,
    write_image,
)

from ensemble.core import artifacts
from ensemble.core.metrics import sigmoid
from ensemble.stacking import stack
from export.bundle import bundle
from export.inference.loading import load_bundle

# logits in ten steps from -0.65 to 0.85, as written in helpers.py
BRIGHT = [0, 20, 50, 80, 110, 140, 170, 200, 230, 255]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with its bundle, and twelve target images of which one is broken."""
    folder = tmp_path_factory.mktemp("adapt")
    exported_run(folder / "run")
    for number, value in enumerate([*BRIGHT, 255]):
        write_image(folder / "photos" / f"{number:02}.png", value)
    (folder / "photos" / "broken.png").write_bytes(b"")
    done = run_cli("adapt", "--images", folder / "photos", "--run", folder / "run", "--device", "cpu")
    return folder, done


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "copy")


def infer(folder, *arguments):
    places = ("--input", folder / "photos", "--run", folder / "run", "--output", folder / "out.csv")
    return run_cli("infer", "--onnx", "--device", "cpu", *places, *arguments)


def targets(folder):
    return read_csv(folder / "out.csv")["target"].replace("", "nan").astype(float).to_numpy()


def test_the_command_says_what_it_found_and_what_it_cannot_know(made):
    folder, (code, out, err) = made
    assert (code, err) == (0, "")
    chosen, *lines = out.splitlines()
    assert " fp32 on " in chosen
    assert lines[0] == "12 images, 2 members on cpu"
    assert lines[1] == "1 images could not be read and were left out."
    assert re.fullmatch(
        r"Share of ai: 0\.\d{4} \[0\.\d{4}, 0\.\d{4}\] \(estimated, 95 % interval over images\); "
        r"0\.5000 where the stack was fitted\.",
        lines[2],
    )
    assert lines[3].startswith("Shift of the stack's logit: ")
    assert "cannot know whether the pictures did too" in out
    assert re.fullmatch(r"At the threshold 0\.5, \d+ of 11 are ai; 6 without the shift\.", lines[-2])
    assert lines[-1].startswith(f"-> {folder / 'run' / 'stacker.json'}; infer --adapted applies it")


def test_the_shift_is_stored_and_the_bundle_has_it_without_a_conversion(made):
    folder, (_, out, _) = made
    run = folder / "run"
    stacker = stack.read_stacker(run)
    assert stacker.adapted.images == 11
    assert stacker.adapted.estimator == "em"
    assert stacker.adapted.data == str(folder / "photos")
    assert f"{stacker.adapted.prior:.4f} [" in out
    assert f"{stacker.adapted.shift:.4f} [" in out
    assert bundle.is_current(run)  # though its graphs could never be converted: these members have no weights
    assert load_bundle(artifacts.bundle_path(run)).stacker == stacker


def test_only_infer_adapted_applies_it_and_says_so(folder):
    code, out, _ = infer(folder)
    plain = targets(folder)
    stored = stack.read_stacker(folder / "run").adapted
    assert code == 1  # the broken image
    assert "Adapted" not in out
    _, out, _ = infer(folder, "--adapted")
    assert (
        f"Adapted: {stored.shift:+.2f} on the stack's logit, from 11 images of {stored.data} "
        f"(share of ai {stored.prior:.2f}).\n" in out
    )
    logits = np.log(plain) - np.log1p(-plain)
    np.testing.assert_allclose(targets(folder), sigmoid(logits + stored.shift), rtol=1e-6)
    write_image(folder / "photos" / "later.png")
    _, out, _ = infer(folder, "--adapted")
    assert "; the images scored now are others.\n" in out


def test_without_adapted_the_target_is_bitwise_as_before(folder):
    infer(folder)
    after = (folder / "out.csv").read_bytes()
    shutil.rmtree(folder / "run")
    exported_run(folder / "run")
    infer(folder)
    assert (folder / "out.csv").read_bytes() == after


def test_infer_adapted_without_an_adaptation_says_what_to_run(folder):
    shutil.rmtree(folder / "run")
    exported_run(folder / "run")
    code, _, err = infer(folder, "--adapted")
    assert code == 2
    assert err == (
        "Error: this stack is not adapted to target images; "
        "run: python cli.py adapt --images DIR, with the same --run\n"
    )
    assert not (folder / "out.csv").exists()


def test_a_new_stack_drops_the_adaptation_and_says_so(folder):
    code, out, _ = run_cli("stack", "--run", folder / "run")
    assert code == 0
    assert "The adaptation of the former stacker was dropped; run adapt again" in out
    assert stack.read_stacker(folder / "run").adapted is None
    _, out, _ = run_cli("stack", "--run", folder / "run")
    assert "dropped" not in out


def test_a_known_share_is_kept_to_and_told_as_given(folder):
    _, out, _ = run_cli("adapt", "--images", folder / "photos", "--run", folder / "run", "--share", 0.25)
    assert "Share of ai: 0.25 (as given)" in out
    assert "the scores of both classes moved by the same amount" in out
    assert "cannot know" not in out
    _, out, _ = infer(folder, "--adapted")
    assert "(share of ai 0.25, as given)" in out
    assert np.nanmean(targets(folder)) == pytest.approx(0.25, abs=1e-6)


def test_images_of_one_class_are_warned_of(folder):
    change_json(artifacts.stacker_path(folder / "run"), intercept=-9.0)
    write_bundle(folder / "run")
    code, out, _ = run_cli("adapt", "--images", folder / "photos", "--run", folder / "run")
    assert code == 0
    assert "Warning: by these scores nearly all images are of one class." in out


def test_scores_from_elsewhere_are_looked_up(folder):
    frame = heldout(artifacts.read_parquet(artifacts.dataset_path(folder / "run"), ""))
    held = write_csv(folder / "held.csv", id=list(frame["id"]), logit=noisy_logits(frame, 1, 7).astype(str))
    names = sorted(path.name for path in (folder / "photos").iterdir())
    test = write_csv(folder / "test.csv", id=names, logit=["0.5"] * len(names))
    assert run_cli("stack", "--run", folder / "run", "--external", f"far={held},{test}")[0] == 0
    code, _, err = run_cli("export", "--run", folder / "run")
    assert (code, err) == (0, "")
    code, out, err = run_cli("adapt", "--images", folder / "photos", "--run", folder / "run")
    assert (code, err) == (0, "")
    assert "of 11 are ai" in out
    code, out, _ = infer(folder, "--adapted")
    assert "Adapted: " in out
    assert np.isfinite(targets(folder)).sum() == 11


def test_too_few_images_change_nothing(folder):
    before = artifacts.stacker_path(folder / "run").read_bytes()
    for number in range(2):
        (folder / "photos" / f"{number:02}.png").unlink()
    code, _, err = run_cli("adapt", "--images", folder / "photos", "--run", folder / "run")
    assert code == 2
    assert err == "Error: 9 readable images are too few to estimate a shift; give 10 or more\n"
    assert artifacts.stacker_path(folder / "run").read_bytes() == before
