"""kaggle-kernel with a pip that makes empty wheels; test_kernel_offline.py has the real one."""

import json
import shutil
import subprocess
import sys
import zipfile

import pandas as pd
import pytest
from filelock import FileLock
from helpers import exported_run, run_cli, write_bundle, write_onnx, write_stacker
from packaging.markers import Marker

from ensemble.core import artifacts
from ensemble.core.errors import UnavailableError
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle
from export.kaggle import wheels
from export.kaggle.wheels import WheelTarget

TARGET = WheelTarget("3.12", "manylinux_2_28_x86_64")
# what each package of a small index needs
INDEX = {
    "onnxruntime": [],
    "onnxruntime-gpu": ["nvidia-cuda; extra == 'cuda'"],
    "nvidia-cuda": [],
    "pillow": [],
    "click": ["colorama; sys_platform == 'win32'", "backport; python_version < '3.12'"],
    "colorama": [],
    "backport": [],
    "only-on-linux": [],
}
OWN = [
    "onnxruntime-gpu>=1.23; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "onnxruntime>=1.23; sys_platform != 'linux' or platform_machine != 'x86_64'",
    "pillow>=13.0",
    "click>=8.2",
    "torch>=2.11; extra == 'train'",
    "onnxruntime-gpu[cuda]>=1.23; extra == 'cuda'",
]


def write_wheel(folder, name, requires):
    lines = ["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", "Requires-Python: >=3.11"]
    lines += [f"Requires-Dist: {text}" for text in requires]
    stem = f"{name.replace('-', '_')}-1.0"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join([*lines, "", ""]))


class Pip:
    """Stands for pip: makes the wheels of INDEX that are asked for, with all their requirements but `forgets`."""

    def __init__(self, forgets=(), fails=None):
        self.forgets, self.fails, self.calls = forgets, fails, []

    def __call__(self, command, verb, *arguments):
        self.calls.append((verb, *arguments))
        if verb == "wheel":
            write_wheel(self.folder(arguments, "--wheel-dir"), "manyeyes", OWN)
            return ""
        if self.fails:
            return self.fails
        folder = self.folder(arguments, "--dest")
        waiting = [text for text in arguments[arguments.index("--dest") + 2 :] if not text.startswith("-")]
        while waiting:
            name = wheels.Requirement(waiting.pop()).name
            write_wheel(folder, name, INDEX[name])
            # as pip does: markers of the Python that runs it
            needed = [wheels.Requirement(text) for text in INDEX[name]]
            waiting += [each.name for each in needed if each.name not in self.forgets]
        return ""

    def folder(self, arguments, option):
        return wheels.Path(arguments[arguments.index(option) + 1])


@pytest.fixture
def pip(monkeypatch):
    return replace_pip(monkeypatch, Pip())


def replace_pip(monkeypatch, pip):
    def run(command, **options):
        error = pip(command, *command[3:])
        return subprocess.CompletedProcess(command, bool(error), "", error)

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return pip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)
    exported_run(tmp_path / "run")
    return tmp_path


def made(*arguments):
    code, out, err = run_cli("kaggle-kernel", "kaggle", "--run", "run", *arguments)
    assert code == 0, err
    return out


def refused(*arguments):
    code, out, err = run_cli("kaggle-kernel", "kaggle", "--run", "run", *arguments)
    assert (code, out) == (2, ""), out
    return err


def read(here, name):
    return json.loads((here / "kaggle" / name).read_text(encoding="utf-8"))


def names(folder):
    return sorted(path.name.partition("-")[0] for path in folder.glob("*.whl"))


def test_everything_kaggle_needs(here, pip):
    said = made("--user", "ann", "--competition", "detect-ai")
    assert sorted(path.name for path in (here / "kaggle").iterdir()) == ["dataset", "kernel"]
    dataset = read(here, "dataset/dataset-metadata.json")
    assert (dataset["id"], dataset["title"], len(dataset["licenses"])) == ("ann/manyeyes", "manyeyes", 1)
    assert read(here, "kernel/kernel-metadata.json") == {
        "id": "ann/manyeyes-submission",
        "title": "manyeyes-submission",
        "code_file": "submission.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": False,
        "enable_internet": False,
        "dataset_sources": ["ann/manyeyes"],
        "competition_sources": ["detect-ai"],
        "kernel_sources": [],
        "model_sources": [],
    }
    bundle.open_bundle(here / "kaggle" / "dataset" / "bundle")  # every file whole
    assert names(here / "kaggle" / "dataset" / "wheels") == ["click", "manyeyes", "onnxruntime", "pillow"]
    assert "kaggle datasets create -p kaggle/dataset --dir-mode zip --keep-tabular" in said
    assert "kaggle kernels push -p kaggle/kernel" in said
    assert "submit detect-ai -f submission.csv -k ann/manyeyes-submission" in said
    assert "MB (bundle 0.0, wheels for Python 3.12 0) and a notebook, CPU, no internet" in said


