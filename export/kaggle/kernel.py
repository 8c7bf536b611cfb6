"""Files for a Kaggle code competition: a data set of bundle and wheels, and a notebook that scores offline.

Formats: dataset-metadata.json, kernel-metadata.json (the Kaggle API's documentation) and nbformat 4.5.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble.core import artifacts
from ensemble.core.errors import ArtifactError, DataError
from export.bundle import bundle
from export.kaggle import wheels
from export.kaggle.wheels import WheelTarget

USER_PLACEHOLDER = "INSERT_USER_HERE"
SLUG = re.compile(r"[a-z0-9](-?[a-z0-9])*")
DATASET, KERNEL = ("dataset", "dataset-metadata.json"), ("kernel", "kernel-metadata.json")
LOCK, TEMPORARY_PREFIX = ".lock", ".making-"  # in the output folder while it is written
NOTEBOOK = "submission.ipynb"
KERNEL_SUFFIX = "-submission"
GPU_MACHINE = "NvidiaTeslaT4"  # CUDA 13 no longer supports the P100
DESCRIPTION = (
    "An ensemble of image classifiers as ONNX, and the Python packages that score with it without a network. "
    "The licences of the checkpoints that the members were fine-tuned from hold for bundle/, each package's own for "
    "wheels/."
)


@dataclass(frozen=True)
class KernelOptions:
    """Names on Kaggle, and the files to read there.

    name: slug of the data set; the notebook's slug adds KERNEL_SUFFIX. user: USER_PLACEHOLDER where it is not known.
    input, sample: files in the competition's folder. images: a folder there, None where infer finds it by itself.
    """

    name: str
    user: str
    competition: str | None
    gpu: bool
    input: str
    images: str | None
    sample: str
    uncertified: bool = False


def check_names(options: KernelOptions) -> None:
    """DataError for a name that Kaggle does not accept, or a path outside the competition's folder."""
    for option, slug in (("--user", options.user), ("--name", options.name), ("--competition", options.competition)):
        if slug not in (None, USER_PLACEHOLDER) and not SLUG.fullmatch(str(slug)):
            raise DataError(
                f"{option} {slug!r}: Kaggle's names in addresses have small letters, digits and single hyphens, such "
                "as detect-ai-images"
            )
    if not 6 <= len(options.name) <= 50 - len(KERNEL_SUFFIX):
        raise DataError(f"--name {options.name}: give 6 to {50 - len(KERNEL_SUFFIX)} characters")
    for option, path in (("--input", options.input), ("--images", options.images), ("--sample", options.sample)):
        if path is not None and (Path(path).is_absolute() or ".." in Path(path).parts):
            raise DataError(f"{option} {path}: name it from the competition's own folder, such as test.csv")


def make_kernel(folder: Path, source: Path, options: KernelOptions, target: WheelTarget) -> tuple[int, int]:
    """Write dataset/ and kernel/ in `folder` from the bundle at `source`; each is replaced atomically.

    Returns the bytes of the bundle and of the wheels.

    ArtifactError for a damaged bundle, one with members that are looked up by id, one that may run below fp32
    without a certificate (unless `options.uncertified`), or a dataset/ or kernel/ that is not ours.
    """
    check_names(options)
    target.platforms()  # raises for a wrong platform before anything is downloaded
    names = ["bundle.json", *_check_bundle(source, options.uncertified)]
    for name, marker in (DATASET, KERNEL):
        if (folder / name).exists() and not (folder / name / marker).is_file():
            raise ArtifactError(f"{folder / name} is there and holds no {marker}; choose another DIR")
    artifacts.ensure_writable(folder)
    try:
        with _folder_lock(folder), tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY_PREFIX) as temporary:
            dataset, notebook = (Path(temporary) / name for name, _ in (DATASET, KERNEL))
            for path in (dataset / "wheels", notebook):
                path.mkdir(parents=True)
            for name in names:
                (dataset / "bundle" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, dataset / "bundle" / name)
            collected = wheels.collect_wheels(dataset / "wheels", target, options.gpu)
            described = {
                "title": options.name,
                "id": f"{options.user}/{options.name}",
                "licenses": [{"name": "other"}],
                "description": DESCRIPTION,
            }
            _write_json(dataset / DATASET[1], described)
            _write_json(notebook / KERNEL[1], kernel_metadata(options))
            _write_json(notebook / NOTEBOOK, make_notebook(options, target))
            sizes = _bytes((dataset / "bundle").rglob("*")), _bytes(collected)
            for path in (dataset, notebook):
                artifacts.replace_folder(path, folder / path.name)
    except OSError as error:
        raise ArtifactError(f"cannot write in {folder}: {error.strerror or error}; make room or rights there") from None
    return sizes


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone, and remove what killed processes left unfinished in it."""
    held = f"another kaggle-kernel is making {folder}; wait for it, or choose another DIR"
    with artifacts.file_lock(folder / LOCK, held, "choose another DIR"):
        for unfinished in folder.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        try:
            yield
        finally:
            with suppress(OSError):  # Windows cannot delete an open file
                (folder / LOCK).unlink()


def _check_bundle(source: Path, uncertified: bool) -> list[str]:
    """The names of the bundle's files, each checked."""
    manifest = bundle.open_bundle(source)
    if looked_up := [name for name in bundle.bundle_stacker(source).members if name not in manifest["members"]]:
        raise ArtifactError(
            f"{', '.join(looked_up)} is looked up by id and has no scores of a hidden test; stack without it and "
            "export again"
        )
    precisions = manifest.get("precisions", {}).items()
    missing = [setting for setting, precision in precisions if not precision.get("certified", True)]
    if missing and not uncertified:
        raise ArtifactError(
            f"{source} may run at {', '.join(missing)} without a passing certificate; certify it by export "
            "--certify-on DATA, or take it as it is with --uncertified"
        )
    return list(manifest["files"])


