"""Members of a run -> its bundle: convert, certify on held-out images, put in place. Converting needs torch."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ensemble import artifacts, dataset, external, images, members
from ensemble.contract import ImageContract
from ensemble.errors import ArtifactError, ImageError
from ensemble.stack_run import read_stacker
from export import bundle, certificate
from export.runtime import onnx_runner, require_torch, torch_runner


def export_run(run: Path, say: Callable[[str], object], force: bool = False) -> dict[str, Any]:
    """Bring the run's bundle up to date; returns each member's certificate.

    A member converted before from the same weights is taken over, unless `force`. A kill
    leaves the older bundle whole, and the next export goes on from what was finished.
    """
    stacker = read_stacker(run)
    work = artifacts.work_path(run, "export")
    if force:
        shutil.rmtree(work, ignore_errors=True)
    elif artifacts.bundle_path(run).is_dir():
        _take_over(artifacts.bundle_path(run), work)
    artifacts.ensure_folder(work / "members")
    elsewhere = [name for name in stacker.members if external.is_external(run, name)]
    trained = [name for name in stacker.members if name not in elsewhere]
    records = {name: _export_member(run, name, work, say) for name in trained}
    shutil.rmtree(work / "externals", ignore_errors=True)
    for name in elsewhere:
        artifacts.ensure_folder(work / "externals")
        shutil.copyfile(artifacts.external_path(run, name), artifacts.external_path(work, name))
    shutil.copyfile(artifacts.stacker_path(run), work / "stacker.json")
    certificates = {name: record["certificate"] for name, record in records.items()}
    artifacts.write_json(work / "certificate.json", {"members": certificates})
    entries = {name: record["entry"] for name, record in records.items()}
    kept = {work / entry["file"] for entry in entries.values()}
    for path in set((work / "members").iterdir()) - kept:
        path.unlink()
    bundle.write_bundle(work, entries, elsewhere)
    artifacts.replace_folder(work, artifacts.bundle_path(run))
    return certificates


def _take_over(folder: Path, work: Path) -> None:
    """Link an older bundle's checked ONNX files into `work`, each with the record that vouches for it."""
    entries = bundle.open_bundle(folder)["members"]
    certificates = artifacts.read_json(folder / "certificate.json", bundle.REMEDY)["members"]
    artifacts.ensure_folder(work / "members")
    for name, entry in entries.items():
        file = work / entry["file"]
        if file.exists():
            continue
        try:
            os.link(folder / entry["file"], file)
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / entry["file"], file)
        _write_record(work, name, entry, certificates[name])


def _record_path(work: Path, name: str) -> Path:
    return work / "members" / f"{name}.json"


def _write_record(work: Path, name: str, entry: dict[str, Any], certified: dict[str, Any]) -> dict[str, Any]:
    record = {"entry": entry, "sha256": artifacts.file_sha256(work / entry["file"]), "certificate": certified}
    artifacts.write_json(_record_path(work, name), record)
    return record


def _export_member(run: Path, name: str, work: Path, say: Callable[[str], object]) -> dict[str, Any]:
    source = bundle.source_sha256(run, name)
    if _record_path(work, name).is_file():
        record = artifacts.read_json(_record_path(work, name), bundle.REMEDY)
        file = work / record["entry"]["file"]
        if record["entry"]["source"] == source and file.is_file() and artifacts.file_sha256(file) == record["sha256"]:
            say(f"{name}: unchanged, taken over")
            return record
        _record_path(work, name).unlink()
    require_torch()
    from export.convert import convert

    member = members.load_member(run, name)
    entry = {
        "file": f"members/{name}.{bundle.PRECISION}.onnx",
        "precision": bundle.PRECISION,
        "contract": member.contract.to_dict(),
        "source": source,
    }
    file = work / str(entry["file"])
    file.unlink(missing_ok=True)  # it may be a link to the older bundle's
    pixels = _heldout_pixels(run, member.contract)
    convert(member, file)
    try:
        exported = onnx_runner(name, file, member.contract, "cpu")
        certified = certificate.certify(torch_runner(name, member, "cpu"), exported, pixels)
    except ArtifactError:
        file.unlink()
        raise
    say(f"{name}: largest difference of a logit {certified['max_abs_difference']:.1e} on {len(pixels)} images")
    return _write_record(work, name, entry, certified)


def _heldout_pixels(run: Path, contract: ImageContract) -> np.ndarray:
    """First views, uint8 [N, S, S, 3], of held-out images of both classes in turn."""
    frame = artifacts.read_parquet(artifacts.dataset_path(run), "run train-all first")
    held = frame[frame["split"] == "heldout"]
    half = certificate.IMAGES // 2
    chosen = held.groupby("label", sort=True).head(half)
    try:
        return np.concatenate([images.to_pixels(images.decode(file), contract)[:1] for file in dataset.files(chosen)])
    except ImageError as error:
        raise ArtifactError(f"export is checked on held-out images, and one cannot be read: {error}") from None