def test_the_notebook_is_one_and_its_code_compiles(here, pip):
    made("--input", "it's.csv", "--images", 'a "b"\n', "--sample", "deep/é.csv", "--python", "3.13")
    notebook = read(here, "kernel/submission.ipynb")
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = code_of(here)
    for text in code:
        compile(text, "cell", "exec")
    settings = {}
    exec(code[0], settings)  # noqa: S102 (ours)
    assert (settings["INPUT"], settings["IMAGES"], settings["SAMPLE"]) == ("it's.csv", 'a "b"\n', "deep/é.csv")
    assert (settings["PYTHON"], settings["DATASET"], settings["SUBMIT"]) == ("3.13", "manyeyes", [])


def test_without_names_it_says_what_to_fill_in(here, pip):
    said = made()
    assert "put your name in place of INSERT_USER_HERE" in said
    assert "put its slug into competition_sources" in said
    assert read(here, "kernel/kernel-metadata.json")["competition_sources"] == []


def test_the_name_may_come_from_the_environment(here, pip, monkeypatch):
    monkeypatch.setenv("KAGGLE_USERNAME", "bob")
    made()
    assert read(here, "dataset/dataset-metadata.json")["id"] == "bob/manyeyes"


def test_pip_is_asked_for_kaggles_python_not_this_one(here, pip):
    made("--python", "3.11", "--platform", "manylinux_2_17_x86_64")
    verb, *arguments = pip.calls[-1]
    assert verb == "download"
    assert arguments[: arguments.index("--platform")] == [
        "--only-binary=:all:",
        "--python-version",
        "3.11",
        "--implementation",
        "cp",
    ]
    platforms = [arguments[at + 1] for at, text in enumerate(arguments) if text == "--platform"]
    assert platforms[0] == "manylinux_2_17_x86_64"
    assert {"manylinux_2_5_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64"} < set(platforms)
    assert "manylinux_2_18_x86_64" not in platforms
    assert "backport" in names(here / "kaggle" / "dataset" / "wheels")  # of 3.11 alone


def test_a_gpu_has_its_libraries(here, pip):
    assert "GPU" in made("--gpu")
    metadata = read(here, "kernel/kernel-metadata.json")
    assert (metadata["enable_gpu"], metadata["machine_shape"]) == (True, "NvidiaTeslaT4")
    found = names(here / "kaggle" / "dataset" / "wheels")
    assert found == ["click", "manyeyes", "nvidia_cuda", "onnxruntime_gpu", "pillow"]


def test_what_pip_left_out_by_its_own_markers_is_asked_for(here, monkeypatch):
    monkeypatch.setitem(INDEX, "pillow", ["only-on-linux; sys_platform == 'linux'"])
    pip = replace_pip(monkeypatch, Pip(forgets=["only-on-linux"]))
    made()
    assert [verb for verb, *_ in pip.calls] == ["wheel", "download", "download"]
    assert "only_on_linux" in names(here / "kaggle" / "dataset" / "wheels")


def test_made_again_it_is_replaced(here, pip):
    made("--gpu", "--user", "ann")
    (here / "kaggle" / "mine.txt").write_text("kept")
    made("--user", "ann")
    assert "nvidia_cuda" not in names(here / "kaggle" / "dataset" / "wheels")
    assert sorted(path.name for path in (here / "kaggle").iterdir()) == ["dataset", "kernel", "mine.txt"]


RETRY = "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)'\n"
NOTHING = "ERROR: Could not find a version that satisfies the requirement pillow>=13.0\n"
NOTHING += "ERROR: No matching distribution found for pillow>=13.0\n"


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (NOTHING, "no wheel of pillow>=13.0 for Python 3.12 on manylinux_2_28_x86_64; give another --python or"),
        (RETRY + NOTHING, "pip reaches no package index: wheels are collected over the network, once"),
        ("ERROR: the disk\nis full", "pip download failed: ERROR: the disk"),
        ("boom", "pip download failed: boom"),
    ],
    ids=["no wheel", "no network", "another error", "a crash"],
)
def test_what_pip_says_becomes_one_line_and_nothing_is_left(here, monkeypatch, stderr, message):
    replace_pip(monkeypatch, Pip(fails=stderr))
    err = refused()
    assert (message in err, err.count("\n")) == (True, 1), err
    assert list((here / "kaggle").iterdir()) == []


