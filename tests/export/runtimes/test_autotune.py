import shutil
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from helpers import PREPROCESS_CONFIG, change_json, exported_run

from ensemble.core import artifacts
from ensemble.core.errors import UnavailableError
from ensemble.models.runner import Runner
from export.bundle import bundle
from export.inference import loading, plan
from export.runtimes import autotune, runtime_selection
from export.runtimes.autotune import TimedConfig, TuneRequest
from export.runtimes.capabilities import Machine
from export.runtimes.runtime_selection import choose_configs
from export.runtimes.settings import RuntimeConfig, RuntimeOptions

MACHINE = Machine("a CPU", 2)
SETTINGS = tuple(RuntimeConfig("openvino", batch=batch, streams=streams) for batch in (1, 4, 8) for streams in (1, 2))


CLOCK = Mock(**{"perf_counter.return_value": 0.0})  # seconds that pass only while a member of a Lab runs


class Lab:
    """Members whose seconds an image are given by setting."""

    def __init__(self, seconds, lacking=()):
        self.seconds, self.lacking = seconds, lacking
        self.opened, self.ran = [], []
        CLOCK.perf_counter.return_value = 0.0

    def open(self, job, setting):
        if setting in self.lacking:
            raise UnavailableError(f"no {setting}")
        self.opened.append(setting)

        def run(pixels):
            self.ran.append(setting)
            assert pixels.shape == (setting.batch * setting.streams, 8, 8, 3)
            seconds = self.seconds[setting]
            CLOCK.perf_counter.return_value += len(pixels) * (seconds() if callable(seconds) else seconds)
            return np.zeros(len(pixels), np.float32)

        return Runner(job.name, PREPROCESS_CONFIG, run)


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MANYEYES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "time", CLOCK)


def job(name="one", sha256="a", settings=SETTINGS):
    return TuneRequest(name, sha256, settings)


def recalled(asked):
    return {name: timed.config for name, timed in autotune.cached_configs([asked], MACHINE).items()}


def lab(fastest, **options):
    return Lab({setting: 0.1 if setting == fastest else 0.2 for setting in SETTINGS}, **options)


@pytest.mark.parametrize("fastest", SETTINGS, ids=lambda s: f"{s.batch}-{s.streams}")
def test_the_fastest_setting_is_found_and_remembered(fastest):
    made = lab(fastest)
    assert autotune.tune([job()], MACHINE, made.open) == {"one": TimedConfig(fastest, pytest.approx(0.1))}
    assert recalled(job()) == {"one": fastest}


def test_losers_are_timed_once_and_finalists_take_turns():
    made = Lab({setting: 1.0 + number for number, setting in enumerate(SETTINGS)})
    found = autotune.measure(job(), made.open)
    assert found == {setting: pytest.approx(1.0 + number) for number, setting in enumerate(SETTINGS[:3])}
    assert made.opened == list(SETTINGS)
    # once to set up and once timed each, then five rounds of the three fastest
    assert made.ran == [setting for setting in SETTINGS for _ in range(2)] + list(SETTINGS[:3]) * 5


def test_one_slow_moment_does_not_decide():
    moments = iter([1.0, 1.0, 1.0, 9.0, 9.0, 1.0, 1.0])
    seconds = dict.fromkeys(SETTINGS[:2], 2.0) | {SETTINGS[0]: lambda: next(moments)}
    made = Lab(seconds)
    assert autotune.tune([job(settings=SETTINGS[:2])], MACHINE, made.open)["one"].config == SETTINGS[0]


def test_short_runs_are_repeated_until_they_can_be_timed():
    made = Lab(dict.fromkeys(SETTINGS[:1], 0.01))
    assert autotune.measure(job(settings=SETTINGS[:1]), made.open) == {SETTINGS[0]: pytest.approx(0.01)}
    assert len(made.ran) == 1 + 30 * 6


def test_what_cannot_be_opened_is_left_out_and_nothing_at_all_is_an_error():
    made = lab(SETTINGS[0], lacking=SETTINGS[:1])
    assert autotune.tune([job()], MACHINE, made.open)["one"].config != SETTINGS[0]
    with pytest.raises(UnavailableError, match="no openvino fp32"):
        autotune.measure(job(), lab(SETTINGS[0], lacking=SETTINGS).open)


@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_what_fails_as_it_runs_is_left_out(calls):
    left = iter(range(calls))

    def fails():
        if next(left, None) is None:
            raise UnavailableError("out of memory")
        return 0.1

    seconds = {SETTINGS[0]: fails, SETTINGS[1]: 0.5, SETTINGS[2]: 0.7}
    made = Lab(seconds)
    found = autotune.measure(job(settings=SETTINGS[:3]), made.open)
    assert found == {SETTINGS[1]: pytest.approx(0.5), SETTINGS[2]: pytest.approx(0.7)}
    with pytest.raises(UnavailableError, match="out of memory"):
        autotune.measure(job(settings=SETTINGS[:1]), made.open)


