"""A bundle whose JSON files hold what no export writes, under hashes that fit: each is one line, or means the same."""

import json
import shutil
from contextlib import suppress

import pytest
from helpers import change_json, exported_run, run_cli, write_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ensemble.core import artifacts
from ensemble.core.errors import ManyeyesError
from export.bundle.allowed_precisions import CertifyOptions
from export.bundle.export import certify_bundle
from export.hub import model_card
from export.inference.loading import load_bundle

FILES = ("bundle.json", "stacker.json", "certificate.json")
CHANGE = {"largest": 0.1, "mean": 0.01, "spearman": 1.0, "auroc": 0.0, "flips": None, "failed": []}
FP32 = {"checked_on": "images", "fp32": {"onnxruntime": {"max_abs_difference": 1e-6}}}
MADE = {"made_from": "x", "by": "1", "images": 9, "rows": "held out", "usable": ["one"], "stack": CHANGE}
CERTIFICATE = {
    "members": {"one": FP32, "two": FP32},
    "precisions": {"openvino bf16": {**MADE, "members": {"one": CHANGE, "two": CHANGE}}},
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 10**400, 0.5, 1e400, float("nan"), "", "x", "one", "\ud800", "é"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["one", "a", "file"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def rehashed(folder):
    """bundle.json with the hashes of the other files as they are now."""
    values = json.loads((folder / "bundle.json").read_text())
    values.pop("digest", None)
    if isinstance(values.get("files"), dict):
        for name in FILES[1:]:
            if name in values["files"]:
                values["files"][name] = artifacts.file_sha256(folder / name)
    try:
        values["digest"] = artifacts.json_sha256(values)
    except UnicodeEncodeError:  # half of a character: no digest fits
        values["digest"] = ""
    (folder / "bundle.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    run = exported_run(folder / "run", cascade=True)
    (run / "bundle" / "certificate.json").write_text(json.dumps({"format_version": 1, **CERTIFICATE}))
    score = {"value": 0.9, "low": 0.8, "high": 1.0}
    scores = {name: {"auroc": score, "balanced_accuracy": score, "log_loss": score} for name in ("stack", "one")}
    rows = {"images": 9, "groups": 5, "stack": "out of fold"}
    change_json(run / "bundle" / "stacker.json", scores=scores, rows=rows)
    values = json.loads((run / "bundle" / "bundle.json").read_text())
    values["precisions"] = {"openvino bf16": {"members": ["one"], "certified": True}}
    (run / "bundle" / "bundle.json").write_text(json.dumps(values))
    rehashed(run / "bundle")
    return run / "bundle"


def places(values, path=()):
    """Every place in a JSON value, as keys and indices from its top."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


def put(values, place, value):
    for key in place[:-1]:
        values = values[key]
    values[place[-1]] = value


def used(folder):
    """All that reads a bundle's JSON files, as `infer`, `export --bundle` and `push` do."""
    ensemble = load_bundle(folder)
    model_card.render_card("me/a", folder, None, (), None)
    certify_bundle(folder, lambda line: None, CertifyOptions())
    return [runner.name for runner in ensemble.runners]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_other_value_in_a_bundle_is_told_in_one_line_or_does_no_harm(data, sound, tmp_path):
    folder = tmp_path / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    path = folder / data.draw(st.sampled_from(FILES))
    values = json.loads(path.read_text())
    place = data.draw(st.sampled_from([place for place in places(values) if place != ("digest",)]))
    put(values, place, data.draw(VALUES))
    path.write_text(json.dumps(values))
    rehashed(folder)
    with suppress(ManyeyesError):  # which is what a user sees in one line; all else is a traceback
        used(folder)


def test_the_bundle_itself_is_sound(sound, tmp_path):
    assert used(shutil.copytree(sound, tmp_path / "bundle")) == ["one", "two"]


DAMAGES = {
    "files-list": ("bundle.json", {"files": ["a"]}, "lacks what one has, or holds what none has (files)"),
    "members": ("bundle.json", {"members": {}}, "lacks members of its own stacker (one, two)"),
    "entry": ("bundle.json", {"members": {"one": "x"}}, "holds what none has (members: one)"),
    "precisions": ("bundle.json", {"precisions": {"x": {}}}, "holds what none has (precisions)"),
    "twice": ("stacker.json", {"members": ["one", "one"]}, "a member twice"),
    "letters": ("stacker.json", {"members": "ab"}, "names of members"),
    "outside": ("stacker.json", {"members": ["../x", "two"]}, "names of members"),
    "flips": ("stacker.json", {"flips": [["one"]]}, "names of members"),
    "huge": ("stacker.json", {"coef": [1, 10**400]}, "stacker.json is damaged"),
}


@pytest.mark.parametrize(("name", "changes", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_cannot_be_is_told_in_one_line(name, changes, message, sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "bundle")
    change_json(folder / name, **changes)
    rehashed(folder)
    write_image(tmp_path / "images" / "1.png")
    code, _, err = run_cli("infer", "--bundle", folder, "--input", tmp_path / "images", "--output", tmp_path / "o.csv")
    assert code == 2
    [line] = err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    "changes", [{"members": {}}, {"members": [1]}, {"precisions": 3}, {"precisions": {"x": {}}}], ids=str
)
def test_certificates_that_cannot_be_are_told_in_one_line(changes, sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "bundle")
    change_json(folder / "certificate.json", **changes)
    rehashed(folder)
    for command in (["export", "--bundle", folder, "--uncertified"],):
        code, _, err = run_cli(*command)
        assert code == 2
        [line] = err.splitlines()
        assert "certificate.json lacks what one has, or holds what none has; make it anew with" in line


def test_numbers_that_json_does_not_have_are_damage(tmp_path):
    path = tmp_path / "x.json"
    for text in (
        '{"format_version": 1, "a": NaN}',
        '{"format_version": 1, "a": 1e999}',
        '{"a": "\\ud800"}',
        "[" * 10**5,
    ):
        path.write_text(text)
        with pytest.raises(ManyeyesError, match="is damaged"):
            artifacts.read_json(path, "remove it")