def test_without_pip_it_says_how_to_get_it(here, monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    assert "this Python has no pip to collect wheels with; run: python -m ensurepip" in refused()


REFUSALS = {
    "--user Ann": "--user 'Ann': Kaggle's names in addresses have small letters",
    "--user a/b": "--user 'a/b'",
    "--competition my_competition": "--competition 'my_competition'",
    "--name under_score": "--name 'under_score'",
    "--name double--hyphen": "--name 'double--hyphen'",
    "--name four": "--name four: give 6 to 39 characters",
    f"--name {'a' * 40}": "give 6 to 39 characters",
    "--python 3": "write it as 3.12",
    "--python 3.x": "write it as 3.12",
    "--python 3.10": "--python 3.10: manyeyes needs Python >=3.11",
    "--platform win_amd64": "--platform win_amd64: write manylinux_2_MINOR_x86_64 (or aarch64)",
    "--input /etc/passwd": "--input /etc/passwd: name it from the competition's own folder",
    "--sample ../x.csv": "--sample ../x.csv: name it from the competition's own folder",
    "--bundle run/bundle": "give either --bundle or --run, not both",
}


@pytest.mark.parametrize(("options", "message"), REFUSALS.items())
def test_names_that_kaggle_would_not_take_are_refused(here, pip, options, message):
    assert message in refused(*options.split())
    assert not (here / "kaggle" / "dataset").exists()


@pytest.mark.parametrize("name", ["sixsix", "a" * 39, "detect-ai-2"])
def test_names_that_kaggle_takes_are_taken(here, pip, name):
    made("--name", name)
    kernel = read(here, "kernel/kernel-metadata.json")
    assert len(kernel["title"]) <= 50
    assert kernel["id"].partition("/")[2] == kernel["title"] == f"{name}-submission"


def code_of(here):
    notebook = read(here, "kernel/submission.ipynb")
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_says_what_is_missing(here, pip):
    made("--python", f"{sys.version_info.major}.{sys.version_info.minor}")
    settings, install, _ = code_of(here)
    for changes, message in (
        ({"PYTHON": "3.99"}, "the wheels are for Python 3.99, this is 3.*: make them anew with --python 3."),
        ({"KAGGLE": here}, "no wheels in .*/manyeyes or .*/datasets/./manyeyes: add it as input"),
    ):
        names = {}
        exec(settings, names)  # noqa: S102 (ours)
        with pytest.raises(RuntimeError, match=message):
            exec(install, names | changes)  # noqa: S102 (ours)


@pytest.mark.parametrize(("competition", "found"), [("right-one", "right-one"), (None, "another")])
@pytest.mark.parametrize("above", ["", "competitions"])
def test_the_notebook_reads_the_competition_it_was_made_for(here, pip, monkeypatch, competition, found, above):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    made("--python", version, *(("--competition", competition) if competition else ()))
    places = here / "input" / above
    for name in ("another", "right-one"):
        (places / name).mkdir(parents=True)
        (places / name / "sample_submission.csv").write_text("id,target\n")
    shutil.copytree(here / "kaggle" / "dataset", here / "input" / "manyeyes")
    run, names = notebook_runner(monkeypatch), {}
    for text in code_of(here):
        exec(text.replace("/kaggle/input", str(here / "input")), names)  # noqa: S102 (ours)
    assert f"--input {places / found / 'test.csv'} " in run[1]
    assert f"--sample {places / found / 'sample_submission.csv'} " in run[2]


def notebook_runner(monkeypatch):
    """The commands of a notebook, as text, in place of running them."""
    commands = []

    def run(command, **options):
        commands.append(" ".join(command))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_what_a_killed_one_left_is_removed(here, pip):
    left = here / "kaggle" / ".making-abc" / "dataset" / "wheels"
    left.mkdir(parents=True)
    (left / "large.whl").write_bytes(b"half")
    made()
    assert sorted(path.name for path in (here / "kaggle").iterdir()) == ["dataset", "kernel"]


def test_two_at_once_do_not_mix(here, pip):
    (here / "kaggle" / ".making-abc").mkdir(parents=True)
    with FileLock(here / "kaggle" / ".lock"):
        said = refused()
    assert said == "Error: another kaggle-kernel is making kaggle; wait for it, or choose another DIR\n"
    assert (here / "kaggle" / ".making-abc").is_dir()  # the other's
    made()


def test_a_folder_of_something_else_is_not_replaced(here, pip):
    (here / "kaggle" / "dataset").mkdir(parents=True)
    (here / "kaggle" / "dataset" / "photo.png").write_text("mine")
    assert "kaggle/dataset is there and holds no dataset-metadata.json; choose another DIR" in refused()
    assert (here / "kaggle" / "dataset" / "photo.png").exists()


def test_a_run_without_a_current_bundle_is_refused(here, pip):
    (here / "run" / "bundle" / "bundle.json").unlink()
    assert "export it first: python cli.py export --run run" in refused()


def test_a_damaged_bundle_is_refused(here, pip):
    write_onnx(here / "run" / "bundle" / "members" / "one.fp32.onnx", 9)
    assert "run/bundle/members/one.fp32.onnx" in refused()


def test_an_uncertified_bundle_is_taken_only_when_asked(here, pip):
    folder = here / "run" / "bundle"
    allowed = {"openvino bf16": {"members": ["one"], "certified": False}}
    bundle.write_bundle(folder, bundle.read_contents(folder)["members"], precisions=allowed)
    assert "may run at openvino bf16 without a passing certificate" in refused()
    made("--uncertified")
    source = "".join(read(here, "kernel/submission.ipynb")["cells"][1]["source"])
    assert "SUBMIT = ['--uncertified']" in source


def test_members_that_are_looked_up_are_refused(here, pip):
    series = pd.DataFrame({"id": ["a"], "logit": [1.0]})
    artifacts.write_parquet(artifacts.external_path(here / "run", "clip"), series)
    write_stacker(here / "run", Stacker(("one", "two", "clip"), (0.5, 0.25, 0.1), 0.1))
    write_bundle(here / "run", externals=["clip"])
    code, out, err = run_cli("kaggle-kernel", "kaggle", "--bundle", "run/bundle")
    assert (code, out, err) == (
        2,
        "",
        "Error: clip is looked up by id and has no scores of a hidden test; stack without it and export again\n",
    )


def test_only_what_the_bundle_lists_is_shipped(here, pip):
    (here / "run" / "bundle" / "notes.txt").write_text("private")
    made()
    shipped = [path.name for path in (here / "kaggle" / "dataset" / "bundle").rglob("*")]
    assert "notes.txt" not in shipped
    assert "stacker.json" in shipped


def test_an_installed_package_becomes_a_wheel_that_pip_takes(tmp_path):
    wheel = wheels.pack_installed("click", tmp_path)
    install = ["install", "--quiet", "--no-index", "--no-deps", "--target", tmp_path / "site", wheel]
    done = subprocess.run([sys.executable, "-m", "pip", *install], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    (record,) = (tmp_path / "site").glob("click-*.dist-info/RECORD")
    assert "click/__init__.py,sha256=" in record.read_text()
    assert (tmp_path / "site" / "click" / "core.py").read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None


def test_a_damaged_wheel_would_be_refused(tmp_path):
    wheel = wheels.pack_installed("click", tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:-100])
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", tmp_path / "s", wheel],
        capture_output=True,
    )
    assert done.returncode != 0