@pytest.mark.parametrize(
    ("asked", "machine"),
    [
        (job(sha256="b"), MACHINE),
        (job(), replace(MACHINE, cpu="another")),
        (job(), replace(MACHINE, cores=4)),
        (job(), replace(MACHINE, gpu="NVIDIA L4")),
        (job(settings=SETTINGS[1:]), MACHINE),
    ],
    ids=["file", "cpu", "cores", "gpu", "choices"],
)
def test_an_answer_holds_for_one_file_on_one_machine(asked, machine):
    made = lab(SETTINGS[1])
    autotune.tune([job()], MACHINE, made.open)
    assert autotune.cached_configs([asked], machine) == {}
    assert recalled(replace(job(), name="renamed")) == {"renamed": SETTINGS[1]}


def test_another_version_of_a_library_measures_anew(monkeypatch):
    made = lab(SETTINGS[1])
    autotune.tune([job()], MACHINE, made.open)
    monkeypatch.setattr(autotune, "version", lambda runtime: f"{runtime} 99")
    assert autotune.cached_configs([job()], MACHINE) == {}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format_version": 99}'])
def test_a_damaged_memory_costs_a_measurement_and_no_error(text):
    made = lab(SETTINGS[1])
    autotune.tune([job()], MACHINE, made.open)
    (artifacts.cache_path() / "runtimes.json").write_text(text)
    assert autotune.cached_configs([job()], MACHINE) == {}
    autotune.tune([job()], MACHINE, made.open)
    assert recalled(job()) == {"one": SETTINGS[1]}


def test_a_setting_that_was_no_candidate_is_not_believed():
    made = lab(SETTINGS[1])
    autotune.tune([job()], MACHINE, made.open)
    file = artifacts.cache_path() / "runtimes.json"
    key = next(key for key in artifacts.read_json(file, "") if key != "format_version")
    change_json(file, **{key: {"setting": vars(RuntimeConfig("openvino", "bf16")), "seconds": 0.1}})
    assert autotune.cached_configs([job()], MACHINE) == {}


CPU_FP32 = {("onnxruntime", precision): "no" for precision in ("bf16", "fp16", "int8")}
AMX = Machine("Xeon", 16, "", CPU_FP32)
BOTH = Machine("Xeon", 16, "NVIDIA H100", CPU_FP32)


def candidates(name, machine, *certified, **wanted):
    allowed = dict.fromkeys(certified, frozenset({"one", "two"}))
    settings, _ = choose_configs({"one": {}, "two": {}, "other": {}}, allowed, RuntimeOptions(**wanted), machine)
    return runtime_selection.tuning_candidates(settings[name], RuntimeOptions(**wanted), machine)


def kinds(name, machine, *certified, **wanted):
    return {(each.runtime, each.precision) for each in candidates(name, machine, *certified, **wanted)}


def test_only_what_may_run_is_measured():
    bf16 = ("openvino", "bf16")
    assert kinds("one", AMX, bf16) == {("openvino", "fp32"), bf16, ("onnxruntime", "fp32")}
    assert kinds("other", AMX, bf16) == {("openvino", "fp32"), ("onnxruntime", "fp32")}
    chosen = RuntimeConfig(*bf16)
    assert {
        str(each) for each in runtime_selection.tuning_candidates(chosen, RuntimeOptions(precision="bf16"), AMX)
    } == {"openvino bf16"}
    assert kinds("one", AMX, bf16, runtime="onnxruntime") == {("onnxruntime", "fp32")}
    assert kinds("one", AMX, bf16, precision="fp32") == {("openvino", "fp32"), ("onnxruntime", "fp32")}
    openvino = [each for each in candidates("other", AMX, batch=5) if each.runtime == "openvino"]
    assert {(each.batch, each.streams, each.threads) for each in openvino} == {(5, 1, 16), (5, 4, 16)}


def test_on_a_gpu_the_cpu_is_not_measured_unless_asked_for():
    assert {each.runtime for each in candidates("one", BOTH)} == {"cuda", "tensorrt"}
    assert {each.runtime for each in candidates("one", BOTH, device="cpu")} == {"openvino", "onnxruntime"}


def test_of_several_certificates_all_members_are_measured_at_the_same_one():
    """One holds for a stack that runs at its own runtime and precision; none was made for a mixture of two."""
    certified = [("tensorrt", "fp16"), ("tensorrt", "bf16"), ("cuda", "fp16")]
    below = {pair for name in ("one", "two") for pair in kinds(name, BOTH, *certified) if pair[1] != "fp32"}
    assert below == {("tensorrt", "fp16")}
    assert kinds("one", BOTH, *certified, runtime="cuda") == {("cuda", "fp32"), ("cuda", "fp16")}


def test_an_answer_that_no_single_certificate_covers_is_not_believed():
    """As a `--tune` of before may have left it: chosen among every pair that its member may run at."""
    older = (RuntimeConfig("tensorrt", "fp16", 64), RuntimeConfig("cuda", "fp16", 64))
    made = Lab({older[0]: 2.0, older[1]: 1.0})
    assert autotune.tune([job(settings=older)], BOTH, made.open)["one"].config == older[1]
    settled = tuple(candidates("one", BOTH, ("tensorrt", "fp16"), ("cuda", "fp16")))
    assert autotune.cached_configs([job(settings=settled)], BOTH) == {}


