import json
import shutil

import numpy as np
import pytest
from helpers import heldout, noisy_logits, read_csv, run_cli, write_csv
from pictures import HOSTILE_NAMES, encoded, noise
from PIL import Image
from small_members import write_networks

from ensemble.core import artifacts
from ensemble.core.metrics import sigmoid
from ensemble.evaluation import heatmaps
from ensemble.evaluation.heatmaps import Panel, printable_text, write_figure


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two tiny networks and their stacker."""
    run = tmp_path_factory.mktemp("explain")
    write_networks(run)
    return run


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a $x_1$ 写真.png"
    path.write_bytes(encoded(noise(5, 90, 60)))
    return path


def explained(run, image, *arguments):
    return run_cli("explain", image, "--run", run, "--device", "cpu", *arguments)


def test_the_numbers_are_those_of_infer(run, image, tmp_path):
    code, out, err = explained(run, image, "--output", tmp_path / "out.png", "--json", tmp_path / "out.json")
    assert (code, err) == (0, "")
    run_cli("infer", "--input", image.parent, "--run", run, "--members", "--output", tmp_path / "s.csv")
    scores = read_csv(tmp_path / "s.csv").iloc[0]
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["target"] == pytest.approx(float(scores["target"]), rel=1e-6)
    assert values["threshold"] == 0.5
    assert values["verdict"] == ("ai" if values["target"] >= 0.5 else "real")
    assert values["logit"] == pytest.approx(0.1 + sum(member["share"] for member in values["members"].values()))
    for name, weight in (("one", 0.5), ("two", 0.25)):
        member = values["members"][name]
        assert member["p"] == pytest.approx(float(scores[name]), rel=1e-6)
        assert member["p"] == pytest.approx(float(sigmoid(member["logit"])))
        assert member["share"] == pytest.approx(weight * member["logit"])
        heat = np.array(member["heat"])
        assert heat.shape == (11, 16)
        assert ((heat >= 0) & (heat <= 1)).all()
    assert out.startswith(f"P(ai) {values['target']:.4f}, threshold 0.5: {values['verdict']}\n")
    assert "Its attention, not proof" in out
    assert out.endswith(f"-> {tmp_path / 'out.png'}\n")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size[0] > 3 * 300


def test_json_on_standard_output_is_alone_there(run, image, tmp_path):
    code, out, err = explained(run, image, "--members", "two", "--output", tmp_path / "out.png", "--json", "-")
    assert code == 0
    values = json.loads(out)
    assert "heat" in values["members"]["two"]
    assert "heat" not in values["members"]["one"]
    assert values["image"] == str(image)
    assert err.startswith("P(ai) ")


def test_scores_from_elsewhere_have_a_share_and_no_map(run, image, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    frame = heldout(artifacts.read_parquet(artifacts.dataset_path(copy), ""))
    held = write_csv(tmp_path / "held.csv", id=list(frame["id"]), logit=noisy_logits(frame, 1, 7).astype(str))
    test = write_csv(tmp_path / "test.csv", id=[image.stem], logit=["0.5"])
    assert run_cli("stack", "--run", copy, "--external", f"far={held},{test}")[0] == 0
    code, out, _ = explained(copy, image, "--output", tmp_path / "out.png", "--json", tmp_path / "out.json")
    values = json.loads((tmp_path / "out.json").read_text())
    assert code == 0
    assert values["members"]["far"]["logit"] == 0.5
    assert "heat" not in values["members"]["far"]
    assert "heat" in values["members"]["one"]
    assert "far" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"", "the file is empty"), (b"text", "not an image in a known format")],
)
def test_a_broken_image_is_one_line(run, tmp_path, content, message):
    path = tmp_path / "broken.jpg"
    if content is not None:
        path.write_bytes(content)
    code, out, err = explained(run, path, "--output", tmp_path / "out.png")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"Error: {path}: {message}")
    assert not (tmp_path / "out.png").exists()


def test_a_member_that_is_not_in_the_stack_is_refused(run, image):
    code, _, err = explained(run, image, "--members", "two,three")
    assert (code, err) == (2, f"Error: no network 'three' in the stack of {run}; it has: one, two\n")


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, "$x_1$ $", "\\frac{$", "a\tb", "\udcff", "x" * 400])
def test_no_name_is_read_as_mathematics_or_breaks_the_picture(tmp_path, name):
    panels = [Panel(Image.new("RGB", (40, 30)), name, "p 0.50")]
    write_figure(panels, name, "note", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"


def test_what_the_font_lacks_and_what_is_too_long_is_told_by_signs():
    assert printable_text("é 写\n真$") == "é ???$"
    assert printable_text("0123456789", 8) == "...56789"
    assert len(printable_text("x" * 400)) == heatmaps.LETTERS


def test_a_name_with_dollars_is_drawn_as_it_is(tmp_path):
    """Mathematics would leave the dollars out, and so be narrower."""
    panels = [Panel(Image.new("RGB", (40, 30)), "name", "p")]
    drawn = []
    for title in ("$a$", "a"):
        write_figure(panels, title, "note", tmp_path / "out.png")
        with Image.open(tmp_path / "out.png") as picture:
            top = np.asarray(picture.convert("L"))[:60]
        drawn.append((top < 200).any(axis=0).sum())
    assert drawn[0] > 2 * drawn[1]
