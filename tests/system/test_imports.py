import ast
import json
import shutil

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

LIGHT = {
    "numpy,torch,pandas": (
        "ensemble.core.errors ensemble.core.recipe ensemble.core.preprocess_config ensemble.commands.train "
        "ensemble.commands.train_all ensemble.commands.training_options ensemble.fetch.catalogue "
        "ensemble.commands.audit ensemble.commands.fetch ensemble.commands.select "
        "ensemble.commands.canonicalise "
        "ensemble.commands.stack ensemble.core.names ensemble.commands.report export.commands.export "
        "export.commands.infer export.commands.adapt export.commands.options export.cluster.placement "
        "export.commands.evaluate export.commands.explain export.commands.bench export.commands.frontier "
        "export.commands.submit export.commands.kaggle_kernel export.commands.push export.commands.pull "
        "export.commands.serve export.runtimes.settings export cli"
    ),
    "ray,torch,transformers": (
        "ensemble.cluster.connect ensemble.cluster.placement ensemble.cluster.train_worker ensemble.cluster.nodes"
    ),
    "torch,sklearn,transformers": (
        "ensemble.images.decode ensemble.core.artifacts ensemble.core.metrics ensemble.stacking.stacker "
        "ensemble.models.runner ensemble.models.members ensemble.stacking.stack ensemble.stacking.scores "
        "ensemble.stacking.logit_table ensemble.stacking.threshold ensemble.models.external ensemble.stacking.fit "
        "ensemble.stacking.calibration ensemble.stacking.diagnostics ensemble.data.dataset ensemble.data.index "
        "ensemble.images.pixel_traces ensemble.images.canonical ensemble.images.degradations "
        "ensemble.images.robustness ensemble.core.bootstrap ensemble.audit.headline ensemble.evaluation.protocol "
        "ensemble.evaluation.report ensemble.stacking.label_shift ensemble.data.files ensemble.data.sources "
        "ensemble.images.preprocess ensemble.stacking.cascade ensemble.stacking.cascade_fit "
        "ensemble.stacking.frontier"
    ),
    "torch,sklearn,transformers,onnx,openvino,onnxruntime,nncf,ray": (
        "export.inference.infer export.inference.loading export.inference.pipeline "
        "export.runtimes.runner export.runtimes.capabilities export.runtimes.devices "
        "export.runtimes.runtime_selection export.bundle.precisions export.bundle.check_images "
        "export.bundle.builder export.bundle.member_logits ensemble.models.classifier export.bundle.export "
        "export.bundle.fp16 export.bundle.int8 export.bundle.precision_search export.inference.plan "
        "export.runtimes.autotune export.inference.benchmark export.runtimes.libraries "
        "export.runtimes.onnx_session export.runtimes.openvino_session export.inference.predictor "
        "export.kaggle.submission export.bundle.bundle ensemble.data.inputs ensemble.data.image_list "
        "ensemble.data.readers ensemble.data.tables "
        "ensemble.data.parquet export.inference.outputs export.inference.journal export.inference.scoring "
        "export.bundle.certificate export.inference.evaluation_model export.inference.ensemble "
        "export.bundle.heldout_rows export.bundle.operating_point export.inference.frontier "
        "export.inference.provenance export.kaggle.kernel export.kaggle.wheels export.bundle.hub_bundles "
        "export.hub.push export.hub.model_card export.web.server export.web.request_guard export.inference.explain "
        "export.cluster.driver export.cluster.worker export.cluster.bundle_transfer export.hub.card_scores "
        "ensemble.data.storage ensemble.data.byte_ranges ensemble.data.shards ensemble.core.hub_download"
    ),
}


def loaded(heavy, names, path=()):
    result = run_python("-c", PROBE, heavy, *names.split(), path=path)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def imported(source):
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or ".")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(("heavy", "names"), LIGHT.items(), ids=[names.split()[0] for names in LIGHT.values()])
def test_light_modules_stay_light(heavy, names):
    assert loaded(heavy, names) == {name: [] for name in names.split()}


def test_an_eager_import_is_caught_and_a_lazy_one_is_not(tmp_path):
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "lazy.py").write_text("def run():\n    import torch\n")
    (tmp_path / "eager.py").write_text("import torch\n")
    (tmp_path / "through.py").write_text("import eager\n")
    assert loaded("torch,sklearn", "lazy eager", [tmp_path]) == {"lazy": [], "eager": ["torch"]}
    assert loaded("torch,sklearn", "through", [tmp_path]) == {"through": ["torch"]}


def test_help_loads_no_numbers():
    result = run_python("-c", HELP, "--help", *(f"{name} --help" for name in cli.COMMANDS))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("folder", "forbidden"), [("ensemble", {"export", "cli"}), ("export", {"cli"})])
def test_packages_import_downwards_only(folder, forbidden):
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert len(sources) > 5
    assert {str(path): imported(path.read_text()) & forbidden for path in sources} == {str(p): set() for p in sources}


@pytest.mark.parametrize(
    "source",
    [
        "import export",
        "import export.inference.infer as infer",
        "from export import Predictor",
        "from export.inference.infer import infer",
        "def run():\n    from export.bundle import bundle",
    ],
)
def test_an_upward_import_is_caught_however_it_is_written(source):
    assert imported(source) == {"export"}
    assert imported(source.replace("export", "ensemble")) == {"ensemble"}


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