@pytest.mark.parametrize(("bf16", "int8", "expected"), [(1.0, 0.5, "int8"), (0.5, 1.0, "bf16")])
def test_of_two_certified_precisions_tuning_takes_the_faster_for_all_members(folder, monkeypatch, bf16, int8, expected):
    """With int8, member two is slower than with bf16, and both together are what counts."""
    values = bundle.open_bundle(folder)
    for name, entry in values["members"].items():
        entry |= {"int8": f"members/{name}.int8.onnx", "made": {"int8": {}}}
        shutil.copyfile(folder / entry["file"], folder / entry["int8"])
    may = {"members": ["one", "two"], "certified": True}
    bundle.write_bundle(folder, values["members"], (), {"openvino bf16": may, "openvino int8": may})
    monkeypatch.setattr(plan, "available", lambda: Machine("Xeon", 2))
    seconds = {"bf16": {"one": bf16, "two": 0.1}, "int8": {"one": int8, "two": 0.2}, "fp32": {"one": 9.0, "two": 9.0}}

    def measure(job, *rest):
        return {setting: seconds[setting.precision][job.name] for setting in job.candidates}

    monkeypatch.setattr(autotune, "measure", measure)
    lines = []
    planned = plan.plan_bundle(folder, RuntimeOptions(tune=True), lines.append).members
    assert [member.setting.precision for member in planned] == [expected] * 2
    assert plan.plan_bundle(folder, RuntimeOptions(), lines.append).members == planned
    assert {member.path.name.split(".")[1] for member in planned} == {"int8" if expected == "int8" else "fp32"}


@pytest.fixture
def folder(tmp_path):
    return artifacts.bundle_path(exported_run(tmp_path / "run"))


def test_a_tuned_bundle_is_run_as_tuned_from_then_on(folder, monkeypatch):
    monkeypatch.setattr(autotune, "MIN_TIMING_SECONDS", 0.0)
    before, chosen = [], loading.load_bundle(folder, log=lambda line: None)
    tuned = loading.load_bundle(folder, RuntimeOptions(tune=True), before.append)
    after = []
    again = loading.load_bundle(folder, RuntimeOptions(), after.append)
    assert before == after
    assert before[-1].startswith("as tuned: ")
    assert tuned.identity == again.identity
    pixels = np.full((3, 8, 8, 3), 255, np.uint8)
    for one, other in zip(again.runners, chosen.runners, strict=True):
        np.testing.assert_allclose(one.run(pixels), other.run(pixels), atol=1e-6)
    assert not list(folder.rglob("runtimes.json"))


def test_tuning_that_was_killed_goes_on_and_keeps_what_it_measured(folder, monkeypatch):
    monkeypatch.setattr(autotune, "MIN_TIMING_SECONDS", 0.0)
    tune, measured = autotune.tune, []

    def killed(jobs, *rest):
        tune(jobs[:1], *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(autotune, "tune", killed)
    with pytest.raises(KeyboardInterrupt):
        loading.load_bundle(folder, RuntimeOptions(tune=True))
    monkeypatch.setattr(autotune, "tune", lambda jobs, *rest: measured.extend(jobs) or tune(jobs, *rest))
    identities = {loading.load_bundle(folder, RuntimeOptions(tune=True)).identity for _ in range(2)}
    assert [job.name for job in measured] == ["two"]
    assert len(identities) == 1


def test_settings_decide_the_identity_and_so_does_the_file(folder, tmp_path):
    def identity(where, **wanted):
        return loading.load_bundle(where, RuntimeOptions(**wanted)).identity

    assert identity(folder) == identity(folder)
    other = shutil.copytree(folder, tmp_path / "copy")
    assert identity(other) == identity(folder)
    assert len({identity(folder), identity(folder, batch=3), identity(folder, runtime="onnxruntime")}) == 3
    values = bundle.open_bundle(other)
    values["members"]["one"]["contract"]["filter"] = "box"
    bundle.write_bundle(other, values["members"])
    assert identity(other) != identity(folder)


def test_the_files_of_a_bundle_are_hashed_once(folder, monkeypatch):
    hashed = []
    real = artifacts.file_sha256
    monkeypatch.setattr(artifacts, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    loading.load_folder(folder, folder)
    assert sorted(hashed) == ["certificate.json", "one.fp32.onnx", "stacker.json", "two.fp32.onnx"]


@pytest.mark.parametrize(("certified", "precision"), [(True, "bf16"), (False, "fp32")])
def test_a_certificate_decides_whether_bf16_is_planned(folder, monkeypatch, certified, precision):
    values = bundle.open_bundle(folder)
    names = list(values["members"]) if certified else []
    bundle.write_bundle(folder, values["members"], (), {"openvino bf16": {"members": names, "certified": True}})
    monkeypatch.setattr(plan, "available", lambda: Machine("Xeon", 2))
    lines = []
    planned = plan.plan_bundle(folder, RuntimeOptions(), lines.append).members
    assert {member.setting.precision for member in planned} == {precision}
    hint = "get one: python cli.py export --certify-on DATA"
    assert (hint in lines[0]) is not certified