@pytest.mark.parametrize(
    "platform", ["manylinux2014_x86_64", "linux_x86_64", "manylinux_2_28_arm64", "manylinux_2_4_x86_64", ""]
)
def test_platforms_are_those_of_linux_with_a_glibc(platform):
    with pytest.raises(UnavailableError, match="write manylinux_2_MINOR_x86_64"):
        WheelTarget("3.12", platform).platforms()


def test_the_oldest_platform_is_glibc_2_5():
    assert WheelTarget("3.12", "manylinux_2_5_x86_64").platforms() == ["manylinux_2_5_x86_64", "manylinux1_x86_64"]


def test_markers_are_those_of_the_target():
    assert Marker("python_version < '3.13' and sys_platform == 'linux'").evaluate(TARGET.environment())
    assert not Marker("platform_machine == 'aarch64'").evaluate(TARGET.environment())
    aarch = WheelTarget("3.12", "manylinux_2_28_aarch64").environment()
    assert Marker("platform_machine == 'aarch64'").evaluate(aarch)


def test_sizes_are_those_on_the_disk(here, pip):
    made()
    total = sum(path.stat().st_size for path in (here / "kaggle" / "dataset" / "bundle").rglob("*") if path.is_file())
    assert total == sum(path.stat().st_size for path in (here / "run" / "bundle").rglob("*") if path.is_file())
    assert artifacts.read_json(here / "kaggle" / "dataset" / "bundle" / "bundle.json", "")["members"]