def _bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def kernel_metadata(options: KernelOptions) -> dict[str, Any]:
    """kernel-metadata.json: private, without internet. Kaggle requires the title in lower case to be the slug."""
    return {
        "id": f"{options.user}/{options.name}{KERNEL_SUFFIX}",
        "title": f"{options.name}{KERNEL_SUFFIX}",
        "code_file": NOTEBOOK,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": options.gpu,
        **({"machine_shape": GPU_MACHINE} if options.gpu else {}),
        "enable_internet": False,
        "dataset_sources": [f"{options.user}/{options.name}"],
        "competition_sources": [options.competition] if options.competition else [],
        "kernel_sources": [],
        "model_sources": [],
    }


ABOUT = """\
# {title}

Scores the competition's images with the ensemble in the data set `{name}`, without internet, and writes
`submission.csv`. Made by `manyeyes kaggle-kernel`; edit the second cell, or make it anew.
"""
SETTINGS = """\
from pathlib import Path

KAGGLE = Path("/kaggle/input")
DATASET = {name!r}
PYTHON = {python!r}  # that the wheels are for
COMPETITION = {competition!r}  # its folder; * is the first that has SAMPLE
INPUT = {input!r}  # the test images' ids, or their folder; this and the next two in the competition's folder
IMAGES = {images!r}  # their folder, where it is not images/ beside INPUT, or INPUT's own
SAMPLE = {sample!r}
INFER = []  # more options of infer, such as ["--tta"], or ["--fill", "0.5"] for images that cannot be read
SUBMIT = {submit!r}  # more options of submit, such as ["--hard"] where labels are scored
"""
INSTALL = """\
import os
import subprocess
import sys
import tempfile

here = f"{sys.version_info.major}.{sys.version_info.minor}"
if here != PYTHON:
    raise RuntimeError(f"the wheels are for Python {PYTHON}, this is {here}: make them anew with --python {here}")


def find(name, *places):
    found = [folder / name for place in places for folder in sorted(KAGGLE.glob(place)) if (folder / name).exists()]
    if not found:
        raise RuntimeError(f"no {name} in {' or '.join(f'{KAGGLE}/{place}' for place in places)}: add it as input")
    return found[0]


data = find("wheels", DATASET, f"datasets/*/{DATASET}").parent
packages = tempfile.mkdtemp()  # of their own, so that nothing of Kaggle's image is changed or used
wheels = sorted(map(str, (data / "wheels").glob("*.whl")))
install = ["install", "--quiet", "--no-index", "--no-deps", "--target", packages, *wheels]
subprocess.run([sys.executable, "-m", "pip", *install], check=True)
"""
SCORE = """\
competition = find(SAMPLE, COMPETITION, f"competitions/{COMPETITION}").parents[len(Path(SAMPLE).parts) - 1]


def manyeyes(*arguments):
    command = [sys.executable, "-P", "-m", "cli", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": packages}).returncode


images = ["--images", competition / IMAGES] if IMAGES else []
places = ["--bundle", data / "bundle", "--input", competition / INPUT, *images, "--output", "scores.csv"]
code = manyeyes("infer", *places, *INFER)
if code and not (code == 1 and "--fill" in INFER):  # 1: some images could not be read, and have that score
    raise RuntimeError("infer failed: its last line says why")
places = ["--bundle", data / "bundle", "--scores", "scores.csv", "--sample", competition / SAMPLE]
if manyeyes("submit", *places, "--output", "submission.csv", *SUBMIT):
    raise RuntimeError("submit failed: its last line says why")
"""


def make_notebook(options: KernelOptions, target: WheelTarget) -> dict[str, Any]:
    """The notebook's cells: about, settings, installation from the data set, scoring."""
    settings = SETTINGS.format(
        name=options.name,
        python=target.python,
        competition=options.competition or "*",
        input=options.input,
        images=options.images,
        sample=options.sample,
        submit=["--uncertified"] if options.uncertified else [],
    )
    about = ABOUT.format(title=options.name + KERNEL_SUFFIX, name=options.name)
    code: dict[str, Any] = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
    cells: list[dict[str, Any]] = [{"id": "about", "cell_type": "markdown", "metadata": {}, "source": _lines(about)}]
    for name, text in (("settings", settings), ("install", INSTALL), ("score", SCORE)):
        cells.append({"id": name, **code, "source": _lines(text)})
    return {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "version": target.python},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _lines(text: str) -> list[str]:
    return text.rstrip("\n").splitlines(keepends=True)
