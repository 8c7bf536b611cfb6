import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import cli
from ensemble.core import artifacts
from ensemble.core.metrics import sigmoid
from ensemble.core.names import LABELS
from ensemble.core.preprocess_config import PreprocessConfig
from ensemble.data import dataset
from ensemble.images import decode, preprocess
from ensemble.stacking.logit_table import LabelledLogits
from ensemble.stacking.stack import fingerprint
from ensemble.stacking.stacker import Stacker
from export.bundle import bundle
from export.bundle.heldout_rows import write_rows

ROOT = Path(cli.__file__).resolve().parent
PREPROCESS_CONFIG = PreprocessConfig(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
STACKER = Stacker(members=("one", "two"), coef=(0.5, 0.25), intercept=0.1)
SCALES = {"one": 4.0, "two": -2.0}  # of the bundle's members: logit = scale * (mean brightness - 0.5)


def run_cli(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", ["cli.py", *map(str, arguments)])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), argv, pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, out.getvalue(), err.getvalue()


def run_python(*arguments: object, path: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def write_image(path: Path, brightness: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 12), (brightness,) * 3).save(path, format="PNG")
    return path


def write_csv(file: Path, /, **columns: Sequence[str]) -> Path:
    pd.DataFrame(columns).to_csv(file, index=False, quoting=csv.QUOTE_ALL)
    return file


def read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def make_frame(groups: int = 12, rows: int = 4) -> pd.DataFrame:
    places = [
        (split, group, row)
        for split, count in (("heldout", groups), ("train", 3), ("tune", 2))
        for group in range(count)
        for row in range(rows)
    ]
    ids = [f"{split}/{group:02}-{row}" for split, group, row in places]
    values: dict[str, Any] = dict.fromkeys(dataset.COLUMNS)
    values |= {
        "id": ids,
        "root": "images",
        "path": [f"{key}.png" for key in ids],
        "label": np.array([row % 2 for _, _, row in places], dtype=np.int8),
        "group": [f"{split}{group}" for split, group, _ in places],
        "split": [split for split, _, _ in places],
        "fold": pd.array([None] * len(ids), dtype="Int16"),
        "width": 20,
        "height": 12,
        "format": "PNG",
        "bytes": 100,
        "sha256": [f"{row:064x}" for row in range(len(ids))],
        "phash": [f"{row:016x}" for row in range(len(ids))],
    }
    return pd.DataFrame(values, columns=dataset.COLUMNS)


def heldout(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["split"] == "heldout"].reset_index(drop=True)


def noisy_logits(frame: pd.DataFrame, signal: float, seed: int = 0) -> np.ndarray:
    labels = heldout(frame)["label"].to_numpy()
    return np.random.default_rng(seed).normal(size=len(labels)) + signal * (labels - 0.5)


def write_run(run: Path, logits: Mapping[str, np.ndarray] | None = None) -> pd.DataFrame:
    frame = make_frame()
    artifacts.write_parquet(artifacts.dataset_path(run), frame)
    for name, values in (logits or {"one": noisy_logits(frame, 2, 1), "two": noisy_logits(frame, 1, 2)}).items():
        write_member(run, name, frame, values)
    return frame


def heldout_scores(frame: pd.DataFrame, logits: np.ndarray) -> pd.DataFrame:
    return heldout(frame)[["id", "label", "split", "fold"]].assign(logit=logits.astype(np.float32))


def write_member(run: Path, name: str, frame: pd.DataFrame, logits: np.ndarray) -> None:
    write_scores(run, name, frame, heldout_scores(frame, logits))


def write_scores(run: Path, name: str, frame: pd.DataFrame, scores: pd.DataFrame) -> None:
    folder = artifacts.member_path(run, name)
    artifacts.write_parquet(folder / "heldout.parquet", scores)
    info = {
        "name": name,
        "recipe": {"train": {"epochs": 3}},
        "labels": list(LABELS),
        "contract": PREPROCESS_CONFIG.to_dict(),
        "parameters": 1_500_000,
        "best": {"epoch": 2, "tune_auroc": 0.75},
        "data_sha256": dataset.dataset_sha256(frame),
        "files": {"heldout.parquet": artifacts.file_sha256(folder / "heldout.parquet")},
        "seconds": 30.0,
    }
    artifacts.write_json(folder / "member.json", info)


def write_folded_run(run: Path, signals: Mapping[str, float]) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Members with out-of-fold logits, and what each scored; the fold of a fitted row is its group's number mod 2."""
    frame = make_frame()
    fitted = frame["split"] != "heldout"
    frame["fold"] = (frame["group"].str[-1].astype("Int16") % 2).where(fitted)
    artifacts.write_parquet(artifacts.dataset_path(run), frame)
    scores = {}
    for seed, (name, signal) in enumerate(signals.items()):
        noise = np.random.default_rng(seed).normal(size=len(frame))
        logits = (noise + signal * (frame["label"] - 0.5)).astype(np.float32)
        scores[name] = frame[["id", "label", "split", "fold"]].assign(logit=logits)
        write_scores(run, name, frame, scores[name])
        change_json(artifacts.member_path(run, name) / "member.json", folds=2)
    return frame, scores


def change_json(path: Path, **changes: object) -> None:
    values = artifacts.read_json(path, "")
    path.write_text(json.dumps(values | changes), encoding="utf-8")


def write_stacker(run: Path, stacker: Stacker = STACKER) -> None:
    fitted_on = fingerprint(run, stacker.members)
    artifacts.write_json(artifacts.stacker_path(run), {**stacker.to_dict(), "fitted_on": fitted_on})


def write_onnx(path: Path, scale: float) -> Path:
    from onnx import TensorProto, helper

    constants = {"axes": np.array([1, 2, 3]), "half": np.float32(127.5), "scale": np.float32(scale / 255)}
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "axes"], ["brightness"], keepdims=0),
        helper.make_node("Sub", ["brightness", "half"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["logit"]),
    ]
    return save_graph(path, nodes, constants)


