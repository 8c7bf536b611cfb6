"""Certificates below fp32 of a bundle of two tiny graphs.

Whether or not this machine computes bf16, a stand-in takes its place: the fp32 session, with something
done to its logits that each test names.
"""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import (
    PREPROCESS_CONFIG,
    STACKER,
    change_json,
    exported_run,
    run_cli,
    write_bundle,
    write_csv,
    write_image,
    write_stacker,
)
from mutations import tag_bomb
from pictures import encoded, noise
from PIL import Image

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError
from ensemble.models.external import External, write_external
from ensemble.models.runner import Runner
from ensemble.stacking.stacker import Stacker
from export.bundle import allowed_precisions, bundle, check_images, low_precision_files
from export.runtimes import capabilities, devices
from export.runtimes import runner as runtime
from export.runtimes.capabilities import Machine
from export.runtimes.settings import PRECISIONS, RUNTIMES, RuntimeConfig

open_runner = runtime.open_runner


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """256 grey images: member one calls the bright half ai, with no p near 0.5; a CSV that says which they are."""
    folder = tmp_path_factory.mktemp("pictures")
    brightness = [value // 2 if value < 128 else 255 - value // 4 for value in range(256)]
    for number, value in enumerate(brightness):
        write_image(folder / "images" / f"{number:03}.png", value)
    labels = [str(int(value > 128)) for value in brightness]
    return write_csv(folder / "all.csv", id=[f"{number:03}" for number in range(256)], label=labels)


@pytest.fixture
def folder(exported, tmp_path):
    """A bundle of its own."""
    return shutil.copytree(artifacts.bundle_path(exported), tmp_path / "alone")


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """What was opened, as (member, setting); logits kept from other tests are not seen."""
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    return []


@pytest.fixture
def stand_in(monkeypatch, opened):
    """Lets OpenVINO compute bf16, as a function of (member, fp32 logits)."""

    def install(change, able=("openvino", "bf16")):
        def open_one(name, path, preprocess_config, setting):
            opened.append((name, str(setting)))
            plain = open_runner(name, path, preprocess_config, low_precision_files.FP32).run
            if setting.precision == "fp32":
                return Runner(name, preprocess_config, plain)
            return Runner(name, preprocess_config, lambda pixels: change(name, plain(pixels)))

        unsupported = {(kind, lower): "no" for kind in RUNTIMES for lower in PRECISIONS if lower != "fp32"}
        del unsupported[able]
        monkeypatch.setattr(capabilities, "available", lambda: Machine("a CPU", 2, unsupported=unsupported))
        monkeypatch.setattr(runtime, "open_runner", open_one)

    return install


def rounded(name, logits):
    """As a format with eight bits of mantissa would."""
    return (np.round(logits * 256) / 256).astype(np.float32)


def turned(*names):
    return lambda name, logits: -logits if name in names else logits


def certify(folder, *arguments):
    code, out, err = run_cli("export", "--bundle", folder, *arguments)
    assert (code, err) == (0, "")
    values = bundle.open_bundle(folder)
    return out, values, artifacts.read_json(folder / "certificate.json", "")["precisions"]


def test_rounded_logits_pass_and_the_table_says_by_how_much(folder, pictures, stand_in):
    stand_in(rounded)
    before = bundle.open_bundle(folder)["files"]
    out, values, found = certify(folder, "--certify-on", pictures)
    assert bundle.certified_precisions(values) == {("openvino", "bf16"): {"one", "two"}}
    assert values["precisions"] == {"openvino bf16": {"members": ["one", "two"], "certified": True}}
    made = found["openvino bf16"]
    assert (made["images"], made["rows"], made["usable"]) == (256, "images of all.csv", ["one", "two"])
    assert 0 < made["members"]["one"]["largest"] <= 0.25 / 512 * 1.01  # half a step, p's slope is at most a quarter
    assert made["members"]["one"]["flips"] == 0
    assert "Certifying openvino bf16 on 256 images of all.csv: as long as scoring them 2 times" in out
    lines = out.splitlines()[-5:-1]
    assert lines[0].split() == "precision largest change mean Spearman AUROC flips verdict".split()
    assert [line.split()[:3] for line in lines[1:]] == [["openvino", "bf16", name] for name in ("one", "two", "stack")]
    assert all(line.endswith("passes") for line in lines[1:])
    onnx = {name: digest for name, digest in values["files"].items() if name.startswith("members/")}
    assert onnx.items() <= before.items()  # nothing was converted


def test_a_member_that_fails_stays_fp32_while_the_stack_passes(folder, pictures, stand_in):
    stand_in(turned("two"))
    out, values, found = certify(folder, "--certify-on", pictures)
    assert bundle.certified_precisions(values) == {("openvino", "bf16"): {"one"}}
    assert found["openvino bf16"]["stack"]["largest"] == 0  # one's stand-in is exact, two is left at fp32
    two = next(line for line in out.splitlines() if " two " in line)
    assert "fails: AUROC by " in two
    assert "flipped" in two


def test_with_logits_shifted_by_a_tenth_a_stack_that_fails_allows_nothing(folder, pictures, stand_in):
    at = STACKER.target(np.array([[4 * (3.5 / 255 - 0.5), -2 * (3.5 / 255 - 0.5)]]))[0]
    change_json(folder / "stacker.json", threshold=float(at))  # just above the 8 images of brightness 0 to 3
    refreshed(folder)
    stand_in(lambda name, logits: logits + np.float32(0.1))
    out, values, found = certify(folder, "--certify-on", pictures)
    assert bundle.certified_precisions(values) == {}
    assert [change["failed"] for change in found["openvino bf16"]["members"].values()] == [[], []]
    assert found["openvino bf16"]["stack"]["failed"] == ["3.12% flipped"]
    ends = ["passes, but not used", "passes, but not used", "fails: 3.12% flipped"]
    assert all(line.endswith(end) for line, end in zip(out.splitlines()[-4:-1], ends, strict=True))


def refreshed(folder):
    """bundle.json written anew, after a file was changed by hand."""
    values = bundle.read_contents(folder)
    bundle.write_bundle(folder, values["members"], (), values["precisions"])


def test_255_images_are_too_few(folder, pictures, stand_in, tmp_path):
    stand_in(rounded)
    rows = pd.read_csv(pictures, dtype=str)
    few = write_csv(tmp_path / "few.csv", **rows.iloc[1:].to_dict("list"))
    out, values, found = certify(folder, "--certify-on", few, "--images", pictures.parent / "images")
    assert (
        "Not certified: openvino bf16. 255 images of few.csv are fewer than 256, so nothing more may run below fp32"
        in out
    )
    assert (values["precisions"], found) == ({}, {})


def test_images_that_cannot_be_read_do_not_count(folder, pictures, stand_in, tmp_path):
    stand_in(rounded)
    copy = shutil.copytree(pictures.parent, tmp_path / "copy")
    for number in (0, 1):
        write_image(copy / "images" / f"more{number}.png", 255 * number)
    more = pd.read_csv(pictures, dtype=str)
    extra = pd.DataFrame({"id": ["more0", "more1"], "label": ["0", "1"]})
    table = write_csv(copy / "more.csv", **pd.concat([more, extra]).to_dict("list"))
    for name in ("003", "200"):
        (copy / "images" / f"{name}.png").write_bytes(b"no image")
    out, _, found = certify(folder, "--certify-on", table)
    assert "2 images could not be read and were left out: " in out
    assert found["openvino bf16"]["images"] == 256
    (copy / "images" / "100.png").write_bytes(b"no image")
    out, values, found = certify(folder, "--certify-on", table)
    assert "255 images of more.csv are fewer than 256" in out
    # what was certified before holds still
    assert bundle.certified_precisions(values) == {("openvino", "bf16"): {"one", "two"}}


def test_what_decoders_say_of_an_image_is_not_shown(folder, pictures, stand_in, tmp_path):
    stand_in(rounded)
    copy = shutil.copytree(pictures.parent, tmp_path / "copy")
    (copy / "images" / "003.png").write_bytes(encoded(noise(0), exif=tag_bomb(5, 1_000_000)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _, _, found = certify(folder, "--certify-on", copy / "all.csv")
    assert [each for each in said if "PIL" in each.filename] == []
    assert found["openvino bf16"]["images"] == 256


def test_uncertified_is_used_recorded_and_said(folder, pictures, stand_in):
    stand_in(turned("two"))
    out, values, found = certify(folder, "--uncertified")
    said = "openvino bf16: every member may use it without a passing certificate, as --uncertified asks"
    assert said in out
    assert "Not certified: openvino bf16. Give labelled images" in out
    assert values["precisions"] == {"openvino bf16": {"members": ["one", "two"], "certified": False}}
    assert bundle.certified_precisions(values) == {("openvino", "bf16"): {"one", "two"}}
    assert found == {}
    out, values, _ = certify(folder, "--certify-on", pictures)
    assert values["precisions"] == {"openvino bf16": {"members": ["one"], "certified": True}}
    out, values, found = certify(folder, "--uncertified")
    assert said in out
    assert values["precisions"] == {"openvino bf16": {"members": ["one", "two"], "certified": False}}
    assert found["openvino bf16"]["usable"] == ["one"]


def test_what_passes_is_certified_whatever_was_asked(folder, pictures, stand_in):
    stand_in(rounded)
    out, values, _ = certify(folder, "--certify-on", pictures, "--uncertified")
    assert values["precisions"]["openvino bf16"]["certified"] is True
    assert "--uncertified asks" not in out


def test_a_machine_without_lower_precisions_says_where_to_go(folder, pictures, stand_in):
    stand_in(rounded)
    certify(folder, "--certify-on", pictures)
    with pytest.MonkeyPatch.context() as patch:
        unsupported = {
            (kind, lower): "this CPU has no bf16; use another" for kind in RUNTIMES for lower in ("bf16", "fp16")
        }
        patch.setattr(capabilities, "available", lambda: Machine("a CPU", 2, unsupported=unsupported))
        out, values, _ = certify(folder, "--certify-on", pictures)
    assert out.splitlines()[1] == (
        "Nothing more below fp32 was certified or allowed: this CPU has no bf16. On the machine that will score, "
        "run: python cli.py export --bundle DIR --certify-on DATA"
    )
    assert bundle.certified_precisions(values) == {
        ("openvino", "bf16"): {"one", "two"}
    }  # certified elsewhere, and holds still


def test_logits_are_computed_once(folder, pictures, stand_in, opened):
    stand_in(rounded)
    certify(folder, "--certify-on", pictures)
    assert sorted(opened) == [
        (name, f"{kind}") for name in ("one", "two") for kind in ("onnxruntime fp32", "openvino bf16")
    ]
    opened.clear()
    change_json(folder / "stacker.json", threshold=0.6)
    refreshed(folder)
    _, values, _ = certify(folder, "--certify-on", pictures)
    assert opened == []
    assert bundle.certified_precisions(values) == {("openvino", "bf16"): {"one", "two"}}


def test_another_processor_computes_its_own_logits(folder, pictures, stand_in, opened, monkeypatch):
    stand_in(rounded)
    certify(folder, "--certify-on", pictures)
    first, machine = sorted(opened), capabilities.available()
    opened.clear()
    monkeypatch.setattr(capabilities, "available", lambda: replace(machine, cpu="another CPU"))
    certify(folder, "--certify-on", pictures)
    assert sorted(opened) == first


def test_another_version_of_a_library_is_certified_again(exported, tmp_path, pictures, stand_in, monkeypatch):
    run = shutil.copytree(exported, tmp_path / "run")
    folder, heldout = artifacts.bundle_path(run), check_images.heldout_images
    stand_in(rounded)
    _, _, found = certify(folder, "--certify-on", pictures)
    assert found["openvino bf16"]["by"] == devices.version("openvino") != ""
    labels = pd.read_csv(pictures, dtype=str)
    files = tuple(pictures.parent / "images" / f"{name}.png" for name in labels["id"])
    given = check_images.LabelledImages(
        "held-out images", True, tuple(labels["id"]), files, labels["label"].astype(int).to_numpy()
    )

    monkeypatch.setattr(devices, "version", lambda runtime: f"{runtime} 99")
    code, out, _ = run_cli("export", "--run", run)  # too few held-out images
    assert code == 0
    assert "Still allowed, though certified with other versions of libraries than those here: openvino bf16" in out
    assert bundle.certified_precisions(bundle.open_bundle(folder)) == {("openvino", "bf16"): {"one", "two"}}

    monkeypatch.setattr(check_images, "heldout_images", lambda run: given)
    stand_in(turned("two"))
    code, out, _ = run_cli("export", "--run", run)
    assert code == 0
    assert "Certifying openvino bf16 on 256 held-out images" in out
    assert "Still allowed" not in out
    assert bundle.certified_precisions(bundle.open_bundle(folder)) == {("openvino", "bf16"): {"one"}}
    record = artifacts.read_json(folder / "certificate.json", "")
    assert record["precisions"]["openvino bf16"]["by"] == "openvino 99"

    monkeypatch.setattr(check_images, "heldout_images", heldout)
    stand_in(rounded, ("openvino", "fp16"))  # a machine that cannot compute it has no say
    assert "Still allowed" not in run_cli("export", "--run", run)[1]
    assert bundle.certified_precisions(bundle.open_bundle(folder)) == {("openvino", "bf16"): {"one"}}
    del record["precisions"]["openvino bf16"]["by"]  # as older bundles have it
    artifacts.write_json(folder / "certificate.json", record)
    refreshed(folder)
    stand_in(rounded)
    assert "Still allowed, though certified with other versions" in run_cli("export", "--run", run)[1]


def test_a_bundle_that_a_kill_left_set_aside_is_certified(folder, pictures, stand_in):
    stand_in(rounded)
    folder.rename(folder.with_name(f".{folder.name}.old"))
    _, values, _ = certify(folder, "--certify-on", pictures)
    assert bundle.certified_precisions(values) == {("openvino", "bf16"): {"one", "two"}}


def test_a_killed_certification_goes_on(folder, pictures, stand_in, opened, monkeypatch):
    stand_in(rounded)
    ran = []
    real = runtime.open_runner

    def dies(name, path, preprocess_config, setting):
        runner = real(name, path, preprocess_config, setting)

        def run(pixels):
            ran.append(len(pixels))
            if dies.after is not None and sum(ran) > dies.after:
                raise KeyboardInterrupt
            return runner.run(pixels)

        return Runner(name, preprocess_config, run)

    dies.after = 700  # of 1,024: four columns of 256
    monkeypatch.setattr(runtime, "open_runner", dies)
    before = (folder / "bundle.json").read_bytes()
    assert run_cli("export", "--bundle", folder, "--certify-on", pictures)[0] != 0
    assert (folder / "bundle.json").read_bytes() == before
    dies.after = None
    ran.clear()
    _, values, _ = certify(folder, "--certify-on", pictures)
    assert ran == [64] * (2 * 4)  # two chunks of 64 images by four columns were done, each run as one
    assert bundle.certified_precisions(values) == {("openvino", "bf16"): {"one", "two"}}


def test_a_new_stack_asks_for_a_new_certificate_and_an_old_one_does_not(exported, tmp_path, pictures, stand_in, opened):
    run = shutil.copytree(exported, tmp_path / "run")
    stand_in(rounded)
    code, out, _ = run_cli("export", "--run", run, "--certify-on", pictures)
    assert code == 0
    assert "one: unchanged, taken over" in out
    assert bundle.is_current(run)
    out = run_cli("export", "--run", run)[1]
    assert "Not certified" not in out
    assert "passes" in out
    write_stacker(run, Stacker(("one", "two"), (0.5, 0.5), 0.0))
    code, out, _ = run_cli("export", "--run", run)
    assert "Not certified: openvino bf16. 48 held-out images are fewer than 256" in out
    assert bundle.certified_precisions(bundle.open_bundle(artifacts.bundle_path(run))) == {}


def test_members_trained_elsewhere_are_looked_up(exported, tmp_path, pictures, stand_in):
    run = shutil.copytree(exported, tmp_path / "run")
    ids = [f"{number:03}" for number in range(256)]
    rows = pd.read_parquet(artifacts.dataset_path(run)).query("split == 'heldout'")
    scores = External("clip", pd.Series(0.5, rows["id"]), pd.Series(np.linspace(-3, 3, 256), ids))
    write_external(run, scores)
    write_stacker(run, Stacker(("clip", "one", "two"), (0.2, 0.5, 0.3), 0.0))
    folder = write_bundle(run, ["clip"])
    stand_in(rounded)
    _, values, found = certify(folder, "--certify-on", pictures)
    assert values["precisions"] == {"openvino bf16": {"members": ["one", "two"], "certified": True}}
    assert list(found["openvino bf16"]["members"]) == ["one", "two"]
    brightness = np.array([value // 2 if value < 128 else 255 - value // 4 for value in range(256)]) / 255 - 0.5
    fp32 = np.stack([np.linspace(-3, 3, 256), 4 * brightness, -2 * brightness], axis=1)
    lower = np.column_stack([fp32[:, 0], *rounded("", fp32[:, 1:]).T])
    stacker = bundle.bundle_stacker(folder)
    change = np.abs(stacker.target(lower) - stacker.target(fp32))
    assert found["openvino bf16"]["stack"]["mean"] == pytest.approx(change.mean(), rel=0.05)


def test_a_gpu_gets_a_file_in_half_precision_if_its_member_passes(folder, pictures, stand_in, opened):
    """CUDA's provider stands in as the CPU's, with the file that CUDA would run."""
    stand_in(lambda name, logits: -logits if name == "two" else logits, ("cuda", "fp16"))
    _, values, found = certify(folder, "--certify-on", pictures)
    assert ("two", "cuda fp16") in opened
    assert bundle.certified_precisions(values) == {("cuda", "fp16"): {"one"}}
    assert 0 < found["cuda fp16"]["members"]["one"]["largest"] < 1e-3
    assert "members/one.fp16.onnx" in values["files"]
    assert {path.name for path in (folder / "members").iterdir()} == {"one.fp32.onnx", "one.fp16.onnx", "two.fp32.onnx"}
    entries = values["members"]
    assert bundle.model_file(entries["one"], RuntimeConfig("cuda", "fp16")) == "members/one.fp16.onnx"
    assert bundle.model_file(entries["one"], RuntimeConfig("tensorrt", "fp16")) == "members/one.fp32.onnx"
    _, values, _ = certify(folder, "--uncertified")
    assert bundle.certified_precisions(values) == {("cuda", "fp16"): {"one", "two"}}
    assert "members/two.fp16.onnx" in values["files"]
    stand_in(turned("one", "two"), ("cuda", "fp16"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANYEYES_CACHE", str(folder.parent / "another cache"))
        _, values, _ = certify(folder, "--certify-on", pictures)
    assert bundle.certified_precisions(values) == {}
    assert [name for name in values["files"] if "fp16" in name] == []
    assert {path.name for path in (folder / "members").iterdir()} == {"one.fp32.onnx", "two.fp32.onnx"}


def test_a_member_converted_anew_to_the_same_file_loses_its_certificate_in_half_precision(folder, pictures, stand_in):
    stand_in(rounded, ("cuda", "fp16"))
    certify(folder, "--certify-on", pictures)
    values = bundle.open_bundle(folder)
    older = artifacts.read_json(folder / "certificate.json", "")["precisions"]
    entries = {name: {key: entry[key] for key in entry if key != "fp16"} for name, entry in values["members"].items()}
    _, certificates, allowed = allowed_precisions.decide_precisions(
        folder, entries, older, allowed_precisions.DEFAULT_OPTIONS, print
    )
    assert (certificates, allowed) == ({}, {})
    _, _, kept = allowed_precisions.decide_precisions(
        folder, values["members"], older, allowed_precisions.DEFAULT_OPTIONS, print
    )
    assert kept == values["precisions"]


def test_a_held_out_image_that_export_cannot_use_is_named(tmp_path):
    """Two that decode, one of which is too thin for the contract."""
    files = (write_image(tmp_path / "a.png"), tmp_path / "line.png")
    Image.new("RGB", (1, 20_000)).save(files[1])
    samples = check_images.sample_images(
        check_images.LabelledImages("held-out images", True, ("a", "line"), files, np.array([0, 1]))
    )
    thin = replace(PREPROCESS_CONFIG, geometry="center_crop", size=224)
    with pytest.raises(ArtifactError, match=rf"2 held-out images, and one cannot be read: {files[1]}: .* too thin"):
        samples.pixels(thin)
    assert samples.pixels(PREPROCESS_CONFIG).shape == (2, 8, 8, 3)


def test_rows_are_drawn_by_class_and_seed():
    labels = np.repeat([0, 1], [5000, 100])
    ids = tuple(map(str, range(len(labels))))
    given = check_images.LabelledImages("images", True, ids, tuple(map(Path, ids)), labels)
    drawn = check_images.stratified_sample(given, 1024)
    assert (len(drawn.labels), drawn.labels.sum()) == (1024, 100)
    assert list(drawn.ids) == sorted(drawn.ids, key=int)
    assert check_images.stratified_sample(given, 1024).ids == drawn.ids
    assert check_images.stratified_sample(given, 100).labels.sum() == 50
    assert check_images.stratified_sample(given, 9999).ids == ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bundle", "DIR"], "--bundle needs --member to make one, or --certify-on or --uncertified to change one"),
        (["--stack-on", "DIR"], "--stack-on is for --member"),
        (["--bundle", "DIR", "--uncertified", "--force"], "name them with --member, or leave it out"),
        (["--bundle", "DIR", "--uncertified", "--run", "R"], "give either --bundle or --run, not both"),
        (["--bundle", "DIR", "--member", "a=x", "--run", "R"], "give either --bundle or --run, not both"),
        (["--bundle", "none", "--uncertified"], "/none/bundle.json; make it anew with: python cli.py export --force"),
        (["--bundle", "none", "--certify-on", "nowhere.csv"], "no data at nowhere.csv"),
    ],
)
def test_wrong_use_is_one_line(arguments, message):
    code, _, err = run_cli("export", *arguments)
    assert code == 2
    assert message in err
