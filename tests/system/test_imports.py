import json
import shutil
from fnmatch import fnmatch

import pandas as pd
import pytest
from helpers import ROOT, exported_run, read_csv, run_python, write_image

import cli
from ensemble.core.metrics import sigmoid

PROBE = """
import importlib, json, sys

heavy = set(sys.argv[1].split(","))
found = {}
for name in sys.argv[2:]:
    importlib.import_module(name)
    found[name] = sorted(heavy & set(sys.modules))
print(json.dumps(found))
"""
HELP = """
import sys
import cli

for command in sys.argv[1:]:
    sys.argv[1:] = command.split()
    try:
        cli.main()
    except SystemExit as stop:
        assert stop.code == 0, command
print(sorted({"numpy", "pandas", "torch"} & set(sys.modules)))
"""
WITHOUT_TORCH = """
import sys

for name in ("torch", "torchvision", "transformers", "timm", "sklearn", "onnx", "accelerate", "safetensors",
             "pydantic", "yaml", "jinja2", "datasets", "kagglehub", "faiss",
             "peft", "rich", "tensorboard", "matplotlib", "psutil", "captum", "nncf", "ray"):
    sys.modules[name] = None
"""
COMMAND = f"{WITHOUT_TORCH}import cli; cli.main()"
NOTEBOOK = f"""{WITHOUT_TORCH}
import pandas as pd
from export import Predictor

predictor = Predictor.load(sys.argv[1], device="cpu")
frame = predictor.predict(pd.DataFrame({{"id": ["b", "a", "c"]}}), images=sys.argv[2])
print(predictor.device, len(predictor.errors))
print(frame.to_csv(index=False))
"""

# No module loads these as it is imported, but for those named: patterns of modules.
HEAVY = "torch,sklearn,transformers,onnx,onnxruntime,openvino,nncf,ray"
MAY_BE_HEAVY = (
    "ensemble.audit.*", "ensemble.cluster.train_driver", "ensemble.cluster.train_process", "ensemble.fetch.demo_data",
    "ensemble.evaluation.heatmaps", "ensemble.models.backbone", "ensemble.models.features", "ensemble.models.lora",
    "ensemble.models.network_edits", "ensemble.models.processor", "ensemble.models.spectrum",
    "ensemble.models.torch_runner", "ensemble.selection.*", "ensemble.training.*", "export.bundle.convert",
)  # fmt: skip
# The command line starts without these.
SLOW = "numpy,torch,pandas"
QUICK = (
    "cli", "export", "ensemble.commands.*", "ensemble.core.errors", "ensemble.core.names", "ensemble.core.recipe*",
    "ensemble.core.preprocess_config", "ensemble.fetch.catalogue", "export.commands.*", "export.cluster.placement",
    "export.runtimes.settings",
)  # fmt: skip


def loaded(heavy, names, path=()):
    result = run_python("-c", PROBE, heavy, *names, path=path)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def modules(*patterns):
    """The modules of both packages whose names match."""
    files = [
        path.relative_to(ROOT).with_suffix("")
        for half in ("ensemble", "export")
        for path in ROOT.glob(f"{half}/**/*.py")
    ]
    names = ["cli", *(".".join(path.parts).removesuffix(".__init__") for path in files)]
    return sorted(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))


def test_modules_load_nothing_heavy():
    light = sorted(set(modules("*")) - set(modules(*MAY_BE_HEAVY)))
    assert len(light) > 100
    assert loaded(HEAVY, light) == {name: [] for name in light}


def test_the_command_line_starts_quickly():
    quick = modules(*QUICK)
    assert len(quick) > 20
    assert loaded(SLOW, quick) == {name: [] for name in quick}


def test_each_pattern_names_a_module():
    assert [pattern for pattern in (*MAY_BE_HEAVY, *QUICK) if not modules(pattern)] == []


def test_an_eager_import_is_caught_and_a_lazy_one_is_not(tmp_path):
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "lazy.py").write_text("def run():\n    import torch\n")
    (tmp_path / "eager.py").write_text("import torch\n")
    (tmp_path / "through.py").write_text("import eager\n")
    assert loaded("torch,sklearn", ["lazy", "eager"], [tmp_path]) == {"lazy": [], "eager": ["torch"]}
    assert loaded("torch,sklearn", ["through"], [tmp_path]) == {"through": ["torch"]}


def test_help_loads_no_numbers():
    result = run_python("-c", HELP, "--help", *(f"{name} --help" for name in cli.COMMANDS))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = exported_run(tmp_path_factory.mktemp("run"))
    for name, value in (("a", 0), ("b", 255), ("c", 128)):
        write_image(run / "images" / f"{name}.png", value)
    return run


# 0.1 + (0.5 * 4 - 0.25 * 2) * (brightness - 0.5), as written in helpers.py
TARGETS = dict(zip("abc", sigmoid([-0.65, 0.85, 0.1 + 1.5 * (128 / 255 - 0.5)]), strict=True))


def test_images_are_scored_where_torch_is_not_installed(run, tmp_path):
    output = tmp_path / "scores.csv"
    places = ["--run", run, "--input", run / "images", "--output", output]
    result = run_python("-c", COMMAND, "infer", "--onnx", "--device", "cpu", *places)
    assert (result.returncode, result.stderr) == (0, "")
    scores = read_csv(output)
    assert list(scores["id"]) == ["a.png", "b.png", "c.png"]
    assert scores["target"].astype(float).tolist() == pytest.approx([TARGETS[key] for key in "abc"], rel=1e-5)


def test_a_bundle_is_certified_where_torch_is_not_installed(run, tmp_path):
    bundle, table = tmp_path / "bundle", tmp_path / "labels.csv"
    shutil.copytree(run / "bundle", bundle)
    table.write_text("id,label\na,real\nb,ai\n")
    places = ["--bundle", bundle, "--certify-on", table, "--images", run / "images"]
    result = run_python("-c", COMMAND, "export", *places)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(("Nothing more below fp32 was certified", "Not certified"))
    assert result.stdout.endswith(f"-> {bundle}\n")


def test_notebooks_work_where_torch_is_not_installed(run):
    result = run_python("-c", NOTEBOOK, run, run / "images")
    assert (result.returncode, result.stderr) == (0, "")
    device, _, table = result.stdout.partition("\n")
    assert device == "cpu 0"
    scores = pd.DataFrame([line.split(",") for line in table.split()[1:]], columns=["id", "target"])
    assert list(scores["id"]) == ["b", "a", "c"]
    assert scores["target"].astype(float).tolist() == pytest.approx([TARGETS[key] for key in "bac"], rel=1e-5)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("infer --input {0}/images --output {1}/out.csv --run {0}", "or use --onnx"),
        ("export --force --run {0}", "torch members need the training packages"),
        ("explain {0}/images/a.png --run {0}", "torch members need the training packages"),
        (
            "train-all {2}/recipes/quick --run {1}",
            "training needs torch, torchvision, transformers, timm, accelerate, sklearn",
        ),
    ],
)
def test_what_needs_torch_says_how_to_get_it(run, tmp_path, command, message):
    result = run_python("-c", COMMAND, *command.format(run, tmp_path, ROOT).split())
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert "pip install 'manyeyes[train]'" in result.stderr