def save_graph(path: Path, nodes: Sequence[Any], constants: Mapping[str, Any]) -> Path:
    """An ONNX file as members are exported: `pixels` uint8 [N, S, S, 3] -> `logit` float32 [N]."""
    from onnx import TensorProto, helper, numpy_helper, save

    graph = helper.make_graph(
        nodes,
        "network",
        [
            helper.make_tensor_value_info(
                "pixels", TensorProto.UINT8, ["batch", PREPROCESS_CONFIG.size, PREPROCESS_CONFIG.size, 3]
            )
        ],
        [helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["batch"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    artifacts.ensure_folder(path.parent)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def write_bundle(run: Path, externals: Sequence[str] = ()) -> Path:
    """The run's bundle, current for its members and stacker, with a tiny graph for each of SCALES."""
    folder = artifacts.bundle_path(run)
    entries = {
        name: {
            "file": f"members/{name}.{bundle.PRECISION}.onnx",
            "precision": bundle.PRECISION,
            "contract": PREPROCESS_CONFIG.to_dict(),
            "source": bundle.source_sha256(run, name),
            "gflop": 0.5,
        }
        for name in SCALES
    }
    for name, entry in entries.items():
        write_onnx(folder / str(entry["file"]), SCALES[name])
    (folder / "stacker.json").write_bytes(artifacts.stacker_path(run).read_bytes())
    artifacts.write_json(folder / "certificate.json", {"members": {name: {"images": 14} for name in SCALES}})
    for name in externals:
        scores = artifacts.external_path(folder, name)
        artifacts.ensure_folder(scores.parent)
        scores.write_bytes(artifacts.external_path(run, name).read_bytes())
    bundle.write_bundle(folder, entries, externals)
    return folder


def exported_run(run: Path, cascade: bool = False) -> Path:
    """With `cascade` the bundle has rows on which `two` matters only where `one` is near 0."""
    write_run(run)
    write_stacker(run)
    if cascade:
        rng, count = np.random.default_rng(0), 600  # as few as still fit alike: a command fits them each time
        one = rng.uniform(-2, 2, count)
        two = -one / 2 + 4 * (np.abs(one) < 0.4) * rng.normal(size=count)
        logits = np.column_stack([one, two])
        labels = (rng.random(count) < sigmoid(8 * STACKER.logit(logits))).astype(int)
        groups = rng.integers(0, 300, count)
        write_rows(artifacts.bundle_path(run), LabelledLogits(STACKER.members, logits, labels, groups))
    write_bundle(run)
    return run


def expected_logits(files: Sequence[Path]) -> np.ndarray:
    means = [
        preprocess.to_pixels(decode.decode(file), PREPROCESS_CONFIG).mean(dtype=np.float64) / 255 - 0.5
        for file in files
    ]
    return np.outer(means, list(SCALES.values()))
